import logging
import re

import numpy as np
import pytest

keras = pytest.importorskip("keras", reason="needs Keras: pip install 'mfac-core[keras]'")

from mfac_core import RecipeError, load_recipe  # noqa: E402
from mfac_core.errors import SettingError  # noqa: E402
from mfac_keras import MFACPruningCallback, prune_one_shot  # noqa: E402


def assert_pruned(task, model, sparsity=0.75):
    for name, kernel in task.kernels(model).items():
        assert np.count_nonzero(kernel == 0) == round(sparsity * kernel.size), name


@pytest.mark.feature("gradual pruning from a recipe, a text or keys")
def test_a_path_a_text_a_recipe_and_keys_mean_the_same(task, tmp_path):
    text = task.recipe()
    (tmp_path / "recipe.yaml").write_text(text)
    keys = {"init_sparsity": 0.2, "final_sparsity": 0.75, "start_epoch": 1.0, "end_epoch": 3.0}
    of_mfac = {"num_grads": 3, "fisher_block_size": 16, "damp": 0.01}
    models = []
    for pruning in (
        MFACPruningCallback(text, verbose=0),
        MFACPruningCallback(tmp_path / "recipe.yaml", verbose=0),
        MFACPruningCallback(load_recipe(text), verbose=0),
        MFACPruningCallback(**keys, **of_mfac, verbose=0),
    ):
        model = task.model()
        history = task.fit(model, pruning)
        assert_pruned(task, model)
        assert history.history["sparsity"] == pytest.approx([0.2, 0.6825, 0.75, 0.75], abs=0.02)
        models.append(model)
    for model in models[1:]:
        for one, other in zip(models[0].get_weights(), model.get_weights(), strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.feature("gradual pruning from a recipe, a text or keys")
@pytest.mark.parametrize("modifier", ["MagnitudePruningModifier", "GMPruningModifier"])
def test_magnitude_pruning_works_too(task, modifier):
    model = task.model()
    task.fit(model, MFACPruningCallback(task.recipe(modifier, start_epoch=0.0), verbose=0))
    assert_pruned(task, model)


@pytest.mark.once
@pytest.mark.feature("fractional epochs")
def test_pruning_steps_happen_at_their_batch(task):
    model = task.model()
    pruning = MFACPruningCallback(
        task.recipe(start_epoch=0.6, end_epoch=2.4, update_frequency=0.8, num_grads=2, inter_func="linear"), verbose=0
    )
    steps = []

    class Note(keras.callbacks.Callback):
        def __init__(self):
            super().__init__()
            self.step = 0
            self.sparsity = 0.0

        def on_train_batch_end(self, batch, logs=None):
            self.step += 1
            if pruning.sparsity != self.sparsity:
                steps.append(self.step)
                self.sparsity = pruning.sparsity

    task.fit(model, pruning, Note())
    assert steps == [3, 7, 11, 12]


@pytest.mark.once
@pytest.mark.feature("unsupported setups raise errors at fit")
@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        ({}, TypeError, "neither a recipe nor keys"),
        ({"recipe": "a\n", "final_sparsity": 0.5}, TypeError, "a recipe and keys"),
        ({"final_sparsity": 1.5, "end_epoch": 2}, RecipeError, "final_sparsity"),
        ({"final_sparsity": 0.5, "end_epoch": 2, "num_grad": 3}, RecipeError, "num_grads"),
        ({"recipe": "m_modifiers:\n- !EpochRangeModifier {end_epoch: 2}\n"}, ValueError, "no pruning modifier"),
        ({"final_sparsity": 0.5, "end_epoch": 2, "loss": "mse"}, TypeError, "sampler=dataset"),
    ],
)
def test_what_is_wrong_with_the_arguments_is_an_error_at_once(keys, error, message):
    with pytest.raises(error, match=message):
        MFACPruningCallback(**keys)


@pytest.mark.feature("unsupported setups raise errors at fit")
@pytest.mark.parametrize(
    ("recipe", "error", "message"),
    [
        ({"params": "[bodyy]"}, SettingError, "'bodyy' matches no variable"),
        ({"available_gpus": '["cuda:7"]'}, ValueError, "cuda:7"),
    ],
)
def test_what_does_not_fit_the_model_is_an_error_before_the_first_step(task, recipe, error, message):
    model = task.model()
    before = model.get_weights()
    with pytest.raises(error, match=message):
        task.fit(model, MFACPruningCallback(task.recipe(**recipe)))
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))
    assert_plain(model, trained=False)


