import copy
import logging

import pytest
import torch
from torch import nn

from mfac_core import sample_batches
from mfac_torch import GradSampler, recalibrate_batchnorm

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def network(*more):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), *more, nn.Flatten(), nn.Linear(64, 5), nn.BatchNorm1d(5)
    )


def batches(number=6, size=8):
    generator = torch.Generator().manual_seed(1)
    return [(2 * torch.randn(size, 1, 6, 6, generator=generator) + 1, torch.zeros(size)) for _ in range(number)]


def all_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("training", [False, True])
def test_statistics_are_the_average_over_batches_as_pytorch_has_it_for_averaged_weights(training):
    model = network()
    twin = copy.deepcopy(model)
    model.train(training)
    weights = {name: each.clone() for name, each in model.named_parameters()}
    assert recalibrate_batchnorm(model, batches()) == 2
    torch.optim.swa_utils.update_bn([inputs for inputs, _ in batches()], twin)
    for layer in (1, 5):
        for name in STATISTICS:
            torch.testing.assert_close(getattr(model[layer], name), getattr(twin[layer], name))
    assert model[1].num_batches_tracked == 6
    assert all(torch.equal(each, weights[name]) for name, each in model.named_parameters())
    assert all(module.training == training for module in model.modules())
    assert model[1].momentum == 0.1


def test_dropout_is_not_active_meanwhile_and_no_random_number_is_drawn():
    with_dropout, without = network(nn.Dropout(0.5)), network(nn.Identity())
    with_dropout.train()
    before = torch.get_rng_state()
    recalibrate_batchnorm(with_dropout, batches())
    recalibrate_batchnorm(without, batches())
    assert_same(all_of(with_dropout), all_of(without))
    assert torch.equal(torch.get_rng_state(), before)


def test_flags_and_momenta_of_each_module_are_as_before():
    model = network(nn.Dropout())
    model[1].momentum, model[6].momentum = 0.3, None
    model.train()
    model[3].eval()
    flags = [module.training for module in model.modules()]
    recalibrate_batchnorm(model, batches())
    assert [module.training for module in model.modules()] == flags
    assert (model[1].momentum, model[6].momentum) == (0.3, None)


def broken(error):
    yield batches()[0]
    raise error


@pytest.mark.parametrize("error", [RuntimeError("the disk is gone"), KeyboardInterrupt()])
def test_an_exception_in_a_batch_leaves_all_as_it_was(error):
    model = network().train()
    recalibrate_batchnorm(model, batches(3))
    before = all_of(model)
    with pytest.raises(type(error)):
        recalibrate_batchnorm(model, lambda: broken(error))
    assert_same(all_of(model), before)
    assert model.training and model[1].training and model[1].momentum == 0.1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_are_refused_and_the_statistics_stay(bad):
    model = network()
    before = all_of(model)
    data = batches()
    data[4][0][0, 0, 0, 0] = bad
    with pytest.raises(ValueError, match="the input of batch normalization layer 1 contains NaN or Inf"):
        recalibrate_batchnorm(model, data)
    assert_same(all_of(model), before)


def test_statistics_that_hold_nan_are_cured():
    model, twin = network(), network()
    model[1].running_mean.fill_(float("nan"))
    recalibrate_batchnorm(model, batches())
    recalibrate_batchnorm(twin, batches())
    assert_same(all_of(model), all_of(twin))


def test_a_model_without_batch_normalization_says_so(caplog):
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.BatchNorm1d(4, track_running_stats=False))
    with caplog.at_level(logging.INFO, logger="mfac_torch"):
        assert recalibrate_batchnorm(model, [(torch.zeros(2, 4), torch.zeros(2))]) == 0
    assert "nothing to recalibrate: the model has no batch normalization with running statistics" in caplog.text


def test_layers_that_are_frozen_or_that_nothing_comes_through_are_left_and_named(caplog):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head, self.unused = nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.BatchNorm1d(4)

        def forward(self, inputs):
            return self.head(self.body(inputs))

    model = Model().train()
    model.body.eval()
    model.unused.running_mean.fill_(7)
    with caplog.at_level(logging.INFO, logger="mfac_torch"):
        assert recalibrate_batchnorm(model, [torch.randn(8, 4) + 3]) == 1
    assert "not reached by any batch: unused; frozen, and left unchanged: body" in caplog.text
    assert not model.body.running_mean.any() and (model.unused.running_mean == 7).all()
    assert (model.head.running_mean > 1).all()  # of inputs that the frozen layer leaves as they are
    assert not model.unused.num_batches_tracked
    model.head.eval()
    assert recalibrate_batchnorm(model, [torch.randn(8, 4)]) == 0
    model.eval()  # now nothing tells frozen layers from others
    assert recalibrate_batchnorm(model, [torch.randn(8, 4)]) == 2


