"""The demo in Keras: the comparison from recipe to report, on the backend that ``KERAS_BACKEND`` names."""

import numpy as np
import pytest

from mfac_core import SettingError, demo_runs, load_recipe
from mfac_core.report import read_json

keras = pytest.importorskip("keras")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
keras_demo = pytest.importorskip("mfac_keras.demo")

WEIGHTS = 9168
GRADUAL = """
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
    final_sparsity: 0.7
    end_epoch: 1.0
    global_sparsity: true
    num_grads: 8
    fisher_block_size: 500
    damp: 0.0001
"""


def test_the_demo_prunes_to_exact_sparsities_and_writes_what_it_did(tmp_path, monkeypatch, capsys):
    for name, text in (("gradual.yaml", GRADUAL), ("one_shot.yaml", ONE_SHOT)):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(demo_runs, "ONE_SHOT", str(tmp_path / "one_shot.yaml"))
    monkeypatch.setattr(keras_demo, "DENSE_EPOCHS", 2)
    folder = tmp_path / "run"

    keras_demo.run(recipe=tmp_path / "gradual.yaml", output=folder, seed=3)

    records, facts = read_json(folder / "run.json")
    reached = {record.method: round(record.sparsity * WEIGHTS, 6) for record in records}
    gradual, one_shot = round(0.8 * WEIGHTS), round(0.7 * WEIGHTS)
    assert reached == {
        "M-FAC gradual": gradual,
        "magnitude gradual": gradual,
        "M-FAC one-shot": one_shot,
        "magnitude one-shot": one_shot,
    }
    assert {record.accuracy_before for record in records} == {records[0].accuracy_before}
    assert all(record.accuracy_after > 0.3 for record in records)
    assert [[epoch for epoch, *_ in record.history] for record in records] == [[0, 1, 2], [0, 1, 2], [], []]
    assert records[0].history[-1][1:] == pytest.approx((records[0].accuracy_after, records[0].sparsity))
    assert facts["seed"] == 3
    assert facts["backend"] == keras.backend.backend()
    assert (folder / "report.png").stat().st_size > 10_000
    table = capsys.readouterr().out
    assert all(record.method in table for record in records)

    model = keras.models.load_model(folder / "pruned.keras")
    masks = np.load(folder / "masks.npz")
    kernels = {variable.path: variable.numpy() for variable in model.trainable_variables if len(variable.shape) > 1}
    assert set(masks) == set(kernels)
    assert sum(masks[path].size for path in masks) == WEIGHTS
    assert sum(int((~masks[path]).sum()) for path in masks) == gradual
    assert all((kernel[~masks[path]] == 0).all() for path, kernel in kernels.items())


def test_one_shot_pruning_leaves_the_dense_network_as_it_is_and_repeats():
    digits, dense = keras_demo.load_digits(0), keras_demo.make_network(0)
    before = dense.get_weights()
    dense.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))

    results = [keras_demo.prune_in_one_shot(digits, 0, load_recipe(ONE_SHOT), "M-FAC", dense) for _ in range(2)]

    assert all(np.array_equal(a, b) for a, b in zip(before, dense.get_weights(), strict=True))
    first, second = (result.model.get_weights() for result in results)
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_recipe_that_matches_nothing_is_refused_before_any_training(tmp_path, monkeypatch):
    (tmp_path / "gradual.yaml").write_text(GRADUAL.replace("__ALL_PRUNABLE__", "re:.*attention"))
    monkeypatch.setattr(keras_demo, "train", None)

    with pytest.raises(SettingError, match="attention"):
        keras_demo.run(recipe=tmp_path / "gradual.yaml", output=tmp_path / "run", seed=0)


def test_the_network_begins_with_weights_like_those_of_pytorch():
    torch_digits = pytest.importorskip("mfac_torch.digits")
    theirs = [weight.numpy(force=True) for weight in torch_digits.make_network(0).parameters()]
    ours = keras_demo.make_network(0).get_weights()

    assert [each.size for each in ours] == [each.size for each in theirs]
    for fan_in, mine, other in zip(np.repeat([9, 144, 128, 32], 2), ours, theirs, strict=True):
        for drawn in (mine, other):
            assert 0.6 < np.abs(drawn).max() * np.sqrt(fan_in) <= 1.0


def test_the_pruned_network_is_within_a_point_of_that_of_pytorch():
    torch_demo = pytest.importorskip("mfac_torch.demo").demo(0)
    recipe = load_recipe(demo_runs.recipe_path(demo_runs.GRADUAL))
    accuracies = []
    for demo in (torch_demo, keras_demo.demo(0)):
        dense = demo.train_dense(lambda epoch: None)
        result = demo.prune_gradually(recipe, "M-FAC", dense, lambda epoch: None)
        assert result.record.sparsity == round(0.96 * WEIGHTS) / WEIGHTS
        accuracies.append(result.record.accuracy_after)

    theirs, ours = accuracies
    assert ours > theirs - 0.01
