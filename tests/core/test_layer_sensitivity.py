from __future__ import annotations

import dataclasses
import io
import json
import logging
import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

import mfac_core
from mfac_core import MemoryBudgetError, Sensitivity, SettingError, sensitivity
from mfac_core.layer_sensitivity import SPARSITIES
from mfac_core.session.layer_sensitivity import check_rows_fit, model_sensitivity, stacked_rows
from tests import reference
from tests.core.strict_backend import StrictBackend, strict_devices

SHAPES = {"first": (6, 4), "second": (3,), "third": (2, 3, 5)}
TOTAL = 57
LEVELS = (0.3, 0.5, 0.9)


def make_weights(dtype=np.float64) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in SHAPES.items()}


def make_gradients(m=9, seed=1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((m, TOTAL))


def by_name(gradients: np.ndarray) -> dict[str, np.ndarray]:
    stops = np.cumsum([math.prod(shape) for shape in SHAPES.values()])
    parts = np.split(gradients, stops[:-1], axis=1)
    return {name: part.reshape(-1, *shape) for part, (name, shape) in zip(parts, SHAPES.items(), strict=True)}


def flat(weights) -> np.ndarray:
    return np.concatenate([np.ravel(array) for array in weights.values()])


class Quadratic:
    """A loss whose increase is known in closed form, and which keeps what it was called with."""

    def __init__(self, weights, dense_loss=2.0):
        rng = np.random.default_rng(3)
        root = rng.standard_normal((TOTAL, TOTAL))
        self.hessian = root @ root.T / TOTAL
        self.minimum = flat(weights)
        self.dense_loss = dense_loss
        self.calls = []

    def __call__(self, weights) -> float:
        self.calls.append({name: np.array(array) for name, array in weights.items()})
        return self.dense_loss + self.increase(flat(weights))

    def increase(self, vector: np.ndarray) -> float:
        change = vector - self.minimum
        return float(change @ self.hessian @ change) / 2


def expected(weights, rows_of, loss, **options):
    """Each layer by the dense oracle, the others dense: measured and predicted increases."""
    options = dict(scope="layer", num_recomputations=1) | options
    measured, predicted = {}, {}
    for name, array in weights.items():
        now, masks = {name: array}, None
        measured[name], predicted[name], total = [], [], 0.0
        for level in LEVELS:
            rows = rows_of(name, now)
            result = reference.prune(now, rows.reshape(len(rows), -1), sparsity=level, masks=masks, **options)
            now, masks = result.weights, result.masks
            total += result.predicted_loss_increase
            measured[name].append(loss.increase(flat({**weights, **now})))
            predicted[name].append(total)
    return measured, predicted


def assert_increases(result: Sensitivity, measured, predicted) -> None:
    assert list(result.measured) == list(result.predicted) == list(measured)
    for name in measured:
        np.testing.assert_allclose(result.measured[name], measured[name], rtol=1e-7, atol=1e-12)
        np.testing.assert_allclose(result.predicted[name], predicted[name], rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("update", ["joint", "independent"])
@pytest.mark.parametrize("block_size, damping", [(None, 1e-3), (10, 1e-3), (10, 1.0), (10, "auto")])
@pytest.mark.parametrize("named", [True, False], ids=["by name", "one array"])
def test_increases_are_those_of_a_quadratic_loss_and_of_the_dense_oracle(named, block_size, damping, update) -> None:
    weights, gradients = make_weights(), make_gradients()
    loss, parts = Quadratic(weights), by_name(gradients)
    options = dict(block_size=block_size, damping=damping, update=update)

    result = sensitivity(weights, loss, parts if named else gradients, sparsities=LEVELS, **options)

    assert_increases(result, *expected(weights, lambda name, now: parts[name], loss, **options))
    assert result.dense_loss == 2.0
    assert result.sparsities == LEVELS
    assert result.num_weights == {"first": 24, "second": 3, "third": 30}


def test_a_function_gives_fresh_rows_for_the_layer_as_it_is() -> None:
    weights = make_weights()
    loss, asked = Quadratic(weights), []

    def rows_of(name, now):
        rng = np.random.default_rng(abs(hash(now[name].tobytes())))
        return rng.standard_normal((9, *SHAPES[name]))

    def gradients(layer):
        asked.append(layer)
        ((name, _),) = layer.items()
        return {name: rows_of(name, {name: np.round(layer[name], 6)})}

    options = dict(block_size=None, damping=1e-3, update="joint")
    result = sensitivity(weights, loss, gradients, sparsities=LEVELS, **options)

    wanted = expected(weights, lambda name, now: rows_of(name, {name: np.round(now[name], 6)}), loss, **options)
    assert_increases(result, *wanted)
    assert [next(iter(layer)) for layer in asked] == [name for name in SHAPES for _ in LEVELS]
    assert [round(24 * level) for level in (0, *LEVELS[:-1])] == [
        int((layer["first"] == 0).sum()) for layer in asked[: len(LEVELS)]
    ]


@pytest.mark.parametrize("num_recomputations", [3, "auto"])
@pytest.mark.parametrize("is_fresh", [True, False])
def test_recomputations_are_those_of_prune(num_recomputations, is_fresh) -> None:
    weights, gradients, seen = make_weights()["first"], make_gradients()[:, :24], []

    def loss(pruned):
        seen.append(pruned)
        return 0.0

    def fresh(now):
        return gradients * (1 + np.ravel(now))

    given = fresh if is_fresh else gradients
    result = sensitivity(weights, loss, given, sparsities=(0.5, 0.9), num_recomputations=num_recomputations)

    half = mfac_core.prune(weights, given, sparsity=0.5, num_recomputations=num_recomputations)
    wanted = mfac_core.prune(half.weights, given, sparsity=0.9, masks=half.masks, num_recomputations=num_recomputations)
    np.testing.assert_array_equal(seen[1], half.weights)
    np.testing.assert_array_equal(seen[2], wanted.weights)
    assert result.predicted["weights"][1] == half.predicted_loss_increase + wanted.predicted_loss_increase


def test_the_damping_is_that_of_prune_by_default() -> None:
    weights, gradients, seen = make_weights()["first"], 1e-3 * make_gradients()[:, :24], []

    def loss(pruned):
        seen.append(pruned)
        return 0.0

    sensitivity(weights, loss, gradients, sparsities=(0.5,))

    wanted = mfac_core.prune(weights, gradients, sparsity=0.5, num_recomputations=1)
    other = mfac_core.prune(weights, gradients, sparsity=0.5, num_recomputations=1, damping=1e-2)
    np.testing.assert_array_equal(seen[1], wanted.weights)
    assert not np.array_equal(seen[1], other.weights)


@pytest.mark.parametrize("mask_type, axes", [("channel", None), ("channel", {"first": (1, 0)}), ((1, 2), None)])
def test_patterns_are_those_of_prune(mask_type, axes) -> None:
    weights, gradients = {"first": make_weights()["first"]}, make_gradients()[:, :24]
    seen = []

    def loss(pruned):
        seen.append(pruned["first"])
        return 0.0

    options = dict(block_size=None, damping=1e-3, update="joint", mask_type=mask_type, axes=axes)
    sensitivity(weights, loss, gradients, sparsities=(0.5,), **options)

    wanted = mfac_core.prune(weights, gradients, sparsity=0.5, scope="layer", num_recomputations=1, **options)
    np.testing.assert_array_equal(seen[1], wanted.weights["first"])


def test_one_array_stays_one_array() -> None:
    array, seen = np.array([0.1, 2.0, -0.2, 3.0]), []
    rows = np.random.default_rng(0).standard_normal((32, 4))

    def loss(pruned):
        seen.append(pruned)
        return float(np.abs(pruned).sum())

    def fresh(pruned):
        assert pruned.shape == (2, 2)
        return rows.reshape(32, 2, 2)

    result = sensitivity(array, loss, rows, sparsities=(0.5,), num_recomputations="auto")
    of_a_function = sensitivity(array.reshape(2, 2), loss, fresh, sparsities=(0.5,), num_recomputations="auto")

    np.testing.assert_array_equal(seen[1], mfac_core.prune(array, rows, sparsity=0.5).weights)
    assert list(result.measured) == ["weights"]
    assert result.measured == of_a_function.measured


def test_only_the_layer_at_hand_is_pruned_and_its_masks_are_nested() -> None:
    weights = make_weights()
    loss = Quadratic(weights)

    sensitivity(weights, loss, make_gradients(), sparsities=LEVELS)

    dense, *calls = loss.calls
    np.testing.assert_array_equal(flat(dense), flat(weights))
    for name in SHAPES:
        own, calls = calls[: len(LEVELS)], calls[len(LEVELS) :]
        for call, level in zip(own, LEVELS, strict=True):
            assert (call[name] == 0).sum() == round(call[name].size * level)
            assert all(call[other].tobytes() == weights[other].tobytes() for other in SHAPES if other != name)
        assert all(((before[name] != 0) | (after[name] == 0)).all() for before, after in pairwise(own))


def test_the_loss_is_not_evaluated_again_where_a_sparsity_prunes_nothing_more() -> None:
    weights = {"second": make_weights()["second"]}  # three weights: 0.5 is round(1.5) = 2 of them, as is 0.6
    calls = []

    def loss(pruned):
        calls.append(pruned)
        return float((pruned["second"] == 0).sum())

    result = sensitivity(weights, loss, make_gradients()[:, :3], sparsities=(0.1, 0.5, 0.6, 0.99))

    assert result.measured["second"] == (0.0, 2.0, 2.0, 3.0)
    assert len(calls) == 3
    assert result.predicted["second"][0] == 0.0
    assert result.predicted["second"][1] == result.predicted["second"][2]


def test_nothing_that_is_given_is_modified() -> None:
    weights, gradients = make_weights(np.float32), by_name(make_gradients())
    before = flat(weights).tobytes(), flat(gradients).tobytes()

    def loss(pruned):
        pruned.clear()  # not even by what the loss does to its mapping
        return 1.0

    def fresh(layer):
        name = next(iter(layer))
        layer.clear()
        return gradients[name]

    sensitivity(weights, loss, gradients)
    sensitivity(weights, loss, fresh)

    assert (flat(weights).tobytes(), flat(gradients).tobytes()) == before


def test_devices_change_nothing_but_where_it_is_computed() -> None:
    weights, gradients = make_weights(), make_gradients()

    result = sensitivity(weights, Quadratic(weights), gradients, sparsities=LEVELS, block_size=5)
    backend = StrictBackend()
    devices = strict_devices(2, backend)
    on_two = sensitivity(weights, Quadratic(weights), gradients, sparsities=LEVELS, block_size=5, devices=devices)

    for name in SHAPES:
        np.testing.assert_allclose(result.measured[name], on_two.measured[name], rtol=1e-7)
    assert {device for device, _ in backend.uploads} == {device.name for device in devices}
    with pytest.raises(mfac_core.DeviceError, match="tpu"):
        sensitivity(weights, Quadratic(weights), gradients, devices="tpu:7")


def test_a_loss_that_is_not_finite_counts_as_infinite_and_is_said(caplog) -> None:
    weights = make_weights()

    def loss(pruned):
        zeros = np.mean(pruned["third"] == 0)
        return np.float32("nan") if zeros > 0.8 else -np.inf if zeros > 0.4 else np.float32(1.0)

    with caplog.at_level(logging.WARNING, "mfac_core"):
        result = sensitivity(weights, loss, make_gradients(), sparsities=LEVELS)

    assert math.isfinite(result.predicted["third"][1])
    assert result.predicted["third"][2] == math.inf
    assert result.measured["third"] == (0.0, math.inf, math.inf)
    assert result.measured["first"] == (0.0, 0.0, 0.0)
    assert [record.getMessage() for record in caplog.records] == [
        "the loss is -inf with third pruned to 0.5: its increase counts as infinite from there"
    ]
    assert result.highest(1e9) == {"first": 0.9, "second": 0.9, "third": 0.3}


def test_a_warning_about_the_rows_is_said_once(caplog) -> None:
    weights = make_weights()
    rows = np.repeat(make_gradients(2), 3, axis=0)

    with caplog.at_level(logging.WARNING, "mfac_core"):
        sensitivity(weights, Quadratic(weights), rows)
        mfac_core.prune(weights, rows, sparsity=0.5)

    repeated = [record for record in caplog.records if "distinct" in record.getMessage()]
    assert len(repeated) == 2  # prune says it for itself again


@pytest.mark.parametrize("is_terminal", [True, False])
@pytest.mark.parametrize("progress", [True, False])
def test_progress_is_shown_on_a_terminal_where_it_is_wanted(progress, is_terminal, monkeypatch, capsys) -> None:
    shown = Console(file=io.StringIO(), width=100, force_terminal=is_terminal, color_system=None)
    monkeypatch.setattr("mfac_core.layer_sensitivity.console", lambda *, stderr: shown)
    weights = make_weights()

    sensitivity(weights, Quadratic(weights), make_gradients(), sparsities=LEVELS, progress=progress)

    written = shown.file.getvalue()
    assert ("10/10" in written and "third" in written) == (progress and is_terminal)
    assert bool(written) == (progress and is_terminal)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("value", [np.float32(3), np.array(3.0), 3])
def test_a_loss_may_be_any_number(value) -> None:
    weights = make_weights()

    assert sensitivity(weights, lambda pruned: value, make_gradients()).dense_loss == 3.0


@pytest.mark.parametrize("value", [None, "3", [3.0], np.ones(2)])
def test_a_loss_that_is_no_number_is_refused(value) -> None:
    with pytest.raises(TypeError, match=f"loss returned a {type(value).__name__}; it must return a number"):
        sensitivity(make_weights(), lambda pruned: value, make_gradients())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_dense_loss_that_is_not_finite_is_refused(value) -> None:
    with pytest.raises(ValueError, match=f"the loss of the dense weights is {value}"):
        sensitivity(make_weights(), lambda pruned: value, make_gradients())


def test_an_exception_in_the_loss_reaches_the_caller() -> None:
    weights = make_weights()
    filters = list(logging.getLogger("mfac_core").filters)

    def loss(pruned):
        if (pruned["second"] == 0).any():
            raise RuntimeError("out of paper")
        return 1.0

    with pytest.raises(RuntimeError, match="out of paper"):
        sensitivity(weights, loss, make_gradients())
    assert logging.getLogger("mfac_core").filters == filters


@pytest.mark.parametrize(
    "sparsities, message",
    [
        ((0.5, 0.5), r"\[0.5, 0.5\] must contain at least one number, each above the previous one"),
        ((0.9, 0.5), "each above the previous one"),
        ((), r"\[\] must contain at least one number"),
        ((0.0, 0.5), "0.0 is out of range; the rule is 0 < sparsity < 1"),
        ((0.5, 1.0), "1.0 is out of range"),
        ((0.5, math.nan), "nan is not a finite number"),
        (("0.5",), "'0.5' is not a finite number"),
        (0.5, "0.5 must be a list of numbers"),
        ("0.5", "'0.5' must be a list of numbers"),
    ],
)
def test_sparsities_that_do_not_rise_between_0_and_1_are_refused(sparsities, message) -> None:
    with pytest.raises(SettingError, match=message):
        sensitivity(make_weights(), lambda pruned: 1.0, make_gradients(), sparsities=sparsities)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        (dict(loss=3.0), TypeError, "loss is a float; pass a function"),
        (dict(update="both"), SettingError, "update"),
        (dict(damping="automatic"), SettingError, "damping"),
        (dict(damping=-1.0), SettingError, "damping"),
        (dict(block_size=0), SettingError, "block_size"),
        (dict(num_recomputations=0), SettingError, "num_recomputations"),
        (dict(mask_type="2:4"), SettingError, "2:4 allows a sparsity of at most 0.5, but the final sparsity is 0.6"),
        (dict(mask_type=(1, 5)), SettingError, "do not divide 'first'"),
        (dict(axes={"fourth": (1, 0)}), ValueError, "axes names fourth"),
        (dict(weights={}), ValueError, "there are no weights"),
        (dict(weights={"a": np.ones((0, 3))}), ValueError, r"weights\['a'\] has no elements; leave it out"),
        (dict(weights={"a": [1.0, 2.0]}), TypeError, "list"),
        (dict(weights={"a": np.ones(TOTAL, int)}), ValueError, r"weights\['a'\] must be float32 or float64"),
        (dict(weights={"a": np.full(TOTAL, np.nan)}), ValueError, "a.*measure finite weights"),
        (dict(weights=np.ones(TOTAL), gradients={"a": np.ones((2, TOTAL))}), ValueError, "weights is one array"),
        (dict(gradients=np.ones((3, 5))), ValueError, "one row of 57 numbers per sample, got shape"),
        (dict(gradients=[1.0]), TypeError, "list"),
        (dict(gradients={"first": np.ones((3, 6, 4))}), ValueError, r"missing: \['second', 'third'\]"),
        (dict(gradients=np.full((3, TOTAL), np.nan)), ValueError, "the gradients of first contain NaN or Inf"),
    ],
)
def test_what_is_wrong_is_said_before_the_loss_is_evaluated(changes, error, message) -> None:
    def loss(pruned):
        raise AssertionError("evaluated")

    given_ = dict(weights=make_weights(), loss=loss, gradients=make_gradients()) | changes
    with pytest.raises(error, match=message):
        sensitivity(given_.pop("weights"), given_.pop("loss"), given_.pop("gradients"), **given_)


