import numpy as np
import pytest

keras = pytest.importorskip("keras", reason="needs Keras: pip install 'mfac-core[keras]'")

from mfac_keras import MFACPruningCallback  # noqa: E402

OPTIMIZERS = {
    "SGD": {},
    "SGD nesterov": {"momentum": 0.9, "nesterov": True},
    "Adam": {"amsgrad": True},
    "AdamW": {},
    "RMSprop": {"centered": True, "momentum": 0.5},
    "Adagrad": {},
    "Adadelta": {"learning_rate": 0.5},
    "Adamax": {},
    "Nadam": {},
    "Ftrl": {},
    "Lion": {},
    "Lamb": {},
    "Adafactor": {},
    "Muon": {},
    "ScheduleFreeAdamW": {},
}
NEWER = {"ScheduleFreeAdamW"}  # than the oldest Keras that is supported


def optimizer_of(name, **options):
    if name == "Muon" and keras.backend.backend() == "tensorflow" and keras.__version__.startswith("3.12."):
        pytest.skip("keras 3.12 cannot train with Muon on tensorflow: it asks a tf.Variable for its path")
    kind = getattr(keras.optimizers, name.split()[0])
    return kind(**{"learning_rate": 0.01, **OPTIMIZERS[name], **options})


def assert_masks_held(task, watch, model, *, exempt=(), **fit_options):
    """Train with masks, and see that nothing pruned was ever other than zero."""
    pruning = MFACPruningCallback(task.recipe(), verbose=0)
    watching = watch(pruning)
    before = task.kernels(model)
    task.fit(model, pruning, watching, **fit_options)
    assert watching.steps > 2
    assert watching.grown == 0
    assert {path for path, count in watching.optimizer_state.items() if count} <= set(exempt)
    for name, kernel in task.kernels(model).items():
        assert np.count_nonzero(kernel == 0) == round(0.75 * kernel.size), name
        assert not np.array_equal(kernel[kernel != 0], before[name][kernel != 0]), name
    return pruning


@pytest.mark.once
def test_every_optimizer_that_keras_ships_is_tried():
    shipped = {
        name
        for name in dir(keras.optimizers)
        if isinstance(getattr(keras.optimizers, name), type) and name not in {"Optimizer", "OptimizerMap"}
    }
    tried = {name.split()[0] for name in OPTIMIZERS}
    assert shipped - {"LossScaleOptimizer", "MultiOptimizer"} == tried - (NEWER - shipped)


@pytest.mark.feature("masks are enforced inside the step, with every optimizer")
@pytest.mark.needs("MultiOptimizer")
def test_pruned_weights_and_slots_stay_zero(task, watch):
    layers = {name: keras.layers.Dense(6, name=name.replace(" ", "_")) for name in OPTIMIZERS}
    of_layers = {f".*/{layer.name}/kernel": optimizer_of(name) for name, layer in layers.items()}
    optimizer = keras.optimizers.MultiOptimizer(keras.optimizers.OptimizerMap(keras.optimizers.SGD(0.01), of_layers))
    model = task.model(optimizer, hidden=keras.Sequential(list(layers.values())))
    # Adafactor adds a small number to what it remembers of every entry, in each step.
    assert_masks_held(task, watch, model, exempt=[layers["Adafactor"].kernel.path])


@pytest.mark.feature("masks are enforced inside the step, with every optimizer")
@pytest.mark.skipif(hasattr(keras.optimizers, "MultiOptimizer"), reason="MultiOptimizer tries all of them at once")
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.needs(name.split()[0])) for name in OPTIMIZERS])
def test_pruned_weights_and_slots_stay_zero_with_one_optimizer(task, watch, name):
    model = task.model(optimizer_of(name))
    assert_masks_held(task, watch, model, exempt=task.kernels(model) if name == "Adafactor" else [])


@pytest.mark.feature("masks are enforced inside the compiled step")
@pytest.mark.parametrize("jit", [False, "auto"])
def test_masks_hold_in_the_compiled_step(task, watch, jit):
    assert_masks_held(task, watch, task.model(jit_compile=jit))


@pytest.mark.feature("weight decay, clipping, regularizers and constraints are kept")
def test_masks_hold_beside_decay_clipping_regularizers_and_constraints(task, watch):
    hidden = keras.layers.Dense(
        8,
        activation="tanh",
        name="body",
        kernel_regularizer=keras.regularizers.L2(0.1),
        kernel_constraint=keras.constraints.MaxNorm(0.5),
    )
    model = task.model(optimizer_of("AdamW", weight_decay=0.1, global_clipnorm=1.0), hidden=hidden)
    assert_masks_held(task, watch, model)
    assert np.linalg.norm(hidden.kernel.numpy(), axis=0).max() <= 0.5 + 1e-5
    assert isinstance(model.layers[0].kernel_constraint, keras.constraints.MaxNorm)


