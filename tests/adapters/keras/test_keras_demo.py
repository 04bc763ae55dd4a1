"""The demo in Keras: the comparison from recipe to report, on the backend that ``KERAS_BACKEND`` names."""

import numpy as np
import pytest

from mfac_core import SettingError, load_recipe
from mfac_core.demo import runs as demo_runs
from mfac_core.report.run import read_json

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


def saved_in(folder, sparsity):
    """The saved network, after checking that it has as many exact zeros, and those of its masks."""
    model = keras.models.load_model(folder / "pruned.keras")
    masks = np.load(folder / "masks.npz")
    kernels = {variable.path: variable.numpy() for variable in model.trainable_variables if len(variable.shape) > 1}
    assert set(masks) == set(kernels)
    assert sum(masks[path].size for path in masks) == WEIGHTS
    assert sum(int((~masks[path]).sum()) for path in masks) == round(sparsity * WEIGHTS)
    assert all(((kernel == 0) == ~masks[path]).all() for path, kernel in kernels.items())
    return model


def test_a_recipe_prunes_to_exact_sparsities_and_writes_what_it_did(tmp_path, monkeypatch, capsys):
    (tmp_path / "gradual.yaml").write_text(GRADUAL)
    monkeypatch.setattr(keras_demo, "DENSE_EPOCHS", 1)
    folder = tmp_path / "run"

    keras_demo.run(recipe=tmp_path / "gradual.yaml", output=folder, seed=3)

    records, facts = read_json(folder / "run.json")
    gradual = round(0.8 * WEIGHTS)
    assert {record.method: round(record.sparsity * WEIGHTS, 6) for record in records} == {
        "M-FAC gradual": gradual,
        "magnitude gradual": gradual,
    }
    assert {record.accuracy_before for record in records} == {records[0].accuracy_before}
    assert [[epoch for epoch, *_ in record.history] for record in records] == [[0, 1, 2], [0, 1, 2]]
    assert records[0].history[-1][1:] == pytest.approx((records[0].accuracy_after, records[0].sparsity))
    assert facts["seed"] == 3
    assert facts["backend"] == keras.backend.backend()
    assert (folder / "report.png").stat().st_size > 10_000
    table = capsys.readouterr().out
    assert all(record.method in table for record in records)
    digits = keras_demo.load_digits(3)
    two_images = 2 / len(digits.test_labels)
    saved = saved_in(folder, 0.8)
    assert keras_demo.accuracy(saved, digits) == pytest.approx(records[0].accuracy_after, abs=two_images)


def test_the_comparison_holds_exact_zeros_through_the_training_after(tmp_path, monkeypatch):
    (tmp_path / "one_shot.yaml").write_text(ONE_SHOT)
    monkeypatch.setattr(demo_runs, "ONE_SHOT", str(tmp_path / "one_shot.yaml"))
    monkeypatch.setattr(demo_runs, "EPOCHS_AFTER", (1, 2))
    monkeypatch.setattr(demo_runs, "SPARSITIES", (0.95,))
    monkeypatch.setattr(keras_demo, "DENSE_EPOCHS", 1)
    folder = tmp_path / "run"

    keras_demo.run(recipe=None, output=folder, seed=3, seeds=1)

    records, facts = read_json(folder / "run.json")
    assert [(each.method, each.epochs_after) for each in records] == [
        (method, epochs) for method in ("M-FAC", "magnitude") for epochs in (0, 1, 2)
    ]
    assert [round(each.sparsity * WEIGHTS, 6) for each in records] == [round(0.95 * WEIGHTS)] * 6
    assert {each.accuracy_before for each in records} == {records[0].accuracy_before}
    for at_once, *further in (records[:3], records[3:]):
        assert all(each.layer_sparsity == at_once.layer_sparsity for each in further)  # the same zeros
    assert sum(records[0].layer_sizes.values()) == WEIGHTS
    assert (facts["framework"], facts["seeds"]) == ("keras", [3])
    assert (folder / "report.png").stat().st_size > 10_000
    digits = keras_demo.load_digits(3)
    two_images = 2 / len(digits.test_labels)
    saved = saved_in(folder, 0.95)
    assert keras_demo.accuracy(saved, digits) == pytest.approx(records[1].accuracy_after, abs=two_images)


def test_one_shot_pruning_leaves_the_dense_network_as_it_is_and_repeats():
    digits, dense = keras_demo.load_digits(0), keras_demo.make_network(0)
    before = dense.get_weights()
    dense.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))

    results = [keras_demo.prune_in_one_shot(digits, 0, load_recipe(ONE_SHOT), "M-FAC", dense) for _ in range(2)]

    assert all(np.array_equal(a, b) for a, b in zip(before, dense.get_weights(), strict=True))
    first, second = (result.model.get_weights() for result in results)
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one == 0, other == 0)
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.once
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


def in_the_form_of_keras(network):
    """The weights of PyTorch's network as the one of Keras takes them."""

    def turned(array):
        if array.shape == (32, 128):  # PyTorch flattens channels, height, width, and Keras height, width, channels
            return array.reshape(32, 32, 2, 2).transpose(2, 3, 1, 0).reshape(128, 32)
        return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T

    return [turned(weight.numpy(force=True)).copy() for weight in network.parameters()]


def test_the_same_weights_and_images_give_the_same_steps_of_training_as_in_pytorch():
    torch = pytest.importorskip("torch")
    torch_digits = pytest.importorskip("mfac_torch.digits")
    one_batch = slice(demo_runs.BATCH_SIZE)  # so that the order of the images, which differs, does not matter
    digits = keras_demo.load_digits(0)
    digits = digits._replace(train_images=digits.train_images[one_batch], train_labels=digits.train_labels[one_batch])
    images, labels = torch_digits.Digits.load(0).train_images[one_batch], torch.from_numpy(digits.train_labels)
    ours, theirs = keras_demo.make_network(0), torch_digits.make_network(0)
    before = in_the_form_of_keras(theirs)
    ours.set_weights(before)

    keras_demo.train(ours, digits, learning_rate=0.05, epochs=3, seed=0)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.05, momentum=demo_runs.MOMENTUM)
    torch_digits.train(theirs, optimizer, torch_digits.Digits(images, labels, images, labels), epochs=3, seed=0)

    np.testing.assert_array_equal(digits.train_images[..., 0], images[:, 0])
    for mine, other, start in zip(ours.get_weights(), in_the_form_of_keras(theirs), before, strict=True):
        change = np.abs(other - start).max()
        assert change > 1e-4
        np.testing.assert_allclose(mine, other, rtol=0, atol=1e-2 * change)
