import logging

import numpy as np
import pytest

keras = pytest.importorskip("keras", reason="needs Keras: pip install 'mfac-core[keras]'")

from mfac_core.backends import Device  # noqa: E402
from mfac_core.backends.numpy_backend import NumpyBackend  # noqa: E402
from mfac_keras import MFACPruningCallback, conversion, prune_one_shot  # noqa: E402
from mfac_keras.backends import current_backend  # noqa: E402
from mfac_keras.live_pruning import KerasPruning  # noqa: E402
from mfac_keras.sampling import GradientSampler  # noqa: E402


@pytest.fixture
def observed(monkeypatch):
    """The rows that reach pruning: step, and name and gradient of each variable."""
    rows = []
    observe = KerasPruning.observe_gradients

    def note(self, step, gradients):
        if self.needs_gradients(step):
            forms = self.forms
            row = {name: forms[name].back(np.array(gradients[id(v)])) for name, v in self.variables.items()}
            rows.append((step, row))
        observe(self, step, gradients)

    monkeypatch.setattr(KerasPruning, "observe_gradients", note)
    return rows


class Weights(keras.callbacks.Callback):
    """Notes the weights before each training step."""

    def __init__(self):
        super().__init__()
        self.before = []

    def on_train_batch_begin(self, batch, logs=None):
        self.before.append([w.copy() for w in self.model.get_weights()])


def reference(task, weights, batch, **model_options):
    """The gradient of a batch in the way of the sampler, at given weights, of a model that nothing hangs on."""
    model = task.model(**model_options)
    model.set_weights(weights)
    variables = [v for v in model.trainable_variables if len(v.shape) > 1]
    return [np.array(each) for each in next(GradientSampler([batch]).gradients(model, variables, 1))]


def assert_rows_are_gradients(task, observed, weights, *, rtol=1e-5, **model_options):
    assert len(observed) == 9
    for step, row in observed:
        expected = reference(task, weights.before[step], task.batch(step % 5), **model_options)
        for found, wanted in zip(row.values(), expected, strict=True):
            np.testing.assert_allclose(found, wanted, rtol=rtol, atol=rtol * np.abs(wanted).max())


@pytest.mark.feature("live gradients of the training batches")
def test_the_window_holds_the_gradients_of_the_training_batches_where_it_wants_them(task, observed):
    weights = Weights()
    task.fit(task.model(), weights, MFACPruningCallback(task.recipe(), verbose=0))
    assert [step for step, _ in observed] == [2, 3, 4, 7, 8, 9, 12, 13, 14]
    assert_rows_are_gradients(task, observed, weights)


class NothingNewToCompile(keras.callbacks.Callback):
    """Has torch.compile fail where it would compile a step once more after the first epoch."""

    def on_epoch_begin(self, epoch, logs=None):
        if epoch and keras.backend.backend() == "torch":
            import torch

            torch.compiler.set_stance("fail_on_recompile")

    def on_train_end(self, logs=None):
        if keras.backend.backend() == "torch":
            import torch

            torch.compiler.set_stance("default")


@pytest.mark.jit_compile
@pytest.mark.timeout(1800)  # a C++ compiler at work
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch[.]", "ignore::UserWarning:torch[.]")
@pytest.mark.feature("jit_compile=True")
def test_gradients_and_masks_where_the_step_is_compiled(task, observed, watch):
    model = task.model(jit_compile=True)
    task.fit(model, epochs=1)  # a compiled step without hooks, which must not be taken for the one with them
    weights, pruning = Weights(), MFACPruningCallback(task.recipe(), verbose=0)
    watching = watch(pruning)
    task.fit(model, weights, pruning, watching, NothingNewToCompile())
    assert_rows_are_gradients(task, observed, weights)
    assert watching.steps == 16
    assert watching.grown == sum(watching.optimizer_state.values()) == 0
    assert pruning.sparsity == 0.75
    masks = pruning.masks
    task.fit(model, epochs=1)  # plain again: pruned weights are free
    assert all(kernel[~masks[name]].all() for name, kernel in task.kernels(model).items())


