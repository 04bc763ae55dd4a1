import logging

import numpy as np
import pytest

keras = pytest.importorskip("keras", reason="needs Keras: pip install 'mfac-core[keras]'")

from mfac_core.errors import SettingError  # noqa: E402
from mfac_keras import prunable_variables, select_variables  # noqa: E402
from mfac_keras.layout import pytorch_forms  # noqa: E402

pytestmark = [
    pytest.mark.feature("which variables: kernels of every layer, selectors, order of axes"),
    pytest.mark.once,
]


@pytest.fixture(scope="module")
def zoo():
    """One of each kind of layer."""
    images = keras.Input([8, 8, 4], name="images")
    x = keras.layers.Conv2D(6, 3, name="conv")(images)
    x = keras.layers.Conv2DTranspose(5, 3, name="up")(x)
    x = keras.layers.DepthwiseConv2D(3, depth_multiplier=2, name="depthwise")(x)
    x = keras.layers.SeparableConv2D(7, 3, name="separable")(x)
    x = keras.layers.BatchNormalization(name="norm")(x)
    x = keras.layers.Reshape([16, 7], name="sequence")(x)
    x = keras.layers.Conv1D(8, 3, groups=1, name="conv1d")(x)
    x = keras.layers.MultiHeadAttention(2, 3, name="attention")(x, x)
    x = keras.layers.LSTM(4, name="lstm")(x)
    x = keras.layers.Dense(5, name="dense")(x)
    tokens = keras.Input([3], dtype="int32", name="tokens")
    y = keras.layers.Flatten()(keras.layers.Embedding(10, 2, name="embedding")(tokens))
    y = keras.layers.Dense(2, name="frozen", trainable=False)(y)
    return keras.Model([images, tokens], keras.layers.Dense(1, name="head")(keras.layers.Concatenate()([x, y])))


KERNELS = [
    "conv/kernel",
    "up/kernel",
    "depthwise/kernel",
    "separable/depthwise_kernel",
    "separable/pointwise_kernel",
    "conv1d/kernel",
    "attention/query/kernel",
    "attention/key/kernel",
    "attention/value/kernel",
    "attention/attention_output/kernel",
    "dense/kernel",
    "head/kernel",
]


def test_all_prunable_is_the_kernels_of_dense_and_convolution_layers(zoo):
    assert sorted(prunable_variables(zoo)) == sorted(KERNELS)
    chosen = list(select_variables(zoo, ["__ALL_PRUNABLE__"]).values())
    places = [[v is each for v in zoo.trainable_variables].index(True) for each in chosen]
    assert places == sorted(places)


def test_all_is_every_trainable_variable(zoo):
    assert list(select_variables(zoo, ["__ALL__"]).values()) == list(zoo.trainable_variables)


def test_names_and_patterns(zoo):
    assert list(select_variables(zoo, ["embedding/embeddings"])) == ["embedding/embeddings"]
    assert list(select_variables(zoo, ["re:lstm/.*recurrent"])) == ["lstm/lstm_cell/recurrent_kernel"]
    with pytest.raises(SettingError, match=r"'conv/kernle' matches no variable .* nearest names are .*conv/kernel"):
        select_variables(zoo, ["conv/kernle"])
    with pytest.raises(SettingError, match="matches no variable"):
        select_variables(zoo, ["re:kernel"])  # from the start of the path
    with pytest.raises(SettingError, match="not a regular expression"):
        select_variables(zoo, ["re:("])


def test_a_frozen_variable_is_an_error_by_name_and_left_out_by_pattern(zoo, caplog):
    with pytest.raises(SettingError, match="'frozen/kernel' is frozen"):
        select_variables(zoo, ["frozen/kernel"])
    assert "frozen/kernel" not in select_variables(zoo, ["re:.*kernel"])
    assert "WARNING" in caplog.text
    assert "frozen (the layer is not trainable) and left out of pruning: frozen/kernel" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="mfac_keras"):
        assert "frozen/kernel" not in select_variables(zoo, ["__ALL__"])
    assert not caplog.text
    with pytest.raises(SettingError, match="leaves nothing to prune"):
        select_variables(zoo, ["re:frozen/kernel"])


def test_statistics_are_no_variables_to_prune_and_are_not_suggested(zoo):
    assert not [name for name in select_variables(zoo, ["re:.*"]) if "moving" in name or "seed" in name]
    with pytest.raises(SettingError, match="'norm/moving_mean' matches no variable") as error:
        select_variables(zoo, ["norm/moving_mean"])
    assert "moving" not in str(error.value).partition("nearest")[2]


def test_a_model_that_is_not_built_has_no_variables_and_says_so():
    model = keras.Sequential([keras.layers.Dense(3)], name="lazy")
    with pytest.raises(ValueError, match="lazy is not built, so it has no variables; call it on a batch first"):
        prunable_variables(model)


def test_two_variables_of_one_path_have_two_names():
    class Twins(keras.Model):
        def __init__(self):
            super().__init__(name="twins")
            self.one, self.two = keras.layers.Dense(2, name="d"), keras.layers.Dense(2, name="d")

        def call(self, inputs):
            return self.two(self.one(inputs))

    model = Twins()
    model(np.ones([1, 2], "float32"))
    assert list(select_variables(model, ["__ALL_PRUNABLE__"])) == ["twins/d/kernel", "twins/d/kernel#2"]


def form_of(model, name):
    variable = {v.path: v for v in model.weights}[name]
    return variable, pytorch_forms(model, {name: variable})[name]


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("conv/kernel", (6, 4, 3, 3)),
        ("up/kernel", (6, 5, 3, 3)),
        ("depthwise/kernel", (10, 1, 3, 3)),
        ("separable/depthwise_kernel", (10, 1, 3, 3)),
        ("separable/pointwise_kernel", (7, 10, 1, 1)),
        ("conv1d/kernel", (8, 7, 3)),
        ("attention/query/kernel", (6, 8)),
        ("attention/attention_output/kernel", (8, 6)),
        ("lstm/lstm_cell/recurrent_kernel", (16, 4)),
        ("dense/kernel", (5, 4)),
        ("dense/bias", (5,)),
        ("embedding/embeddings", (10, 2)),
    ],
)
def test_the_core_sees_the_weight_that_pytorch_has(zoo, name, shape):
    variable, form = form_of(zoo, name)
    array = variable.numpy()
    assert form.of(array).shape == shape
    np.testing.assert_array_equal(form.back(form.of(array)), array)


def test_a_convolution_in_pytorchs_form_is_that_of_pytorch(zoo):
    torch = pytest.importorskip("torch")
    images = np.random.default_rng(0).standard_normal((1, 8, 8, 4)).astype("float32")
    layers = {layer.name: layer for layer in zoo.layers}
    x = images
    functions = {
        "conv": torch.nn.functional.conv2d,
        "up": torch.nn.functional.conv_transpose2d,
        "depthwise": lambda x, w: torch.nn.functional.conv2d(x, w, groups=5),
    }
    for name, function in functions.items():
        weight = torch.from_numpy(form_of(zoo, f"{name}/kernel")[1].of(layers[name].kernel.numpy()).copy())
        expected = function(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()), weight).numpy().transpose(0, 2, 3, 1)
        x = np.asarray(keras.ops.convert_to_numpy(layers[name](x)))
        np.testing.assert_allclose(x, expected, rtol=1e-4, atol=1e-5)