@pytest.mark.feature("mixed precision (LossScaleOptimizer)")
def test_masks_hold_under_mixed_precision(task, watch):
    hidden = keras.layers.Dense(8, activation="tanh", name="body", dtype="mixed_float16")
    optimizer = keras.optimizers.LossScaleOptimizer(optimizer_of("Adam"), initial_scale=256.0)
    assert_masks_held(task, watch, task.model(optimizer, hidden=hidden))


@pytest.mark.feature("gradient accumulation")
def test_masks_hold_under_gradient_accumulation(task, watch):
    assert_masks_held(task, watch, task.model(optimizer_of("Adam", gradient_accumulation_steps=2)))


@pytest.mark.feature("EMA of the optimizer")
@pytest.mark.parametrize("name", ["Adam", "Muon"])
@pytest.mark.parametrize("every", [None, 3])
def test_averaged_weights_are_zero_where_pruned(task, watch, name, every):
    model = task.model(optimizer_of(name, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=every))
    pruning = assert_masks_held(task, watch, model)
    for name, kernel in task.kernels(model).items():
        assert not kernel[~pruning.masks[name]].any()


@pytest.mark.feature("MultiOptimizer")
@pytest.mark.needs("MultiOptimizer")
def test_masks_hold_with_an_optimizer_per_layer(task, watch):
    optimizers = keras.optimizers.OptimizerMap(optimizer_of("SGD nesterov"), {".*body.*": optimizer_of("Adam")})
    assert_masks_held(task, watch, task.model(keras.optimizers.MultiOptimizer(optimizers)))


def watched_dense():
    """A dense layer that notes how many of its weights each training step finds not to be zero."""

    class WatchedDense(keras.layers.Dense):
        def build(self, input_shape):
            super().build(input_shape)
            self.found = self.add_weight(shape=[40], initializer="zeros", trainable=False, name="found")
            self.calls = self.add_weight(shape=[], initializer="zeros", trainable=False, name="calls", dtype="int32")

        def call(self, inputs, training=None):
            if training:
                count = keras.ops.cast(keras.ops.count_nonzero(keras.ops.convert_to_tensor(self.kernel)), "float32")
                self.found.assign(self.found + count * keras.ops.one_hot(self.calls, 40))
                self.calls.assign(self.calls + 1)
            return super().call(inputs)

    return WatchedDense(8, activation="tanh", name="body")


@pytest.mark.feature("masks are enforced in each step of an execution (steps_per_execution > 1)")
@pytest.mark.backends("tensorflow", "jax")
def test_every_step_of_an_execution_finds_zeros(task):
    hidden = watched_dense()
    model = task.model(hidden=hidden, steps_per_execution=5)
    calls = int(hidden.calls.numpy())
    task.fit(model, MFACPruningCallback(task.recipe(), verbose=0))
    found = hidden.found.numpy()[calls : calls + 20]
    kept = [48] * 5 + [48 - round(48 * 0.2)] * 5
    assert found[:10].tolist() == kept
    assert len(set(found[10:15])) == 1
    assert found[15:].tolist() == [12] * 5


@pytest.mark.feature("no retracing when masks change")
def test_the_step_is_traced_twice_at_most_however_often_masks_change(task):
    traces = []

    class Counting(keras.layers.Dense):
        def call(self, inputs, training=None):
            if training:
                traces.append(1)
            return super().call(inputs)

    model = task.model(hidden=Counting(8, name="body"), jit_compile=keras.backend.backend() == "jax")
    pruning = MFACPruningCallback(task.recipe(update_frequency=0.4, num_grads=1), verbose=0)

    class Mark(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if pruning.sparsity > 0.25 and not self.late:
                self.late = len(traces)

    if keras.backend.backend() == "torch":
        pytest.skip("the torch backend traces nothing: each step runs eagerly")
    mark = Mark()
    mark.late = 0
    task.fit(model, pruning, mark, epochs=5)
    assert mark.late
    assert len(traces) == mark.late


@pytest.mark.feature("no retracing when masks change")
@pytest.mark.backends("jax")
def test_the_step_is_compiled_twice_at_most_however_often_masks_change(task, caplog):
    import jax

    with jax.log_compiles():
        task.fit(task.model(), MFACPruningCallback(task.recipe(update_frequency=0.4, num_grads=1), verbose=0))
    compiled = [record for record in caplog.records if record.getMessage().startswith("Compiling jit(step)")]
    assert len(compiled) == 2


@pytest.mark.feature("masks are released after the end (leave_enabled: false)")
def test_masks_are_released_when_the_recipe_says_so(task):
    model = task.model()
    pruning = MFACPruningCallback(task.recipe(leave_enabled="false", end_epoch=2.0), verbose=0)
    task.fit(model, pruning, epochs=3)
    assert pruning.masks == {}
    assert all(np.count_nonzero(kernel == 0) == 0 for kernel in task.kernels(model).values())