INCREASES = st.floats(-1, 10, allow_nan=False) | st.just(math.inf)


@settings(max_examples=200)
@given(rows=st.lists(st.tuples(INCREASES, INCREASES, INCREASES), min_size=1, max_size=5), budget=st.floats(-2, 11))
def test_the_highest_sparsity_within_a_budget_and_its_recipe(rows, budget) -> None:
    measured = {f"layer{number}": row for number, row in enumerate(rows)}
    result = Sensitivity(1.0, (0.5, 0.9, 0.99), measured, measured, dict.fromkeys(measured, 10))

    highest = result.highest(budget)
    for name, sparsity in highest.items():
        for level, increase in zip(result.sparsities, measured[name], strict=True):
            assert level > sparsity or increase <= budget
        following = [level for level in result.sparsities if level > sparsity][:1]
        assert all(measured[name][result.sparsities.index(level)] > budget for level in following)
    assert list(highest) == list(measured)

    grouped = result.final_sparsity(budget)
    assert {name: level for level, names in grouped.items() for name in names} == {
        name: level for name, level in highest.items() if level
    }
    assert list(grouped) == sorted(grouped)


def test_a_budget_that_is_no_number_is_refused() -> None:
    with pytest.raises(SettingError, match="max_increase: nan is not a finite number"):
        Sensitivity(1.0, (0.5,), {"a": (0.0,)}, {"a": (0.0,)}, {"a": 1}).highest(math.nan)


