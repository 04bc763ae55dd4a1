import numpy as np
import pytest

keras = pytest.importorskip("keras", reason="needs Keras: pip install 'mfac-core[keras]'")

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
    prune_one_shot(model, (task.x, task.y), final_sparsity=0.5, num_grads=4, fisher_block_size=16, damp=0.01)
    assert all(np.count_nonzero(kernel == 0) == kernel.size / 2 for kernel in task.kernels(model).values())


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
        model.set_weights([np.linalg.lstsq(x, y)[0]])
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
def test_samples_that_all_hold_nan_are_refused_with_the_likely_cause(task):
    task.x[:] = np.nan
    with pytest.raises(ValueError, match=r"all 3 held NaN or Inf and were refused; look for NaN in the data"):
        prune_one_shot(task.model(), [task.batch(0)], recipe=task.recipe())
