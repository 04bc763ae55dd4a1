import logging

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from mfac_torch import GradSampler, MFACPruningModifier, ScheduledModifierManager

pytestmark = pytest.mark.usefixtures("placement")  # on the CPU, and on a GPU


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3))


@pytest.fixture
def data():
    torch.manual_seed(1)
    return [(torch.randn(6, 4), torch.randint(3, (6,))) for _ in range(3)]


def weights(model):
    return {name: parameter for name, parameter in model.named_parameters() if name.endswith("weight")}


def expected(model, inputs, targets):
    """Gradients in eval mode by the ordinary way, on a copy."""
    copied = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3))
    copied.load_state_dict(model.state_dict())
    copied.eval()
    nn.functional.cross_entropy(copied(inputs), targets).backward()
    return {name: parameter.grad for name, parameter in weights(copied).items()}


def draw(sampler, model, count):
    return list(sampler.gradients(model, weights(model), count))


def assert_rows_equal(rows, model, batches):
    assert len(rows) == len(batches)
    for row, batch in zip(rows, batches, strict=True):
        for name, gradient in expected(model, *batch).items():
            torch.testing.assert_close(row[name], gradient, rtol=1e-5, atol=1e-7)


def test_each_batch_gives_its_gradient_in_eval_mode(model, data):
    rows = draw(GradSampler(data, nn.functional.cross_entropy), model, 3)
    assert_rows_equal(rows, model, data)


def test_the_model_is_left_as_it_was(model, data):
    model[1].eval()
    flags = [module.training for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    model[0].weight.grad = torch.full_like(model[0].weight, 7)
    for _ in GradSampler(data, nn.functional.cross_entropy).gradients(model, weights(model), 2):
        assert [module.training for module in model.modules()] == flags
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(model[0].weight.grad, torch.full_like(model[0].weight, 7))
    assert model[3].weight.grad is None


def test_training_flags_are_restored_when_the_loss_raises(model, data):
    def broken(output, target):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        draw(GradSampler(data, broken), model, 1)
    assert model.training
    assert model[2].training


def test_frozen_weights_are_sampled_too_and_stay_frozen(model, data):
    expected_rows = list(GradSampler(data, nn.functional.cross_entropy).gradients(model, weights(model), 2))
    model[0].weight.requires_grad_(False)
    rows = list(GradSampler(data, nn.functional.cross_entropy).gradients(model, weights(model), 2))
    for row, expected_row in zip(rows, expected_rows, strict=True):
        assert all(torch.equal(row[name], expected_row[name]) for name in row)
    assert not model[0].weight.requires_grad


def test_sampling_works_where_gradients_are_off(model, data):
    with torch.no_grad():
        rows = draw(GradSampler(data, nn.functional.cross_entropy), model, 1)
    assert_rows_equal(rows, model, data[:1])


def test_data_that_end_early_are_started_again_with_one_line(model, data, caplog):
    with caplog.at_level(logging.INFO, logger="mfac_core"):
        rows = draw(GradSampler(data, nn.functional.cross_entropy), model, 8)
    assert_rows_equal(rows, model, [*data, *data, *data[:2]])
    assert [record.getMessage() for record in caplog.records] == [
        "the data ended after 3 of 8 gradient samples and are restarted"
    ]


def test_a_builder_is_called_again_when_its_iterator_is_exhausted(model, data):
    calls = []

    def builder():
        calls.append(len(calls))
        return (([inputs], {}, targets) for inputs, targets in data)

    sampler = GradSampler(builder, nn.functional.cross_entropy)
    assert_rows_equal(draw(sampler, model, 4), model, [*data, data[0]])
    assert len(calls) == 2
    assert_rows_equal(draw(sampler, model, 3), model, data)


def test_a_data_loader_is_a_source(model):
    inputs, targets = torch.randn(8, 4), torch.randint(3, (8,))
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=4)
    rows = draw(GradSampler(loader, nn.functional.cross_entropy), model, 2)
    assert_rows_equal(rows, model, [(inputs[:4], targets[:4]), (inputs[4:], targets[4:])])


