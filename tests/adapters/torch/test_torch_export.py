import logging
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from mfac_core.errors import DeviceError
from mfac_torch import GradSampler, MagnitudePruningModifier, ScheduledModifierManager
from mfac_torch.export import export_onnx, load_masks, masks_of, save_masks, to_semi_structured, to_torch_prune

ROOT = Path(__file__).parents[3]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
WARNING_OF_EXPORTER = pytest.mark.filterwarnings(
    r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning",  # torch.export to itself
)


class Tied(nn.Module):
    """An encoder and a decoder that share one weight."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(6, 6, bias=False)
        self.decoder = nn.Linear(6, 6, bias=False)
        self.decoder.weight = self.encoder.weight

    def forward(self, inputs):
        return self.decoder(self.encoder(inputs))


class Convolutions(nn.Module):
    """What exporters fold: normalization into convolutions, transposed weights, constants."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.grouped = nn.Conv2d(4, 4, 3, groups=2)
        self.up = nn.ConvTranspose2d(4, 2, 3)
        self.fc = nn.Linear(2 * 4, 5, bias=False)
        self.head = nn.Linear(5, 3)

    def forward(self, inputs):
        features = self.up(self.grouped(self.norm(self.conv(inputs)).relu()))
        rows = features.transpose(1, 2).flatten(2)  # three dimensions, so that products take transposed weights
        return self.head(self.fc(rows).relu())


def pruned(model, sparsity=0.5):
    """Prune by magnitude in one shot; the manager."""
    manager = ScheduledModifierManager([MagnitudePruningModifier(final_sparsity=sparsity, end_epoch=0.0)])
    manager.apply(model)
    return manager


def two_of_four(shape, seed=0):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    groups = values.view(shape[0], -1, 4)
    groups.scatter_(2, groups.abs().argsort(dim=2)[:, :, :2], 0.0)
    return values


# --- masks as a file


def test_masks_of_a_manager_a_model_and_a_mapping_save_the_same(task, tmp_path):
    model = task.model()
    manager = pruned(model)
    for name, source in {"manager": manager, "model": model, "masks": manager.masks}.items():
        save_masks(source, tmp_path / name)
        loaded = load_masks(tmp_path / name)
        assert sorted(loaded) == ["0.weight", "2.weight"]
        for parameter, mask in loaded.items():
            assert mask.dtype == torch.bool
            assert torch.equal(mask, manager.masks[parameter])


def test_the_file_of_masks_says_how_sparse_they_are(task, tmp_path):
    from safetensors import safe_open

    model = task.model()
    save_masks(pruned(model, 0.75), tmp_path / "masks.safetensors")
    with safe_open(tmp_path / "masks.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert float(metadata["sparsity"]) == 0.75


def test_layers_without_zeros_have_no_mask_unless_they_are_named(task):
    model = task.model()
    with torch.no_grad():
        model[0].weight[0, 0] = 0.0
    assert list(masks_of(model)) == ["0.weight"]
    assert list(masks_of(model, ["__ALL_PRUNABLE__"])) == ["0.weight", "2.weight"]


def test_a_model_that_was_not_pruned_has_no_masks_to_save(task, tmp_path):
    with pytest.raises(ValueError, match="there are no masks: nothing was pruned yet"):
        save_masks(task.model(), tmp_path / "masks.safetensors")


def test_another_file_of_tensors_is_not_taken_for_masks(tmp_path):
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.safetensors is not a file of masks: its format is None"):
        load_masks(tmp_path / "model.safetensors")


# --- the form of torch.nn.utils.prune


def test_torch_prune_computes_the_same_and_holds_the_masks_by_itself(task):
    model = task.model()
    manager = pruned(model)
    expected = model(task.batches[0][0])
    assert to_torch_prune(model, manager) is model
    assert prune.is_pruned(model)
    assert torch.equal(model(task.batches[0][0]), expected)

    task.train(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), stop=5)
    for index in (0, 2):
        prune.remove(model[index], "weight")
        assert torch.equal(model[index].weight != 0, manager.masks[f"{index}.weight"])
    assert sorted(model.state_dict()) == sorted(task.model().state_dict())


