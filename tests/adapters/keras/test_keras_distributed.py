import numpy as np
import pytest

keras = pytest.importorskip("keras", reason="needs Keras: pip install 'mfac-core[keras]'")

from mfac_keras import MFACPruningCallback  # noqa: E402
from mfac_keras.live_pruning import KerasPruning  # noqa: E402


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


@pytest.mark.feature("two devices: MirroredStrategy (tensorflow), DataParallel (jax)")
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


@pytest.mark.feature("two devices: MirroredStrategy (tensorflow), DataParallel (jax)")
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


@pytest.mark.feature("two devices: MirroredStrategy (tensorflow), DataParallel (jax)")
@pytest.mark.backends("tensorflow")
def test_a_strategy_that_is_not_supported_is_refused_by_name(task):
    import tensorflow as tf

    strategy = tf.distribute.experimental.CentralStorageStrategy(["CPU:0"], "CPU:0")
    with strategy.scope():
        model = task.model("sgd")
    with pytest.raises(NotImplementedError, match="CentralStorageStrategy"):
        task.fit(model, MFACPruningCallback(task.recipe()))


@pytest.mark.feature("two devices: MirroredStrategy (tensorflow), DataParallel (jax)")
@pytest.mark.backends("jax")
def test_two_devices_in_parallel(task, first_row, watch):
    import jax

    devices = jax.devices()
    assert len(devices) == 2
    keras.distribution.set_distribution(keras.distribution.DataParallel(devices=[f"cpu:{i}" for i in range(2)]))
    try:
        model = task.model("sgd")
        pruning = MFACPruningCallback(task.recipe(num_grads=5), verbose=0)
        watching = watch(pruning)
        task.fit(model, pruning, watching)
    finally:
        keras.distribution.set_distribution(None)
    assert watching.grown == 0
    assert pruning.sparsity == 0.75
    assert_row_of_the_whole_batch(task, model, first_row)
