import numpy as np
import pytest

keras = pytest.importorskip("keras", reason="needs Keras: pip install 'mfac-core[keras]'")

from mfac_core import SettingError  # noqa: E402
from mfac_keras import prune_one_shot, sensitivity  # noqa: E402
from mfac_keras.sampling import GradientSampler  # noqa: E402
from tests import reference  # noqa: E402

pytestmark = pytest.mark.feature("sensitivity of layers")

LEVELS = (0.25, 0.5, 0.875)
OPTIONS = {"sparsities": LEVELS, "num_grads": 4, "num_batches": 3, "damp": 0.01, "fisher_block_size": 16}


def batches(task):
    return [task.batch(number) for number in range(5)]


class Network:
    """The model of the task in NumPy: its loss and the gradients of its kernels, by hand."""

    def __init__(self, model):
        self.names = [layer.kernel.path for layer in model.layers]
        self.kernels = [layer.kernel.numpy().astype(np.float64) for layer in model.layers]
        self.biases = [layer.bias.numpy().astype(np.float64) for layer in model.layers]

    def loss(self, data):
        return float(np.mean([np.mean((self._forward(x)[1] - y) ** 2) for x, y in data]))

    def gradients(self, place, data):
        rows = []
        for x, y in data:
            hidden, output = self._forward(x)
            of_output = 2 * (output - y) / y.size
            of_hidden = of_output @ self.kernels[1].T * (1 - hidden**2)
            rows.append((x.T @ of_hidden, hidden.T @ of_output)[place].T.ravel())  # PyTorch's order
        return np.stack(rows)

    def _forward(self, x):
        hidden = np.tanh(x @ self.kernels[0] + self.biases[0])
        return hidden, hidden @ self.kernels[1] + self.biases[1]


def expected(model, data, held_out, *, fresh, **options):
    """The increases by the dense oracle."""
    options = {
        "damping": 0.01,
        "block_size": 16,
        "scope": "layer",
        "update": "joint",
        "num_recomputations": 1,
    } | options
    network = Network(model)
    dense_loss = network.loss(held_out)
    measured, predicted = {}, {}
    for place, name in enumerate(network.names):
        dense = network.kernels[place]
        rows, masks, total = network.gradients(place, data), None, 0.0
        measured[name], predicted[name] = [], []
        for level in LEVELS:
            rows = network.gradients(place, data) if fresh else rows
            result = reference.prune({name: network.kernels[place].T}, rows, sparsity=level, masks=masks, **options)
            masks, total = result.masks, total + result.predicted_loss_increase
            network.kernels[place] = result.weights[name].T
            measured[name].append(network.loss(held_out) - dense_loss)
            predicted[name].append(total)
        network.kernels[place] = dense
    return dense_loss, measured, predicted


def assert_as_expected(result, dense_loss, measured, predicted):
    assert result.dense_loss == pytest.approx(dense_loss, rel=1e-5)
    assert list(result.measured) == list(measured)
    for name in measured:
        np.testing.assert_allclose(result.measured[name], measured[name], rtol=1e-2, atol=1e-5)
        np.testing.assert_allclose(result.predicted[name], predicted[name], rtol=1e-2, atol=1e-5)


def state_of(model):
    variables = {id(variable): variable for variable in [*model.variables, *model.optimizer.variables]}
    return [np.array(variable.numpy()).tobytes() for variable in variables.values()]


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("compiled", [True, False])
def test_increases_are_those_of_the_dense_oracle(task, fresh, compiled):
    model = task.model()
    if not compiled:
        model = keras.models.clone_model(model)

    result = sensitivity(model, batches(task), None if compiled else "mse", fresh_grads=fresh, **OPTIONS)

    assert_as_expected(result, *expected(model, batches(task)[:4], batches(task)[:3], fresh=fresh))
    assert list(result.num_weights.values()) == [48, 24]


@pytest.mark.parametrize(
    "keys, options",
    [
        ({"num_grads": 2}, {"data": 2}),
        ({"num_batches": 5}, {"held_out": 5}),
        ({"fisher_block_size": None}, {"block_size": None}),
        ({"damp": 0.5}, {"damping": 0.5}),
        ({"mask_type": "channel"}, {"mask_type": "channel"}),
    ],
)
@pytest.mark.once
def test_each_setting_reaches_the_core(task, keys, options):
    model = task.model()
    data = batches(task)

    result = sensitivity(model, data, **OPTIONS | keys)

    given, held_out = data[: options.pop("data", 4)], data[: options.pop("held_out", 3)]
    assert_as_expected(result, *expected(model, given, held_out, fresh=True, **options))


def test_the_loss_may_be_measured_on_other_batches(task):
    model = task.model()
    data = batches(task)

    result = sensitivity(model, data[:4], held_out=data[4:], **OPTIONS | {"num_batches": 1})

    assert_as_expected(result, *expected(model, data[:4], data[4:], fresh=True))