def test_a_layer_that_stands_in_two_places_averages_over_both():
    norm = nn.BatchNorm1d(3)
    model = nn.Sequential(norm, nn.Linear(3, 3), norm)
    inputs = torch.randn(16, 3)
    expected = (inputs.mean(0) + model[1](nn.functional.batch_norm(inputs, None, None, training=True)).mean(0)) / 2
    assert recalibrate_batchnorm(model, [inputs]) == 1
    torch.testing.assert_close(norm.running_mean, expected.detach())
    assert norm.num_batches_tracked == 2


def test_many_batches_are_averaged_in_more_than_half_precision():
    model = nn.BatchNorm1d(2).bfloat16()
    inputs = [torch.full((4, 2), 3.0).bfloat16() * (1 + (i % 2)) for i in range(400)]
    recalibrate_batchnorm(model, inputs)
    assert model.running_mean.tolist() == [4.5, 4.5]
    assert model.running_mean.dtype == torch.bfloat16


def test_layers_of_every_kind_are_found():
    model = nn.Sequential(nn.LazyBatchNorm1d(), nn.SyncBatchNorm(3), nn.Unflatten(1, (3, 1, 1, 1)), nn.BatchNorm3d(3))
    data = [torch.randn(8, 3)]
    with pytest.raises(ValueError, match="0 has no statistics, because no input has reached it yet; call the model"):
        recalibrate_batchnorm(model, data)
    model(data[0])
    assert recalibrate_batchnorm(model, data) == 3
    torch.testing.assert_close(model[0].running_mean, data[0].mean(0))


def test_wrappers_are_looked_through():
    model = network()
    twin = copy.deepcopy(model)
    assert recalibrate_batchnorm(torch.compile(nn.DataParallel(model), backend="eager"), batches()) == 2
    recalibrate_batchnorm(twin, batches())
    assert_same(all_of(model), all_of(twin))
    with pytest.raises(TypeError, match="the model is a list"):
        recalibrate_batchnorm([model], batches())


class WithLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, inputs, labels):
        return {"loss": (self.norm(inputs) - labels).square().mean()}


INPUTS = [torch.randn(8, 4, generator=torch.Generator().manual_seed(i)) for i in range(3)]
FORMS = {
    "inputs alone": INPUTS,
    "lists of one": [[x] for x in INPUTS],
    "pairs": [(x, torch.zeros(8)) for x in INPUTS],
    "calls": [([x], {}, None) for x in INPUTS],
    "mappings": [{"input": x} for x in INPUTS],
    "mappings with labels": [{"input": x, "labels": torch.zeros(8)} for x in INPUTS],
    "a function": lambda: iter(INPUTS),
    "a sampler": GradSampler([(x, torch.zeros(8)) for x in INPUTS], nn.functional.mse_loss),
}


@pytest.mark.parametrize("form", FORMS)
def test_batches_may_have_every_form(form):
    model = nn.BatchNorm1d(4)
    assert recalibrate_batchnorm(model, FORMS[form]) == 1
    torch.testing.assert_close(model.running_mean, torch.stack(INPUTS).mean((0, 1)))


@pytest.mark.parametrize("as_mapping", [False, True])
def test_a_model_that_cannot_be_called_without_labels_gets_them(as_mapping):
    model = WithLoss()
    data = [{"inputs": x, "labels": torch.zeros(8, 4)} if as_mapping else (x, torch.zeros(8, 4)) for x in INPUTS]
    for loader in (data, GradSampler(data)):
        model.norm.reset_running_stats()
        assert recalibrate_batchnorm(model, loader) == 1
        torch.testing.assert_close(model.norm.running_mean, torch.stack(INPUTS).mean((0, 1)))


def test_a_number_of_batches_may_be_given(monkeypatch):
    model = nn.BatchNorm1d(4)
    for given, taken in ((2, 2), (None, 3), (9, 3)):
        recalibrate_batchnorm(model, INPUTS, num_batches=given)
        assert model.num_batches_tracked == taken
    monkeypatch.setattr(sample_batches, "_MAX_WITHOUT_LENGTH", 2)
    recalibrate_batchnorm(model, lambda: iter(INPUTS))
    assert model.num_batches_tracked == 2
    with pytest.raises(ValueError, match="num_batches: 0 must be a positive integer"):
        recalibrate_batchnorm(model, INPUTS, num_batches=0)
    with pytest.raises(ValueError, match="yields no batch"):
        recalibrate_batchnorm(model, [])
    with pytest.raises(TypeError, match="pass an iterable of batches"):
        recalibrate_batchnorm(model, 3)
    assert model.num_batches_tracked == 2