@pytest.mark.feature("unsupported setups raise errors at fit")
def test_two_callbacks_on_one_optimizer_are_refused(task):
    model = task.model()
    with pytest.raises(RuntimeError, match="another callback prunes"):
        task.fit(model, MFACPruningCallback(task.recipe()), MFACPruningCallback(task.recipe()))


@pytest.mark.once
@pytest.mark.feature("unsupported setups raise errors at fit")
def test_a_callback_that_stands_twice_in_the_list_is_refused(task):
    pruning = MFACPruningCallback(task.recipe(), verbose=0)
    with pytest.raises(ValueError, match="is among the callbacks of fit twice; remove one of them"):
        task.fit(task.model(), pruning, pruning)
    task.fit(task.model(), pruning)
    assert pruning.sparsity == 0.75


@pytest.mark.once
@pytest.mark.feature("unsupported setups raise errors at fit")
def test_a_callback_that_prunes_another_model_begins_anew_without_a_word(task, caplog):
    pruning = MFACPruningCallback(task.recipe(init_sparsity=0.5), verbose=0)
    task.fit(task.model(), pruning)
    task.fit(task.model(), pruning)
    assert not caplog.text
    assert pruning.sparsity == 0.75


@pytest.mark.once
@pytest.mark.feature("unsupported setups raise errors at fit")
def test_a_modifier_that_is_out_of_scope_is_refused_or_skipped(task, caplog):
    text = task.recipe() + "  - !QuantizationModifier {start_epoch: 1.0}\n"
    with pytest.raises(RecipeError, match=r"QuantizationModifier .* unsupported=.skip"):
        MFACPruningCallback(text)
    model = task.model()
    task.fit(model, MFACPruningCallback(text, unsupported="skip", verbose=0))
    assert "QuantizationModifier is not supported and is left out" in caplog.text
    assert_pruned(task, model)


@pytest.mark.once
@pytest.mark.feature("unsupported setups raise errors at fit")
def test_names_in_the_style_of_pytorch_are_told_apart(task):
    with pytest.raises(
        SettingError, match=r"MFACPruningModifier.params: 'body.weight' .*PyTorch's `weight` is a `kernel`"
    ):
        task.fit(task.model(), MFACPruningCallback(task.recipe(params="[body.weight]")))
    callback = MFACPruningCallback(task.recipe(params="[tiny/body]"))
    task.fit(task.model(), callback)
    assert list(callback.masks) == ["tiny/body/kernel"]


@pytest.mark.feature("unsupported setups raise errors at fit")
def test_an_optimizer_that_does_not_train_the_variables_is_refused(task):
    model = task.model()
    other = keras.optimizers.SGD()
    other.build(model.trainable_variables[2:])
    with pytest.raises(ValueError, match=r"does not train .*body.kernel"):
        task.fit(model, MFACPruningCallback(task.recipe(), optimizer=other))


def of_keras_2(name):
    """An object of a user's class, which inherits from one of Keras 2."""
    base = type(name, (), {"__module__": f"tf_keras.src.{name.lower()}", "built": True, "__call__": lambda self: None})
    return type("Mine", (base,), {})()


@pytest.mark.once
@pytest.mark.feature("unsupported setups raise errors at fit")
def test_objects_of_keras_2_and_of_torch_are_refused_by_name_at_the_start(task):
    keys = {"final_sparsity": 0.5, "end_epoch": 1.0}
    of_2 = r"is a \S*Mine of Keras 2 \(tf_keras\), but pruning needs Keras 3: create it with `import keras`"
    callback = MFACPruningCallback(**keys)
    with pytest.raises(TypeError, match=f"the model {of_2}"):
        callback.set_model(of_keras_2("Sequential"))  # what its fit begins with
    with pytest.raises(TypeError, match=f"the model {of_2}"):
        prune_one_shot(of_keras_2("Functional"), [task.batch(0)], "mse", final_sparsity=0.5)
    with pytest.raises(TypeError, match=f"the optimizer {of_2}"):
        MFACPruningCallback(**keys, optimizer=of_keras_2("Adam"))
    with pytest.raises(TypeError, match=f"the loss {of_2}"):
        MFACPruningCallback(**keys, sampler=[task.batch(0)], loss=of_keras_2("Loss"))
    with pytest.raises(TypeError, match=f"the loss {of_2}"):
        prune_one_shot(task.model(), [task.batch(0)], of_keras_2("Loss"), final_sparsity=0.5)
    with pytest.raises(
        TypeError, match=r"follows the optimizer .* it is a builtins.str; .* keras.optimizers.Optimizer"
    ):
        MFACPruningCallback(**keys, optimizer="adam")
    with pytest.raises(
        TypeError, match=r"the model is a builtins.NoneType, but pruning needs a keras.Model of Keras 3"
    ):
        prune_one_shot(None, [task.batch(0)], final_sparsity=0.5)


