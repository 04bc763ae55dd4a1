import itertools
import logging

import numpy as np
import pytest

keras = pytest.importorskip("keras", reason="needs Keras: pip install 'mfac-core[keras]'")

from mfac_core import SettingError  # noqa: E402
from mfac_core.recipe.recommended import RECOMMENDED  # noqa: E402
from mfac_keras import MFACPruningCallback, prune_one_shot  # noqa: E402

pytestmark = pytest.mark.feature("one-shot pruning")


def batches(task):
    return [task.batch(number) for number in range(5)]


@pytest.mark.parametrize("compiled", [True, False])
def test_a_model_is_pruned_in_one_step(task, compiled, capsys):
    model = task.model()
    if not compiled:
        model = keras.models.clone_model(model)
    masks = prune_one_shot(model, batches(task), None if compiled else "mse", task.recipe(), verbose=1)
    assert capsys.readouterr().out.count("pruning step at epoch 0.00") == 1
    assert set(masks) == set(task.kernels(model))
    for name, kernel in task.kernels(model).items():
        np.testing.assert_array_equal(kernel != 0, masks[name])
        assert np.count_nonzero(kernel == 0) == round(0.75 * kernel.size)


def test_keys_need_no_epochs_and_a_tuple_of_arrays_is_data(task):
    model = task.model()
    prune_one_shot(model, (task.x, task.y), final_sparsity=0.75, num_grads=4, fisher_block_size=16, damp=0.01)
    zeros = [np.count_nonzero(kernel == 0) for kernel in task.kernels(model).values()]
    assert sum(zeros) == 54
    assert zeros != [36, 18]  # over all layers, which is recommended


@pytest.mark.once
def test_the_update_makes_up_for_some_of_the_loss():
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((256, 6)) @ rng.standard_normal((6, 12))).astype(
        "float32"
    )  # each input says what others do
    y = (x @ rng.standard_normal((12, 2)) + 0.1 * rng.standard_normal((256, 2))).astype("float32")

    def loss_after(**keys):
        model = keras.Sequential([keras.Input([12]), keras.layers.Dense(2, use_bias=False)])
        model.compile("sgd", "mse")
        model.set_weights([np.linalg.lstsq(x, y, rcond=1e-4)[0]])  # smallest weights of the many that fit
        data = [(x[rows : rows + 4], y[rows : rows + 4]) for rows in range(0, 256, 4)]
        prune_one_shot(model, data, **keys)
        assert np.count_nonzero(model.get_weights()[0] == 0) == 12
        return model.evaluate(x, y, verbose=0)

    by_magnitude = "m_modifiers:\n- !MagnitudePruningModifier {final_sparsity: 0.5, end_epoch: 0.0}\n"
    by_mfac = {"final_sparsity": 0.5, "num_grads": 64, "damp": 1e-5, "update": "joint"}
    assert loss_after(**by_mfac) < 0.1 * loss_after(recipe=by_magnitude)


@pytest.mark.once
def test_an_unbuilt_model_is_refused(task):
    with pytest.raises(ValueError, match="is not built"):
        prune_one_shot(keras.Sequential([keras.layers.Dense(3)]), batches(task), "mse", task.recipe())


def test_zeros_are_kept_in_a_fine_tuning(task):
    model = task.model()
    masks = prune_one_shot(model, batches(task), recipe=task.recipe())
    keep = "m_modifiers:\n- !MagnitudePruningModifier {init_sparsity: 0.75, final_sparsity: 0.75, end_epoch: 0.0}\n"
    task.fit(model, MFACPruningCallback(keep, verbose=0), epochs=2)
    for name, kernel in task.kernels(model).items():
        np.testing.assert_array_equal(kernel != 0, masks[name])


@pytest.mark.once
def test_a_recipe_in_the_place_of_the_loss_is_refused_by_name(task, tmp_path):
    for recipe in (task.recipe(), "recipe.yaml", tmp_path / "recipe.yaml"):
        with pytest.raises(TypeError, match=r"the third argument, is a recipe; pass it by name: .*recipe="):
            prune_one_shot(task.model(), [task.batch(0)], recipe)


