import numpy as np
import pytest

keras = pytest.importorskip("keras", reason="needs Keras: pip install 'mfac-core[keras]'")

from mfac_keras import MFACPruningCallback, prune_one_shot  # noqa: E402
from mfac_keras.backends import current_backend  # noqa: E402
from mfac_keras.live_pruning import KerasPruning  # noqa: E402

DEVICES = "two devices: MirroredStrategy (tensorflow), DataParallel and ModelParallel (jax)"


@pytest.fixture
def first_row(monkeypatch):
    """What reaches pruning in the first step that it wants."""
    rows = []
    observe = KerasPruning.observe_gradients

    def note(self, step, gradients):
        rows.append([np.array(gradient) for gradient in gradients.values()])
        observe(self, step, gradients)

    monkeypatch.setattr(KerasPruning, "observe_gradients", note)
    return rows


def assert_row_of_the_whole_batch(task, model, rows):
    """The row of the first step is the gradient of all replicas together."""
    plain = rows.copy()
    rows.clear()
    task.fit(task.model("sgd"), MFACPruningCallback(task.recipe(num_grads=5), verbose=0), epochs=1)
    for found, wanted in zip(plain[0], rows[0], strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.feature(DEVICES)
@pytest.mark.backends("tensorflow")
def test_two_replicas_hold_one_mask(task, two_replicas, first_row):
    with two_replicas.scope():
        model = task.model("sgd")
    assert two_replicas.num_replicas_in_sync == 2
    pruning = MFACPruningCallback(task.recipe(num_grads=5), verbose=0)
    task.fit(model, pruning)
    for variable in model.trainable_variables:
        replicas = two_replicas.experimental_local_results(variable.value)
        assert len(replicas) == 2
        if variable.path in pruning.masks:
            for replica in replicas:
                np.testing.assert_array_equal(replica.numpy() != 0, pruning.masks[variable.path])
    assert pruning.sparsity == 0.75
    assert_row_of_the_whole_batch(task, model, first_row)


@pytest.mark.feature(DEVICES)
@pytest.mark.backends("tensorflow")
def test_two_replicas_under_mixed_precision(task, two_replicas, watch):
    with two_replicas.scope():
        optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01), initial_scale=64.0)
        model = task.model(optimizer)
    pruning = MFACPruningCallback(task.recipe(), verbose=0)
    watching = watch(pruning)
    task.fit(model, pruning, watching)
    assert watching.steps > 10
    assert watching.grown == 0
    assert sum(watching.optimizer_state.values()) == 0


@pytest.mark.feature(DEVICES)
@pytest.mark.backends("tensorflow")
def test_a_strategy_that_is_not_supported_is_refused_by_name(task):
    import tensorflow as tf

    strategy = tf.distribute.experimental.CentralStorageStrategy(["CPU:0"], "CPU:0")
    with strategy.scope():
        model = task.model("sgd")
    with pytest.raises(NotImplementedError, match="CentralStorageStrategy"):
        task.fit(model, MFACPruningCallback(task.recipe()))


@pytest.fixture
def distributed(request):
    """A distribution over two devices of this process, in which models are made."""
    devices = [f"cpu:{number}" for number in range(2)]
    if request.param == "DataParallel":
        distribution = keras.distribution.DataParallel(devices=devices)
    else:  # the axis of the inputs or of the outputs is cut in two, and with it the gradient
        layout = {"inputs": ("model", None), "outputs": (None, "model")}[request.param.partition(" of ")[2]]
        layouts = keras.distribution.LayoutMap(keras.distribution.DeviceMesh((1, 2), ("batch", "model"), devices))
        layouts[".*body/kernel"] = layout
        distribution = keras.distribution.ModelParallel(layout_map=layouts)
    with distribution.scope():
        yield distribution


DISTRIBUTED = pytest.mark.parametrize(
    "distributed", ["DataParallel", "ModelParallel of inputs", "ModelParallel of outputs"], indirect=True
)


def assert_equal_masks(found, wanted):
    assert found.keys() == wanted.keys()
    for name, mask in wanted.items():
        np.testing.assert_array_equal(found[name], mask, err_msg=name)


@pytest.mark.feature(DEVICES)
@pytest.mark.backends("jax")
@DISTRIBUTED
def test_two_devices_prune_as_one(task, distributed, first_row, watch):
    model = task.model("sgd")
    pruning = MFACPruningCallback(task.recipe(num_grads=5), verbose=0)
    watching = watch(pruning)
    task.fit(model, pruning, watching)
    assert watching.grown == 0
    assert pruning.sparsity == 0.75
    kernel = model.get_layer("body").kernel.value
    assert len(kernel.devices()) == 2
    assert kernel.is_fully_replicated == isinstance(distributed, keras.distribution.DataParallel)

    keras.distribution.set_distribution(None)
    assert_row_of_the_whole_batch(task, model, first_row)
    alone = MFACPruningCallback(task.recipe(num_grads=5), verbose=0)
    task.fit(task.model("sgd"), alone)
    assert_equal_masks(pruning.masks, alone.masks)


@pytest.mark.feature(DEVICES)
@pytest.mark.backends("jax")
@DISTRIBUTED
def test_one_shot_on_two_devices_prunes_as_on_one(task, distributed):
    def pruned():
        model = task.model()
        return model, prune_one_shot(model, (task.x, task.y), sparsity=0.6, num_grads=6, num_recomputations=2)

    model, masks = pruned()
    keras.distribution.set_distribution(None)
    alone, wanted = pruned()
    assert_equal_masks(masks, wanted)
    for name, kernel in task.kernels(alone).items():
        np.testing.assert_allclose(task.kernels(model)[name], kernel, atol=1e-6, err_msg=name)


@pytest.mark.backends("tensorflow")
def test_several_workers_are_refused_because_keras_cannot_train_in_them(task):
    # only the class matters; a worker has to be configured before the process computes anything
    import tensorflow as tf

    strategy = object.__new__(tf.distribute.MultiWorkerMirroredStrategy)
    model = task.model("sgd")
    model._distribute_strategy = strategy
    cure = "Keras 3 cannot train under it.*JAX backend"
    with pytest.raises(NotImplementedError, match=f"MultiWorkerMirroredStrategy.*{cure}"):
        current_backend().refuse_unsupported(model)
    with pytest.raises(NotImplementedError, match=f"MultiWorkerMirroredStrategy.*{cure}"):
        prune_one_shot(model, (task.x, task.y), sparsity=0.5)


@pytest.mark.backends("torch")
@pytest.mark.parametrize("prune", ["in one shot", "in fit"])
def test_several_processes_of_torch_are_refused_with_a_cure(task, monkeypatch, prune):
    from torch import distributed

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
        with pytest.raises(NotImplementedError, match="2 processes.*JAX backend.*mfac_torch"):
            if prune == "in fit":
                task.fit(task.model(), MFACPruningCallback(task.recipe()))
            else:
                prune_one_shot(task.model(), (task.x, task.y), sparsity=0.5)
    finally:
        distributed.destroy_process_group()
