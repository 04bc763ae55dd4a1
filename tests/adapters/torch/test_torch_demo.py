"""The demo in PyTorch, from recipe to report."""

import pytest
from safetensors.torch import load_file

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from mfac_core.report import read_json
from mfac_torch import demo

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


def test_the_demo_prunes_to_exact_sparsities_and_writes_what_it_did(tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)

    demo.run(recipe=tmp_path / "recipe.yaml", output=tmp_path / "run", seed=3)

    records, facts = read_json(tmp_path / "run" / "run.json")
    gradual, one_shot = round(0.8 * WEIGHTS), round(0.9 * WEIGHTS)
    assert {record.method: round(record.sparsity * WEIGHTS, 6) for record in records} == {
        "M-FAC gradual": gradual,
        "magnitude gradual": gradual,
        "M-FAC one-shot": one_shot,
        "magnitude one-shot": one_shot,
    }
    assert facts["framework"] == "torch"
    assert (tmp_path / "run" / "report.png").stat().st_size > 10_000
    weights, masks = (load_file(tmp_path / "run" / f"{name}.safetensors") for name in ("pruned", "masks"))
    assert sum(int((~mask).sum()) for mask in masks.values()) == gradual
    assert all((weights[name][~mask] == 0).all() for name, mask in masks.items())