def test_torch_prune_masks_every_owner_of_a_tied_weight():
    model = Tied()
    masks = {"encoder.weight": torch.rand(6, 6) > 0.5}
    to_torch_prune(model, masks)
    assert model.encoder.weight_orig is model.decoder.weight_orig
    inputs = torch.randn(3, 6)
    weight = model.encoder.weight_orig * masks["encoder.weight"]
    assert torch.allclose(model(inputs), inputs @ weight.T @ weight.T)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"0.weight": torch.ones(8, 6, dtype=torch.bool), "5.weight": torch.ones(2)}, "no parameter '5.weight'"),
        ({"0.weight": torch.ones(8, 6, dtype=torch.bool), "2.weight": torch.ones(8, 3)}, r"shape \(8, 3\).*\(3, 8\)"),
    ],
)
def test_masks_of_another_model_leave_the_model_untouched(task, masks, message):
    model = task.model()
    with pytest.raises(ValueError, match=message):
        to_torch_prune(model, masks)
    assert not prune.is_pruned(model)


# --- 2:4


def test_the_layer_and_the_place_that_break_the_pattern_are_named():
    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 4))
    with torch.no_grad():
        model[0].weight.copy_(two_of_four((4, 8)))
        model[2].weight.copy_(two_of_four((4, 4)))
        model[2].weight[3] = torch.tensor([1.0, 0.0, 2.0, 3.0])
    with pytest.raises(ValueError, match=re.escape("2.weight is not 2:4: 3 of the 4 weights [3, 0:4] are not zero")):
        to_semi_structured(model)


def test_widths_and_layers_that_have_no_pattern_are_named():
    model = nn.Sequential(nn.Conv1d(4, 4, 1), nn.Linear(6, 2))
    with torch.no_grad():
        model[1].weight.zero_()
    with pytest.raises(ValueError, match="1.weight has 6 inputs, which is not a multiple of 4"):
        to_semi_structured(model)
    with pytest.raises(ValueError, match="0.weight is not the weight of a Linear layer"):
        to_semi_structured(model, ["0.weight"])
    with pytest.raises(ValueError, match="must be a name or a non-empty list"):
        to_semi_structured(model, [])
    with pytest.raises(ValueError, match="no Linear layer of the model has a weight that is zero"):
        to_semi_structured(nn.Sequential(nn.Linear(4, 4)))


def test_on_a_cpu_the_pattern_that_a_recipe_made_is_found_and_the_hardware_refused():
    model = nn.Linear(8, 4)
    modifier = MagnitudePruningModifier(final_sparsity=0.5, end_epoch=0.0, mask_type="2:4")
    ScheduledModifierManager([modifier]).apply(model)
    with pytest.raises(DeviceError, match=r"weight is on cpu; 2:4 kernels need .* compute capability 8.0"):
        to_semi_structured(model)
    assert type(model.weight) is nn.Parameter


@pytest.mark.gpu("torch")
@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor is in prototype stage:UserWarning")
def test_a_two_of_four_model_computes_the_same_on_its_gpu():
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs a GPU of compute capability 8.0 or later")
    model = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 64)).eval().half().cuda()
    with torch.no_grad():
        model[0].weight.copy_(two_of_four((128, 128)))
    inputs = torch.randn(64, 128, dtype=torch.half, device="cuda")
    with torch.inference_mode():
        expected = model(inputs)
        to_semi_structured(model)
        found = model(inputs)
    assert isinstance(model[0].weight.data, torch.sparse.SparseSemiStructuredTensor)
    assert not isinstance(model[2].weight.data, torch.sparse.SparseSemiStructuredTensor)
    assert torch.allclose(found, expected, rtol=1e-2, atol=1e-2)


# --- ONNX


def exported(model, inputs, path):
    """Export; the initializers of the file, and what onnxruntime computes."""
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    export_onnx(model, (inputs,), path)
    initializers = {each.name: onnx.numpy_helper.to_array(each) for each in onnx.load(path).graph.initializer}
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    return initializers, output


