"""Whole training runs on several ranks, which prune like one process that gets the whole batches."""

import functools
import re

import pytest
import torch
from torch import nn

from mfac_core.backends import lookup
from mfac_torch import conversion
from tests.adapters.torch.conftest import TinyTask
from tests.adapters.torch.rank_training import ACDC, Run, assert_equal_runs, train
from tests.adapters.torch.virtual_gpus import VirtualGpus

GLOBAL = {"global_sparsity": True}


def recipe(modifier="MFACPruningModifier", **keys):
    return TinyTask.recipe(modifier, **keys)


@functools.cache
def alone(text, optimizer="sgd"):
    return train(None, text, {"optimizer": optimizer})


@pytest.mark.parametrize("scope", [{}, GLOBAL], ids=["layer", "global"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_masks_are_those_of_one_process_with_the_whole_batch(rank_processes, how, size, optimizer, scope):
    text = recipe(**scope)
    outcomes = rank_processes.run(train, text, {"how": how, "optimizer": optimizer}, size=size)
    assert_equal_runs(outcomes, alone(text, optimizer))


def test_hsdp_prunes_like_one_process(rank_processes):
    text = recipe(**GLOBAL)
    assert_equal_runs(rank_processes.run(train, text, {"how": "hsdp", "optimizer": "adamw"}), alone(text, "adamw"))


def _as_on_gpus(group, text, how):
    """Train as on a GPU, where arrays are tensors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(lookup._registered, "torch", VirtualGpus())
        patch.setattr(conversion, "_is_on_cpu", lambda tensor: False)
        return train(group, text, {"how": how})


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_tensors_on_gpus_are_exchanged_as_tensors(rank_processes, how):
    text = recipe(**GLOBAL)
    assert_equal_runs(rank_processes.run(_as_on_gpus, text, how), alone(text))


@pytest.mark.parametrize(
    "keys",
    [
        {"update": "joint"},
        {"num_recomputations": 2, "num_grads": 2},
        {"damp": "auto"},
        {"fisher_block_size": "null"},
        {"init_sparsity": "__FROM_PARAM__"},
    ],
    ids=lambda keys: next(iter(keys)),
)
@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_every_form_of_m_fac_prunes_like_one_process(rank_processes, how, keys):
    text = recipe(**keys)
    assert_equal_runs(rank_processes.run(train, text, {"how": how}, size=2), alone(text))


CONSTANT = """
pruning_modifiers:
  - !ConstantPruningModifier
    start_epoch: 0.0
    params: __ALL_PRUNABLE__
"""


def with_zeros():
    model = TinyTask.model()
    with torch.no_grad():
        model[0].weight[::2, ::3] = 0.0
        model[2].weight[1] = 0.0
    return model


@pytest.mark.parametrize(
    ("text", "model"),
    [
        (recipe("MagnitudePruningModifier"), TinyTask.model),
        (recipe("GlobalMagnitudePruningModifier"), TinyTask.model),
        (recipe("MagnitudePruningModifier", init_sparsity="__FROM_PARAM__"), with_zeros),
        (ACDC, TinyTask.model),
        (CONSTANT, with_zeros),
    ],
    ids=["magnitude", "global magnitude", "from param", "acdc", "constant"],
)
@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_other_modifiers_prune_like_one_process(rank_processes, how, text, model):
    options = {"how": how, "model": model}
    assert_equal_runs(rank_processes.run(train, text, options), train(None, text, options))


def eight_inputs():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 3))


@pytest.mark.parametrize("modifier", ["MFACPruningModifier", "MagnitudePruningModifier"])
@pytest.mark.parametrize(
    ("mask_type", "how"),
    [("2:4", "ddp"), ("block4", "ddp"), ("channel", "ddp"), ("filter", "ddp"), ("2:4", "fsdp2"), ("filter", "fsdp2")],
)
def test_groups_inside_a_shard_prune_like_one_process(rank_processes, modifier, mask_type, how):
    text = recipe(
        modifier, mask_type=mask_type, params="['2.weight', '4.weight']", init_sparsity=0.0, final_sparsity=0.5
    )
    options = {"how": how, "model": eight_inputs}
    assert_equal_runs(rank_processes.run(train, text, options, size=2), train(None, text, options))


def _refused_pattern(group, text):
    with pytest.raises(NotImplementedError, match=r"2\.weight"):
        Run(group, text, how="fsdp2", model=eight_inputs)


def test_groups_across_shards_are_refused_by_name(rank_processes):
    rank_processes.run(_refused_pattern, recipe(mask_type="channel", params="['2.weight']"), size=2)


class OneRow(nn.Module):
    """A single weight of one row: with shards, all ranks but the first have nothing."""

    def __init__(self):
        super().__init__()
        self.only = nn.Linear(6, 1, bias=False)

    def forward(self, inputs):
        return self.only(inputs).expand(-1, 3)


class Warm(Run):
    """The learning rate begins at 0, and the loop passes no closure by name, as some trainers do."""

    def step(self, step):
        self.optimizers[0].param_groups[0]["lr"] = 0.05 * min(step / 3, 1.0)
        self.loss(step).backward()
        self.optimizers[0].step(closure=None)


def one_row():
    torch.manual_seed(0)
    return OneRow()


def test_a_warm_up_from_zero_is_training_also_on_a_rank_without_weights(rank_processes):
    options = {"how": "fsdp2", "model": one_row}
    text = recipe(fisher_block_size=4)
    assert_equal_runs(rank_processes.run(train, text, options, Warm, size=2), train(None, text, options, Warm))


class Unknown(torch.optim.SGD):
    """An optimizer whose state is not known."""

    def step(self, closure=None):
        return super().step(closure)


def unknown(parameters):
    return Unknown(parameters, lr=0.05, momentum=0.9)


def test_lines_are_logged_once(rank_processes):
    # warnings about the recipe, the selection, the window and the optimizer
    text = recipe(params="['re:.*weight', 're:.*bias']", update_frequency=10.0, num_grads=50)
    options = {"optimizer": unknown}
    first, second = (outcome.lines for outcome in rank_processes.run(train, text, options, size=2))
    of_ranks = [line for line in first if "2 ranks" in line]
    assert len(of_ranks) == 1
    assert second == []
    assert _without_numbers(set(first) - set(of_ranks)) == _without_numbers(train(None, text, options).lines)
    for words in ("in one pass within each layer", "re:.*bias", "50 gradient samples", "Unknown keeps state"):
        assert [line for line in first if line.startswith("WARNING") and words in line], words


def _without_numbers(lines):
    return {re.sub(r"[0-9.,e+-]+", "", line) for line in lines}