def test_the_older_dictionary_form_is_accepted(model, data):
    sampler = GradSampler.of(
        {
            "data_loader_builder": lambda: (([inputs], {}, targets) for inputs, targets in data),
            "loss_fn": nn.functional.cross_entropy,
        }
    )
    assert_rows_equal(draw(sampler, model, 2), model, data[:2])
    assert GradSampler.of(sampler) is sampler


def test_arguments_and_keyword_arguments_reach_the_model(data):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, inputs, *, scale):
            return self.linear(inputs) * scale

    model = Scaled()
    inputs, targets = data[0]
    batches = [((inputs,), {"scale": torch.tensor(scale)}, targets) for scale in (0.0, 2.0)]
    silent, loud = GradSampler(batches, nn.functional.cross_entropy).gradients(model, dict(model.named_parameters()), 2)
    assert silent["linear.weight"].abs().sum() == 0
    assert loud["linear.weight"].abs().sum() > 0


def test_a_parameter_the_loss_does_not_touch_has_zero_gradient(model, data):
    parameters = weights(model) | {"elsewhere": nn.Parameter(torch.ones(2))}
    row = next(GradSampler(data, nn.functional.cross_entropy).gradients(model, parameters, 1))
    assert row["elsewhere"].tolist() == [0, 0]


def test_an_iterator_that_ends_early_yields_what_it_had_and_says_so(model, data, caplog):
    sampler = GradSampler(iter(data), nn.functional.cross_entropy)
    with caplog.at_level(logging.WARNING, logger="mfac_core"):
        assert len(draw(sampler, model, 5)) == 3
    assert "after 3 of 5" in caplog.text
    with pytest.raises(ValueError, match="yields no batch"):
        draw(sampler, model, 5)


def test_a_source_without_batches_is_an_error_that_names_it(model):
    with pytest.raises(ValueError, match=r"a list\) yields no batch"):
        draw(GradSampler([], nn.functional.cross_entropy), model, 1)


@pytest.mark.parametrize(
    ("batches", "loss_fn", "message"),
    [
        ([torch.ones(2, 4)], nn.functional.cross_entropy, "yields a Tensor"),
        (
            [(torch.ones(2, 4), torch.ones(2), torch.ones(2))],
            nn.functional.cross_entropy,
            "tuple of Tensor, Tensor, Tensor",
        ),
        ([(torch.ones(2, 4), None)], lambda output, target: output, r"shape \(2, 3\)"),
        ([(torch.ones(2, 4), None)], lambda output, target: 1.0, "returned a float"),
        ([(torch.ones(2, 4), None)], lambda output, target: output.detach().sum(), "does not depend"),
        ([(torch.ones(2, 4), None)], lambda output, target: torch.ones((), requires_grad=True), "depends on none"),
    ],
)
def test_what_is_not_a_batch_or_a_loss_is_refused_by_name(model, batches, loss_fn, message):
    with pytest.raises(ValueError, match=message):
        draw(GradSampler(batches, loss_fn), model, 1)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GradSampler(3, nn.functional.mse_loss), "data_loader_or_builder is a int"),
        (lambda: GradSampler([], "mse"), "loss_fn is a str"),
        (lambda: GradSampler(list, "mse"), "loss_fn is a str"),
        (lambda: GradSampler(nn.functional.mse_loss, []), r"write GradSampler\(data_loader, loss_fn\)"),
        (lambda: GradSampler(nn.MSELoss(), list), r"is a MSELoss .* write GradSampler\(data_loader, loss_fn\)"),
        (lambda: GradSampler.of([]), "grad_sampler is a list"),
        (lambda: GradSampler.of({"loader": []}), r"has the keys \['loader'\]"),
    ],
)
def test_what_is_not_a_sampler_is_refused_by_name(build, message):
    with pytest.raises(TypeError, match=message):
        build()


