import logging

import numpy as np
import pytest

keras = pytest.importorskip("keras", reason="needs Keras: pip install 'mfac-core[keras]'")

from mfac_core import sample_batches  # noqa: E402
from mfac_keras import prune_one_shot, recalibrate_batchnorm  # noqa: E402

pytestmark = pytest.mark.feature("batch normalization recalibrated")

BatchNormalization = getattr(keras.layers, "BatchNormalization", None)


def network(*more):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input([6]),
            keras.layers.Dense(8, name="body"),
            BatchNormalization(name="norm", momentum=0.9),
            keras.layers.Activation("tanh"),
            *more,
            keras.layers.Dense(3, name="head"),
        ]
    )
    model.compile("sgd", "mse")
    return model


def batches(number=5, size=16):
    rng = np.random.default_rng(1)
    return [
        ((2 * rng.standard_normal((size, 6)) + 1).astype("float32"), np.zeros((size, 3), "float32"))
        for _ in range(number)
    ]


def statistics(layer):
    return layer.moving_mean.numpy().copy(), layer.moving_variance.numpy().copy()


def assert_statistics(layer, mean, variance):
    np.testing.assert_allclose(layer.moving_mean.numpy(), mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(layer.moving_variance.numpy(), variance, rtol=1e-4, atol=1e-5)


def average(inputs):
    inputs = [np.asarray(each, np.float64) for each in inputs]
    return np.mean([each.mean(0) for each in inputs], 0), np.mean([each.var(0) for each in inputs], 0)


def test_statistics_are_the_average_over_batches():
    model = network()
    weights = [each.numpy() for each in model.trainable_variables]
    assert recalibrate_batchnorm(model, batches()) == 1
    kernel, bias = (each.astype("float64") for each in model.get_layer("body").get_weights())
    assert_statistics(model.get_layer("norm"), *average(x @ kernel + bias for x, _ in batches()))
    assert all(np.array_equal(each.numpy(), old) for each, old in zip(model.trainable_variables, weights, strict=True))
    assert model.get_layer("norm").momentum == 0.9
    assert "call" not in vars(model.get_layer("norm"))
    before = statistics(model.get_layer("norm"))
    model(batches()[0][0], training=False)
    assert all(map(np.array_equal, before, statistics(model.get_layer("norm"))))
    model.fit(*batches()[0], verbose=0)  # training goes on as before, with the momentum
    after = statistics(model.get_layer("norm"))
    assert not np.array_equal(before[0], after[0])
    assert np.abs(after[0] - before[0]).max() < 1


@pytest.mark.parametrize(
    "dataset_of",
    [
        lambda inputs: inputs,
        lambda inputs: [(x,) for x in inputs],
        np.concatenate,
        lambda inputs: keras.ops.convert_to_tensor(np.concatenate(inputs)),
        lambda inputs: (np.concatenate(inputs),),
    ],
    ids=["batches", "tuples", "array", "tensor", "tuple of one array"],
)
def test_inputs_without_targets_will_do(dataset_of):
    model, twin = network(), network()
    inputs = [x for x, _ in batches(number=4, size=32)]  # arrays are cut into batches of 32
    assert recalibrate_batchnorm(model, dataset_of(inputs)) == 1
    recalibrate_batchnorm(twin, [(x, None) for x in inputs])
    assert_statistics(model.get_layer("norm"), *statistics(twin.get_layer("norm")))
    kernel, bias = (each.astype("float64") for each in model.get_layer("body").get_weights())
    assert_statistics(model.get_layer("norm"), *average(x @ kernel + bias for x in inputs))


def test_dropout_is_not_active_meanwhile():
    last = BatchNormalization(name="last")
    model = network(keras.layers.Dropout(0.5), last)
    assert recalibrate_batchnorm(model, batches()) == 2
    kernel, bias = (each.astype("float64") for each in model.get_layer("body").get_weights())
    inputs = [x @ kernel + bias for x, _ in batches()]
    epsilon = model.get_layer("norm").epsilon
    assert_statistics(last, *average(np.tanh((x - x.mean(0)) / np.sqrt(x.var(0) + epsilon)) for x in inputs))


@pytest.mark.parametrize("functional", [False, True])
def test_layers_of_models_within_a_model_are_found(functional):
    inner = keras.Sequential([keras.Input([6]), BatchNormalization(name="norm")], name="inner")
    if functional:
        inputs = keras.Input([6])
        model = keras.Model(inputs, BatchNormalization(name="norm")(inner(inputs)))
    else:

        class Model(keras.Model):
            def __init__(self):
                super().__init__()
                self.parts = [inner, BatchNormalization(name="norm")]

            def call(self, inputs):  # takes no training argument
                return self.parts[1](self.parts[0](inputs))

        model = Model()
        model(batches()[0][0])
    assert recalibrate_batchnorm(model, batches()) == 2
    assert_statistics(inner.layers[-1], *average(x for x, _ in batches()))


def test_a_layer_that_stands_in_two_places_averages_over_both():
    norm, layer = BatchNormalization(epsilon=1e-6), keras.layers.Dense(6, use_bias=False)
    model = keras.Sequential([keras.Input([6]), norm, layer, norm])
    assert recalibrate_batchnorm(model, batches()) == 1
    kernel = layer.kernel.numpy()
    inputs = [x for x, _ in batches()]
    inputs += [((x - x.mean(0)) / x.std(0)) @ kernel for x in inputs]
    assert_statistics(norm, *average(inputs))


def broken():
    yield batches()[0]
    raise RuntimeError("the disk is gone")


def test_an_exception_in_a_batch_leaves_all_as_it_was():
    model = network()
    model.fit(*batches()[1], verbose=0)
    norm = model.get_layer("norm")
    before = statistics(norm)
    with pytest.raises(RuntimeError, match="the disk is gone"):
        recalibrate_batchnorm(model, broken)
    data = batches()
    data[3][0][0, 0] = np.nan
    with pytest.raises(ValueError, match="the input of batch normalization layer .*norm contains NaN or Inf"):
        recalibrate_batchnorm(model, data)
    assert all(map(np.array_equal, before, statistics(norm)))
    assert norm.momentum == 0.9
    assert "call" not in vars(norm)


def test_statistics_that_hold_nan_are_cured():
    model = network()
    norm = model.get_layer("norm")
    recalibrate_batchnorm(model, batches())
    before = statistics(norm)
    norm.moving_mean.assign(np.full(8, np.nan))
    recalibrate_batchnorm(model, batches())
    assert all(map(np.array_equal, before, statistics(norm)))


def test_frozen_layers_are_left_and_named(caplog):
    model = network(BatchNormalization(name="last"))
    model.get_layer("norm").trainable = False
    before = statistics(model.get_layer("norm"))
    with caplog.at_level(logging.INFO, logger="mfac_keras"):
        assert recalibrate_batchnorm(model, batches()) == 1
        assert all(map(np.array_equal, before, statistics(model.get_layer("norm"))))
        model.trainable = False
        assert recalibrate_batchnorm(model, batches()) == 0
    assert "1 batch normalization layer recalibrated over 5 batches; frozen, and left unchanged: " in caplog.text
    assert "nothing to recalibrate: every batch normalization of the model is frozen" in caplog.text


def test_a_model_without_batch_normalization_says_so(task, caplog):
    with caplog.at_level(logging.INFO, logger="mfac_keras"):
        assert recalibrate_batchnorm(task.model(), [task.batch(0)]) == 0
    assert "nothing to recalibrate: the model has no batch normalization with running statistics" in caplog.text


def test_half_precision_is_averaged_in_more():
    model = keras.Sequential([keras.Input([2]), BatchNormalization(dtype="bfloat16")])
    data = [(np.full((4, 2), 3.0 * (1 + i % 2), "float32"), np.zeros(4)) for i in range(400)]
    recalibrate_batchnorm(model, data)
    assert np.asarray(keras.ops.convert_to_numpy(model.layers[-1].moving_mean), "float32").tolist() == [4.5, 4.5]


@pytest.mark.backends("tensorflow")
def test_a_dataset_of_tensorflow_is_one_pass_long():
    import tensorflow as tf

    model = network()
    recalibrate_batchnorm(model, batches())
    before = statistics(model.get_layer("norm"))
    x, y = (np.concatenate(each) for each in zip(*batches(), strict=True))
    recalibrate_batchnorm(model, tf.data.Dataset.from_tensor_slices((x, y)).batch(16))
    assert_statistics(model.get_layer("norm"), *before)
    recalibrate_batchnorm(model, tf.data.Dataset.from_tensor_slices((x, y)).batch(16).repeat(), num_batches=5)
    assert_statistics(model.get_layer("norm"), *before)


def test_a_number_of_batches_may_be_given(monkeypatch, caplog):
    model = network()
    kernel, bias = model.get_layer("body").get_weights()

    def expected(number):
        return average(x @ kernel + bias for x, _ in batches()[:number])

    recalibrate_batchnorm(model, batches(), num_batches=2)
    assert_statistics(model.get_layer("norm"), *expected(2))
    recalibrate_batchnorm(model, batches(), num_batches=9)
    assert_statistics(model.get_layer("norm"), *expected(5))
    monkeypatch.setattr(sample_batches, "_MAX_WITHOUT_LENGTH", 3)
    recalibrate_batchnorm(model, lambda: iter(batches()))
    assert_statistics(model.get_layer("norm"), *expected(3))
    with caplog.at_level(logging.INFO, logger="mfac_keras"):  # arrays are cut into batches of 32
        recalibrate_batchnorm(model, tuple(np.concatenate(each) for each in zip(*batches(), strict=True)))
    assert "recalibrated over 3 batches" in caplog.text
    with pytest.raises(ValueError, match="num_batches: 0 must be a positive integer"):
        recalibrate_batchnorm(model, batches(), num_batches=0)


@pytest.mark.once
def test_what_is_no_model_or_no_data_is_refused():
    with pytest.raises(ValueError, match="is not built"):
        recalibrate_batchnorm(keras.Sequential([BatchNormalization()]), batches())
    with pytest.raises(TypeError, match="needs a keras.Model of Keras 3"):
        recalibrate_batchnorm(BatchNormalization(), batches())
    with pytest.raises(TypeError, match="pass batches"):
        recalibrate_batchnorm(network(), None)


def test_batch_renormalization_gets_its_deviations_too():
    try:
        norm = BatchNormalization(renorm=True, name="norm")
    except (TypeError, ValueError):
        pytest.skip("this version of Keras has no batch renormalization")
    last = BatchNormalization()
    model = keras.Sequential([keras.Input([6]), norm, keras.layers.Activation("tanh"), last])
    assert recalibrate_batchnorm(model, batches()) == 2
    mean, variance = average(x for x, _ in batches())
    normalized = [(x - x.mean(0)) / np.sqrt(x.var(0) + norm.epsilon) for x, _ in batches()]
    assert_statistics(last, *average(map(np.tanh, normalized)))
    assert_statistics(norm, mean, variance)
    np.testing.assert_allclose(norm.moving_stddev.numpy(), np.sqrt(variance + norm.epsilon), rtol=1e-4)
    np.testing.assert_allclose(norm.renorm_mean.numpy(), mean, rtol=1e-4, atol=1e-5)
    assert norm.renorm is True


# --- in one shot


def stale(caplog):
    return [each.getMessage() for each in caplog.records if "statistics of the weights before" in each.getMessage()]


def test_one_shot_recalibrates_on_request_and_says_otherwise_that_statistics_are_stale(caplog):
    model, twin = network(), network()
    keys = {"sparsity": 0.5, "num_grads": 4, "fisher_block_size": 16, "num_recomputations": 2, "damp": 0.01}
    prune_one_shot(model, batches(), recalibrate_batchnorm=True, **keys)
    assert not stale(caplog)
    prune_one_shot(twin, batches(), **keys)
    (line,) = stale(caplog)
    assert line.startswith("1 batch normalization layer (")
    assert "mfac_keras.recalibrate_batchnorm(model, dataset) recalibrates them" in line
    norms = [each.get_layer("norm") for each in (model, twin)]
    assert not np.allclose(norms[0].moving_mean.numpy(), norms[1].moving_mean.numpy())
    recalibrate_batchnorm(twin, batches())
    assert all(map(np.array_equal, *map(statistics, norms)))
    caplog.clear()
    prune_one_shot(model, recipe="modifiers:\n- !ConstantPruningModifier {params: __ALL_PRUNABLE__}\n")
    assert not stale(caplog)  # no weight has moved
    with pytest.raises(TypeError, match="recalibrate_batchnorm needs batches; pass batches .x, y. as dataset"):
        prune_one_shot(
            model,
            recipe="modifiers:\n- !MagnitudePruningModifier {final_sparsity: 0.9, end_epoch: 0.0}\n",
            recalibrate_batchnorm=True,
        )
