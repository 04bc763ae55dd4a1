"""What is reported is what the weights are: whoever writes other weights, and whichever optimizer trains."""

import numpy as np
import pytest

keras = pytest.importorskip("keras", reason="needs Keras: pip install 'mfac-core[keras]'")

from mfac_keras import MFACPruningCallback  # noqa: E402

pytestmark = pytest.mark.feature("zeros are counted from the weights")

EARLY = "restored earlier, denser weights at the end of fit"
MEANWHILE = "Other code has written to the model between two training steps"
FOLLOWED = "does not pass the gradients of"


def zeros_of(task, model):
    kernels = task.kernels(model).values()
    return sum(np.count_nonzero(kernel == 0) for kernel in kernels) / sum(kernel.size for kernel in kernels)


def magnitude(task, **keys):
    return task.recipe("MagnitudePruningModifier", **keys)


class RestoresAtTheEnd(keras.callbacks.Callback):
    """Puts the weights back that the model had at the begin of fit, some other way than EarlyStopping."""

    def on_train_begin(self, logs=None):
        self.before = self.model.get_weights()

    def on_train_end(self, logs=None):
        for weight, value in zip(self.model.weights, self.before, strict=True):
            weight.assign(value)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(("restoring", "verbose"), [("EarlyStopping", 0), ("RestoresAtTheEnd", 2)])
def test_weights_put_back_at_the_end_are_reported_in_either_order(task, caplog, first, verbose, restoring):
    stopping = {
        "EarlyStopping": lambda: keras.callbacks.EarlyStopping(
            "sparsity", mode="min", patience=9, restore_best_weights=True
        ),
        "RestoresAtTheEnd": RestoresAtTheEnd,
    }[restoring]()
    pruning = MFACPruningCallback(magnitude(task), verbose=0)
    model = task.model()
    history = task.fit(model, *([stopping, pruning] if first else [pruning, stopping]), verbose=verbose)
    left = zeros_of(task, model)
    assert left < 0.3
    assert pruning.sparsity == pytest.approx(left)
    assert caplog.text.count(EARLY) == 1
    assert "but 0.7500 according to the masks" in caplog.text
    assert "tiny/body/kernel" in caplog.text
    assert "start_from_epoch" in caplog.text
    assert "on_train_end" not in vars(history)  # nothing leaks into what fit has returned


def test_a_later_fit_knows_nothing_of_an_earlier_one(task, caplog):
    model = task.model()
    history = keras.callbacks.History()
    pruning = MFACPruningCallback(magnitude(task), verbose=0)
    task.fit(model, pruning, history)
    task.fit(model, history, epochs=1)
    assert not caplog.text
    assert pruning.sparsity == zeros_of(task, model) == 0  # trained without the callback, they have grown back