@pytest.mark.once
def test_a_recipe_in_another_place_is_refused_by_name(task, tmp_path):
    for recipe in (task.recipe(), "recipe.yaml", tmp_path / "recipe.yaml"):
        with pytest.raises(TypeError, match=r"the second argument, is a recipe; pass it by name: .*recipe="):
            prune_one_shot(task.model(), recipe)
        with pytest.raises(TypeError, match=r"sparsity is a \w+; pass a number, such as 0.9, or a recipe by name: "):
            prune_one_shot(task.model(), batches(task), sparsity=recipe)


@pytest.mark.once
def test_samples_that_all_hold_nan_are_refused_with_the_likely_cause(task):
    task.x[:] = np.nan
    with pytest.raises(ValueError, match=r"all 3 contained NaN or Inf and were refused; look for NaN in the data"):
        prune_one_shot(task.model(), [task.batch(0)], recipe=task.recipe())


@pytest.mark.parametrize("modifier", ["MagnitudePruningModifier", "GMPruningModifier"])
def test_what_needs_no_gradients_needs_no_data(task, modifier):
    model, other = task.model(), task.model()
    masks = prune_one_shot(model, None, recipe=task.recipe(modifier))
    for name, mask in prune_one_shot(other, batches(task), recipe=task.recipe(modifier)).items():
        np.testing.assert_array_equal(masks[name], mask)
    assert all(np.count_nonzero(kernel == 0) == round(0.75 * kernel.size) for kernel in task.kernels(model).values())


def test_constant_masks_need_no_data(task):
    model = task.model()
    model.layers[0].kernel.assign(np.where(np.arange(8) % 2, model.layers[0].kernel.numpy(), 0))
    masks = prune_one_shot(model, recipe="modifiers:\n- !ConstantPruningModifier {params: [tiny/body/kernel]}\n")
    np.testing.assert_array_equal(masks["tiny/body/kernel"], model.layers[0].kernel.numpy() != 0)


def test_mfac_without_data_says_what_to_pass(task):
    model = task.model()
    before = model.get_weights()
    magnitude = "  - !MagnitudePruningModifier {final_sparsity: 0.9, end_epoch: 0.0, params: [tiny/head/kernel]}\n"
    with pytest.raises(TypeError, match=r"M-FAC in one shot needs gradients; pass batches \(x, y\) as dataset"):
        prune_one_shot(model, None, recipe=task.recipe(params="[tiny/body/kernel]") + magnitude)
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))


def test_modifiers_that_follow_each_other_are_pruned_in_their_order_without_a_warning(task, caplog):
    def recipe(second_start):
        return (
            "pruning_modifiers:\n"
            f"  - !GMPruningModifier {{final_sparsity: 0.75, start_epoch: {second_start}, end_epoch: 9.0}}\n"
            "  - !GMPruningModifier {final_sparsity: 0.5, start_epoch: 0.0, end_epoch: 4.0}\n"
        )

    model = task.model()
    prune_one_shot(model, None, recipe=recipe(4.0))
    assert not caplog.text
    assert all(np.count_nonzero(kernel == 0) == round(0.75 * kernel.size) for kernel in task.kernels(model).values())
    prune_one_shot(task.model(), None, recipe=recipe(3.0))
    assert "GMPruningModifier 1 and GMPruningModifier 2 prune the same parameters" in caplog.text


FEW = {"num_grads": 4, "fisher_block_size": 16}