def network_with_more(dtype=None):
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.Input([6, 6, 2]),
            keras.layers.Conv2D(4, 3, name="conv", dtype=dtype),
            keras.layers.BatchNormalization(name="norm", dtype=dtype),
            keras.layers.Conv2DTranspose(3, 2, name="back", dtype=dtype),
            keras.layers.Dropout(0.5),
            keras.layers.Flatten(),
            keras.layers.Dense(3, name="frozen", trainable=False, dtype=dtype),
        ]
    )
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((32, 6, 6, 2)).astype("float32"), rng.standard_normal((32, 3)).astype("float32")
    model.compile("adam", "mse", metrics=["mae"])
    model.fit(x, y, epochs=1, batch_size=8, verbose=0)
    return model, [(x[rows : rows + 8], y[rows : rows + 8]) for rows in range(0, 32, 8)]


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("fresh", [True, False])
def test_the_model_is_left_bit_for_bit(dtype, fresh):
    model, data = network_with_more(dtype)
    before = state_of(model)

    result = sensitivity(model, data, fresh_grads=fresh, **OPTIONS)

    assert [path.split("/")[-2] for path in result.measured] == ["conv", "back"]  # frozen ones are left out
    assert state_of(model) == before
    assert np.isfinite(list(result.measured.values())).all()


@pytest.mark.parametrize("calls", [1, 3, 6])
def test_the_model_is_left_bit_for_bit_after_an_exception(monkeypatch, calls):
    model, data = network_with_more()
    before, left = state_of(model), [calls]
    loss = GradientSampler.loss

    def failing(*arguments):
        left[0] -= 1
        if not left[0]:
            raise RuntimeError("out of paper")
        return loss(*arguments)

    monkeypatch.setattr(GradientSampler, "loss", failing)
    with pytest.raises(RuntimeError, match="out of paper"):
        sensitivity(model, data, **OPTIONS)
    assert state_of(model) == before


@pytest.mark.once
def test_patterns_follow_the_layout_of_the_layer(monkeypatch):
    model, data = network_with_more()
    seen = []
    loss = GradientSampler.loss

    def seeing(sampler, model, data):
        seen.append(np.array(model.get_layer("back").kernel.numpy()))
        return loss(sampler, model, data)

    monkeypatch.setattr(GradientSampler, "loss", seeing)
    sensitivity(model, data, params=["back"], mask_type="filter", **OPTIONS | {"sparsities": (0.34,)})

    assert (seen[-1] == 0).all(axis=(0, 1, 3)).sum() == 1  # (*window, output, input)


@pytest.mark.once
def test_recomputations_have_gradients_of_their_own(task, monkeypatch):
    model, seen = task.model(), []
    gradients = GradientSampler.gradients

    def seeing(sampler, model, variables, count):
        seen.append(int((model.layers[0].kernel.numpy() == 0).sum()))
        return gradients(sampler, model, variables, count)

    monkeypatch.setattr(GradientSampler, "gradients", seeing)
    keys = OPTIONS | {"sparsities": (0.75,), "num_recomputations": 2}
    sensitivity(model, batches(task), params=["body"], **keys)

    assert seen == [0, 24]


@pytest.mark.once
def test_params_and_exclude_select_as_for_pruning(task):
    model = task.model()

    result = sensitivity(model, batches(task), params=["re:.*(kernel|bias)"], exclude=["head"], **OPTIONS)

    assert [path.rpartition("/")[2] for path in result.measured] == ["kernel", "bias"]
    with pytest.raises(SettingError, match="nothing"):
        sensitivity(model, batches(task), params=["nothing"])


@pytest.mark.once
@pytest.mark.parametrize(
    "keys, message",
    [
        ({"num_batches": 0}, "num_batches: 0 must be a positive integer"),
        ({"num_grads": {0.0: 64}}, "the same for all layers"),
        ({"fisher_block_size": 0}, "^fisher_block_size: 0 must be a positive integer"),
        ({"sparsities": (0.9, 0.5)}, "each above the previous one"),
    ],
)
def test_bad_settings_are_refused_by_name(task, keys, message):
    with pytest.raises(SettingError, match=message):
        sensitivity(task.model(), batches(task), **OPTIONS | keys)


@pytest.mark.once
def test_what_is_no_built_model_of_keras_3_is_refused(task):
    with pytest.raises(ValueError, match="is not built"):
        sensitivity(keras.Sequential([keras.layers.Dense(3)]), batches(task), "mse")
    with pytest.raises(TypeError, match=r"pruning needs a keras\.Model"):
        sensitivity(object(), batches(task), "mse")


@pytest.mark.once
def test_names_go_into_one_shot_pruning_as_they_are(task):
    model = task.model()
    result = sensitivity(model, batches(task), **OPTIONS)

    targets = result.final_sparsity(max(max(each) for each in result.measured.values()))
    prune_one_shot(model, batches(task), final_sparsity=targets, num_grads=4)

    assert [int((layer.kernel.numpy() == 0).sum()) for layer in model.layers] == [42, 21]
