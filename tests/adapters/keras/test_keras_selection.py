import numpy as np
import pytest

keras = pytest.importorskip("keras", reason="needs Keras: pip install 'mfac-core[keras]'")

from mfac_core.errors import SettingError  # noqa: E402
from mfac_keras import MFACPruningCallback, prunable_variables, prune_one_shot, select_variables  # noqa: E402
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
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "are not in scope: 12 frozen (the layer is not trainable: frozen/kernel)" in record.getMessage()
    for keyword in ("__ALL__", "__ALL_PRUNABLE__"):
        caplog.clear()
        assert "frozen/kernel" not in select_variables(zoo, [keyword])
        assert "frozen (the layer is not trainable: frozen/kernel)" in caplog.text
    caplog.clear()
    select_variables(zoo, ["__ALL_PRUNABLE__"], ["frozen"])
    select_variables(zoo, ["dense/kernel"])
    assert not caplog.text
    assert list(select_variables(zoo, ["frozen/kernel"], frozen_too=True)) == ["frozen/kernel"]
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


class Tiny(keras.Model):
    def __init__(self):
        super().__init__(name="tiny")
        self.body = keras.Sequential(
            [keras.layers.Dense(4, name="first"), keras.layers.LayerNormalization(name="norm")], name="body"
        )
        self.head = keras.layers.Dense(2, name="head")

    def call(self, inputs):
        return self.head(self.body(inputs))


@pytest.fixture
def tiny():
    model = Tiny()
    model(np.ones([1, 3], "float32"))
    return model


def test_a_layer_by_its_name_or_path_means_its_prunable_weights(zoo, tiny, caplog):
    assert list(select_variables(zoo, ["attention", "conv"], ["re:.*value"])) == [
        "conv/kernel",
        "attention/query/kernel",
        "attention/key/kernel",
        "attention/attention_output/kernel",
    ]
    assert list(select_variables(zoo, ["attention/query"])) == ["attention/query/kernel"]
    (first,) = select_variables(tiny, ["body"])
    assert first.endswith("first/kernel")
    assert (
        list(select_variables(tiny, ["first"]))
        == list(select_variables(tiny, [first.removesuffix("/kernel")]))
        == [first]
    )
    assert len(select_variables(tiny, ["tiny"])) == 2
    assert not caplog.records
    with pytest.raises(SettingError, match="'norm' is a layer without weights of Dense and convolution layers"):
        select_variables(zoo, ["norm"])


def test_normalization_and_biases_that_a_pattern_catches_are_named(zoo, caplog):
    assert "norm/gamma" in select_variables(zoo, ["re:(norm|attention/query|conv/)"])
    (record,) = caplog.records
    for name in ("norm/gamma", "norm/beta", "attention/query/bias", "conv/bias"):
        assert name in record.getMessage()
    assert "kernel" not in record.getMessage()
    caplog.clear()
    select_variables(zoo, ["re:(norm|conv/)"], ["norm", "re:.*bias"])
    select_variables(zoo, ["norm/gamma", "conv/bias"])
    assert not caplog.records


def test_nearest_names_are_of_what_one_prunes_and_a_glob_becomes_a_pattern(zoo):
    for entry in ("norm/gama", "dense/bais"):
        with pytest.raises(SettingError) as error:
            select_variables(zoo, [entry])
        suggested = str(error.value).partition("nearest names are ")[2]
        assert "kernel" in suggested and "bias" not in suggested and "norm" not in suggested
    with pytest.raises(SettingError, match=r"write 're:conv.\*/kernel\$'"):
        select_variables(zoo, ["conv*/kernel"])


def test_what_is_excluded_must_match_something(zoo):
    with pytest.raises(SettingError, match="exclude: 'hed' matches no variable .* nearest layers are head"):
        select_variables(zoo, ["__ALL_PRUNABLE__"], ["hed"])


def test_low_rank_adapters_beside_a_frozen_kernel_are_named(caplog):
    model = keras.Sequential([keras.Input([8]), keras.layers.Dense(8, name="wide"), keras.layers.Dense(4, name="head")])
    model.get_layer("wide").enable_lora(2)
    chosen = select_variables(model, ["re:.*kernel"])
    assert sum("lora" in name for name in chosen) == 2
    assert "low-rank adapters are pruned, but the frozen weights that they are added to are not: " in caplog.text
    assert "64 of 128 weights" in caplog.text


class Experts(keras.layers.Layer):
    def build(self, shape):
        self.up = self.add_weight(shape=(3, 8, 12), name="up", initializer="random_normal")

    def call(self, inputs):
        return keras.ops.einsum("bi,eoi->beo", inputs, self.up)


