"""The same work on every array library gives what NumPy gives, as arrays of that library on their device."""

from __future__ import annotations

import numpy as np
import pytest

import mfac_core
from mfac_core.backends import array_library, check_float, device_of, numpy_dtype, readable_on, resolve_device
from mfac_core.fisher import kernels
from mfac_core.fisher.matrix import GradientMatrix
from mfac_core.fisher.rounding import random_signs
from mfac_core.fisher.triangular import cholesky
from mfac_core.fisher.window import GradientWindow
from mfac_core.masks.layout import WeightLayout, scatter_unpruned, take_unpruned, zeros_of
from mfac_core.masks.patterns import mask_patterns
from mfac_core.masks.selection import MaskRule, least_salient, newly_pruned
from mfac_core.masks.zero_count import count_zeros
from mfac_core.pruners.fingerprint import fingerprint

DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64])
TOLERANCE = {np.float32: 2e-4, np.float64: 1e-9}
SHAPES = {"a": (5, 8), "b": (12,)}
NUM_WEIGHTS = 52

# --- what an array is


@DTYPES
def test_an_array_has_a_library_a_device_and_a_dtype(library, dtype):
    x = library.array(np.zeros(3, dtype))
    assert array_library(x) == library.name
    assert device_of(x) == library.device
    assert numpy_dtype(x) == dtype
    assert numpy_dtype(x == 0) == np.bool_
    check_float("x", x)


@pytest.mark.parametrize("dtype", [np.int64, np.bool_])
def test_an_array_that_is_not_float_is_refused_with_the_method_of_its_library_as_the_cure(library, dtype):
    x = library.array(np.zeros(3, dtype))
    with pytest.raises(ValueError, match="x must be float32 or float64, got .*; convert them first") as caught:
        check_float("x", x)
    assert ("to(torch.float32)" in str(caught.value)) == (library.name == "torch")


def test_a_device_reads_arrays_of_its_own_library_and_of_numpy_as_they_are(library):
    x = library.array(np.arange(3.0))
    given = np.arange(3.0)
    assert readable_on(library.device, x) is x
    assert readable_on(library.device, given) is given
    here = readable_on(resolve_device("cpu"), x)
    assert isinstance(here, np.ndarray)
    np.testing.assert_array_equal(here, np.arange(3.0))
    if library.spelling == "torch:cpu":
        assert np.shares_memory(here, x.numpy())


# --- kernels


@DTYPES
def test_random_signs_are_the_same_on_every_library_and_device(library, dtype):
    signs = random_signs(library.array(np.zeros((2, 3000), dtype)), 16)
    assert device_of(signs) == library.device and numpy_dtype(signs) == dtype
    found = library.numpy(signs)
    np.testing.assert_array_equal(found, random_signs(np.zeros((5, 3000)), 16))
    assert found.shape == (1, 3000, 16) and np.all(np.abs(found) == 1)
    # as good as orthogonal to each other and to the vector of ones
    together = np.concatenate([found[0], np.ones((3000, 1))], axis=1)
    assert np.abs(together.T @ together / 3000 - np.eye(17)).max() < 0.1


def matrices(*shape, dtype=np.float64):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(dtype)