@WARNING_OF_EXPORTER
def test_an_onnx_file_holds_the_same_zeros_and_computes_the_same(tmp_path, caplog):
    torch.manual_seed(0)
    model, inputs = Convolutions(), torch.randn(2, 1, 8, 6)
    model(torch.randn(32, 1, 8, 6))  # normalization statistics that are worth folding
    pruned(model, 0.7)
    model.grouped.eval()
    flags = [module.training for module in model.modules()]
    initializers, output = exported(model, inputs, tmp_path / "model.onnx")

    assert [module.training for module in model.modules()] == flags
    for name in ("conv", "grouped", "up"):  # under their own names, though normalization was folded into one
        weight = getattr(model, name).weight
        assert np.array_equal(initializers[f"{name}.weight"] == 0, weight.detach().numpy() == 0)
    for name in ("fc", "head"):
        weight = getattr(model, name).weight.detach().numpy()
        assert any(np.array_equal(each, weight.T) or np.array_equal(each, weight) for each in initializers.values())
    assert "zeros" not in caplog.text
    with torch.inference_mode():
        np.testing.assert_allclose(output, model.eval()(inputs).numpy(), rtol=1e-4, atol=1e-5)


@WARNING_OF_EXPORTER
def test_zeros_that_are_not_in_the_file_are_named(tmp_path, caplog):
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 4, bias=False)

        def forward(self, inputs):
            return inputs @ (self.fc.weight.T + 1.0)

    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    model, inputs = Shifted(), torch.randn(2, 8)
    pruned(model)
    with caplog.at_level(logging.WARNING, "mfac_torch"):
        export_onnx(model, (inputs,), tmp_path / "folded.onnx")
    assert "fc.weight has 16 zeros, but the ONNX file has 0 of them" in caplog.text
    caplog.clear()
    export_onnx(model, (inputs,), tmp_path / "plain.onnx", optimize=False)
    assert "zeros" not in caplog.text


def test_export_after_one_shot_mfac_keeps_what_the_manager_reports(task, tmp_path):
    model = task.model()
    recipe = task.recipe(mask_type="unstructured", final_sparsity=0.5, init_sparsity=0.0)
    manager = ScheduledModifierManager.from_yaml(recipe)
    manager.apply(model, grad_sampler=GradSampler(task.batches, nn.functional.mse_loss))
    save_masks(manager, tmp_path / "masks.safetensors")
    fresh = task.model()
    fresh.load_state_dict(model.state_dict())
    assert {name: mask.tolist() for name, mask in load_masks(tmp_path / "masks.safetensors").items()} == {
        name: mask.tolist() for name, mask in masks_of(fresh).items()
    }


# --- documentation


@WARNING_OF_EXPORTER
@pytest.mark.parametrize("page", ["export.md", "migration.md"])
def test_every_block_of_python_runs_as_it_stands(page, tmp_path, monkeypatch):
    if page == "export.md":
        pytest.importorskip("onnx")
        pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    blocks = [
        block for block in BLOCK.finditer(text) if not re.search(r"mfac_torch\.(lightning|transformers)", block[1])
    ]
    assert len(blocks) >= 2
    namespace = {"__name__": "__main__"}
    for block in blocks:  # those for other libraries run with the tests of their callbacks
        above = text[: block.start(1)].count("\n")
        exec(compile("\n" * above + block[1], page, "exec"), namespace)


def test_other_libraries_are_imported_only_when_asked_for_and_missed_by_name():
    code = """
import sys
import mfac_torch, mfac_torch.export, torch
absent = ["lightning", "pytorch_lightning", "transformers", "onnx", "onnxscript"]
assert not set(absent) & set(sys.modules)
sys.modules.update(dict.fromkeys(absent))
for use in (
    "import mfac_torch.lightning",
    "import mfac_torch.transformers",
    "mfac_torch.export.export_onnx(torch.nn.Linear(2, 1), (torch.ones(1, 2),), 'model.onnx')",
):
    try:
        exec(use)
    except ImportError as error:
        print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    needs = [re.fullmatch(r"(.*) needs .*pip install \"mfac-core\[(.*)\]\"", line) for line in run.stdout.splitlines()]
    assert [need.groups() for need in needs] == [
        ("mfac_torch.lightning", "lightning"),
        ("mfac_torch.transformers", "transformers"),
        ("export_onnx", "onnx"),
    ]