@pytest.mark.feature("unsupported setups raise errors at fit")
@pytest.mark.backends("torch")
def test_a_torch_module_is_sent_to_the_other_adapter(task):
    import torch

    with pytest.raises(TypeError, match=r"torch.nn.modules.linear.Linear, .* use mfac_torch"):
        prune_one_shot(torch.nn.Linear(4, 4), [task.batch(0)], final_sparsity=0.5)


@pytest.mark.once
@pytest.mark.feature("logs, progress lines, TensorBoard")
@pytest.mark.parametrize("several", [False, True])
def test_each_line_says_what_it_is_about(task, caplog, several):
    paths = ["tiny/body/kernel", "tiny/head/kernel"] if several else ["tiny/body/kernel"]
    one = task.recipe("MagnitudePruningModifier", params="[tiny/body/kernel]")
    other = task.recipe("MagnitudePruningModifier", params="[tiny/head/kernel]").partition("\n")[2]
    with caplog.at_level(logging.INFO, logger="mfac_keras"):
        task.fit(task.model(), MFACPruningCallback(one + other * several, verbose=0), epochs=2)
    messages = [record.getMessage() for record in caplog.records]
    names = [f"MagnitudePruningModifier {number}: " if several else "" for number in (1, 2)]
    for name, path in zip(names, paths, strict=False):
        about = f"({name}{path})"
        assert sum(each.startswith("pruning step") and each.endswith(about) for each in messages) == 2
        ended = f"fit ended at epoch 2.00 without the pruning step of epoch 3 {about}: sparsity is"
        assert sum(each.startswith(ended) for each in messages) == 1


@pytest.mark.once
@pytest.mark.feature("logs, progress lines, TensorBoard")
def test_what_will_hardly_go_as_it_was_meant_is_warned_of_when_training_begins(task, caplog):
    task.fit(task.model(), MFACPruningCallback(task.recipe(num_grads=7), verbose=0), epochs=2)
    assert "has 5 of 7 gradient samples" in caplog.text
    assert "final_sparsity 0.75 is not reached" in caplog.text


@pytest.mark.feature("logs, progress lines, TensorBoard")
def test_each_pruning_step_is_one_line(task, capsys, caplog):
    with caplog.at_level(logging.INFO, logger="mfac_keras"):
        task.fit(task.model(), MFACPruningCallback(task.recipe()))
    printed = [line for line in capsys.readouterr().out.splitlines() if line]
    plan, advice, *logged = [record.getMessage() for record in caplog.records if record.name == "mfac_keras"]
    assert "in one pass within each layer" in advice
    steps = "3 pruning steps from epoch 1 (step 5), sparsity 0.2, to epoch 3 (step 15), sparsity 0.75"
    assert plan.endswith(f"{steps}; computed on cpu (the recipe names no devices: computed where the weights are)")
    assert printed == logged
    assert len(printed) == 3
    assert printed[0].startswith("pruning step at epoch 1.00 (step 5): sparsity 0.2083, 3 gradient samples, predicted")
    task.fit(task.model(), MFACPruningCallback(task.recipe(), verbose=0))
    assert not capsys.readouterr().out


@pytest.mark.feature("logs, progress lines, TensorBoard")
def test_damping_auto_is_measured_at_each_pruning_step_and_named_in_its_line(task, capsys):
    task.fit(task.model(), MFACPruningCallback(task.recipe(damp="auto")))
    printed = [line for line in capsys.readouterr().out.splitlines() if line]
    named = [
        re.search(r"damping (\S+ to \S+), predicted loss increase \S+ \(in-sample\), \d", line) for line in printed
    ]
    assert all(named)
    assert len({found[1] for found in named}) == 3


class Seen(keras.callbacks.Callback):
    """Keeps the logs of each epoch."""

    def __init__(self):
        super().__init__()
        self.logs = []

    def on_epoch_end(self, epoch, logs=None):
        self.logs.append(dict(logs))