def test_an_interrupted_fit_leaves_nothing_that_warns_later(task, caplog):
    class Stops(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise KeyboardInterrupt

    model, history = task.model(), keras.callbacks.History()
    pruning = MFACPruningCallback(magnitude(task), verbose=0)
    with pytest.raises(KeyboardInterrupt):
        task.fit(model, pruning, Stops(), history)
    model.set_weights([weight + 1 for weight in model.get_weights()])
    assert pruning.sparsity == 0
    caplog.clear()
    task.fit(model, history, epochs=1)
    assert not caplog.text


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("hook", ["on_epoch_begin", "on_epoch_end"])
def test_weights_written_between_two_epochs_are_warned_of_before_they_are_zeroed(task, caplog, first, hook):
    class Writes(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            self.before = self.model.get_weights()

    def write(self, epoch, logs=None):
        if epoch == 2:
            self.model.set_weights(self.before)

    setattr(Writes, hook, write)
    pruning = MFACPruningCallback(magnitude(task, end_epoch=2.0), verbose=0)
    model = task.model()
    history = task.fit(model, *([Writes(), pruning] if first else [pruning, Writes()]), epochs=5)
    assert caplog.text.count(MEANWHILE) == 1
    assert "The next training step sets these weights to zero" in caplog.text
    assert zeros_of(task, model) == pruning.sparsity == 0.75
    reported = history.history["sparsity"]
    assert reported[3:] == [0.75, 0.75]
    if first and hook == "on_epoch_end":
        assert reported[2] == 0  # what History, the last of all, was told


def test_a_run_in_which_nobody_meddles_warns_of_nothing(task, caplog):
    pruning = MFACPruningCallback(task.recipe(init_sparsity=0.5), verbose=0)
    task.fit(task.model(), pruning, keras.callbacks.EarlyStopping("loss", patience=9), epochs=5)
    assert not caplog.text
    assert pruning.sparsity == 0.75


def test_a_fit_that_begins_anew_tells_the_sparsity_that_is_there(task, caplog):
    model = task.model()
    pruning = MFACPruningCallback(magnitude(task), verbose=0)
    task.fit(model, pruning)
    model.set_weights([weight + 1 for weight in model.get_weights()])
    task.fit(model, pruning, epochs=1)
    assert "starts over" not in caplog.text  # there was no zero to release


# --- an optimizer that nobody follows


def updates_by(get_optimizer):
    """A class of models whose training step asks ``get_optimizer(model)`` for its optimizer."""
    backend = keras.backend.backend()

    class Net(keras.Sequential):
        pass

    def loss_of(model, x, y):
        return keras.ops.mean(keras.ops.square(model(x, training=True) - y))

    if backend == "tensorflow":
        import tensorflow as tf

        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                loss = loss_of(self, x, y)
            weights = self.trainable_weights
            get_optimizer(self).apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
            return {"loss": loss}

    elif backend == "torch":
        import torch

        def train_step(self, data):
            x, y = data
            self.zero_grad()
            loss = loss_of(self, x, y)
            loss.backward()
            weights = self.trainable_weights
            with torch.no_grad():
                get_optimizer(self).apply([weight.value.grad for weight in weights], weights)
            return {"loss": loss}

    else:
        import jax

        def train_step(self, state, data):
            trainable, rest, slots, metrics = state
            x, y = data[:2]

            def loss(values):
                predicted, _ = self.stateless_call(values, rest, x, training=True)
                return keras.ops.mean(keras.ops.square(predicted - y))

            value, gradients = jax.value_and_grad(loss)(trainable)
            optimizer = get_optimizer(self)
            if optimizer is self.optimizer:
                trainable, slots = optimizer.stateless_apply(slots, gradients, trainable)
            else:  # of the kind that remembers nothing
                own = [variable.value for variable in optimizer.variables]
                trainable, _ = optimizer.stateless_apply(own, gradients, trainable)
            return {"loss": value}, (trainable, rest, slots, metrics)

    Net.train_step = train_step
    return Net


def net(task, get_optimizer, **compile_options):
    layers = [keras.Input([6]), keras.layers.Dense(8, activation="tanh"), keras.layers.Dense(3)]
    model = updates_by(get_optimizer)(layers, name="net")
    model.opt = keras.optimizers.SGD(0.01)
    model.opt.build(model.trainable_variables)
    model.compile(loss="mse", **compile_options)
    return model


MODIFIERS = {
    "magnitude": lambda task: task.recipe("MagnitudePruningModifier"),
    "M-FAC": lambda task: task.recipe(init_sparsity=0.5),
    "constant": lambda task: "modifiers:\n- !ConstantPruningModifier {params: __ALL_PRUNABLE__}\n",
    "AC/DC": lambda task: (
        "modifiers:\n- !ACDCPruningModifier {compression_sparsity: 0.5, start_epoch: 0.0, end_epoch: 4.0, params: "
        "__ALL_PRUNABLE__}\n"
    ),
}


class Counts(keras.callbacks.Callback):
    """Counts training steps."""

    steps = 0

    def on_train_batch_begin(self, batch, logs=None):
        self.steps += 1


@pytest.mark.parametrize("run_eagerly", [False, True])
@pytest.mark.parametrize("modifier", MODIFIERS)
def test_an_optimizer_that_is_not_followed_is_refused_after_the_first_step(task, modifier, run_eagerly):
    model = net(task, lambda model: model.opt, run_eagerly=run_eagerly)
    if modifier == "constant":
        kernel = model.layers[0].kernel
        kernel.assign(np.where(np.arange(8) % 2, kernel.numpy(), 0))
    counts = Counts()
    with pytest.raises(RuntimeError, match=rf"{FOLLOWED} net/.*kernel.* to rm_?sprop\w*: call apply .* as optimizer="):
        task.fit(model, counts, MFACPruningCallback(MODIFIERS[modifier](task), verbose=0))
    assert counts.steps == 1
    assert not {"apply", "make_train_function"} & (set(vars(model)) | set(vars(model.optimizer)))


@pytest.mark.parametrize("modifier", MODIFIERS)
def test_the_optimizer_that_trains_can_be_passed(task, modifier, caplog):
    model = net(task, lambda model: model.opt)
    if keras.backend.backend() == "jax":
        model.compile(model.opt, "mse")  # its state is that of the model's optimizer
    pruning = MFACPruningCallback(MODIFIERS[modifier](task), optimizer=model.opt, verbose=0)
    task.fit(model, pruning)
    assert zeros_of(task, model) == pruning.sparsity
    assert pruning.sparsity == {"magnitude": 0.75, "M-FAC": 0.75, "constant": 0, "AC/DC": 0.5}[modifier]
    assert not caplog.text


def test_an_optimizer_that_trains_only_a_part_of_the_scope_is_refused(task):
    class Both:
        def __init__(self, model):
            self.model = model

        def apply(self, gradients, weights):
            self.model.optimizer.apply(gradients[:2], weights[:2])
            self.model.opt.apply(gradients[2:], weights[2:])

        def apply_gradients(self, pairs):
            self.apply(*map(list, zip(*pairs, strict=True)))

    if keras.backend.backend() == "jax":
        pytest.skip("an optimizer of JAX gives all variables back")
    model = net(task, Both)
    head = model.layers[-1].kernel.path
    with pytest.raises(RuntimeError, match=f"{FOLLOWED} {head} to rm_?sprop"):
        task.fit(model, MFACPruningCallback(magnitude(task), verbose=0))


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "frozen"},
        {"optimizer": "accumulating"},
        {"optimizer": "scaled"},
        {"steps_per_execution": 2},
        {"run_eagerly": True},
    ],
    ids=lambda options: "-".join(map(str, next(iter(options.items())))),
)
def test_what_trains_as_keras_does_is_never_refused(task, options, caplog):
    if "steps_per_execution" in options and keras.backend.backend() == "torch":
        pytest.skip("the torch backend has one step per execution")
    optimizers = {
        "accumulating": lambda: keras.optimizers.SGD(0.01, gradient_accumulation_steps=2),
        "scaled": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.01), initial_scale=2.0**127),
    }
    kind = options.pop("optimizer", "adam")
    model = task.model(optimizers.get(kind, lambda: "adam")(), **options)
    recipe = magnitude(task)
    if kind == "frozen":  # nothing in scope moves in the first two epochs
        recipe += (
            "  - !TrainableParamsModifier {params: ['re:.*'], trainable: false, start_epoch: 0.0, end_epoch: 2.0}\n"
        )
    pruning = MFACPruningCallback(recipe, verbose=0)
    task.fit(model, pruning)
    assert zeros_of(task, model) == pruning.sparsity == 0.75
    assert "earlier" not in caplog.text