@pytest.mark.feature("run_eagerly=True")
def test_live_gradients_of_an_eager_model(task, observed):
    weights = Weights()
    model = task.model(run_eagerly=True)
    task.fit(model, weights, MFACPruningCallback(task.recipe(end_epoch=1.0), verbose=0), epochs=2)
    assert [step for step, _ in observed] == [2, 3, 4]
    assert_rows_are_gradients(task, observed * 3, weights)


@pytest.mark.feature("mixed precision (LossScaleOptimizer)")
@pytest.mark.parametrize(
    "how",
    [
        "LossScaleOptimizer",
        "loss_scale_factor",
        pytest.param("MultiOptimizer", marks=pytest.mark.needs("MultiOptimizer")),
    ],
)
def test_rows_are_unscaled(task, observed, how):
    optimizers = keras.optimizers
    optimizer = {
        "LossScaleOptimizer": lambda: optimizers.LossScaleOptimizer(optimizers.SGD(0.01), initial_scale=1024.0),
        "loss_scale_factor": lambda: optimizers.SGD(0.01, loss_scale_factor=512.0),
        "MultiOptimizer": lambda: optimizers.MultiOptimizer(
            optimizers.OptimizerMap(optimizers.SGD(0.01), {".*body.*": optimizers.Adam(0.01)}), loss_scale_factor=512.0
        ),
    }[how]()
    weights = Weights()
    task.fit(task.model(optimizer), weights, MFACPruningCallback(task.recipe(), verbose=0))
    assert_rows_are_gradients(task, observed, weights)


@pytest.mark.feature("mixed precision (LossScaleOptimizer)")
def test_rows_in_half_precision_point_the_right_way(task, observed):
    def hidden():
        return keras.layers.Dense(8, activation="tanh", name="body", dtype="mixed_float16")

    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.01), initial_scale=1024.0)
    weights = Weights()
    task.fit(task.model(optimizer, hidden=hidden()), weights, MFACPruningCallback(task.recipe(), verbose=0))
    for step, row in observed:
        wanted = np.concatenate([each.ravel() for each in reference(task, weights.before[step], task.batch(step % 5))])
        found = np.concatenate([each.ravel() for each in row.values()])
        lengths = np.linalg.norm(found), np.linalg.norm(wanted)
        assert found @ wanted / np.prod(lengths) > 0.99
        assert lengths[0] / lengths[1] == pytest.approx(1, abs=0.02)


@pytest.mark.feature("mixed precision (LossScaleOptimizer)")
def test_a_step_whose_gradients_overflow_leaves_no_row(task, observed, caplog):
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.01), initial_scale=2.0**15)
    model = task.model(optimizer)
    x, y = task.x.copy(), task.y.copy()
    y[3 * task.batch_size] = 1e37  # a batch whose scaled loss is infinite
    task.x, task.y = x, y
    pruning = MFACPruningCallback(task.recipe(end_epoch=1.0), verbose=0)
    task.fit(model, pruning, epochs=1)
    assert len(observed) == 3
    assert "NaN or Inf" in caplog.text
    assert pruning.sparsity == 0.75
    assert all(np.isfinite(kernel).all() for kernel in task.kernels(model).values())


@pytest.mark.feature("gradient accumulation")
def test_each_micro_batch_gives_a_row(task, observed):
    weights = Weights()
    model = task.model(keras.optimizers.SGD(0.01, gradient_accumulation_steps=2))
    task.fit(model, weights, MFACPruningCallback(task.recipe(), verbose=0))
    assert_rows_are_gradients(task, observed, weights)


@pytest.mark.feature("MultiOptimizer")
@pytest.mark.needs("MultiOptimizer")
def test_several_optimizers_give_one_row_for_all(task, observed):
    optimizers = keras.optimizers.OptimizerMap(keras.optimizers.SGD(0.01), {".*body.*": keras.optimizers.Adam(0.01)})
    weights = Weights()
    task.fit(
        task.model(keras.optimizers.MultiOptimizer(optimizers)), weights, MFACPruningCallback(task.recipe(), verbose=0)
    )
    assert_rows_are_gradients(task, observed, weights)


