"""Ways to train on several ranks, each of which prunes like one process that trains in the same way."""

import pytest
import torch
from torch import nn

from tests.adapters.torch.conftest import TinyTask
from tests.adapters.torch.rank_training import ACDC, Run, assert_equal_runs, train

HOW = pytest.mark.parametrize("how", ["ddp", "fsdp2"])


class Accumulating(Run):
    """Two backward passes per step, of which only the last one communicates."""

    def step(self, step):
        quiet, sharded = getattr(self.module, "no_sync", None), hasattr(self.module, "set_requires_gradient_sync")
        if sharded:
            self.module.set_requires_gradient_sync(False)
        with quiet() if quiet is not None else torch.enable_grad():
            (self.loss(step) / 2).backward()
        if sharded:
            self.module.set_requires_gradient_sync(True)
        (self.loss(step + 1) / 2).backward()
        self.optimizers[0].step()


class Scaled(Run):
    """Mixed precision, with an overflow on the last rank in step 7, before the window of step 10 is full."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=4)

    def train(self):
        return super().train(stop=21)  # one of which is skipped

    def step(self, step):
        loss = self.loss(step)
        if step == 7 and self.rank == self.size - 1:
            loss = loss * float("inf")
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizers[0])
        self.scaler.update()


class Clipped(Run):
    """Gradients are clipped between the backward pass and the step."""

    def step(self, step):
        self.loss(step).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 0.05)
        self.optimizers[0].step()


def two_optimizers(parameters):
    first, second, *others = parameters
    return [torch.optim.SGD([first, second], lr=0.05), torch.optim.AdamW(others, lr=0.01)]


@pytest.mark.parametrize(
    ("kind", "optimizer"),
    [(Accumulating, "adamw"), (Scaled, "adamw"), (Clipped, "adamw"), (Run, two_optimizers)],
    ids=["accumulating", "scaled", "clipped", "two optimizers"],
)
@HOW
def test_each_loop_prunes_like_that_of_one_process(rank_processes, how, kind, optimizer):
    text, options = TinyTask.recipe(), {"optimizer": optimizer}
    outcomes = rank_processes.run(train, text, {"how": how, **options}, kind, size=2)
    assert_equal_runs(outcomes, train(None, text, options, kind))


class Tied(nn.Module):
    """Encoder and decoder share their weight."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 8, bias=False), nn.Linear(8, 6, bias=False)
        self.decoder.weight = nn.Parameter(self.encoder.weight.detach().T.contiguous())
        self.head = nn.Linear(6, 3)
        self.other_head = nn.Linear(6, 3, bias=False)
        self.other_head.weight = self.head.weight

    def forward(self, inputs):
        hidden = self.decoder(torch.tanh(self.encoder(inputs)))
        return self.head(hidden) + self.other_head(inputs)


class SometimesUnused(nn.Module):
    """A layer that only every other step uses, on all ranks."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)
        self.calls = 0

    def forward(self, inputs):
        self.calls += 1
        hidden = self.first(inputs)
        if self.calls % 2:
            hidden = hidden + self.second(inputs)
        return self.last(torch.tanh(hidden))


def tied():
    torch.manual_seed(0)
    return Tied()


def sometimes_unused():
    torch.manual_seed(0)
    return SometimesUnused()


@HOW
def test_tied_weights_count_once(rank_processes, how):
    text = TinyTask.recipe()
    outcomes = rank_processes.run(train, text, {"how": how, "model": tied}, size=2)
    alone = train(None, text, {"model": tied})
    assert_equal_runs(outcomes, alone)
    assert "other_head.weight" not in alone.masks


def test_parameters_may_be_unused_in_some_steps(rank_processes):
    text = TinyTask.recipe()
    options = {"model": sometimes_unused}
    outcomes = rank_processes.run(train, text, {"ddp": {"find_unused_parameters": True}, **options}, size=2)
    assert_equal_runs(outcomes, train(None, text, options))


@pytest.mark.parametrize("options", [{"ddp": {"static_graph": True}}, {"compiled": "aot_eager"}], ids=str)
def test_other_forms_of_ddp(rank_processes, options):
    text = TinyTask.recipe()
    assert_equal_runs(rank_processes.run(train, text, options, size=2), train(None, text))


def _zero(group, recipe):
    """Train with an optimizer that shards its state, and count the state of pruned weights that is not zero."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # its import warns

    def zero(parameters):
        return ZeroRedundancyOptimizer(
            parameters, torch.optim.AdamW, process_group=group, lr=0.01, parameters_as_bucket_view=False
        )

    run = Run(group, recipe, optimizer=zero).train(stop=10)
    kept = [
        int((value[~run.manager.masks[name]] != 0).sum())
        for name, parameter in run.model.named_parameters()
        if name in run.manager.masks
        for key, value in run.optimizers[0].optim.state.get(parameter, {}).items()
        if key != "step"
    ]
    return run.train(10).outcome(), kept


@pytest.mark.parametrize("modifier", ["MFACPruningModifier", "ACDCPruningModifier"])
def test_an_optimizer_that_shards_its_state_has_it_reset(rank_processes, modifier):
    text = TinyTask.recipe() if "MFAC" in modifier else ACDC
    outcomes, kept = zip(*rank_processes.run(_zero, text, size=2), strict=True)
    assert_equal_runs(list(outcomes), train(None, text, {"optimizer": "adamw"}))
    assert {each for of_rank in kept for each in of_rank} == {0}
    assert sum(map(len, kept)) == 4  # two moments of two weights, each on one rank
