"""What tensors have and other arrays of the core have not; the numbers are in ``test_array_libraries``."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import mfac_core
import mfac_torch  # noqa: F401 - registers tensors as arrays
from mfac_core.backends import check_float, device_of, numpy_dtype, resolve_device
from mfac_core.fisher.blockwise import BlockwiseFisher
from mfac_core.fisher.matrix import GradientMatrix
from mfac_core.masks.selection import least_salient
from mfac_core.session.layer_sensitivity import stacked_rows

DEVICES = pytest.mark.parametrize("devices", ["cpu", "torch:cpu"])
SHAPES = {"a": (5, 8), "b": (12,)}
RUN = dict(initial_sparsity=0.1, final_sparsity=0.7, start_epoch=1, end_epoch=3)


def random(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


def parameters():
    return {name: nn.Parameter(random(*shape)) for name, shape in SHAPES.items()}


def assert_plain(tensor):
    """Assert that a tensor can be used in any computation, and is the end of none."""
    assert type(tensor) is torch.Tensor
    assert not tensor.requires_grad and tensor.grad_fn is None and not tensor.is_inference()


@DEVICES
@pytest.mark.parametrize("update", ["joint", "independent"])
def test_parameters_are_pruned_and_results_have_no_graph(devices, update):
    weights, rows = parameters(), random(9, 52).requires_grad_() * 2
    before = {name: parameter.detach().clone() for name, parameter in weights.items()}
    result = mfac_core.prune(weights, rows, sparsity=0.5, update=update, num_recomputations=1, devices=devices)
    reference = mfac_core.prune(
        {name: parameter.detach().numpy() for name, parameter in weights.items()}, rows.detach().numpy(),
        sparsity=0.5, update=update, num_recomputations=1,
    )  # fmt: skip
    for name in weights:
        assert_plain(result.weights[name])
        assert result.masks[name].dtype == torch.bool
        assert torch.equal(weights[name].detach(), before[name]) and weights[name].requires_grad
        np.testing.assert_array_equal(result.masks[name].numpy(), reference.masks[name])
        np.testing.assert_allclose(result.weights[name].numpy(), reference.weights[name], rtol=0, atol=1e-3)
    assert type(result.sparsity) is float and type(result.predicted_loss_increase) is float


@DEVICES
def test_a_function_computes_gradients_with_autograd(devices):
    layer, inputs = nn.Linear(12, 3), random(8, 12)

    def gradients(weights):
        def loss(weight, x):
            return (nn.functional.linear(x, weight).tanh() ** 2).sum()

        assert torch.is_grad_enabled()
        assert_plain(weights)
        weights.requires_grad_()
        return torch.stack([torch.autograd.grad(loss(weights, x), weights)[0] for x in inputs])

    result = mfac_core.prune(layer.weight, gradients, sparsity=0.75, num_recomputations=3, devices=devices)
    assert_plain(result.weights)
    assert int((result.weights == 0).sum()) == 27
    assert torch.is_grad_enabled()


@DEVICES
def test_the_inverse_fisher_takes_tensors_of_a_graph(devices):
    rows, x = random(6, 20).requires_grad_(), random(20, 2).requires_grad_()
    fisher = mfac_core.inverse_fisher(rows, damping=1e-2, devices=devices)
    for found in (fisher.diagonal(), fisher.apply(x), fisher @ x[:, 0], x.T @ fisher, x[:, 0] @ fisher):
        assert_plain(found)


def test_saliencies_have_no_graph():
    weights = nn.Parameter(torch.tensor([2.0, 1.0]))
    found = mfac_core.saliency(weights, torch.tensor([0.5, 0.25]).requires_grad_())
    assert_plain(found)
    assert found.tolist() == [4.0, 2.0]


@DEVICES
def test_a_run_with_parameters_and_their_gradients(devices):
    settings = mfac_core.MFACSettings(**RUN, num_gradients=4, devices=(devices,))
    weights = parameters()
    pruner = mfac_core.make_pruner(settings, weights, steps_per_epoch=4)
    for step in range(12):
        if pruner.needs_gradients(step):
            loss = sum(
                (parameter * random(*parameter.shape) * (step + 1)).pow(2).sum() for parameter in weights.values()
            )
            gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
            pruner.observe(dict(zip(weights, gradients, strict=True)))
        while pruner.is_due(step + 1):
            result = pruner.prune(weights, step + 1)
            for name, parameter in weights.items():
                assert_plain(result.weights[name])
                with torch.no_grad():
                    parameter.copy_(result.weights[name])
    assert pruner.is_finished
    assert sum(int((parameter == 0).sum()) for parameter in weights.values()) == round(0.7 * 52)


def test_tensors_of_inference_mode_are_taken():
    with torch.inference_mode():
        weights, rows = random(10), random(4, 10)
        inside = mfac_core.prune(weights, rows, sparsity=0.5)
    outside = mfac_core.prune(weights, rows, sparsity=0.5)
    assert torch.equal(inside.masks, outside.masks) and torch.equal(inside.weights, outside.weights)


@DEVICES
def test_products_with_the_inverse_fisher_are_computed_in_inference_mode(devices):
    rows, x = random(9, 20), random(20, 3)
    expected = mfac_core.inverse_fisher(rows, damping=0.1) @ x
    with torch.inference_mode():
        found = mfac_core.inverse_fisher(rows, damping=0.1, devices=devices) @ x
    assert_plain(found)
    torch.testing.assert_close(found, expected)


@DEVICES
def test_views_that_negate_are_read_as_any_tensor(devices):
    def imaginary(x):  # of a conjugate: torch negates the values only when it reads them
        return torch.complex(x, -x).conj().imag

    weights, rows, x = random(10), random(4, 10), random(10, 2)
    assert imaginary(weights).is_neg()
    found = mfac_core.prune(imaginary(weights), imaginary(rows), sparsity=0.5, devices=devices)
    expected = mfac_core.prune(weights, rows, sparsity=0.5, devices=devices)
    assert torch.equal(found.masks, expected.masks) and torch.equal(found.weights, expected.weights)
    fisher = mfac_core.inverse_fisher(imaginary(rows), devices=devices)
    assert torch.equal(fisher @ imaginary(x), mfac_core.inverse_fisher(rows, devices=devices) @ x)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_a_nested_tensor_is_refused():
    with pytest.raises(TypeError, match="weights: the tensor cannot be used as an array: it is nested, .* pad them"):
        mfac_core.prune(torch.nested.nested_tensor([random(3, 4)]), random(5, 12), sparsity=0.5)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
@pytest.mark.parametrize(
    "convert, message",
    [
        (lambda x: x.to_sparse(), "of the layout torch.sparse_coo; make it dense"),
        (lambda x: x.to_sparse_csr(), "of the layout torch.sparse_csr; make it dense"),
        (lambda x: x.to("meta"), "on the meta device, without values"),
    ],
)
def test_a_tensor_that_is_not_dense_is_refused_with_the_reason(convert, message):
    weights, rows = random(3, 4), random(5, 12)
    other = convert(weights)
    with pytest.raises(TypeError, match=f"weights: the tensor cannot be used as an array: it is {message}"):
        mfac_core.prune(other, rows, sparsity=0.5)
    with pytest.raises(TypeError, match=f"gradients: the tensor cannot be used as an array: it is {message}"):
        mfac_core.prune(weights, other, sparsity=0.5)
    with pytest.raises(TypeError, match=message):
        mfac_core.inverse_fisher(other)
    with pytest.raises(TypeError, match=message):
        mfac_core.inverse_fisher(rows.T) @ other
    with pytest.raises(TypeError, match=message):
        mfac_core.saliency(other, weights.abs())
    pruner = mfac_core.make_pruner(mfac_core.MFACSettings(**RUN), {"w": weights}, steps_per_epoch=1)
    with pytest.raises(TypeError, match=message):
        pruner.observe({"w": other})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.complex64])
def test_other_dtypes_are_refused_in_the_words_of_torch(dtype):
    weights, rows = random(10), random(4, 10)
    message = rf"must be float32 or float64, got {dtype}; convert them first, such as with to\(torch.float32\)"
    with pytest.raises(ValueError, match=f"weights {message}"):
        mfac_core.prune(weights.to(dtype), rows, sparsity=0.5)
    with pytest.raises(ValueError, match=f"gradients {message}"):
        mfac_core.prune(weights, rows.to(dtype), sparsity=0.5)
    with pytest.raises(ValueError, match=f"gradients {message}"):
        mfac_core.inverse_fisher(rows.to(dtype))
    pruner = mfac_core.make_pruner(mfac_core.MFACSettings(**RUN), {"w": weights}, steps_per_epoch=1)
    with pytest.raises(ValueError, match=message):
        pruner.observe({"w": weights.to(dtype)})
    with pytest.raises(ValueError, match=rf"masks\['weights'\] must be boolean \(True keeps\), got {dtype}"):
        mfac_core.prune(weights, rows, sparsity=0.5, masks=weights.to(dtype))
    with pytest.raises(ValueError, match=message):
        check_float("x", weights.to(dtype))


def test_tensors_on_the_cpu_are_read_by_numpy_without_a_copy():
    rows = random(4, 30)
    fisher = BlockwiseFisher(GradientMatrix([rows], block_size=10), damping=1e-2, devices="cpu")
    chunks = fisher._readable_chunks(0, resolve_device("cpu"))
    assert all(isinstance(chunk, np.ndarray) and np.shares_memory(chunk, rows.numpy()) for chunk in chunks)


@pytest.mark.parametrize("devices, library", [("cpu", "numpy"), ("torch:cpu", "torch"), (None, "numpy")])
def test_the_cpu_means_numpy_unless_torch_is_named(devices, library, monkeypatch):
    computed = []
    of_blocks = BlockwiseFisher.run

    def run(self, *arguments, **options):
        computed.extend(device.backend.name for device in self._devices.values())
        return of_blocks(self, *arguments, **options)

    monkeypatch.setattr(BlockwiseFisher, "run", run)
    options = {} if devices is None else {"devices": devices}
    mfac_core.prune(random(10), random(4, 10), sparsity=0.5, **options)
    mfac_core.inverse_fisher(random(4, 10), **options).diagonal()
    settings = mfac_core.MFACSettings(**RUN, num_gradients=1, devices=("auto",) if devices is None else (devices,))
    pruner = mfac_core.make_pruner(settings, {"w": random(10)}, steps_per_epoch=1)
    pruner.observe({"w": random(10)})
    pruner.prune({"w": random(10)}, 2)
    assert set(computed) == {library}


def test_the_device_and_the_dtype_of_a_parameter():
    parameter = nn.Parameter(random(3, dtype=torch.float64))
    assert device_of(parameter) == resolve_device("torch:cpu")
    assert numpy_dtype(parameter) == np.float64
    assert numpy_dtype(parameter > 0) == np.bool_


@pytest.mark.parametrize("flip", [False, True])
def test_arrays_of_numpy_with_any_strides_meet_tensors(flip):
    weights, rows = random(10), np.random.default_rng(0).standard_normal((4, 10)).astype(np.float32)
    given = np.ascontiguousarray(rows[:, ::-1])[:, ::-1] if flip else np.asfortranarray(rows)
    given.setflags(write=False)
    expected = mfac_core.prune(weights.numpy(), rows, sparsity=0.5)
    for devices in ("cpu", "torch:cpu"):
        result = mfac_core.prune(weights, given, sparsity=0.5, devices=devices)
        np.testing.assert_array_equal(result.masks.numpy(), expected.masks)


def test_tensors_with_any_strides_are_taken():
    weights, rows = random(8, 5).T, random(40, 9).T
    assert not weights.is_contiguous() and not rows.is_contiguous()
    expected = mfac_core.prune(weights.numpy(), rows.numpy(), sparsity=0.5)
    for devices in ("cpu", "torch:cpu"):
        result = mfac_core.prune(weights, rows, sparsity=0.5, devices=devices)
        np.testing.assert_array_equal(result.masks.numpy(), expected.masks)
        np.testing.assert_allclose(result.weights.numpy(), expected.weights, rtol=0, atol=1e-3)


@pytest.mark.parametrize("count", [1, 40_000, 99_999])
def test_equal_saliencies_are_chosen_as_by_numpy(count):
    saliencies = torch.randint(0, 50, (100_000,), generator=torch.Generator().manual_seed(0)).float()
    chosen = least_salient(saliencies, count)
    np.testing.assert_array_equal(chosen.numpy(), least_salient(saliencies.numpy(), count))


def test_the_sensitivity_of_layers_by_a_loss_with_a_graph():
    weights, rows = parameters(), random(20, 52)
    before = {name: parameter.detach().clone() for name, parameter in weights.items()}

    def loss(now):
        change = torch.cat([(now[name] - before[name]).reshape(-1) for name in before])
        return ((rows @ change) ** 2).mean() + 0 * weights["a"].sum()

    result = mfac_core.sensitivity(weights, loss, rows, sparsities=(0.3, 0.6))
    assert result.dense_loss == 0 and 0 < result.measured["a"][0] < result.measured["a"][1]


def test_rows_of_tensors_are_stacked():
    rows = [{"a": random(2, 3) * factor} for factor in (1, float("nan"), 2)]
    stacked = stacked_rows(rows, 3)
    assert type(stacked["a"]) is torch.Tensor
    np.testing.assert_array_equal(stacked["a"].numpy(), np.stack([random(2, 3).numpy() * factor for factor in (1, 2)]))


def test_the_first_tensor_imports_the_adapter(tmp_path):
    """With the entry point of pyproject.toml, as an installation writes it."""
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    ((library, module),) = project["entry-points"]["mfac_core.backends"].items()
    metadata = tmp_path / "as_installed-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: as-installed\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text(f"[mfac_core.backends]\n{library} = {module}\n")
    code = f"""
        import sys; sys.path[:] = {[str(tmp_path), *sys.path]!r}
        import mfac_core, torch
        from mfac_core.backends import resolve_device
        assert "mfac_torch" not in sys.modules
        print(mfac_core.prune(torch.tensor([1.0, -3.0]), torch.eye(2), sparsity=0.5).weights)
        assert resolve_device("torch:cpu").backend.name == "torch"
    """
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert (result.stdout, result.returncode) == ("tensor([ 0., -3.])\n", 0), result.stderr


# --- devices without float64, such as Apple's MPS


def hard(m, d):
    """Return gradients whose scales are spread over six decades, with duplicated rows: float32 is not enough."""
    rows = np.random.default_rng(m).standard_normal((m, d)) * np.logspace(-3, 3, d)
    rows[m // 2 :] = rows[: m - m // 2]
    return rows.astype(np.float32)


ROWS = pytest.mark.parametrize("rows", [random(9, 60).numpy(), random(40, 60).numpy(), hard(9, 60), hard(40, 60)])


def test_the_simulated_device_refuses_float64(no_float64):
    with pytest.raises(TypeError, match="doesn't support float64"):
        random(3).double()


@ROWS
@pytest.mark.parametrize("damping", ["auto", 1e-3, 1e-6])
@pytest.mark.parametrize("block_size", [20, None])
def test_the_inverse_fisher_where_there_is_no_float64(no_float64, rows, damping, block_size, caplog):
    caplog.set_level("INFO", "mfac_core")
    options = dict(block_size=block_size, damping=damping)
    expected = mfac_core.inverse_fisher(rows, **options)
    found = mfac_core.inverse_fisher(torch.from_numpy(rows), **options, devices="cuda:0")
    np.testing.assert_allclose(found.diagonal().numpy(), expected.diagonal(), rtol=3e-5)
    x = random(60)
    product = expected.apply(x.numpy())
    for _ in range(2):
        np.testing.assert_allclose(found.apply(x).numpy(), product, rtol=0, atol=1e-3 * np.abs(product).max())
    assert caplog.text.count("cuda:0 has no float64: products are computed on the host") == 1
    assert caplog.text.count("cuda:0 has no float64: blocks that need it are computed on the host") <= 1


@ROWS
@pytest.mark.parametrize("update", ["joint", "independent"])
@pytest.mark.parametrize("damping", ["auto", 1e-3])
def test_pruning_where_there_is_no_float64(no_float64, rows, update, damping):
    weights, given = random(60), torch.from_numpy(rows)
    options = dict(sparsity=0.5, update=update, damping=damping, block_size=20, num_recomputations=1)
    expected = mfac_core.prune(weights.numpy(), rows, **options)
    found = mfac_core.prune(weights, given, **options, devices="cuda:0")
    np.testing.assert_array_equal(found.masks.numpy(), expected.masks)
    scale = np.abs(expected.weights).max()
    np.testing.assert_allclose(found.weights.numpy(), expected.weights, rtol=0, atol=1e-2 * scale)


def test_a_run_where_there_is_no_float64(no_float64):
    def train(place, devices):
        weights = {name: place(random(*shape)) for name, shape in SHAPES.items()}
        settings = mfac_core.MFACSettings(**RUN, num_gradients=4, devices=(devices,), gradients_device=devices)
        pruner = mfac_core.make_pruner(settings, weights, steps_per_epoch=4)
        for step in range(12):
            if pruner.needs_gradients(step):
                gradients = {name: (random(*shape) * step).sin() for name, shape in SHAPES.items()}
                pruner.observe({name: place(gradient) for name, gradient in gradients.items()})
            while pruner.is_due(step + 1):
                weights = pruner.prune(weights, step + 1).weights
        return pruner.masks

    expected, found = train(lambda tensor: tensor.numpy(), "cpu"), train(lambda tensor: tensor, "cuda:0")
    for name, mask in expected.items():
        np.testing.assert_array_equal(found[name], mask)


def test_the_inverse_fisher_names_the_argument_that_is_not_dense():
    with pytest.raises(TypeError, match="^gradients: .*torch.sparse_coo; make it dense"):
        mfac_core.inverse_fisher(torch.eye(3).to_sparse())
