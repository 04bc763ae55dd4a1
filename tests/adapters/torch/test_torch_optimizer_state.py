"""What optimizers remember of pruned weights, and what of it is left alone."""

import re
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import mfac_torch
from mfac_torch import ACDCPruningModifier, MagnitudePruningModifier, ScheduledModifierManager
from mfac_torch import optimizer_state as of_optimizers
from mfac_torch.optimizer_state import declare_elementwise_state, reset_pruned_state, reset_state

PRUNED = torch.tensor([[False, True, False], [True, False, False]])

PLAIN = {
    "SGD": (torch.optim.SGD, {"momentum": 0.9}, {"momentum_buffer"}),
    "Adam": (torch.optim.Adam, {"amsgrad": True}, {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}),
    "AdamW": (torch.optim.AdamW, {}, {"exp_avg", "exp_avg_sq"}),
    "Adam, foreach": (torch.optim.Adam, {"foreach": True}, {"exp_avg", "exp_avg_sq"}),
    "Adam, fused": (torch.optim.Adam, {"fused": True}, {"exp_avg", "exp_avg_sq"}),
    "NAdam": (torch.optim.NAdam, {}, {"exp_avg", "exp_avg_sq"}),
    "RAdam": (torch.optim.RAdam, {}, {"exp_avg", "exp_avg_sq"}),
    "Adamax": (torch.optim.Adamax, {}, {"exp_avg", "exp_inf"}),
    "RMSprop": (
        torch.optim.RMSprop,
        {"momentum": 0.9, "centered": True},
        {"square_avg", "momentum_buffer", "grad_avg"},
    ),
    "Adagrad": (torch.optim.Adagrad, {}, {"sum"}),
    "Adadelta": (torch.optim.Adadelta, {}, {"square_avg", "acc_delta"}),
    "Rprop": (torch.optim.Rprop, {}, {"prev"}),
    "ASGD": (torch.optim.ASGD, {}, {"ax"}),
}
OF_LATER_RELEASES = {"Muon": {"momentum_buffer"}, "Adafactor": set()}
PLAIN |= {
    name: (getattr(torch.optim, name), {}, keys)
    for name, keys in OF_LATER_RELEASES.items()
    if hasattr(torch.optim, name)
}


class Rotated(torch.optim.Optimizer):
    """Keeps moments of the weight's shape in another basis, under the names that Adam has for its own."""

    def __init__(self, parameters, lr=3e-3):
        super().__init__(parameters, {"lr": lr})
        self.largest = 0.0

    @torch.no_grad()
    def step(self, closure=None):
        self.largest = 0.0
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            matrix = parameter.grad.reshape(len(parameter), -1)
            if not state:
                basis = torch.linalg.qr(torch.randn(len(parameter), len(parameter)))[0]
                rotated = basis @ matrix
                state.update(basis=basis, exp_avg=torch.zeros_like(rotated), exp_avg_sq=rotated**2)
            rotated = state["basis"] @ matrix
            state["exp_avg"].lerp_(rotated, 0.1)
            state["exp_avg_sq"].lerp_(rotated * rotated, 0.001)
            change = state["basis"].T @ (state["exp_avg"] / (state["exp_avg_sq"].sqrt() + 1e-8))
            parameter.sub_(self.param_groups[0]["lr"] * change.reshape(parameter.shape))
            self.largest = max(self.largest, self.param_groups[0]["lr"] * float(change.detach().abs().max()))


class Coded(torch.optim.Optimizer):
    """Keeps its momentum as codes of a byte, of which 127 is the number 0."""

    def __init__(self, parameters, lr=0.05):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            if not state:
                state["momentum_buffer"] = torch.full_like(parameter, 127, dtype=torch.uint8)
                state["scale"] = torch.tensor(1.0)
            momentum = (state["momentum_buffer"].float() - 127) * state["scale"]
            momentum.lerp_(parameter.grad, 0.1)
            state["scale"] = momentum.abs().max() / 127 + 1e-12
            state["momentum_buffer"] = (momentum / state["scale"] + 127).round().to(torch.uint8)
            parameter.sub_(self.param_groups[0]["lr"] * momentum)


class OwnStep(torch.optim.SGD):
    """A class that is not declared until a test does so."""

    def step(self, closure=None):
        return super().step(closure)


class AtOnce(torch.optim.Adagrad):
    """Makes its state when it is made, and none later; nobody knows what it holds."""

    def __init__(self, parameters, **options):
        super().__init__(parameters, **options)
        for state in self.state.values():
            state["other"] = torch.ones(5)

    def step(self, closure=None):
        return super().step(closure)


def stepped(make, options, steps=2):
    weight = nn.Parameter(torch.tensor([[1.0, -2.0, 3.0], [-4.0, 5.0, 6.0]]))
    optimizer = make([weight], **options)
    for step in range(steps):
        weight.grad = torch.full_like(weight, 0.5 + step)
        optimizer.step()
    return weight, optimizer


