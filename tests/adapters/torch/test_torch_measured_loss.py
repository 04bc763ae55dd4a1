"""What a pruning step does to the loss is measured where there is a sampler, and changes nothing else."""

import copy
import gc
import logging
import re
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from mfac_torch import GradSampler, MFACPruningModifier, ScheduledModifierManager

pytestmark = pytest.mark.usefixtures("placement")  # on the CPU, and on a GPU

LINE = re.compile(r"predicted loss increase \S+ \(in-sample\)(?:, measured loss change (\S+) on ([^()]+?))?, \d")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3))


@pytest.fixture
def batches():
    torch.manual_seed(1)
    return [(torch.randn(8, 6), torch.randint(3, (8,))) for _ in range(64)]


def modifier(**changes):
    return MFACPruningModifier(**{"final_sparsity": 0.8, "end_epoch": 0.0, "num_grads": 20, **changes})


def one_shot(model, sampler, caplog, *modifiers):
    """What the lines of the pruning steps say of the measured change."""
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="mfac_torch"):
        ScheduledModifierManager(list(modifiers) or [modifier()]).apply(model, grad_sampler=sampler)
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("pruning step")]
    return [LINE.search(line).groups() for line in lines]


def loss_of(model, batches):
    with torch.no_grad():
        return sum(F.cross_entropy(copy.deepcopy(model).eval()(x), y).item() for x, y in batches) / len(batches)


@pytest.mark.parametrize(("parts", "where"), [(1, "16 held-out batches"), (3, "16 batches, over all 3 sub-steps")])
def test_the_line_of_the_last_part_has_the_change_on_batches_after_those_of_the_samples(
    model, batches, caplog, parts, where
):
    apart = batches[20:36]
    before = loss_of(model, apart)
    *others, (change, said) = one_shot(
        model, GradSampler(batches, F.cross_entropy), caplog, modifier(num_recomputations=parts)
    )
    assert others == [(None, None)] * (parts - 1)
    assert said == where
    assert float(change) == pytest.approx(loss_of(model, apart) - before, rel=0.01)
    assert change[0] in "+-"


def test_each_of_several_modifiers_measures_its_own_step(model, batches, caplog):
    apart = batches[20:36]
    losses = [loss_of(model, apart)]
    after_first = copy.deepcopy(model)
    modifiers = modifier(params=["0.weight"]), modifier(params=["3.weight"])
    one_shot(after_first, GradSampler(batches, F.cross_entropy), caplog, modifiers[0])
    losses.append(loss_of(after_first, apart))
    found = one_shot(model, GradSampler(batches, F.cross_entropy), caplog, *modifiers)
    losses.append(loss_of(model, apart))
    for (change, said), before, after in zip(found, losses[:-1], losses[1:], strict=True):
        assert said == "16 held-out batches"
        assert float(change) == pytest.approx(after - before, rel=0.01)


def test_an_iterator_keeps_its_batches_for_gradient_samples(model, batches, caplog):
    source = iter(batches)
    assert one_shot(model, GradSampler(source, F.cross_entropy), caplog) == [(None, None)]
    assert len(list(source)) == 64 - 20
    assert "the data ended" not in caplog.text


@pytest.mark.parametrize("wanted", ["before", "after"])
@pytest.mark.parametrize("parts", [1, 2])
def test_a_loss_that_fails_in_the_measurement_leaves_all_as_it_was_and_the_next_try_gives_the_same_bits(
    batches, wanted, parts
):
    class Fault(Exception):
        pass

    inputs, targets = (torch.cat(each) for each in zip(*batches, strict=True))

    def trained(failing):
        torch.manual_seed(2)
        model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
        optimizer = torch.optim.SGD(model.parameters(), 0.0)  # the step in which it fails had other gradients
        calls = []

        def loss(output, target):
            calls.append(None)
            if failing and len(calls) == number:
                raise Fault
            return F.cross_entropy(output, target)

        # the samples of all parts, and the loss before, are evaluated ahead of the loss after
        number = 20 + 1 if wanted == "before" else 20 * parts + 16 + 3
        loader = DataLoader(TensorDataset(inputs, targets), batch_size=8, shuffle=True)
        manager = ScheduledModifierManager([modifier(end_epoch=0.0, num_recomputations=parts, damp=1e-3)])
        manager.modify(model, optimizer, 2, grad_sampler=GradSampler(loader, loss))

        def step():
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()

        if failing:
            state = copy.deepcopy(model.state_dict())
            with pytest.raises(Fault):
                step()
            if parts == 2 and wanted == "after":
                assert 0.1 < manager.sparsity < 0.7  # the first part is done
            else:
                assert manager.sparsity == 0
                assert all(torch.equal(each, state[name]) for name, each in model.state_dict().items())
                assert manager.masks == {}
        step()
        assert manager.sparsity == pytest.approx(0.8, abs=0.01)
        return model

    whole, retried = trained(False), trained(True)
    assert all(map(torch.equal, whole.parameters(), retried.parameters()))


def test_batches_are_forgotten_with_the_pruning_step(model, caplog):
    drawn = []

    def source():
        for _ in range(40):
            batch = torch.randn(8, 6), torch.randint(3, (8,))
            drawn.append(weakref.ref(batch[0]))
            yield batch

    sampler = GradSampler(source, F.cross_entropy)
    ((change, _),) = one_shot(model, sampler, caplog)
    assert change is not None
    gc.collect()
    assert [each() for each in drawn] == [None] * 36


def test_dropout_drops_the_same_before_and_after_and_training_draws_as_without(model, batches, caplog):
    with torch.no_grad():
        model[0].weight *= 1e-12  # nothing changes without these
    sampler = GradSampler(batches, F.cross_entropy, training=True)
    ((change, _),) = one_shot(model, sampler, caplog, modifier(params=["0.weight"], damp=1e3))
    assert abs(float(change)) < 1e-6


def test_loggers_are_told_of_the_measured_change(model, batches, caplog):
    logged = []

    class Board:
        def log_scalar(self, tag, value, step):
            logged.append((tag, value, step))

    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    manager = ScheduledModifierManager([modifier(params=["0.weight"]), modifier(params=["3.weight"], num_grads=10)])
    with caplog.at_level(logging.INFO, logger="mfac_torch"):
        manager.modify(model, optimizer, 2, grad_sampler=GradSampler(batches, F.cross_entropy), loggers=Board())
        F.cross_entropy(model(batches[0][0]), batches[0][1]).backward()
        optimizer.step()
    changes = {tag: value for tag, value, _ in logged if tag.startswith("PruningStep")}
    said = [float(found.group(1)) for found in map(LINE.search, caplog.messages) if found]
    assert list(changes) == [
        "PruningStep/measured_loss_change/MFACPruningModifier 1",
        "PruningStep/measured_loss_change/MFACPruningModifier 2",
    ]
    assert list(changes.values()) == pytest.approx(said, rel=0.01)