def test_without_a_recipe_the_recommended_settings_are_taken(task, caplog):
    model, twin = task.model(), task.model()
    masks = prune_one_shot(model, batches(task), sparsity=0.75, **FEW)
    assert sum(np.count_nonzero(~mask) for mask in masks.values()) == 54
    keys = {"init_sparsity": 0.05, **RECOMMENDED, **FEW}
    recipe = task.recipe(**{key: str(value).lower() for key, value in keys.items()})
    with caplog.at_level(logging.INFO, logger="mfac_keras"):
        prune_one_shot(twin, batches(task), recipe=recipe)
        assert "recommended settings where none are given" not in caplog.text
        assert all(map(np.array_equal, model.get_weights(), twin.get_weights()))
        prune_one_shot(task.model(), batches(task), final_sparsity=0.75, **FEW)
    taken = caplog.text.partition("one-shot pruning with recommended settings where none are given: ")[2].partition(
        "\n"
    )[0]
    assert all(f"{key} {str(value).lower()}" in taken for key, value in RECOMMENDED.items() if key not in FEW)
    assert "than recommended: num_grads 4 (recommended: 256)" in caplog.text


@pytest.mark.once
@pytest.mark.parametrize(
    ("key", "value"), [("global_sparsity", False), ("update", "independent"), ("num_recomputations", 2), ("damp", 10.0)]
)
def test_a_key_takes_the_place_of_a_recommended_setting(task, key, value):
    model, other = task.model(), task.model()
    prune_one_shot(model, batches(task), sparsity=0.75, **FEW)
    prune_one_shot(other, batches(task), sparsity=0.75, **FEW, **{key: value})
    assert not all(map(np.array_equal, model.get_weights(), other.get_weights()))


def test_a_recipe_means_what_it_says_and_the_log_says_where_that_differs(task, caplog):
    model, twin = task.model(), task.model()
    with caplog.at_level(logging.INFO, logger="mfac_keras"):
        prune_one_shot(model, batches(task), recipe=task.recipe())
    assert "than recommended: global_sparsity false (recommended: true), update independent (joint), " in caplog.text
    as_there = {
        "global_sparsity": False,
        "update": "independent",
        "num_recomputations": 1,
        "damp": 0.01,
        "num_grads": 3,
    }
    prune_one_shot(twin, batches(task), sparsity=0.75, fisher_block_size=16, **as_there)
    assert all(map(np.array_equal, model.get_weights(), twin.get_weights()))


@pytest.mark.once
def test_the_sparsity_is_given_once(task):
    model = task.model()
    for keys, message in (
        ({"num_grads": 4}, "the sparsity is missing; pass sparsity=0.9"),
        ({"sparsity": 0.5, "final_sparsity": 0.5}, "name one setting twice; pass one"),
        ({"sparsity": 0.5, "recipe": task.recipe()}, "got a recipe and keys of one"),
        ({}, "got neither a recipe nor keys of one; pass .*sparsity=0.9"),
    ):
        with pytest.raises(TypeError, match=message):
            prune_one_shot(model, batches(task), **keys)


def test_a_failure_late_on_the_way_leaves_the_model_as_it_was(task):
    model = task.model()
    before = model.get_weights()
    drawn = itertools.count()

    def data():
        for batch in batches(task):
            if next(drawn) == 9:  # in the third of the recomputations
                raise RuntimeError("the disk is gone")
            yield batch

    with pytest.raises(RuntimeError, match="the disk is gone"):
        prune_one_shot(model, data, sparsity=0.9, num_recomputations=4, **FEW)
    assert all(map(np.array_equal, before, model.get_weights()))


def test_groups_of_layers_are_pruned_one_after_the_other(task, caplog):
    caplog.set_level(logging.INFO, logger="mfac_keras")
    model, by_hand, at_once = task.model(), task.model(), task.model()
    keys = FEW | {"global_sparsity": False, "sparsity": 0.5}
    masks = prune_one_shot(model, batches(task), layers_at_once=1, **keys)
    for number, path in enumerate(masks, start=1):
        assert f"(group {number} of 2: {path})" in caplog.text
        prune_one_shot(by_hand, batches(task), params=[path], **keys)
    prune_one_shot(at_once, batches(task), **keys)
    assert all(map(np.array_equal, model.get_weights(), by_hand.get_weights()))
    assert not all(map(np.array_equal, model.get_weights(), at_once.get_weights()))
    with pytest.raises(SettingError, match="layers_at_once: 1 conflicts with global_sparsity"):
        prune_one_shot(model, batches(task), layers_at_once=1, sparsity=0.9, **FEW)