def copied(state):
    return {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in state.items()}


def same(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key]
        for key, value in one.items()
    )


@pytest.mark.parametrize("name", PLAIN)
def test_what_is_one_number_per_weight_is_zeroed_at_pruned_weights_and_the_rest_stays(name):
    make, options, expected = PLAIN[name]
    weight, optimizer = stepped(make, options)
    before = copied(optimizer.state[weight])
    with ExitStack() as undo:
        reset_pruned_state(optimizer, {"weight": weight}, {"weight": PRUNED}, undo)
        after = copied(optimizer.state[weight])
    changed = {key for key in before if not same({key: before[key]}, {key: after[key]})}
    assert changed == expected
    for key in expected:
        assert torch.equal(after[key], before[key].masked_fill(PRUNED, 0))
    assert same(optimizer.state[weight], before)


@pytest.mark.parametrize("name", PLAIN)
def test_an_optimizer_whose_state_is_dropped_makes_its_next_step_as_its_first(name):
    make, options, _ = PLAIN[name]
    weight, optimizer = stepped(make, options)
    before = copied(optimizer.state[weight])
    with ExitStack() as undo:
        reset_state(optimizer, [weight], undo)
    assert same(optimizer.state[weight], before)
    with ExitStack() as undo:
        reset_state(optimizer, [weight], undo)
        undo.pop_all()
    start = weight.detach().clone()
    weight.grad = torch.full_like(weight, 0.5)
    optimizer.step()
    fresh = nn.Parameter(start)
    fresh.grad = torch.full_like(fresh, 0.5)
    make([fresh], **options).step()
    assert torch.equal(weight, fresh)


def test_a_subclass_without_a_step_of_its_own_counts_as_its_base():
    class Named(torch.optim.AdamW):
        pass

    weight, optimizer = stepped(Named, {})
    reset_pruned_state(optimizer, {"weight": weight}, {"weight": PRUNED}, ExitStack())
    assert not optimizer.state[weight]["exp_avg"][PRUNED].any()


@pytest.mark.parametrize("make", [Rotated, Coded, OwnStep])
def test_what_is_not_known_is_left_alone_and_named_once(make, caplog, monkeypatch):
    weight, optimizer = stepped(make, {"momentum": 0.9} if make is OwnStep else {})
    before = copied(optimizer.state[weight])
    for _ in range(2):
        reset_pruned_state(optimizer, {"weight": weight}, {"weight": PRUNED}, ExitStack())
    assert same(optimizer.state[weight], before)
    assert caplog.text.count("it is not reset") == 1
    assert f"declare_elementwise_state({make.__name__}, [" in caplog.text
    monkeypatch.setattr(of_optimizers, "_elementwise_keys", dict(of_optimizers._elementwise_keys))
    mfac_torch.declare_elementwise_state(make, ["exp_avg", "momentum_buffer"])
    reset_pruned_state(optimizer, {"weight": weight}, {"weight": PRUNED}, ExitStack())
    changed = {key for key, value in optimizer.state[weight].items() if not same({key: value}, {key: before[key]})}
    assert changed == {Rotated: {"exp_avg"}, Coded: set(), OwnStep: {"momentum_buffer"}}[make]


class Wrapped(torch.Tensor):
    """A tensor whose values are not where a plain one has them."""


@pytest.mark.parametrize(
    "value",
    [
        torch.ones(2, 3, dtype=torch.uint8),
        torch.ones(2, 3, dtype=torch.complex64),
        torch.ones(3, 2),
        torch.ones(2, 3).to_sparse(),
        torch.ones(2, 3).as_subclass(Wrapped),
    ],
    ids=["bytes", "complex", "another shape", "sparse", "a subclass"],
)
def test_an_entry_of_a_known_name_in_another_form_is_left_alone(value, caplog):
    weight, optimizer = stepped(torch.optim.Adam, {})
    optimizer.state[weight]["exp_avg"] = value
    reset_pruned_state(optimizer, {"weight": weight}, {"weight": PRUNED}, ExitStack())
    assert optimizer.state[weight]["exp_avg"] is value
    assert bool((value.to_dense() == 1).all())
    assert not optimizer.state[weight]["exp_avg_sq"][PRUNED].any()
    assert "Adam keeps state (exp_avg) that is not known" in caplog.text


def test_state_that_its_optimizer_would_not_make_again_is_not_dropped(caplog):
    weight, optimizer = stepped(AtOnce, {})
    before = copied(optimizer.state[weight])
    reset_state(optimizer, [weight], ExitStack())
    assert same(optimizer.state[weight], before)
    assert "AtOnce keeps state (sum, other) that is not known" in caplog.text
    weight, optimizer = stepped(torch.optim.Adagrad, {"initial_accumulator_value": 0.5})
    reset_state(optimizer, [weight], ExitStack())
    assert bool((optimizer.state[weight]["sum"] == 0.5).all())