@pytest.mark.feature("logs, progress lines, TensorBoard")
def test_callbacks_before_and_after_see_the_sparsity_and_the_same_metrics(task):
    plain = Seen()
    task.fit(task.model(metrics=["mae"]), plain, validation_data=task.batch(0))
    before, after = Seen(), Seen()
    pruning = MFACPruningCallback(task.recipe(), verbose=0)
    history = task.fit(task.model(metrics=["mae"]), before, pruning, after, validation_data=task.batch(0))
    assert before.logs == after.logs
    assert [logs["sparsity"] for logs in before.logs] == history.history["sparsity"]
    assert all(set(logs) == {"loss", "mae", "val_loss", "val_mae", "sparsity"} for logs in before.logs)
    assert before.logs[0]["loss"] == pytest.approx(plain.logs[0]["loss"], rel=1e-5)


@pytest.mark.once
@pytest.mark.feature("logs, progress lines, TensorBoard")
@pytest.mark.parametrize("first", [True, False])
def test_tensorboard_gets_the_sparsity(task, tmp_path, first):
    pytest.importorskip("tensorboard")
    pytest.importorskip("tensorflow")
    board = keras.callbacks.TensorBoard(tmp_path)
    pruning = MFACPruningCallback(task.recipe(), verbose=0)
    task.fit(task.model(), *([board, pruning] if first else [pruning, board]))
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("events*"))
    assert b"epoch_sparsity" in written


@pytest.mark.feature("EarlyStopping and ModelCheckpoint alongside")
@pytest.mark.parametrize("first", [True, False])
def test_early_stopping_that_puts_dense_weights_back_is_told(task, caplog, first):
    stopping = keras.callbacks.EarlyStopping("sparsity", mode="min", patience=9, restore_best_weights=True)
    pruning = MFACPruningCallback(task.recipe(), verbose=0)
    model = task.model()
    task.fit(model, *([stopping, pruning] if first else [pruning, stopping]))
    assert all(np.count_nonzero(kernel == 0) < 0.3 * kernel.size for kernel in task.kernels(model).values())
    assert caplog.text.count("denser weights at the end of fit") == 1
    assert pruning.sparsity < 0.3


@pytest.mark.once
@pytest.mark.feature("EarlyStopping and ModelCheckpoint alongside")
@pytest.mark.parametrize("first", [True, False])
def test_early_stopping_after_the_schedule_keeps_the_zeros(task, caplog, first):
    stopping = keras.callbacks.EarlyStopping("loss", patience=1, restore_best_weights=True, start_from_epoch=3)
    pruning = MFACPruningCallback(task.recipe(init_sparsity=0.5), verbose=0)
    model = task.model()
    task.fit(model, *([stopping, pruning] if first else [pruning, stopping]), epochs=6)
    assert_pruned(task, model)
    assert not caplog.text


@pytest.mark.feature("EarlyStopping and ModelCheckpoint alongside")
@pytest.mark.parametrize("first", [True, False])
def test_a_model_saved_while_it_is_pruned_loads_plain(task, tmp_path, first):
    checkpoint = keras.callbacks.ModelCheckpoint(str(tmp_path / "{epoch}_{sparsity:.2f}.keras"))
    pruning = MFACPruningCallback(task.recipe(), verbose=0)
    model = task.model()
    task.fit(model, *([checkpoint, pruning] if first else [pruning, checkpoint]))
    assert sorted(path.name for path in tmp_path.iterdir())[-1] == "4_0.75.keras"
    loaded = keras.models.load_model(next(tmp_path.glob("3_*.keras")), safe_mode=True)
    assert_pruned(task, loaded)
    assert len(loaded.optimizer.variables) == len(model.optimizer.variables)
    assert int(loaded.optimizer.iterations.numpy()) == 15


@pytest.mark.feature("SwapEMAWeights alongside")
@pytest.mark.parametrize("first", [True, False])
def test_averages_swapped_in_for_an_evaluation_are_zero_where_pruned(task, first):
    found = []

    class Look(keras.callbacks.Callback):
        def on_test_batch_end(self, batch, logs=None):
            for name, mask in pruning.masks.items():
                found.append(np.count_nonzero(task.kernels(self.model)[name][~mask]))

    swap = keras.callbacks.SwapEMAWeights()
    pruning = MFACPruningCallback(task.recipe(), verbose=0)
    model = task.model(keras.optimizers.Adam(0.01, use_ema=True, ema_momentum=0.5))
    order = [swap, pruning, Look()] if first else [pruning, swap, Look()]
    task.fit(model, *order, validation_data=task.batch(0))
    assert found
    assert not any(found)
    assert_pruned(task, model)