def test_two_functions_in_the_wrong_order_are_refused_once_batches_are_drawn(model, data):
    swapped = GradSampler(nn.functional.cross_entropy, lambda: data)
    with pytest.raises(TypeError, match=r"cross_entropy.*without arguments.*and the loss function after it"):
        draw(swapped, model, 1)


def test_progress_is_shown_only_on_request(model, data, capsys):
    draw(GradSampler(data, nn.functional.cross_entropy), model, 2)
    assert capsys.readouterr().out == ""
    draw(GradSampler(data, nn.functional.cross_entropy, progress=True), model, 2)
    assert "gradient samples" in capsys.readouterr().out


# --- builders and their options


def drawn_by(builder, options, model, count=2):
    list(GradSampler(builder, nn.functional.cross_entropy).gradients(model, weights(model), count, options))


def test_options_reach_a_builder_by_name_or_as_one_dictionary(model, data):
    got = []

    def by_name(batch_size=2, shuffle=True):
        got.append((batch_size, shuffle))
        return data

    def as_dictionary(kwargs):
        got.append(kwargs)
        return data

    def without():
        got.append("none")
        return data

    drawn_by(by_name, {"batch_size": 7}, model)
    drawn_by(by_name, {}, model)
    drawn_by(as_dictionary, {"batch_size": 7}, model)
    drawn_by(as_dictionary, {}, model)
    drawn_by(without, {}, model)
    assert got == [(7, True), (2, True), {"batch_size": 7}, None, "none"]


def test_options_that_nothing_takes_are_refused_by_name(model, data):
    for source in (data, lambda: data):
        with pytest.raises(TypeError, match=r"grad_sampler_kwargs \{'batch_size': 7\}.*takes none"):
            drawn_by(source, {"batch_size": 7}, model)


def test_options_of_a_recipe_reach_the_builder(model, data):
    sizes = []

    def builder(batch_size):
        sizes.append(batch_size)
        return data

    manager = ScheduledModifierManager(
        [MFACPruningModifier(final_sparsity=0.5, end_epoch=0.0, num_grads=2, grad_sampler_kwargs={"batch_size": 3})]
    )
    manager.apply(model, grad_sampler=GradSampler(builder, nn.functional.cross_entropy))
    assert sizes == [3, 3]  # two batches for the samples, and two of three to measure the loss on


# --- models that return tuples


