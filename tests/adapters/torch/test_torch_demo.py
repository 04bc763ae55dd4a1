"""The demo in PyTorch, from recipe to report."""

import pytest
from safetensors.torch import load_file

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from mfac_core import load_recipe
from mfac_core.demo import runs as demo_runs
from mfac_core.report.run import read_json
from mfac_torch import demo
from mfac_torch.digits import Digits, accuracy, make_network

WEIGHTS = 9168
RECIPE = """
training_modifiers:
  - !EpochRangeModifier {end_epoch: 2.0}
pruning_modifiers:
  - !MFACPruningModifier
    params: __ALL_PRUNABLE__
    init_sparsity: 0.3
    final_sparsity: 0.8
    start_epoch: 0.5
    end_epoch: 1.5
    update_frequency: 0.5
    num_grads: 8
    global_sparsity: true
    fisher_block_size: 500
    damp: 0.0001
"""


ONE_SHOT = """
pruning_modifiers:
  - !MFACPruningModifier
    params: __ALL_PRUNABLE__
    final_sparsity: 0.9
    end_epoch: 1.0
    global_sparsity: true
    num_grads: 8
    damp: 0.0001
"""


def pruned_to(folder, sparsity):
    """The saved network, after checking that it has as many exact zeros, and those of its masks."""
    weights, masks = (load_file(folder / f"{name}.safetensors") for name in ("pruned", "masks"))
    assert sum(int((~mask).sum()) for mask in masks.values()) == round(sparsity * WEIGHTS)
    assert all(((weights[name] == 0) == ~mask).all() for name, mask in masks.items())
    network = make_network(0)
    network.load_state_dict(weights)
    return network


def test_a_recipe_prunes_to_exact_sparsities_and_writes_what_it_did(tmp_path, monkeypatch):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    monkeypatch.setattr(demo, "DENSE_EPOCHS", 1)

    demo.run(recipe=tmp_path / "recipe.yaml", output=tmp_path / "run", seed=3)

    records, facts = read_json(tmp_path / "run" / "run.json")
    gradual = round(0.8 * WEIGHTS)
    assert {record.method: round(record.sparsity * WEIGHTS, 6) for record in records} == {
        "M-FAC gradual": gradual,
        "magnitude gradual": gradual,
    }
    assert (facts["framework"], facts["seed"]) == ("torch", 3)
    assert (tmp_path / "run" / "report.png").stat().st_size > 10_000
    pruned_to(tmp_path / "run", 0.8)


def test_the_comparison_holds_exact_zeros_through_the_training_after(tmp_path, monkeypatch, capsys):
    (tmp_path / "one_shot.yaml").write_text(ONE_SHOT)
    monkeypatch.setattr(demo_runs, "ONE_SHOT", str(tmp_path / "one_shot.yaml"))
    monkeypatch.setattr(demo_runs, "EPOCHS_AFTER", (1, 2))
    monkeypatch.setattr(demo, "DENSE_EPOCHS", 1)
    folder = tmp_path / "run"

    demo.run(recipe=None, output=folder, seed=3, seeds=1)

    records, facts = read_json(folder / "run.json")
    assert [(each.method, each.epochs_after) for each in records] == [
        (method, epochs) for _ in (0.95, 0.97) for method in ("M-FAC", "magnitude") for epochs in (0, 1, 2)
    ]
    assert [round(each.sparsity * WEIGHTS, 6) for each in records] == [
        round(sparsity * WEIGHTS) for sparsity in (0.95, 0.97) for _ in range(6)
    ]
    assert {each.accuracy_before for each in records} == {records[0].accuracy_before}
    assert records[0].layer_sizes == {
        "conv_1.weight": 144,
        "conv_2.weight": 4608,
        "linear_1.weight": 4096,
        "linear_2.weight": 320,
    }
    for at_once, *further in (records[start : start + 3] for start in (0, 3, 6, 9)):
        assert all(each.layer_sparsity == at_once.layer_sparsity for each in further)  # the same zeros
        assert at_once.seconds < min(each.seconds for each in further)
    assert (facts["seeds"], facts["data"]) == ([3], "scikit-learn's handwritten digits, 540 test images")
    assert "One seed (3)" in capsys.readouterr().out
    assert (folder / "report.png").stat().st_size > 10_000
    saved = pruned_to(folder, 0.95)
    assert accuracy(saved, Digits.load(3)) == pytest.approx(records[1].accuracy_after, abs=2 / 540)


def test_training_after_pruning_trains_a_copy():
    network, recipe = make_network(0), load_recipe(demo_runs.recipe_path(demo_runs.FINE_TUNING), {"epochs": 1})
    before = [parameter.clone() for parameter in network.parameters()]
    epochs = []

    trained = demo.demo(0).train_by_recipe(recipe, "M-FAC", network, epochs.append).model

    assert epochs == [1]
    assert all((a == b).all() for a, b in zip(before, network.parameters(), strict=True))
    assert not any((a == b).all() for a, b in zip(before, trained.parameters(), strict=True))
