"""Each kind of pruning that a recipe can ask for, in Keras."""

import numpy as np
import pytest

keras = pytest.importorskip("keras", reason="needs Keras: pip install 'mfac-core[keras]'")

from mfac_keras import MFACPruningCallback, prune_one_shot  # noqa: E402

pytestmark = pytest.mark.feature("constant masks, AC/DC, OBS, a mapping of final sparsities, several modifiers")

BODY = "tiny/body/kernel"


class ZerosPerBatch(keras.callbacks.Callback):
    """Notes the part of the kernels' entries that is zero after each training step."""

    def __init__(self, task):
        super().__init__()
        self.task = task
        self.zeros = []

    def on_train_batch_end(self, batch, logs=None):
        kernels = [kernel.reshape(-1) for kernel in self.task.kernels(self.model).values()]
        self.zeros.append(round(float(np.mean(np.concatenate(kernels) == 0)), 3))


def half_zero(task):
    model = task.model()
    for layer in model.layers:
        kernel = layer.kernel.numpy()
        kernel.reshape(-1)[::2] = 0
        layer.kernel.assign(kernel)
    return model


def test_a_constant_mask_holds_the_zeros_that_are_there_to_the_end(task):
    model = half_zero(task)
    zeros = ZerosPerBatch(task)
    callback = MFACPruningCallback("pruning_modifiers:\n  - !ConstantPruningModifier {start_epoch: 0.0}\n", verbose=0)
    task.fit(model, callback, zeros, epochs=2)
    assert zeros.zeros == [0.5] * 10
    assert callback.sparsity == 0.5


@pytest.mark.once
def test_a_constant_mask_with_an_end_is_released_there(task):
    zeros = ZerosPerBatch(task)
    recipe = "pruning_modifiers:\n  - !ConstantPruningModifier {start_epoch: 0.0, end_epoch: 1.0}\n"
    task.fit(half_zero(task), zeros, MFACPruningCallback(recipe, verbose=0), epochs=2)
    assert zeros.zeros[:5] == [0.5] * 5
    assert max(zeros.zeros[5:]) < 0.1


def test_acdc_alternates_and_ends_compressed(task):
    recipe = (
        "pruning_modifiers:\n  - !ACDCPruningModifier\n    compression_sparsity: 0.75\n    start_epoch: 0.0\n"
        "    end_epoch: 4.0\n    update_frequency: 1.0\n    params: __ALL_PRUNABLE__\n    global_sparsity: false\n"
    )
    zeros = ZerosPerBatch(task)
    model = task.model()
    task.fit(model, zeros, MFACPruningCallback(recipe, verbose=0), epochs=5)
    by_epoch = [set(zeros.zeros[5 * epoch + 1 : 5 * epoch + 4]) for epoch in range(5)]
    assert [epoch == {0.75} for epoch in by_epoch] == [False, True, False, True, True]