@DTYPES
@pytest.mark.parametrize("shape", [(1, 3, 4), (5, 16, 40), (2, 300, 20)])
def test_products_and_sums_of_batches(library, shape, dtype):
    x = matrices(*shape, dtype=dtype)
    there, transposed = library.array(x), x.swapaxes(1, 2)
    tolerance = dict(rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    gram = library.numpy(kernels.lower_gram(there))
    np.testing.assert_allclose(np.tril(gram), np.tril(x @ transposed), **tolerance)
    product = there[:, 1:, :] @ library.array(transposed)[:, :, :2]
    np.testing.assert_allclose(library.numpy(product), x[:, 1:] @ transposed[:, :, :2], **tolerance)
    sums = library.numpy(kernels.column_sums_of_squares(there))
    np.testing.assert_allclose(sums, np.sum(x * x, axis=1), **tolerance)


@DTYPES
@pytest.mark.parametrize("size", [1, 7, 16, 100, 300])
def test_cholesky_factors_of_batches(library, size, dtype):
    x = matrices(3, size, 2 * size, dtype=np.float64)
    gram = (x @ x.swapaxes(1, 2)).astype(dtype)
    right = matrices(3, size, 5, dtype=dtype)
    factor = cholesky(library.array(gram), shift=1.0)
    exact = np.linalg.cholesky(gram.astype(np.float64) + np.eye(size))
    for found, expected in [
        (factor.solve(library.array(right)), np.linalg.solve(exact, right)),
        (factor.solve_transposed(library.array(right)), np.linalg.solve(exact.swapaxes(1, 2), right)),
        (factor.inverse(), np.linalg.inv(exact)),
    ]:
        scale = np.abs(expected).max()
        np.testing.assert_allclose(library.numpy(found), expected, rtol=0, atol=TOLERANCE[dtype] * scale)


def test_a_matrix_that_is_not_positive_definite_raises_or_gives_nan(library):
    try:
        inverse = cholesky(library.array([[[1.0, 2.0], [2.0, 1.0]]]), shift=0.0).inverse()
    except np.linalg.LinAlgError:
        return
    assert np.isnan(library.numpy(inverse)).any()


@DTYPES
def test_saliencies(library, dtype):
    weights, diagonal = np.array([2.0, 1.0, 0.0], dtype), np.array([0.5, 0.25, 1.0], dtype)
    found = mfac_core.saliency(library.array(weights), library.array(diagonal))
    np.testing.assert_allclose(library.numpy(found), [4.0, 2.0, 0.0])
    assert numpy_dtype(found) == dtype
    mixed = mfac_core.saliency(library.array(weights), diagonal), mfac_core.saliency(weights, library.array(diagonal))
    np.testing.assert_array_equal(library.numpy(mixed[0]), library.numpy(found))
    np.testing.assert_array_equal(mixed[1], library.numpy(found))


@pytest.mark.parametrize("x", [[3.0], [3.0, 1.0, 2.0, 1.0, np.inf, 0.0], np.random.default_rng(0).integers(0, 9, 500)])
def test_the_kth_smallest_number(library, x):
    x = np.asarray(x, np.float32)
    for k in {0, len(x) // 3, len(x) - 1}:
        assert float(kernels.kth_smallest(library.array(x), k)) == np.sort(x)[k]


# --- where the gradient samples are


@pytest.mark.parametrize("block_size", [7, None])
@DTYPES
def test_a_window_keeps_the_most_recent_rows(library, block_size, dtype):
    rows = matrices(7, 20, dtype=dtype)
    here, there = (
        GradientWindow(20, 4, block_size=block_size, device=device, dtype=dtype)
        for device in (resolve_device("cpu"), library.device)
    )
    for row in rows:
        here.push(row)
        there.push(library.array(row[:6]), library.array(row[6:]))
    assert there.count == 4
    np.testing.assert_array_equal(there.to_rows(), here.to_rows())
    chunks = [library.numpy(chunk) for group in there.stored_groups for chunk in there.chunks(group)]
    columns = [chunk.swapaxes(0, 1).reshape(4, -1) for chunk in chunks]
    np.testing.assert_array_equal(np.concatenate(columns, axis=1), here.to_rows())
    kept = np.arange(20) % 3 > 0
    for more in (2, 4, 6):
        np.testing.assert_array_equal(there.rebuilt(kept, more).to_rows(), here.rebuilt(kept, more).to_rows())
    resumed = GradientWindow(20, 4, block_size=block_size, device=library.device, dtype=dtype)
    resumed.load_state_dict(here.state_dict())
    np.testing.assert_array_equal(resumed.to_rows(), here.to_rows())


@pytest.mark.parametrize("block_size", [7, None])
@pytest.mark.parametrize("masked", [False, True])
def test_plain_arrays_are_read_block_by_block(library, block_size, masked):
    rows, mask = matrices(3, 20), (np.arange(20) % 4 > 0) if masked else None
    here = GradientMatrix([rows[:, :9], rows[:, 9:]], mask, block_size=block_size)
    there = GradientMatrix([library.array(rows[:, :9]), library.array(rows[:, 9:])], mask, block_size=block_size)
    assert there.dtype == np.float64
    for group, same in zip(there.stored_groups, here.stored_groups, strict=True):
        for chunk, expected in zip(there.chunks(group), here.chunks(same), strict=True):
            np.testing.assert_array_equal(library.numpy(chunk), expected)


# --- weights and masks


def weights_in(dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in SHAPES.items()}


def test_weights_are_flattened_gathered_and_scattered(library):
    layout, weights, mask = WeightLayout(SHAPES), weights_in(), np.arange(NUM_WEIGHTS) % 3 > 0
    vector = layout.flatten(library.arrays(weights))
    expected = layout.flatten(weights)
    np.testing.assert_array_equal(library.numpy(vector), expected)
    np.testing.assert_array_equal(library.numpy(take_unpruned(vector, mask)), expected[mask])
    gathered = layout.gather(library.arrays(weights), layout.unpruned(mask, library.device))
    np.testing.assert_array_equal(library.numpy(gathered), expected[mask])
    scattered = scatter_unpruned(gathered, mask)
    np.testing.assert_array_equal(library.numpy(scattered), np.where(mask, expected, 0))
    np.testing.assert_array_equal(zeros_of(scattered), ~mask)
    for name, array in layout.unflatten_like(scattered, library.arrays(weights_in(np.float64))).items():
        start, stop = layout.segments[name]
        assert numpy_dtype(array) == np.float64
        np.testing.assert_array_equal(library.numpy(array).ravel(), np.where(mask, expected, 0)[start:stop])
    count = count_zeros(library.arrays(weights), library.arrays(layout.unflatten(mask)))
    assert count.sparsity == 0 and "18 of 18 pruned weights are not zero" in count.difference()


@pytest.mark.parametrize("count", [0, 1, 4, 7, 8])
def test_of_equal_saliencies_the_first_are_chosen(library, count):
    values = np.array([2.0, 1.0, 1.0, 0.0, 1.0, 3.0, 1.0, 1.0], np.float32)
    chosen = library.numpy(least_salient(library.array(values), count))
    expected = np.zeros(8, bool)
    expected[np.argsort(values, kind="stable")[:count]] = True
    np.testing.assert_array_equal(chosen, expected)


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("mask_type", ["unstructured", "2:4", "block4", "channel"])
def test_the_choice_of_the_mask(library, scope, mask_type):
    shapes = {"a": (5, 8), "b": (4, 4)}
    mask = np.arange(56) % 5 > 0 if mask_type == "unstructured" else np.ones(56, bool)
    rule = MaskRule({"a": (0, 40), "b": (40, 56)}, scope, mask_patterns(mask_type, shapes))
    saliencies = np.round(np.random.default_rng(0).random(int(mask.sum())), 1).astype(np.float32)  # with ties
    expected = newly_pruned(saliencies, mask, 0.5, rule)
    assert 0 < expected.sum() < mask.sum()
    np.testing.assert_array_equal(library.numpy(newly_pruned(library.array(saliencies), mask, 0.5, rule)), expected)


def test_a_saliency_that_is_nan_is_refused(library):
    with pytest.raises(ValueError, match="a saliency is NaN"):
        least_salient(library.array([1.0, np.nan]), 1)


def test_weights_have_the_fingerprint_of_their_numbers(library):
    weights = weights_in()["a"]
    assert fingerprint(library.array(weights)) == fingerprint(weights)


# --- the inverse Fisher of arrays


def computed_on(library, where):
    return "cpu" if where == "the host" else library.device


WHERE = pytest.mark.parametrize("where", ["the host", "its device"])


@WHERE
@DTYPES
@pytest.mark.parametrize("m, block_size", [(6, 20), (30, 20), (6, None)])
@pytest.mark.parametrize("damping", [1e-2, "auto"])
def test_the_inverse_fisher_and_its_products(library, where, m, block_size, damping, dtype):
    rows, x = matrices(m, NUM_WEIGHTS, dtype=dtype), matrices(NUM_WEIGHTS, 3, dtype=dtype)
    options = dict(block_size=block_size, damping=damping)
    here = mfac_core.inverse_fisher(rows, **options)
    given, many = library.array(rows), library.array(x)
    there = mfac_core.inverse_fisher(given, **options, devices=computed_on(library, where))
    pairs = [
        (there.diagonal(), here.diagonal()),
        (there.apply(many), here.apply(x)),
        (there @ many, here @ x),
        (there @ many[:, 0], here @ x[:, 0]),
    ]
    # arrays of array_api_strict do not leave an operator to their other operand
    left = there.__rmatmul__ if library.name == "array_api_strict" else lambda x: x @ there
    pairs += [(left(many.T), x.T @ here), (left(many[:, 1]), x[:, 1] @ here)]
    for found, expected in pairs:
        assert numpy_dtype(found) == dtype
        np.testing.assert_allclose(
            library.numpy(found), expected, rtol=0, atol=TOLERANCE[dtype] * np.abs(expected).max()
        )
    np.testing.assert_array_equal(library.numpy(given), rows)
    np.testing.assert_array_equal(library.numpy(many), x)


@WHERE
@pytest.mark.parametrize("m, block_size", [(9, 20), (40, 20), (150, 60), (200, None)])
@pytest.mark.parametrize("rtol", [1e-3, 1e-5])
@pytest.mark.parametrize("kind", ["scales over six decades", "duplicated rows", "large mean"])
def test_the_diagonal_is_as_accurate_as_asked_for(library, where, m, block_size, rtol, kind):
    rows = matrices(m, 240).astype(np.float32)
    if kind == "scales over six decades":
        rows *= np.random.default_rng(1).permutation(np.logspace(-3, 3, 240)).astype(np.float32)
    elif kind == "duplicated rows":
        rows[m // 2 :] = rows[: m - m // 2]
    else:
        rows += 100
    # in float64 on NumPy, which test_inverse_fisher compares with exact arithmetic
    exact = mfac_core.inverse_fisher(rows.astype(np.float64), block_size=block_size, rtol=1e-7).diagonal()
    devices = computed_on(library, where)
    found = mfac_core.inverse_fisher(library.array(rows), block_size=block_size, rtol=rtol, devices=devices).diagonal()
    np.testing.assert_allclose(library.numpy(found), exact, rtol=rtol + 2 * np.finfo(np.float32).eps)


def test_rows_that_are_not_finite_are_named(library):
    rows = matrices(6, NUM_WEIGHTS)
    rows[3, 44] = np.nan
    with pytest.raises(ValueError, match=r"gradients contain NaN or Inf in 1 of their rows: 3;"):
        mfac_core.inverse_fisher(library.array(rows), devices=library.device).diagonal()


# --- pruning arrays


def same_result(library, found, expected, dtype=np.float32):
    assert found.sparsity == expected.sparsity
    for name in expected.weights:
        np.testing.assert_array_equal(library.numpy(found.masks[name]), expected.masks[name])
        assert numpy_dtype(found.weights[name]) == dtype
        weights = library.numpy(found.weights[name])
        np.testing.assert_allclose(weights, expected.weights[name], rtol=0, atol=100 * TOLERANCE[dtype])
        np.testing.assert_array_equal(weights == 0, ~expected.masks[name])
    increase = pytest.approx(expected.predicted_loss_increase, rel=100 * TOLERANCE[dtype])
    assert found.predicted_loss_increase == increase


@WHERE
@pytest.mark.parametrize("update", ["joint", "independent"])
@pytest.mark.parametrize("m, block_size", [(6, 20), (30, 20), (6, None)])
@DTYPES
def test_prune(library, where, update, m, block_size, dtype):
    weights, rows = weights_in(dtype), matrices(m, NUM_WEIGHTS, dtype=dtype)
    options = dict(sparsity=0.5, block_size=block_size, update=update, num_recomputations=1)
    expected = mfac_core.prune(weights, rows, **options)
    given, given_rows = library.arrays(weights), library.array(rows)
    found = mfac_core.prune(given, given_rows, **options, devices=computed_on(library, where))
    same_result(library, found, expected, dtype)
    np.testing.assert_array_equal(library.numpy(given_rows), rows)
    for name in weights:
        np.testing.assert_array_equal(library.numpy(given[name]), weights[name])


@pytest.mark.parametrize("update", ["joint", "independent"])
@pytest.mark.parametrize("host_first", [True, False])
def test_a_device_of_the_library_and_the_host_share_the_work(library, update, host_first):
    if library.device.name == "cpu":
        pytest.skip("the library has no device besides the host")
    weights, rows = weights_in(), matrices(6, NUM_WEIGHTS, dtype=np.float32)
    devices = ("cpu", library.device)[:: 1 if host_first else -1]
    options = dict(sparsity=0.5, block_size=4, update=update, num_recomputations=1)
    expected = mfac_core.prune(weights, rows, **options)
    same_result(library, mfac_core.prune(library.arrays(weights), rows, **options, devices=devices), expected)
    here, there = (mfac_core.inverse_fisher(rows, block_size=4, devices=each) for each in ("cpu", devices))
    assert all(there._fisher._assigned.values())
    np.testing.assert_allclose(there.diagonal(), here.diagonal(), rtol=1e-4)
    np.testing.assert_allclose(there.apply(rows[0]), here.apply(rows[0]), rtol=1e-3, atol=1e-3)


@WHERE
@pytest.mark.parametrize(
    "options",
    [
        dict(mask_type="2:4"),
        dict(mask_type="block4"),
        dict(scope="layer"),
        dict(scope="layer", mask_type="block4"),
        dict(recomputation_spacing="linear", num_recomputations=3),
    ],
    ids=str,
)
def test_prune_with_patterns_masks_and_fresh_gradients(library, where, options):
    weights, seen = weights_in(), []
    masks = {name: np.abs(array) > 0.1 for name, array in weights.items()}
    of_samples = {name: matrices(9, *shape, dtype=np.float32) for name, shape in SHAPES.items()}

    def fresh(place):
        def gradients(now):
            assert set(now) == set(weights)
            seen.append({name: np.array(device_of(array).to_numpy(array)) for name, array in now.items()})
            for array in now.values():
                array[...] = 0  # a function may do with its weights what it likes
            return {name: place(rows * (1 + len(seen))) for name, rows in of_samples.items()}

        return gradients

    options = dict(sparsity=0.5, block_size=20) | options
    unpruned = masks if "mask_type" not in options else None
    expected = mfac_core.prune(weights, fresh(np.asarray), masks=unpruned, **options)
    before, seen[:] = list(seen), []
    given_masks = None if unpruned is None else library.arrays(unpruned)
    given = library.arrays(weights)
    devices = computed_on(library, where)
    found = mfac_core.prune(given, fresh(library.array), masks=given_masks, **options, devices=devices)
    same_result(library, found, expected)
    assert len(seen) == len(before) > 1
    for name in weights:
        np.testing.assert_array_equal(library.numpy(given[name]), weights[name])
        for one, other in zip(seen, before, strict=True):
            np.testing.assert_allclose(one[name], other[name], rtol=0, atol=1e-2)


def test_prune_one_array(library):
    weights, rows = weights_in()["a"], matrices(9, *SHAPES["a"], dtype=np.float32)
    expected = mfac_core.prune(weights, rows, sparsity=0.5, num_recomputations=1)
    found = mfac_core.prune(library.array(weights), library.array(rows), sparsity=0.5, num_recomputations=1)
    np.testing.assert_array_equal(library.numpy(found.masks), expected.masks)
    np.testing.assert_allclose(library.numpy(found.weights), expected.weights, rtol=0, atol=1e-3)


def test_weights_and_gradients_may_be_of_different_libraries(library):
    weights, rows = weights_in(), matrices(9, NUM_WEIGHTS, dtype=np.float32)
    of_samples = {name: matrices(9, *shape, dtype=np.float32) for name, shape in SHAPES.items()}
    options = dict(sparsity=0.5, num_recomputations=1)
    expected = mfac_core.prune(weights, rows, **options)
    for devices in ("cpu", library.device):
        same_result(library, mfac_core.prune(library.arrays(weights), rows, **options, devices=devices), expected)
        found = mfac_core.prune(weights, library.array(rows), **options, devices=devices)
        for name in weights:
            assert isinstance(found.weights[name], np.ndarray)
            np.testing.assert_array_equal(found.masks[name], expected.masks[name])
    expected = mfac_core.prune(weights, of_samples, **options)
    mixed = {"a": weights["a"], "b": library.array(weights["b"])}, {"a": library.array(of_samples["a"])}
    found = mfac_core.prune(mixed[0], {"b": of_samples["b"], **mixed[1]}, **options)
    assert isinstance(found.weights["a"], np.ndarray)
    np.testing.assert_array_equal(found.masks["a"], expected.masks["a"])
    np.testing.assert_array_equal(library.numpy(found.masks["b"]), expected.masks["b"])


def test_what_does_not_fit_is_refused(library):
    weights, rows = library.arrays(weights_in()), library.array(matrices(9, NUM_WEIGHTS))
    with pytest.raises(ValueError, match=r"gradients must have one row of 52 numbers per sample"):
        mfac_core.prune(weights, rows[:, 1:], sparsity=0.5)
    with pytest.raises(ValueError, match="gradients contains no sample"):
        mfac_core.prune(weights, rows[:0, :], sparsity=0.5)
    with pytest.raises(ValueError, match=r"masks\['a'\] must be boolean"):
        mfac_core.prune(weights, rows, sparsity=0.5, masks=weights)
    with pytest.raises(ValueError, match="gradients must be float32 or float64, got .*int64"):
        mfac_core.prune(weights, library.array(np.ones((9, NUM_WEIGHTS), np.int64)), sparsity=0.5)
    weights["b"] = library.array(np.full(12, np.nan))
    with pytest.raises(ValueError, match="weights contain NaN or Inf in b"):
        mfac_core.prune(weights, rows, sparsity=0.5)


def test_the_sensitivity_of_layers(library):
    weights = weights_in()
    rows = matrices(30, NUM_WEIGHTS, dtype=np.float32)

    def loss_by(place):
        def loss(now):
            change = np.concatenate([np.ravel(place(now[name]) - weights[name]) for name in weights])
            return float(np.mean((rows @ change) ** 2) / 2)

        return loss

    expected = mfac_core.sensitivity(weights, loss_by(np.asarray), rows, sparsities=(0.3, 0.6))
    found = mfac_core.sensitivity(
        library.arrays(weights), loss_by(library.numpy), library.array(rows), sparsities=(0.3, 0.6)
    )
    for name in weights:
        np.testing.assert_allclose(found.measured[name], expected.measured[name], rtol=1e-2)
        np.testing.assert_allclose(found.predicted[name], expected.predicted[name], rtol=1e-2)


# --- pruners

RUN = dict(initial_sparsity=0.1, final_sparsity=0.7, start_epoch=1, end_epoch=3)
SETTINGS = [
    mfac_core.MFACSettings(**RUN, num_gradients=5, block_size=20, devices=("auto",)),
    mfac_core.MFACSettings(**RUN, num_gradients=5, update="independent", scope="layer"),
    mfac_core.MFACSettings(**RUN, num_gradients=4, num_recomputations=2, mask_type="block4"),
    mfac_core.MagnitudeSettings(**RUN),
    mfac_core.ACDCSettings(compression_sparsity=0.5, start_epoch=1, end_epoch=3),
    mfac_core.ConstantSettings(start_epoch=1),
]


def train(settings, place, stop, pruner=None, start=0, weights=None, library=None):
    """Return the pruner and the weights after the optimizer steps from ``start`` to ``stop``."""
    weights = {name: place(array) for name, array in weights_in().items()} if weights is None else weights
    pruner = pruner or mfac_core.make_pruner(settings, weights, steps_per_epoch=8, library=library)
    for step in range(start, stop):
        if pruner.needs_gradients(step):
            pruner.observe({name: place(array) for name, array in weights_in(seed=step).items()})
        while pruner.is_due(step + 1):
            weights = pruner.prune(weights, step + 1).weights
    return pruner, weights


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda each: type(each).__name__)
@pytest.mark.parametrize("named_library", [False, True])
def test_a_run_and_its_continuation_end_as_on_numpy(library, settings, named_library):
    name = library.name if named_library else None
    reference, expected = train(settings, np.asarray, 24)
    half, weights = train(settings, library.array, 13, library=name)
    fresh = mfac_core.make_pruner(settings, library.arrays(weights_in()), steps_per_epoch=8, library=name)
    state = half.state_dict()
    fresh.check_state(state)
    fresh.load_state_dict(state)
    pruner, found = train(settings, library.array, 24, fresh, 13, weights)
    assert pruner.is_finished == reference.is_finished
    for name, mask in reference.masks.items():
        np.testing.assert_array_equal(pruner.masks[name], mask)
        np.testing.assert_allclose(library.numpy(found[name]), expected[name], rtol=0, atol=1e-2)


def test_a_gradient_that_is_not_finite_is_refused_and_counted(library):
    weights = library.arrays(weights_in())
    pruner = mfac_core.make_pruner(SETTINGS[0], weights, steps_per_epoch=8)
    gradients = weights_in(seed=1)
    pruner.observe(library.arrays(gradients))
    gradients["b"][3] = np.inf
    pruner.observe(library.arrays(gradients))
    assert (pruner.num_rows, pruner.refused_rows) == (1, 1)


def test_a_gradient_may_be_spread_over_libraries(library):
    gradients = weights_in(seed=1)
    here, there = (mfac_core.make_pruner(SETTINGS[0], weights_in(), steps_per_epoch=8) for _ in range(2))
    here.observe(gradients)
    there.observe({"a": library.array(gradients["a"]), "b": gradients["b"]})
    np.testing.assert_array_equal(there.state_dict()["window"]["rows"], here.state_dict()["window"]["rows"])


def test_a_gradient_is_copied_when_it_is_observed(library):
    weights = library.arrays(weights_in())
    pruner = mfac_core.make_pruner(SETTINGS[0], weights, steps_per_epoch=8)
    gradients = library.arrays(weights_in(seed=1))
    pruner.observe(gradients)
    for array in gradients.values():
        array[...] = 0
    assert np.all(pruner.state_dict()["window"]["rows"] != 0)