def test_targets_go_into_a_recipe_as_they_are() -> None:
    measured = {"conv.weight": (0.01, 0.02, 0.5), "fc.weight": (0.0, 0.0, 0.01), "head.weight": (0.9, 1.0, 2.0)}
    result = Sensitivity(1.0, (0.5, 0.9, 0.99), measured, measured, dict.fromkeys(measured, 10))

    recipe = mfac_core.load_recipe(
        f"""
        pruning_modifiers:
          - !MFACPruningModifier
            final_sparsity: {result.final_sparsity(0.05)}
            params: []
            end_epoch: 1.0
        """
    )

    (modifier,) = recipe.modifiers
    assert modifier.final_sparsity == {0.9: ("conv.weight",), 0.99: ("fc.weight",)}


@pytest.fixture
def result() -> Sensitivity:
    measured = {"conv[1]": (-0.00031, 0.0123), "fc\x1b": (0.2, math.inf)}
    predicted = {"conv[1]": (0.00001, 0.0), "fc\x1b": (0.004, 1234567.0)}
    return Sensitivity(0.25, (0.5, 0.975), measured, predicted, {"conv[1]": 999, "fc\x1b": 9_683_886})


def test_the_table_shows_every_number_in_plain_text(result) -> None:
    lines = str(result).splitlines()

    assert lines[0] == "Increase of the loss when one layer alone is pruned; dense: 0.25"
    assert lines[-1] == "Predicted is in-sample: by the gradient samples that chose the update."
    cells = [line.split() for line in lines[2:-2]]
    assert cells[0] == ["Layer", "Weights", "50%", "97.5%"]
    assert cells[2:] == [
        ["conv[1]", "999", "-3.1e-4", "0.012"],
        ["predicted", "1e-5", "0"],
        ["fc\\x1b", "9.68M", "0.2", "inf"],
        ["predicted", "0.004", "1.2e+06"],
    ]