@pytest.mark.parametrize("resets", [True, False])
def test_momentum_is_reset_when_weights_come_back(task, resets):
    recipe = (
        "pruning_modifiers:\n  - !ACDCPruningModifier\n    compression_sparsity: 0.5\n    start_epoch: 0.0\n"
        f"    end_epoch: 4.0\n    params: __ALL_PRUNABLE__\n    momentum_buffer_reset: {resets}\n"
    )
    momenta = []

    class Momenta(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            momenta.append(float(np.abs(self.model.optimizer.momentums[0].numpy()).max()))

    model = task.model(keras.optimizers.SGD(0.01, momentum=0.9))
    task.fit(model, MFACPruningCallback(recipe, verbose=0), Momenta(), epochs=4)
    assert (momenta[2] == 0) == resets  # the second decompressed phase begins with epoch 2
    assert momenta[1] > 0


def test_obs_with_recomputations_reaches_its_sparsity(task):
    keys = {"num_grads": 3, "fisher_block_size": 8, "damp": 0.01, "num_recomputations": 2, "global_sparsity": "false"}
    model = task.model()
    batches = [task.batch(number) for number in range(5)]
    task.fit(model, MFACPruningCallback(task.recipe("OBSPruningModifier", **keys), sampler=batches, verbose=0))
    for kernel in task.kernels(model).values():
        assert np.count_nonzero(kernel == 0) == round(0.75 * kernel.size)


@pytest.mark.once
def test_each_entry_of_a_mapping_has_its_sparsity(task):
    recipe = task.recipe("GMPruningModifier", final_sparsity="{0.5: ['re:.*body/kernel'], 0.75: ['re:.*head/kernel']}")
    model = task.model()
    task.fit(model, MFACPruningCallback(recipe.replace("params: __ALL_PRUNABLE__", "params: []"), verbose=0))
    zeros = [np.count_nonzero(kernel == 0) / kernel.size for kernel in task.kernels(model).values()]
    assert zeros == [0.5, 0.75]


@pytest.mark.once
def test_acdc_and_constant_masks_in_one_shot(task):
    recipe = (
        "pruning_modifiers:\n  - !ACDCPruningModifier\n    compression_sparsity: 0.75\n    start_epoch: 0.0\n"
        "    end_epoch: 4.0\n    params: ['re:.*head/kernel']\n"
        "  - !ConstantPruningModifier {params: ['re:.*body/kernel']}\n"
    )
    model = half_zero(task)
    masks = prune_one_shot(model, [task.batch(0)], recipe=recipe, verbose=0)
    assert {name.rpartition("/")[0].rpartition("/")[2]: 1 - mask.mean() for name, mask in masks.items()} == {
        "head": 0.75,
        "body": 0.5,
    }


@pytest.mark.once
def test_a_finished_callback_that_begins_anew_says_so(task, caplog):
    model = task.model()
    callback = MFACPruningCallback(task.recipe("GMPruningModifier"), verbose=0)
    task.fit(model, callback)
    assert "starts over" not in caplog.text
    task.fit(model, callback, epochs=1)
    assert "has pruned in an earlier fit (sparsity 0.7500) and starts over at epoch 0" in caplog.text


@pytest.mark.once
def test_keys_in_a_dictionary_are_refused_with_the_cure():
    with pytest.raises(TypeError, match=r"recipe is a dict; pass a path, a text or a Recipe, or the keys"):
        MFACPruningCallback({"final_sparsity": 0.8})


def two_modifiers(task):
    """Magnitude pruning of the body that ends early, and M-FAC of everything that goes on."""
    first = task.recipe("MagnitudePruningModifier", params="['re:.*body/kernel']", start_epoch=0.0, end_epoch=1.0)
    return first + task.recipe(final_sparsity=0.5, start_epoch=0.6).partition("\n")[2]


def test_two_modifiers_on_one_variable_hold_the_zeros_of_both_and_are_warned_of(task, watch, caplog):
    pruning = MFACPruningCallback(two_modifiers(task), verbose=0)
    watching = watch(pruning)
    model = task.model()
    history = task.fit(model, pruning, watching)
    assert "prune the same parameters (tiny/body/kernel), so more is pruned than either says" in caplog.text
    assert (watching.grown, sum(watching.optimizer_state.values())) == (0, 0)
    zeros = {name: np.mean(kernel == 0) for name, kernel in task.kernels(model).items()}
    assert zeros[BODY] >= 0.75
    assert {name: np.mean(~mask) for name, mask in pruning.masks.items()} == zeros
    pruned = sum(np.count_nonzero(kernel == 0) for kernel in task.kernels(model).values())
    assert history.history["sparsity"][-1] == pruned / 72


def test_an_update_of_one_modifier_does_not_bring_back_what_another_has_pruned(task):
    regrown = []

    class Look(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            regrown.append(np.count_nonzero(task.kernels(self.model)[BODY][~pruning.masks[BODY]]))

    pruning = MFACPruningCallback(two_modifiers(task), verbose=0)
    task.fit(task.model(), pruning, Look())
    assert regrown == [0] * 20


@pytest.mark.once
def test_two_modifiers_on_one_variable_in_one_shot(task):
    model = task.model()
    masks = prune_one_shot(model, [task.batch(number) for number in range(5)], recipe=two_modifiers(task))
    for name, kernel in task.kernels(model).items():
        np.testing.assert_array_equal(kernel != 0, masks[name])
    assert np.mean(~masks[BODY]) >= 0.75


@pytest.mark.once
def test_a_modifier_that_follows_another_sees_its_zeros_wherever_it_stands_in_the_recipe(task):
    first = task.recipe("MagnitudePruningModifier", start_epoch=0.0, end_epoch=1.0, final_sparsity=0.5)
    second = task.recipe("MagnitudePruningModifier", init_sparsity="__FROM_PARAM__", start_epoch=1.0, end_epoch=3.0)
    zeros = []
    for one, other in ((first, second), (second, first)):
        model = task.model()
        watching = ZerosPerBatch(task)
        text = one + other.partition("\n")[2]
        task.fit(model, MFACPruningCallback(text, verbose=0), watching)
        zeros.append(watching.zeros)
    assert zeros[0] == zeros[1]
    assert zeros[0][4] == 0.5
    assert min(zeros[0][4:]) == 0.5


def test_a_modifier_that_asks_for_gradients_of_training_gets_them_in_spite_of_a_sampler(task):
    drawn = []

    def batches():
        drawn.append(1)
        return [task.batch(number) for number in range(5)]

    live, asked, sampled = task.model(), task.model(), task.model()
    task.fit(live, MFACPruningCallback(task.recipe(), verbose=0))
    text = task.recipe(use_gradient_buffering="true")
    task.fit(asked, MFACPruningCallback(text, sampler=batches, verbose=0))
    assert not drawn
    for one, other in zip(live.get_weights(), asked.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    task.fit(sampled, MFACPruningCallback(task.recipe(), sampler=batches, verbose=0))
    assert len(drawn) == 3 * 2  # begun anew for the batches to measure the loss on


@pytest.mark.once
def test_a_function_that_makes_the_batches_gets_what_the_recipe_gives_it(task):
    seen = []

    def batches(size, offset=0):
        seen.append((size, offset))
        return [(task.x[offset : offset + size], task.y[offset : offset + size])]

    text = task.recipe(grad_sampler_kwargs="{size: 8, offset: 4}")
    model = task.model()
    task.fit(model, MFACPruningCallback(text, sampler=batches, verbose=0))
    assert set(seen) == {(8, 4)}
    with pytest.raises(TypeError, match=r"gives grad_sampler_kwargs .* from a list that takes none of these"):
        task.fit(model, MFACPruningCallback(text, sampler=[task.batch(0)], verbose=0))