@pytest.mark.feature("weight decay, clipping, regularizers and constraints are kept")
def test_rows_have_the_regularizer_and_no_clipping(task, observed):
    def hidden():
        return keras.layers.Dense(8, activation="tanh", name="body", kernel_regularizer=keras.regularizers.L2(0.3))

    weights = Weights()
    model = task.model(keras.optimizers.SGD(0.01, global_clipnorm=1e-3), hidden=hidden())
    task.fit(model, weights, MFACPruningCallback(task.recipe(), verbose=0))
    assert len(observed) == 9
    for step, row in observed:
        wanted = reference(task, weights.before[step], task.batch(step % 5), hidden=hidden())
        np.testing.assert_allclose(list(row.values())[0], wanted[0], rtol=1e-4, atol=1e-6)
        assert np.linalg.norm(wanted[0]) > 1e-2


@pytest.mark.feature("masks are enforced in each step of an execution (steps_per_execution > 1)")
@pytest.mark.backends("tensorflow", "jax")
@pytest.mark.parametrize("jit", [False, True])
def test_each_step_of_an_execution_gives_a_row_of_its_own(task, observed, jit):
    # without pruning in between, the weights at each step are those of a plain run
    weights = Weights()
    task.fit(task.model("sgd"), weights, epochs=2)
    model = task.model("sgd", steps_per_execution=3, jit_compile=jit)
    pruning = MFACPruningCallback(task.recipe(start_epoch=2.0, end_epoch=2.0, num_grads=7), verbose=0)
    task.fit(model, pruning, epochs=2)
    assert [step for step, _ in observed] == [3, 4, 5, 6, 7, 8, 9]
    for step, row in observed:
        wanted = reference(task, weights.before[step], task.batch(step % 5))
        for found, each in zip(row.values(), wanted, strict=True):
            np.testing.assert_allclose(found, each, rtol=1e-4, atol=1e-5)


@pytest.mark.feature("masks are enforced in each step of an execution (steps_per_execution > 1)")
@pytest.mark.backends("tensorflow", "jax")
def test_a_pruning_step_that_an_execution_moves_is_logged(task, caplog):
    model = task.model(steps_per_execution=2)
    with caplog.at_level(logging.INFO, logger="mfac_keras"):
        task.fit(model, MFACPruningCallback(task.recipe(start_epoch=0.6, end_epoch=1.0), verbose=0), epochs=1)
    assert "the pruning step of step 3 was done at step 4, where an execution of 2 steps ends" in caplog.text
    assert "the pruning step of step 5" not in caplog.text


def batches(task):
    return [task.batch(number) for number in range(5)]


def py_dataset(task):
    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 5

        def __getitem__(self, index):
            return task.batch(index)

    return Batches()


def tf_dataset(task):
    tf = pytest.importorskip("tensorflow")
    return tf.data.Dataset.from_tensor_slices((task.x, task.y)).batch(task.batch_size)