def assert_plain(model, *, trained=True):
    from mfac_keras.optimizers import innermost

    for owner in (model, model.optimizer, *innermost(model.optimizer)):
        assert not {"apply", "stateless_apply", "make_train_function", "_get_metrics_result_or_logs"} & set(vars(owner))
    assert not trained or model.train_function is None


@pytest.mark.feature("the model is plain after fit: save, export, fit again")
def test_the_model_is_plain_after_fit(task, tmp_path):
    model, plain = task.model(), task.model()
    config = model.get_config(), model.optimizer.get_config()
    task.fit(model, MFACPruningCallback(task.recipe(), verbose=0))
    task.fit(plain)
    assert_plain(model)
    assert (model.get_config(), model.optimizer.get_config()) == config
    assert [v.name for v in model.optimizer.variables] == [v.name for v in plain.optimizer.variables]
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras", safe_mode=True)
    np.testing.assert_allclose(loaded.predict(task.x, verbose=0), model.predict(task.x, verbose=0), rtol=1e-5)
    before = model.get_weights()
    task.fit(model, epochs=2)
    assert sum(np.count_nonzero(w == 0) for w in model.get_weights()) == 0
    assert not all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))


@pytest.mark.feature("the model is plain after fit: save, export, fit again")
@pytest.mark.backends("tensorflow", "jax")
@pytest.mark.filterwarnings("ignore:The `native_serialization` parameter:DeprecationWarning")  # Keras on JAX passes it
def test_a_pruned_model_exports(task, tmp_path):
    tf = pytest.importorskip("tensorflow")
    model = task.model()
    task.fit(model, MFACPruningCallback(task.recipe(), verbose=0))
    model.export(tmp_path / "saved", verbose=False)
    exported = tf.saved_model.load(str(tmp_path / "saved"))
    served = exported.serve(task.x)
    np.testing.assert_allclose(served, model.predict(task.x, batch_size=80, verbose=0), rtol=1e-4, atol=1e-5)


class Interrupt(keras.callbacks.Callback):
    """Raises at a step, from a callback."""

    def __init__(self, error, at):
        super().__init__()
        self.error, self.left = error, at

    def on_train_batch_begin(self, batch, logs=None):
        self.left -= 1
        if self.left == 0:
            raise self.error


@pytest.mark.feature("an interrupted fit leaves no active hook")
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("no")], ids=["KeyboardInterrupt", "exception"])
def test_a_fit_after_an_interrupted_one_is_a_normal_fit(task, error):
    model = task.model()
    pruning = MFACPruningCallback(task.recipe(), verbose=0)
    with pytest.raises(type(error)):
        task.fit(model, pruning, Interrupt(error, 8))
    assert pruning.sparsity == pytest.approx(0.2, abs=0.02)
    history = task.fit(model, epochs=2)
    assert set(history.history) == {"loss"}
    assert sum(np.count_nonzero(w == 0) for w in model.get_weights()) == 0
    pruning.close()
    model.train_function = None
    assert_plain(model)
    task.fit(model, pruning)
    assert_pruned(task, model)
    task.fit(model, MFACPruningCallback(task.recipe(), verbose=0))
    assert_pruned(task, model)


@pytest.mark.feature("an interrupted fit leaves no active hook")
def test_an_error_inside_the_step_takes_the_hooks_away(task):
    model = task.model()

    class Broken(keras.utils.PyDataset):
        def __len__(self):
            return 5

        def __getitem__(self, index):
            x, y = task.batch(index)
            return (x, y) if index < 3 else (x[:, :2], y)

    with pytest.raises(Exception):  # noqa: B017  # each backend has its own
        model.fit(Broken(), epochs=1, verbose=0, shuffle=False, callbacks=[MFACPruningCallback(task.recipe())])
    assert_plain(model)