def test_weights_that_nobody_trains_are_pruned_all_the_same(task):
    backend = keras.backend.backend()

    class Nothing:
        def apply(self, gradients, weights):
            pass

        def apply_gradients(self, pairs):
            pass

        variables = ()

        def stateless_apply(self, slots, gradients, trainable):
            return trainable, slots

    model = net(task, lambda model: Nothing(), run_eagerly=backend == "tensorflow")
    pruning = MFACPruningCallback(magnitude(task), verbose=0)
    task.fit(model, pruning)
    assert zeros_of(task, model) == pruning.sparsity == 0.75


@pytest.mark.backends("torch")
def test_an_optimizer_that_replaces_the_one_of_the_model_is_refused(task):
    class Replaces(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                self.model.optimizer = keras.optimizers.SGD(0.01)

    with pytest.raises(RuntimeError, match="another callback replaced model.optimizer during fit"):
        task.fit(task.model(), MFACPruningCallback(magnitude(task), verbose=0), Replaces())


def test_a_model_without_an_optimizer_is_refused_by_name(task):
    model = net(task, lambda model: model.opt, optimizer=None)
    with pytest.raises(
        TypeError, match=r"follows the optimizer that trains the model, but there is none; .*optimizer="
    ):
        task.fit(model, MFACPruningCallback(magnitude(task), verbose=0))


# --- zeros that are held where nothing moves


@pytest.mark.parametrize("params", ["__ALL_PRUNABLE__", "['re:.*kernel']", "[tiny/body/kernel, tiny/head/kernel]"])
@pytest.mark.parametrize("all_frozen", [False, True])
def test_constant_masks_on_a_frozen_base_are_held_for_free(task, params, all_frozen, caplog):
    model = task.model()
    for layer in model.layers:
        kernel = layer.kernel.numpy()
        kernel.reshape(-1)[::2] = 0
        layer.kernel.assign(kernel)
    model.layers[0].trainable = False
    model.layers[1].kernel.trainable = not all_frozen
    model.compile("adam", "mse")
    pruning = MFACPruningCallback(f"pruning_modifiers:\n  - !ConstantPruningModifier {{params: {params}}}\n", verbose=0)
    history = task.fit(model, pruning, epochs=2)
    assert set(pruning.masks) == {"tiny/body/kernel", "tiny/head/kernel"}
    kernels = [layer.kernel.numpy() for layer in model.layers]
    assert [np.count_nonzero(kernel == 0) / kernel.size for kernel in kernels] == [0.5, 0.5]
    assert history.history["sparsity"] == [0.5, 0.5]
    assert pruning.sparsity == 0.5
    assert not caplog.text


def test_a_frozen_base_is_held_while_the_head_is_pruned(task):
    model = task.model()
    base = model.layers[0]
    base.kernel.assign(np.where(np.arange(8) % 2, base.kernel.numpy(), 0))
    base.trainable = False
    model.compile("adam", "mse")
    recipe = task.recipe(params="[tiny/head/kernel]") + "  - !ConstantPruningModifier {params: [tiny/body/kernel]}\n"
    pruning = MFACPruningCallback(recipe, verbose=0)
    task.fit(model, pruning)
    assert [np.mean(layer.kernel.numpy() == 0) for layer in model.layers] == [0.5, 0.75]
    assert pruning.sparsity == pytest.approx((24 + 18) / 72)


class Distiller(keras.Model):
    """Trains a student, and has a teacher that nobody has frozen."""

    def __init__(self, task):
        super().__init__()
        self.student, self.teacher = (self.network(name) for name in ("student", "teacher"))
        self.compile("adam", "mse")
        self(task.x)

    @staticmethod
    def network(name):
        return keras.Sequential([keras.Input([6]), keras.layers.Dense(8), keras.layers.Dense(3)], name=name)

    def call(self, x):
        return self.student(x)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        taught = keras.ops.stop_gradient(self.teacher(x))
        return keras.ops.mean((y - y_pred) ** 2) + keras.ops.mean((taught - y_pred) ** 2)


@pytest.mark.filterwarnings("ignore:Gradients do not exist:UserWarning")
@pytest.mark.parametrize("start_epoch", [0.0, 1.0])
def test_weights_that_nothing_trains_are_named_once(task, caplog, start_epoch):
    task.fit(Distiller(task), MFACPruningCallback(magnitude(task, start_epoch=start_epoch), verbose=0))
    warned = [record.getMessage() for record in caplog.records if "training has not changed" in record.getMessage()]
    assert len(warned) == 1
    assert "teacher" in warned[0]
    assert "student" not in warned[0]


@pytest.mark.filterwarnings("ignore:Gradients do not exist:UserWarning")
def test_weights_that_a_recipe_freezes_or_that_are_out_of_scope_are_not_named_as_untrained(task, caplog):
    frozen = "  - !TrainableParamsModifier {params: [head], trainable: false}\n"
    task.fit(task.model(), MFACPruningCallback(magnitude(task, params="[body, head]") + frozen, verbose=0))
    task.fit(Distiller(task), MFACPruningCallback(magnitude(task, params="[student]"), verbose=0))
    assert "training has not changed" not in caplog.text


def test_zeros_that_are_held_below_an_adapter_are_no_sparsity_of_the_layer(task, caplog):
    model = task.model()
    task.fit(model, MFACPruningCallback(magnitude(task), verbose=0))
    model.get_layer("body").enable_lora(2)
    model.compile("adam", "mse")
    caplog.clear()
    hold = "pruning_modifiers:\n  - !ConstantPruningModifier {params: __ALL_PRUNABLE__}\n"
    task.fit(model, MFACPruningCallback(hold, verbose=0))
    warned = [record.getMessage() for record in caplog.records if "low-rank adapters" in record.getMessage()]
    assert len(warned) == 1
    assert "tiny/body/kernel" in warned[0]
    assert "head" not in warned[0]