def test_state_that_a_recorded_graph_knows_gets_its_first_values_in_place():
    weight, optimizer = stepped(torch.optim.Adam, {})
    optimizer.param_groups[0]["capturable"] = True
    moment = optimizer.state[weight]["exp_avg"]
    reset_state(optimizer, [weight], ExitStack())
    assert optimizer.state[weight]["exp_avg"] is moment
    assert not moment.any()


@pytest.mark.parametrize(("given", "keys"), [(3, ["a"]), (nn.Linear, ["a"]), (OwnStep, "exp_avg"), (OwnStep, [3])])
def test_a_declaration_that_says_nothing_is_refused(given, keys):
    with pytest.raises(TypeError, match="pass"):
        declare_elementwise_state(given, keys)


def test_moments_in_another_basis_make_no_leap_at_the_pruning_step():
    torch.manual_seed(0)
    layer = nn.Linear(32, 32, bias=False)
    optimizer = Rotated(layer.parameters())
    manager = ScheduledModifierManager([MagnitudePruningModifier(final_sparsity=0.5, start_epoch=1.0, end_epoch=1.0)])
    manager.modify(layer, optimizer, steps_per_epoch=50)
    largest = []
    for _ in range(70):
        inputs = torch.randn(64, 32)
        optimizer.zero_grad()
        nn.functional.mse_loss(layer(inputs), inputs.flip(1)).backward()
        optimizer.step()
        largest.append(optimizer.largest)
    assert int((layer.weight == 0).sum()) == 512
    assert max(largest[50:]) < 2 * max(largest[40:50])


@pytest.mark.parametrize("make", [Rotated, Coded, torch.optim.Adagrad, torch.optim.Adam, torch.optim.AdamW])
def test_alternating_phases_stay_small_with_any_state(task, make):
    modifier = ACDCPruningModifier(
        params="__ALL_PRUNABLE__", compression_sparsity=0.75, start_epoch=0.0, end_epoch=6.0, update_frequency=1.0
    )
    model = task.model()
    optimizer = make([model[0].weight, model[2].weight], lr=0.01)
    manager = ScheduledModifierManager([modifier])
    manager.modify(model, optimizer, task.steps_per_epoch)
    task.train(model, optimizer, stop=40)
    manager.finalize(model)
    assert all(float(parameter.detach().abs().max()) < 10 for parameter in model.parameters())
    assert sum(int((model[index].weight == 0).sum()) for index in (0, 2)) == 54


class LoggedLBFGS(torch.optim.LBFGS):
    """Has a step of its own, which is that of its base class."""

    def step(self, closure):
        return super().step(closure)


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, LoggedLBFGS])
@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_the_history_of_lbfgs_begins_anew_when_masks_change(line_search, kind):
    torch.manual_seed(1)
    inputs = torch.randn(64, 8)
    targets = torch.tanh(inputs @ torch.randn(8, 4))
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    optimizer = kind(model.parameters(), lr=0.5, max_iter=5, line_search_fn=line_search)
    manager = ScheduledModifierManager(
        [MagnitudePruningModifier(params=["2.weight"], final_sparsity=0.5, start_epoch=1.0, end_epoch=1.0)]
    )
    manager.modify(model, optimizer, steps_per_epoch=10)
    owner = model[0].weight  # the first parameter holds the history, and is not in scope
    evaluations = []

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        return loss

    for _ in range(10):
        optimizer.step(closure)
        evaluations.append(optimizer.state[owner].get("n_iter", 0))
    assert evaluations[-1] == 0
    after_pruning = float(closure().detach())
    for _ in range(20):
        optimizer.step(closure)
        assert int((model[2].weight == 0).sum()) == 32
    assert float(closure().detach()) < after_pruning


def test_an_optimizer_beside_the_scope_keeps_its_history(task):
    model = task.model()
    optimizer = torch.optim.LBFGS([model[0].weight], lr=0.1, max_iter=2)

    def closure():
        optimizer.zero_grad()
        loss = task.loss(model, task.batches[0])
        loss.backward()
        return loss

    optimizer.step(closure)
    before = dict(optimizer.state[model[0].weight])
    reset_pruned_state(
        optimizer, {"2.weight": model[2].weight}, {"2.weight": torch.ones(3, 8, dtype=torch.bool)}, ExitStack()
    )
    reset_state(optimizer, [model[2].weight], ExitStack())
    assert dict(optimizer.state[model[0].weight]) == before
    assert np.isfinite(float(closure().detach()))


def test_each_optimizer_in_the_table_is_known_by_its_own_name():
    # In the oldest supported PyTorch no optimizer with plain state is a subclass of another.
    page = (Path(__file__).parents[3] / "docs" / "pytorch.md").read_text(encoding="utf-8")
    row = next(line for line in page.splitlines() if line.endswith("| entries of pruned weights become zero |"))
    names = re.findall(r"`([A-Z]\w+)`", row)

    assert len(names) > 10
    assert set(names) <= of_optimizers._KEYS.keys()
