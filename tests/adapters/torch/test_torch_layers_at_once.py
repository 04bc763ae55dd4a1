"""One-shot pruning of a PyTorch model by groups of layers."""

import copy
import gc
import itertools
import logging
import weakref

import pytest
import torch
from torch import nn

from mfac_core import MemoryBudgetError, SettingError
from mfac_core.backends import numpy_backend
from mfac_core.fisher.window import GradientWindow
from mfac_torch import GradSampler, ScheduledModifierManager, prune_one_shot

pytestmark = pytest.mark.usefixtures("placement")  # on the CPU, and on a GPU

LOSS = nn.functional.mse_loss
KEYS = {"num_grads": 4, "fisher_block_size": 16, "global_sparsity": False, "num_recomputations": 2}


def deep():
    torch.manual_seed(0)
    sizes = [6, 8, 5, 7, 3]
    layers = [layer for pair in itertools.pairwise(sizes) for layer in (nn.Linear(*pair), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


NAMES = ["0.weight", "2.weight", "4.weight", "6.weight"]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_it_is_the_same_as_one_call_for_each_group(task, size):
    model, by_hand, at_once = deep(), deep(), deep()
    masks = prune_one_shot(model, task.batches, LOSS, sparsity=0.5, layers_at_once=size, **KEYS)
    for first in range(0, 4, size):
        prune_one_shot(by_hand, task.batches, LOSS, sparsity=0.5, params=NAMES[first : first + size], **KEYS)
    prune_one_shot(at_once, task.batches, LOSS, sparsity=0.5, **KEYS)
    assert list(masks) == NAMES
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, by_hand.get_parameter(name))
    assert not torch.equal(model[6].weight, at_once[6].weight)
    assert all(int((model.get_parameter(name) == 0).sum()) == round(masks[name].numel() / 2) for name in NAMES)


def test_only_the_window_of_one_group_exists_at_a_time(task, monkeypatch):
    alive, columns = weakref.WeakSet(), []
    create = GradientWindow.__init__

    def created(self, *args, **options):
        gc.collect()
        alive.add(self)
        create(self, *args, **options)
        columns.append(sum(window.num_weights for window in alive))

    monkeypatch.setattr(GradientWindow, "__init__", created)
    prune_one_shot(deep(), task.batches, LOSS, sparsity=0.5, layers_at_once=1, **(KEYS | {"num_recomputations": 1}))
    assert columns == [48, 40, 35, 21]
    columns.clear()
    prune_one_shot(deep(), task.batches, LOSS, sparsity=0.5, **(KEYS | {"num_recomputations": 1}))
    assert columns == [144]


def test_the_memory_check_counts_one_group(task, monkeypatch):
    monkeypatch.setattr(numpy_backend.NumpyBackend, "free_bytes", lambda self, device: 200_000)
    keys = KEYS | {"num_grads": 400, "fisher_block_size": 4}
    with pytest.raises(MemoryBudgetError) as error:
        prune_one_shot(deep(), task.batches, LOSS, sparsity=0.5, **keys)
    assert error.value.__notes__ == ["Groups of layers need less: pass layers_at_once=k, with global_sparsity: false."]
    prune_one_shot(deep(), task.batches, LOSS, sparsity=0.5, layers_at_once=1, **keys)


def test_a_failure_in_the_last_group_leaves_the_model_as_it_was(task):
    model = deep()
    before = copy.deepcopy(model.state_dict())
    drawn = itertools.count()

    def batches():
        for batch in task.batches:
            if next(drawn) == 30:  # in the last of four groups
                raise RuntimeError("the disk is gone")
            yield batch

    with pytest.raises(RuntimeError, match="the disk is gone"):
        prune_one_shot(model, batches, LOSS, sparsity=0.5, layers_at_once=1, **(KEYS | {"num_recomputations": 1}))
    assert next(drawn) == 31
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_groups_are_in_the_log_and_a_recipe_of_several_modifiers_works(task, caplog):
    caplog.set_level(logging.INFO, "mfac_torch")
    model = deep()
    manager = ScheduledModifierManager.from_yaml(
        """
        modifiers:
          - !GlobalMagnitudePruningModifier {params: [0.weight, 2.weight], final_sparsity: 0.5, end_epoch: 0.0}
          - !MFACPruningModifier {params: [4.weight, 6.weight], final_sparsity: 0.5, end_epoch: 0.0, num_grads: 4}
        """
    )
    manager.apply(model, grad_sampler=GradSampler(task.batches, LOSS), layers_at_once=1)
    scopes = [
        record.getMessage().rpartition("(")[2] for record in caplog.records if "pruning step at" in record.getMessage()
    ]
    assert scopes == [
        "GlobalMagnitudePruningModifier 1: 0.weight, 2.weight)",
        "MFACPruningModifier 2, group 1 of 2: 4.weight)",
        "MFACPruningModifier 2, group 2 of 2: 6.weight)",
    ]
    assert int((model[0].weight == 0).sum() + (model[2].weight == 0).sum()) == 44
    assert manager.sparsity == pytest.approx(0.5, abs=0.01)


def test_a_global_threshold_is_refused_and_nothing_changes(task):
    model = deep()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(SettingError, match=r"layers_at_once: 2 conflicts with global_sparsity of MFACPruningModifier"):
        prune_one_shot(model, task.batches, LOSS, sparsity=0.5, layers_at_once=2)
    with pytest.raises(SettingError, match=r"layers_at_once: 0 must be a positive integer"):
        prune_one_shot(model, task.batches, LOSS, sparsity=0.5, layers_at_once=0, **KEYS)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_gradients_of_other_parameters_do_not_pile_up(task):
    """Beside the window of one group, the gradients of a whole model would need as much memory as its weights."""
    model, present = deep(), []

    def watch(module, *_):  # once the gradients of a layer are there
        present.append([name for name, parameter in model.named_parameters() if parameter.grad is not None])

    sampler = GradSampler(task.batches, LOSS)
    for layer in model[1:]:
        layer.register_full_backward_hook(watch)
    list(sampler.gradients(model, {"6.weight": model[6].weight}, 1))
    assert len(present) == len(model) - 1
    assert all(set(names) <= {"6.weight"} for names in present), present
    assert all(parameter.grad is None for parameter in model.parameters())
    LOSS(model(task.batches[0][0]), task.batches[0][1]).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())  # training has its gradients as before