@pytest.mark.feature("an interrupted fit leaves no active hook")
def test_a_callback_that_trains_meanwhile_is_told(task):
    class Meddle(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.train_on_batch(*task.batch(0))

    with pytest.raises(RuntimeError, match="pruning hooks were removed"):
        task.fit(task.model(), MFACPruningCallback(task.recipe(), verbose=0), Meddle())


def known(task):
    import tensorflow as tf

    return tf.data.Dataset.from_tensor_slices((task.x, task.y)).batch(16)


def repeated(task):
    return known(task).repeat()


def unknown(task):
    return known(task).filter(lambda x, y: True)


def py_dataset(task):
    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 5

        def __getitem__(self, index):
            return task.batch(index)

    return Batches()


def generator(task):
    while True:
        for number in range(5):
            yield task.batch(number)


@pytest.mark.feature("NumPy, tf.data, PyDataset and generator input")
@pytest.mark.parametrize(
    ("make", "options"),
    [(known, {}), (repeated, {"steps_per_epoch": 5}), (py_dataset, {}), (generator, {"steps_per_epoch": 5})],
)
def test_every_kind_of_input_gives_the_same_run(task, make, options):
    if make in {known, repeated}:
        pytest.importorskip("tensorflow")
    model, plain = task.model(), task.model()
    pruning = MFACPruningCallback(task.recipe(), verbose=0)
    model.fit(make(task), epochs=4, verbose=0, shuffle=False, callbacks=[pruning], **options)
    task.fit(plain, MFACPruningCallback(task.recipe(), verbose=0))
    for one, other in zip(model.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.feature("data of unknown length")
@pytest.mark.filterwarnings("ignore:Your input ran out of data:UserWarning")
def test_data_of_unknown_length_prune_from_the_second_epoch_on(task):
    pytest.importorskip("tensorflow")
    model = task.model()
    pruning = MFACPruningCallback(task.recipe(), verbose=0)
    history = model.fit(unknown(task), epochs=4, verbose=0, shuffle=False, callbacks=[pruning])
    assert_pruned(task, model)
    assert history.history["sparsity"] == pytest.approx([0.0, 0.68, 0.75, 0.75], abs=0.02)


@pytest.mark.feature("data of unknown length")
@pytest.mark.filterwarnings("ignore:Your input ran out of data:UserWarning")
def test_weights_pruned_after_the_last_batch_of_data_of_unknown_length_stay_pruned(task):
    pytest.importorskip("tensorflow")
    model = task.model()
    pruning = MFACPruningCallback(task.recipe(start_epoch=2.0, end_epoch=2.0), steps_per_epoch=5, verbose=0)
    model.fit(unknown(task), epochs=2, verbose=0, shuffle=False, callbacks=[pruning])
    assert_pruned(task, model)


@pytest.mark.feature("data of unknown length")
@pytest.mark.filterwarnings("ignore:Your input ran out of data:UserWarning")
def test_a_single_epoch_of_unknown_length_says_that_nothing_was_pruned(task, caplog):
    pytest.importorskip("tensorflow")
    task.model().fit(unknown(task), verbose=0, shuffle=False, callbacks=[MFACPruningCallback(task.recipe())])
    assert "fit ended before pruning began" in caplog.text


@pytest.mark.feature("partial last batches")
@pytest.mark.parametrize("steps", [1, 2])
def test_a_partial_last_batch_counts_as_a_step(task, steps):
    if steps > 1 and keras.backend.backend() == "torch":
        pytest.skip("the torch backend has one step per execution")
    model = task.model(steps_per_execution=steps)
    pruning = MFACPruningCallback(task.recipe(), verbose=0)
    history = task.fit(model, pruning, batch_size=17)
    assert_pruned(task, model)
    assert history.history["sparsity"][0] == pytest.approx(0.2, abs=0.02)


def subclassed():
    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.body = keras.layers.Dense(8, activation="tanh")
            self.head = keras.layers.Dense(3)

        def call(self, inputs):
            return self.head(self.body(inputs))

    return Net()


def functional():
    inputs = keras.Input([6])
    return keras.Model(inputs, keras.layers.Dense(3)(keras.layers.Dense(8, activation="tanh")(inputs)))


def unbuilt():
    return keras.Sequential([keras.layers.Dense(8, activation="tanh"), keras.layers.Dense(3)])


def custom_step():
    if keras.backend.backend() == "jax":

        class Net(keras.Sequential):
            def train_step(self, state, data):
                logs, state = super().train_step(state, data)
                return {**logs, "mine": logs["loss"] * 2}, state

    else:

        class Net(keras.Sequential):
            def train_step(self, data):
                logs = super().train_step(data)
                return {**logs, "mine": logs["loss"] * 2}

    return Net([keras.Input([6]), keras.layers.Dense(8, activation="tanh"), keras.layers.Dense(3)])


@pytest.mark.feature("Sequential, functional and subclassed models")
@pytest.mark.parametrize("make", [subclassed, functional, unbuilt])
def test_every_kind_of_model(task, watch, make):
    model = make()
    model.compile("adam", "mse")
    pruning = MFACPruningCallback(task.recipe(), verbose=0)
    watching = watch(pruning)
    task.fit(model, pruning, watching)
    assert_pruned(task, model)
    assert watching.grown == 0
    assert watching.steps > 10


@pytest.mark.feature("a custom train_step")
def test_a_custom_train_step_is_kept(task):
    model = custom_step()
    model.compile("adam", "mse")
    history = task.fit(model, MFACPruningCallback(task.recipe(), verbose=0))
    assert_pruned(task, model)
    assert history.history["mine"] == pytest.approx([2 * loss for loss in history.history["loss"]], rel=1e-5)
    assert history.history["sparsity"][-1] == pytest.approx(0.75, abs=0.01)


@pytest.mark.feature("a custom train_step")
@pytest.mark.backends("tensorflow")
def test_a_train_step_that_does_not_use_the_optimizer_is_told(task):
    class Still(keras.Sequential):
        def train_step(self, data):
            return {"loss": self.compute_loss(data[0], data[1], self(data[0]))}

    model = Still([keras.Input([6]), keras.layers.Dense(3)])
    model.compile("sgd", "mse")
    with pytest.raises(RuntimeError, match="does not pass its gradients to"):
        task.fit(model, MFACPruningCallback(task.recipe()))


@pytest.mark.feature("Embedding (sparse gradients), recurrent layers, MultiHeadAttention")
def test_embeddings_recurrent_layers_and_attention(task, watch):
    inputs = keras.Input([5], dtype="int32")
    x = keras.layers.Embedding(12, 8)(inputs)
    x = keras.layers.MultiHeadAttention(2, 4)(x, x)
    x = keras.layers.LSTM(4)(x)
    model = keras.Model(inputs, keras.layers.Dense(3)(x))
    model.compile("adam", "mse")
    pruning = MFACPruningCallback(
        task.recipe(params="[__ALL_PRUNABLE__, 're:.*embeddings', 're:.*recurrent_kernel', 're:.*lstm_cell/kernel']"),
        verbose=0,
    )
    watching = watch(pruning)
    tokens = np.random.default_rng(0).integers(0, 12, (80, 5))
    model.fit(tokens, task.y, batch_size=16, epochs=4, shuffle=False, verbose=0, callbacks=[pruning, watching])
    assert len(pruning.masks) == 8
    assert all(np.count_nonzero(~mask) == round(0.75 * mask.size) for mask in pruning.masks.values())
    assert watching.steps > 10
    assert watching.grown == 0
    assert sum(watching.optimizer_state.values()) == 0


@pytest.mark.once
@pytest.mark.parametrize("steps", [0, -3, 2.5, "ten", True])
def test_steps_per_epoch_that_is_no_positive_integer_is_refused_at_once(task, steps):
    with pytest.raises(SettingError, match=f"{steps!r} must be a positive integer"):
        MFACPruningCallback(task.recipe(), steps_per_epoch=steps)


@pytest.mark.once
def test_steps_per_epoch_that_keras_knows_otherwise_is_refused_before_training(task):
    model = task.model()
    before = model.get_weights()
    with pytest.raises(ValueError, match="got steps_per_epoch=100, but an epoch of this fit has 5 steps"):
        task.fit(model, MFACPruningCallback(task.recipe(), steps_per_epoch=100))
    for weights, now in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(weights, now)


@pytest.mark.parametrize(("verbose", "prints"), [("auto", True), (2, True), (0, False)])
def test_verbose_takes_what_fit_takes(task, capsys, verbose, prints):
    prune_one_shot(task.model(), [task.batch(0)], "mse", sparsity=0.5, num_grads=4, verbose=verbose)
    assert ("pruning step" in capsys.readouterr().out) == prints


@pytest.mark.parametrize("verbose", ["yes", None, 3])
def test_a_verbose_that_fit_does_not_take_is_refused(verbose):
    with pytest.raises(TypeError, match="verbose is .*; pass 1 or 'auto'"):
        MFACPruningCallback(final_sparsity=0.5, end_epoch=1, verbose=verbose)