@pytest.mark.parametrize("mask_type", ["2:4", "filter"])
def test_inputs_of_stacked_matrices_of_own_layers_are_the_last_axis(mask_type, caplog):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input([12]), Experts(name="experts"), keras.layers.Dense(2, name="head")])
    name = next(variable.path for variable in model.weights if variable.path.endswith("up"))
    data = np.ones([2, 12], "float32"), np.ones([2, 3, 2], "float32")
    recipe = f"""
    modifiers:
      - !MagnitudePruningModifier {{params: ["{name}"], mask_type: "{mask_type}", final_sparsity: 0.5, end_epoch: 0}}
    """
    prune_one_shot(model, data, "mse", recipe)
    weight = model.get_layer("experts").up.numpy()
    if mask_type == "2:4":
        assert (np.count_nonzero(weight.reshape(-1, 4), axis=1) <= 2).all()
    else:
        kept = np.count_nonzero(weight, axis=2)
        assert set(kept.ravel()) == {0, 12}
        assert any(len(set(each)) > 1 for each in kept.tolist())  # a filter is not a whole matrix
        assert len({tuple(each) for each in kept.tolist()}) > 1  # nor one of all matrices
    caplog.clear()
    select_variables(model, ["__ALL_PRUNABLE__"])
    assert f"288 in arrays of three or more axes that belong to no such layer ({name})" in caplog.text


def test_one_warning_for_all_modifiers_in_fit_and_in_one_shot(caplog):
    model = keras.Sequential([keras.Input([8]), keras.layers.Dense(8, trainable=False), keras.layers.Dense(4)])
    model.compile("sgd", "mse")
    data = np.ones([8, 8], "float32"), np.ones([8, 4], "float32")
    recipe = """
    modifiers:
      - !MagnitudePruningModifier {final_sparsity: 0.5, end_epoch: 1.0}
      - !MagnitudePruningModifier {final_sparsity: 0.75, start_epoch: 2.0, end_epoch: 3.0}
    """
    model.fit(*data, epochs=1, verbose=0, callbacks=[MFACPruningCallback(recipe, verbose=0)])
    assert caplog.text.count("64 of 96 weights of Dense and convolution layers are not in scope") == 1
    caplog.clear()
    prune_one_shot(model, data, "mse", recipe)
    assert caplog.text.count("64 of 96 weights of Dense and convolution layers are not in scope") == 1


def test_exclude_is_a_keyword_of_callback_and_one_shot():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input([8]), keras.layers.Dense(8, name="a"), keras.layers.Dense(4, name="b")])
    model.compile("sgd", "mse")
    data = np.random.default_rng(0).random((16, 8)).astype("float32"), np.ones([16, 4], "float32")
    callback = MFACPruningCallback(final_sparsity=0.5, start_epoch=1, end_epoch=1, num_grads=2, exclude="b", verbose=0)
    model.fit(*data, batch_size=4, epochs=2, verbose=0, callbacks=[callback])
    assert [name.endswith("a/kernel") for name in callback.masks] == [True]
    masks = prune_one_shot(model, data, "mse", final_sparsity=0.5, num_grads=2, ignore=["a"])
    assert [name.endswith("b/kernel") for name in masks] == [True]


@pytest.mark.once
@pytest.mark.parametrize("function", [prunable_variables, lambda model: select_variables(model, ["__ALL__"])])
@pytest.mark.parametrize("model", [None, "model", keras.Sequential])
def test_what_is_no_model_is_refused_by_name(function, model):
    with pytest.raises(TypeError, match="the model is a .* pruning needs a keras.Model of Keras 3; pass"):
        function(model)


@pytest.mark.once
def test_a_layer_is_not_taken_for_a_model_of_pytorch():
    with pytest.raises(TypeError, match="put the layer into a model"):
        prunable_variables(keras.layers.Dense(3))


@pytest.mark.backends("torch")  # the others draw no complex weights
def test_kernels_of_complex_numbers_are_refused_by_name():
    model = keras.Sequential([keras.Input([4], dtype="complex64"), keras.layers.Dense(3, dtype="complex64", name="fc")])
    with pytest.raises(SettingError, match=r"only floating-point weights .* are not: .*fc/kernel \(complex64\)"):
        select_variables(model, ["__ALL_PRUNABLE__"])


@pytest.mark.once
@pytest.mark.filterwarnings("ignore:Layer InputLayer does not have:UserWarning")
def test_quantized_kernels_are_not_said_to_be_lacking(caplog):
    model = keras.Sequential([keras.Input([4]), keras.layers.Dense(3, name="fc"), keras.layers.Dense(2, name="head")])
    model.get_layer("fc").quantize("int8")
    assert all("/head/" in name for name in select_variables(model, ["__ALL_PRUNABLE__"]))
    assert "12 of 18 weights of Dense and convolution layers are not in scope" in caplog.text
    model.get_layer("head").quantize("int8")
    with pytest.raises(SettingError, match="is frozen .the layer is not trainable, or quantized"):
        select_variables(model, ["__ALL_PRUNABLE__"])


def test_one_name_needs_no_list(zoo):
    assert list(select_variables(zoo, "attention", exclude="re:attention/(query|key|value)")) == [
        "attention/attention_output/kernel"
    ]
    with pytest.raises(SettingError, match="params: None must be a name or a non-empty list of names"):
        select_variables(zoo, None)