@pytest.mark.parametrize("width", [30, 50, 80])
def test_a_narrow_terminal_cuts_nothing_off(width) -> None:
    measured = {"encoder.layer.1.weight": tuple(-0.00012 * 3**power for power in range(8))}
    result = Sensitivity(1.0, SPARSITIES, measured, measured, {"encoder.layer.1.weight": 119_378})
    console = Console(width=max(width, 60), file=io.StringIO(), color_system=None)

    console.print(result.table())

    shown = console.file.getvalue()
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= max(width, 60)
    assert shown.count("-") >= 2 * 8


@pytest.mark.parametrize("num_layers", [1, 3, 70])
def test_the_picture_names_every_layer_with_its_size(num_layers, tmp_path) -> None:
    measured = {f"layer_{number}": (0.0, -0.1, 0.01 * number) for number in range(num_layers)}
    result = Sensitivity(1.0, (0.5, 0.9, 0.99), measured, measured, {name: 1000 + int(name[6:]) for name in measured})

    result.picture(tmp_path / "folder" / "picture.png")
    result.picture(tmp_path / "picture.svg")

    assert (tmp_path / "folder" / "picture.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "picture.svg").read_text(encoding="utf-8")
    for number in range(num_layers):
        assert f"layer_{number}  (1,{number:03})" in text


def test_the_picture_bears_infinite_and_negative_increases_and_any_name(result, tmp_path) -> None:
    nothing = {"$a_{": (0.0,), "b" * 200: (-1.0,)}

    result.picture(tmp_path / "one.svg")
    Sensitivity(1.0, (0.5,), nothing, nothing, dict.fromkeys(nothing, 1)).picture(tmp_path / "other.svg")

    text = (tmp_path / "one.svg").read_text(encoding="utf-8")
    assert "inf" in text
    assert "-3.1e-4" in text
    assert "predicted (in-sample)" in text
    assert "$a_{  (1)" in (tmp_path / "other.svg").read_text(encoding="utf-8")


def test_the_result_is_plain_values(result) -> None:
    written = json.loads(json.dumps(dataclasses.asdict(result)))

    assert written["measured"]["conv[1]"] == [-0.00031, 0.0123]
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.dense_loss = 1.0


def test_rows_are_stacked_as_they_come() -> None:
    buffer = np.zeros(2, np.float32)

    def rows():
        for value in (1.0, 2.0):
            buffer[:] = value  # written over, as a framework may do
            yield {"a": buffer, "b": np.full((1, 2), value)}

    stacked = stacked_rows(rows(), 5)

    np.testing.assert_array_equal(stacked["a"], np.array([[1, 1], [2, 2]], np.float32))
    assert stacked["a"].dtype == np.float32
    assert stacked["b"].shape == (2, 1, 2)
    with pytest.raises(ValueError, match="no gradient sample is finite"):
        stacked_rows([], 5)


def test_rows_that_are_not_finite_are_left_out_and_said(caplog) -> None:
    values = [1.0, math.nan, 3.0, -math.inf]

    stacked = stacked_rows(({"a": np.ones(2), "b": np.array([0.0, value])} for value in values), 4)

    np.testing.assert_array_equal(stacked["b"], [[0.0, 1.0], [0.0, 3.0]])
    assert len(stacked["a"]) == 2
    assert "NaN or Inf are left out of the sensitivity of a, b" in caplog.text
    with pytest.raises(ValueError, match=r"no gradient sample is finite \(2 contain NaN or Inf\)"):
        stacked_rows([{"a": np.full(2, math.nan)}] * 2, 2)


def test_rows_that_do_not_fit_are_refused_with_a_number_that_does(monkeypatch) -> None:
    monkeypatch.setattr("mfac_core.backends.numpy_backend.NumpyBackend.free_bytes", lambda self, device: 30_000_000)
    weights = {"a": np.ones(1000), "b": np.ones(2000)}

    check_rows_fit(weights, 1000, 100, together=False)
    with pytest.raises(MemoryBudgetError, match=r"num_gradients \(.*\) of at most [0-9]+ would fit"):
        check_rows_fit(weights, 4000, 100, together=False)
    with pytest.raises(MemoryBudgetError, match="4000 gradient samples of"):
        check_rows_fit({"a": np.ones(1000), **{f"b{i}": np.ones(900) for i in range(3)}}, 4000, 100, together=True)
    with pytest.raises(SettingError, match="num_gradients"):
        check_rows_fit(weights, 0, 100, together=False)
    with pytest.raises(SettingError, match="the same for all layers"):
        check_rows_fit(weights, {0.0: 64}, 100, together=False)


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("calls", [None, 1, 4])
def test_a_framework_of_arrays_is_measured_like_arrays_and_gets_its_weights_back(fresh, calls) -> None:
    weights, rows = make_weights(), by_name(make_gradients())
    model = {name: array.copy() for name, array in weights.items()}
    left = [calls]

    def gradients(names, count):
        return ({name: rows[name][number] for name in names} for number in range(count))

    def loss(batches):
        left[0] = left[0] and left[0] - 1
        if left[0] == 0:
            raise RuntimeError("out of paper")
        return sum(float((array * array).sum()) for array in model.values()) * len(batches)

    def measured():
        return model_sensitivity(
            {name: array.copy() for name, array in model.items()},
            write=lambda name, array: model[name].__setitem__(..., array),
            gradients=gradients,
            loss=loss,
            batches=lambda count: [None] * count,
            axes={},
            sparsities=LEVELS,
            num_grads=9,
            fresh_grads=fresh,
            num_recomputations=1,
            num_batches=2,
            fisher_block_size=None,
            damp=0.1,
            mask_type="unstructured",
            progress=False,
        )

    if calls is None:
        expected = sensitivity(
            weights,
            lambda pruned: 2 * sum(float((array * array).sum()) for array in pruned.values()),
            rows,
            sparsities=LEVELS,
            block_size=None,
            damping=0.1,
        )
        assert measured() == expected
    else:
        with pytest.raises(RuntimeError, match="out of paper"):
            measured()
    assert all(np.array_equal(model[name], weights[name]) for name in weights)