@pytest.mark.feature("sampled gradients")
@pytest.mark.parametrize("make", [batches, py_dataset, tf_dataset, lambda task: lambda: batches(task)])
def test_sampled_rows_are_the_gradients_of_batches_in_inference_mode(task, make):
    hidden = keras.Sequential([keras.layers.Dense(8, name="body"), keras.layers.Dropout(0.5)])
    model = task.model(hidden=hidden)
    variables = [v for v in model.trainable_variables if len(v.shape) > 1]
    rows = [[np.array(each) for each in row] for row in GradientSampler(make(task)).gradients(model, variables, 7)]
    assert len(rows) == 7
    weights = model.get_weights()
    w, b, v, c = weights[:4] if len(weights) == 4 else [x for x in weights if x.dtype == np.float32][:4]
    for number in range(7):
        x, y = task.batch(number % 5)
        error = 2 * ((x @ w + b) @ v + c - y) / y.size
        np.testing.assert_allclose(rows[number][1], (x @ w + b).T @ error, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(rows[number][0], x.T @ (error @ v.T), rtol=1e-4, atol=1e-5)


@pytest.mark.feature("sampled gradients")
def test_sampling_leaves_the_model_as_it_was(task):
    hidden = keras.Sequential([keras.layers.Dense(8), keras.layers.BatchNormalization(), keras.layers.Dropout(0.5)])
    model = task.model(hidden=hidden, metrics=["mae"])
    task.fit(model, epochs=1)
    state = [v.numpy().copy() for v in (*model.variables, *model.optimizer.variables, *model.metrics_variables)]
    variables = [v for v in model.trainable_variables if len(v.shape) > 1]
    assert len(list(GradientSampler(batches(task)).gradients(model, variables, 3))) == 3
    after = [v.numpy() for v in (*model.variables, *model.optimizer.variables, *model.metrics_variables)]
    assert all(np.array_equal(a, b) for a, b in zip(state, after, strict=True))


@pytest.mark.feature("sampled gradients")
def test_losses_that_keep_count_of_themselves_are_as_they_were(task):
    inputs = keras.Input([6])
    outputs = [keras.layers.Dense(3, name=name)(inputs) for name in ("one", "other")]
    model = keras.Model(inputs, outputs)
    model.compile("sgd", ["mse", "mae"])
    model.fit(task.x, [task.y, task.y], verbose=0)
    before = [v.numpy().copy() for v in model.metrics_variables]
    x, y = task.batch(0)
    assert len(list(GradientSampler([(x, [y, y])]).gradients(model, model.trainable_variables, 2))) == 2
    assert all(np.array_equal(a, v.numpy()) for a, v in zip(before, model.metrics_variables, strict=True))
    assert len(before) > 2


@pytest.mark.feature("sampled gradients")
def test_a_run_with_a_sampler_prunes_at_once_and_taps_nothing(task, observed):
    model = task.model()
    pruning = MFACPruningCallback(task.recipe(start_epoch=0.0), sampler=batches(task), verbose=0)
    task.fit(model, pruning)
    assert observed == []
    assert pruning.sparsity == 0.75


@pytest.mark.feature("sampled gradients")
@pytest.mark.parametrize("loss", ["mse", keras.losses.MeanSquaredError(), lambda y, p: keras.ops.square(y - p)])
def test_a_sampler_may_have_a_loss_of_its_own(task, loss):
    model = task.model()
    variables = [v for v in model.trainable_variables if len(v.shape) > 1]
    rows = [list(GradientSampler(batches(task), each).gradients(model, variables, 1))[0] for each in (None, loss)]
    for one, other in zip(*rows, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.once
@pytest.mark.feature("sampled gradients")
@pytest.mark.parametrize(
    ("dataset", "error", "message"),
    [
        (7, TypeError, "is a int; pass batches"),
        ([], ValueError, "yields no batch"),
        ([np.ones([2, 6])], ValueError, "yields a ndarray; each batch must be"),
    ],
)
def test_what_is_no_dataset_is_refused_by_name(task, dataset, error, message):
    model = task.model()
    with pytest.raises(error, match=message):
        list(GradientSampler(dataset).gradients(model, model.trainable_variables, 1))


@pytest.mark.once
@pytest.mark.feature("sampled gradients")
def test_a_model_without_a_loss_is_refused_by_name(task):
    model = keras.Sequential([keras.Input([6]), keras.layers.Dense(3)])
    with pytest.raises(ValueError, match="has no loss; compile it, or pass loss="):
        list(GradientSampler([task.batch(0)]).gradients(model, model.trainable_variables, 1))


@pytest.mark.feature("arrays shared with the core without a copy")
def test_arrays_on_the_cpu_share_memory_with_tensors():
    variable = keras.Variable(np.arange(6.0, dtype="float32").reshape(2, 3))
    to_array = current_backend().to_array
    one, other = to_array(variable), to_array(variable)
    assert np.shares_memory(one, other)
    np.testing.assert_array_equal(one, variable.numpy())
    half = keras.Variable(np.ones([2]), dtype="bfloat16")
    assert to_array(half).dtype == np.float32


class TakesThroughDLPack(NumpyBackend):
    """Asks for a tensor on a stream, as CuPy does."""

    def asarray(self, x, device, dtype=None):
        if isinstance(x, conversion._WithoutStream):
            assert type(x.__dlpack__(stream=1, max_version=(1, 0))).__name__ == "PyCapsule"
        return np.from_dlpack(x)


@pytest.mark.feature("arrays shared with the core without a copy")
@pytest.mark.parametrize("on_default_stream", [True, False])
def test_a_framework_with_streams_of_its_own_gives_a_copy(monkeypatch, on_default_stream):
    device = Device(TakesThroughDLPack(), "cpu")
    monkeypatch.setattr(conversion, "_array_device", {3: device}.get)
    tensor = keras.ops.convert_to_tensor(np.arange(6.0, dtype="float32").reshape(2, 3))
    array = conversion.gpu_array(tensor, 3, on_default_stream=on_default_stream)
    np.testing.assert_array_equal(array, np.arange(6.0).reshape(2, 3))
    assert np.shares_memory(array, np.from_dlpack(tensor)) == on_default_stream


@pytest.mark.feature("arrays shared with the core without a copy")
def test_without_cupy_tensors_on_a_gpu_are_copied_to_host_memory_and_the_log_says_so_once(caplog):
    tensor = keras.ops.convert_to_tensor(np.arange(6.0, dtype="float32"))
    conversion._array_device.cache_clear()  # what other tests were told
    for _ in range(3):
        array = conversion.gpu_array(tensor, 99, on_default_stream=True)
        assert isinstance(array, np.ndarray)
        np.testing.assert_array_equal(array, np.arange(6.0))
    assert caplog.text.count("tensors on GPU 99 are copied to host memory for the pruning step") == 1


class OnTheGpu:
    """What a CuPy array has that the backends use."""

    def get(self):
        return np.arange(6.0, dtype="float32").reshape(3, 2).T


@pytest.mark.backends("tensorflow", "jax")
@pytest.mark.feature("arrays shared with the core without a copy")
def test_a_variable_takes_a_transposed_array_of_a_gpu():
    variable = keras.Variable(np.zeros([2, 3]))
    variable.assign(current_backend().to_tensor(OnTheGpu()))
    np.testing.assert_array_equal(variable.numpy(), OnTheGpu().get())


@pytest.mark.parametrize(
    ("arguments", "logged"),
    [
        (("mse", [1]), "loss is a list"),
        ((keras.losses.mean_squared_error, (1, 2)), "loss is a tuple"),
        (([1], np.ones(3)), "loss is a ndarray"),
        (("mse",), "to sample gradients from is a str; pass batches"),
        ((keras.losses.MeanSquaredError(),), "to sample gradients from is a MeanSquaredError; pass batches"),
        (({"x": np.ones(3)},), "to sample gradients from is a dict; pass batches"),
    ],
)
def test_arguments_of_a_sampler_in_the_wrong_place_are_refused_by_name(arguments, logged):
    with pytest.raises(TypeError, match=logged):
        GradientSampler(*arguments)


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="PyTorch alone has reentrant checkpoints")
def test_a_layer_that_is_evaluated_again_in_its_backward_pass_has_its_gradient():
    from torch.utils.checkpoint import checkpoint

    class Again(keras.layers.Dense):
        def call(self, inputs):
            return checkpoint(super().call, inputs.detach().requires_grad_(), use_reentrant=True)

    model = keras.Sequential([keras.Input([4]), Again(3), keras.layers.Dense(2)])
    kernel = model.layers[0].kernel
    kernel.value.grad = before = kernel.value.detach().clone()
    batch = np.ones([5, 4], "float32"), np.ones([5, 2], "float32")
    ((gradient,),) = GradientSampler([batch], "mse").gradients(model, [kernel], 1)
    assert gradient.any()
    assert kernel.value.grad is before


@pytest.mark.feature("sampled gradients")
def test_weights_that_no_sample_reaches_are_said_once(caplog):
    inputs = keras.Input([3])
    used, unused = keras.layers.Dense(2, name="used")(inputs), keras.layers.Dense(2, name="unused")(inputs)
    model = keras.Model(inputs, used + 0.0 * unused)
    x, y = np.ones((4, 3), np.float32), np.ones((4, 2), np.float32)
    sampler = GradientSampler([(x, y)], keras.losses.MeanSquaredError())
    for _ in range(2):
        assert next(sampler.gradients(model, model.trainable_variables, 1))
    (warning,) = [
        record.getMessage() for record in caplog.records if (record.levelname, record.name) == ("WARNING", "mfac_keras")
    ]
    assert warning.startswith("the gradient is zero in every gradient sample for unused/kernel, unused/bias, so M-FAC")


@pytest.mark.feature("sampled gradients")
def test_a_loss_that_depends_on_no_weight_is_refused_by_name():
    model = keras.Sequential([keras.Input([3]), keras.layers.Dense(2)])
    sampler = GradientSampler([(np.ones((4, 3), np.float32), np.ones((4, 2), np.float32))], lambda y, _: y)
    if keras.backend.backend() == "jax":  # has a gradient of zeros, and says so in the log
        assert next(sampler.gradients(model, model.trainable_variables, 1))
    else:
        with pytest.raises(ValueError, match="depends on none of the weights to prune: .*kernel"):
            next(sampler.gradients(model, model.trainable_variables, 1))


@pytest.mark.feature("sampled gradients")
def test_models_and_classes_in_place_of_batches_and_losses_are_refused_by_name():
    batches = [(np.ones((4, 3)), np.ones((4, 2)))]
    with pytest.raises(TypeError, match=r"loss is the class MeanSquaredError; pass an instance: MeanSquaredError\(\)"):
        GradientSampler(batches, keras.losses.MeanSquaredError)
    with pytest.raises(TypeError, match="the dataset to sample gradients from is a Sequential; pass batches"):
        GradientSampler(keras.Sequential(), "mse")


@pytest.mark.feature("sampled gradients")
def test_batches_are_drawn_as_for_gradients_and_begun_anew(task):
    drawn = GradientSampler(batches(task)).batches(7)
    assert [np.array_equal(drawn[number][0], task.batch(number % 5)[0]) for number in range(7)] == [True] * 7
    (only,) = GradientSampler(lambda number: [task.batch(number)]).batches(1, {"number": 3})
    np.testing.assert_array_equal(only[0], task.batch(3)[0])


@pytest.mark.feature("sampled gradients")
@pytest.mark.parametrize("run_eagerly", [False, True])
def test_the_loss_of_batches_is_the_mean_in_inference_mode_and_leaves_the_model_as_it_was(task, run_eagerly):
    regularizer = keras.regularizers.L2(0.3)
    dense = keras.layers.Dense(8, kernel_regularizer=regularizer)
    hidden = keras.Sequential([dense, keras.layers.BatchNormalization(), keras.layers.Dropout(0.5)])
    model = task.model(hidden=hidden, metrics=["mae"], run_eagerly=run_eagerly)
    task.fit(model, epochs=1)
    state = [v.numpy().copy() for v in (*model.variables, *model.optimizer.variables, *model.metrics_variables)]
    sampler = GradientSampler(batches(task))
    found = sampler.loss(model, batches(task))
    after = [v.numpy() for v in (*model.variables, *model.optimizer.variables, *model.metrics_variables)]
    assert all(np.array_equal(a, b) for a, b in zip(state, after, strict=True))

    def wanted():
        errors = [np.mean((np.asarray(model.predict(x, verbose=0)) - y) ** 2) for x, y in batches(task)]
        return np.mean(errors) + 0.3 * np.sum(dense.kernel.numpy() ** 2)

    assert found == pytest.approx(wanted(), rel=1e-5)
    dense.kernel.assign(dense.kernel * 0.5)  # what is compiled already has the new values too
    assert sampler.loss(model, batches(task)) == pytest.approx(wanted(), rel=1e-5)
    model.compile("sgd", "mae")
    penalty = 0.3 * np.sum(dense.kernel.numpy() ** 2)
    errors = [np.mean(np.abs(np.asarray(model.predict(x, verbose=0)) - y)) for x, y in batches(task)]
    assert sampler.loss(model, batches(task)) == pytest.approx(np.mean(errors) + penalty, rel=1e-5)


@pytest.mark.feature("sampled gradients")
@pytest.mark.parametrize("loss", [None, "mse", keras.losses.MeanSquaredError(), lambda y, p: keras.ops.square(y - p)])
def test_sample_weights_count_in_the_loss_of_batches(task, loss):
    model = task.model(hidden=keras.layers.Dense(8))
    x, y = task.batch(0)
    weights = np.zeros(len(x), np.float32)
    weights[0] = len(x)
    found = GradientSampler([1], loss).loss(model, [(x, y, weights[:, None] if callable(loss) else weights)])
    assert found == pytest.approx(np.mean((np.asarray(model.predict(x[:1], verbose=0)) - y[:1]) ** 2), rel=1e-5)


@pytest.mark.feature("sampled gradients")
def test_losses_that_keep_count_of_themselves_are_as_they_were_after_a_loss(task):
    inputs = keras.Input([6])
    model = keras.Model(inputs, [keras.layers.Dense(3, name=name)(inputs) for name in ("one", "other")])
    model.compile("sgd", ["mse", "mae"])
    x, y = task.batch(0)
    model.fit(task.x, [task.y, task.y], verbose=0)
    before = [v.numpy().copy() for v in model.metrics_variables]
    assert GradientSampler([(x, [y, y])]).loss(model, [(x, [y, y])] * 2) > 0
    assert all(np.array_equal(a, v.numpy()) for a, v in zip(before, model.metrics_variables, strict=True))


@pytest.mark.feature("sampled gradients")
@pytest.mark.parametrize("training", [True, False])
def test_forward_runs_the_model_on_a_batch(task, training):
    norm = keras.layers.BatchNormalization()
    model = task.model(hidden=norm)
    before = norm.moving_mean.numpy().copy()
    output = GradientSampler(batches(task)).forward(model, task.batch(0), training=training)
    assert tuple(output.shape) == (task.batch_size, 3)
    assert np.array_equal(norm.moving_mean.numpy(), before) != training


@pytest.mark.once
@pytest.mark.feature("sampled gradients")
def test_a_loss_of_no_batch_or_no_loss_is_refused_by_name(task):
    with pytest.raises(ValueError, match="there is no batch to evaluate the loss on"):
        GradientSampler(batches(task)).loss(task.model(), [])
    with pytest.raises(ValueError, match="has no loss; compile it, or pass loss="):
        GradientSampler(batches(task)).loss(keras.Sequential([keras.Input([6]), keras.layers.Dense(3)]), batches(task))


def divergence(targets, output):
    ops = keras.ops
    differences = ops.log_softmax(targets) - ops.log_softmax(output)
    return ops.mean(ops.sum(ops.softmax(targets) * differences, axis=-1))


@pytest.mark.feature("sampled gradients")
def test_samples_that_tell_nothing_are_named_with_the_cure(task, caplog):
    model = task.model(hidden=keras.layers.Dense(8, activation="relu"))
    task.fit(model, epochs=1)
    weights = model.get_weights()

    def said(dataset, loss):
        model.set_weights(weights)
        caplog.clear()
        prune_one_shot(model, dataset, loss, final_sparsity=0.5, num_grads=5, num_recomputations=1, damp=1e-5)
        return [record.getMessage() for record in caplog.records if "gradient samples" in record.getMessage()]

    distilled = [(x, np.asarray(model.predict(x, verbose=0))) for x, _ in batches(task)]
    (warning,) = said(distilled, divergence)
    assert warning.startswith(("the 5 gradient samples are as small as rounding errors", "all 5 gradient samples are"))
    assert "sample the targets from its own output instead" in warning
    (warning,) = said([task.batch(0)], "mse")
    assert warning.startswith("of 5 gradient samples only 1 is distinct, so the Fisher has rank 1")
    (warning,) = said(batches(task), lambda y, predicted: 1e-4 * keras.ops.square(y - predicted))
    assert warning.startswith("the damping of 1e-05 hides the empirical Fisher of the 5 gradient samples")
    assert said(batches(task), "mse") == []