class Pair(nn.Module):
    """Returns logits and classes, as models of SparseML do."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, inputs):
        logits = self.model(inputs)
        return logits, logits.softmax(dim=1)


def test_a_loss_that_takes_one_output_gets_the_first_of_a_tuple(model, data, caplog):
    pair = Pair(model)
    with caplog.at_level(logging.INFO, logger="mfac_torch"):
        rows = list(GradSampler(data, nn.functional.cross_entropy).gradients(pair, weights(model), 3))
    assert_rows_equal(rows, model, data)
    assert caplog.text.count("does not take the tuple") == 1


def test_a_loss_that_takes_the_tuple_gets_it(model, data, caplog):
    def loss(outputs, target):
        logits, classes = outputs
        return nn.functional.cross_entropy(logits, target) + 0 * classes.sum()

    with caplog.at_level(logging.INFO, logger="mfac_torch"):
        rows = list(GradSampler(data, loss).gradients(Pair(model), weights(model), 3))
    assert_rows_equal(rows, model, data)
    assert caplog.text == ""


def test_an_error_in_a_loss_is_raised_as_it_is(model, data):
    def loss(outputs, target):
        if isinstance(outputs, tuple):
            raise TypeError("mine")
        raise ValueError("about the first entry")

    with pytest.raises(TypeError, match="^mine$"):
        list(GradSampler(data, loss).gradients(Pair(model), weights(model), 1))

    def loss_of_one_row(output, target):
        if output.ndim > 1:
            raise TypeError("mine too")
        return output.sum()

    with pytest.raises(TypeError, match="^mine too$"):
        list(GradSampler(data, loss_of_one_row).gradients(model, weights(model), 1))


def test_batches_are_drawn_as_for_gradients_and_begun_anew(data):
    sampler = GradSampler(data, nn.functional.cross_entropy)
    drawn = sampler.batches(5)
    assert [any(batch is each for each in data) for batch in drawn] == [True] * 5
    assert all(one is other for one, other in zip(drawn, [*data, *data[:2]], strict=True))
    builder = GradSampler(lambda only: [data[only]], nn.functional.cross_entropy)
    assert builder.batches(1, {"only": 2})[0] is data[2]
    with pytest.raises(ValueError, match="yields no batch"):
        GradSampler([], nn.functional.cross_entropy).batches(1)


def test_the_loss_of_batches_is_the_mean_in_eval_mode_and_leaves_the_model_as_it_was(model, data):
    model.train()
    model[1].eval()
    model[0].weight.grad = torch.full_like(model[0].weight, 7)
    flags = [module.training for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    found = GradSampler(data, nn.functional.cross_entropy).loss(model, data)
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(model[0].weight.grad, torch.full_like(model[0].weight, 7))
    assert model[3].weight.grad is None
    model.eval()
    losses = [nn.functional.cross_entropy(model(inputs), targets).item() for inputs, targets in data]
    assert found == pytest.approx(sum(losses) / 3, rel=1e-6)


def test_statistics_are_put_back_when_the_loss_of_batches_is_taken_in_training_mode(model, data):
    model.eval()
    before = model[1].running_mean.clone()
    sampler = GradSampler(data, nn.functional.cross_entropy, training=True)
    in_training = sampler.loss(model, data)
    assert torch.equal(model[1].running_mean, before)
    assert not model.training
    assert in_training != pytest.approx(GradSampler(data, nn.functional.cross_entropy).loss(model, data), rel=1e-3)


def test_a_loss_that_differentiates_by_the_input_is_evaluated(data):
    class Slope(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(4, 1)

        def forward(self, inputs, targets):
            inputs = inputs.requires_grad_()
            (gradient,) = torch.autograd.grad(self.body(inputs).sum(), inputs, create_graph=True)
            return gradient.square().sum()

    model = Slope()
    found = GradSampler(data).loss(model, data)
    assert found == pytest.approx(6 * float(model.body.weight.detach().square().sum()), rel=1e-5)
    assert model.body.weight.grad is None


def test_a_loss_of_no_batch_or_of_no_scalar_is_refused_by_name(model, data):
    with pytest.raises(ValueError, match="there is no batch to evaluate the loss on"):
        GradSampler(data, nn.functional.cross_entropy).loss(model, [])
    with pytest.raises(ValueError, match="returned a tensor of shape"):
        GradSampler(data, lambda output, target: output).loss(model, data)
    with pytest.raises(ValueError, match="yields a Tensor; each batch must be"):
        GradSampler(data, nn.functional.cross_entropy).loss(model, [data[0][0]])


@pytest.mark.parametrize("training", [True, False])
def test_forward_runs_the_model_in_the_mode_that_it_is_in_without_gradients(model, data, training):
    model.train(training)
    before = model[1].running_mean.clone()
    output = GradSampler(data, nn.functional.cross_entropy).forward(model, data[0])
    assert output.shape == (6, 3)
    assert not output.requires_grad
    assert model.training == training
    assert torch.equal(model[1].running_mean, before) != training


def test_forward_of_a_model_with_a_loss_of_its_own_gets_all_of_a_batch(data):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(4, 3)

        def forward(self, inputs, labels):
            return nn.functional.cross_entropy(self.body(inputs), labels)

    own = Own()
    sampler = GradSampler(data)
    assert sampler.forward(own, data[0]).item() == pytest.approx(sampler.loss(own, data[:1]))
