"""What fails half-way changes nothing, and the next try goes as if nothing had happened."""

import copy
import pkgutil

import numpy as np
import pytest
import torch
from torch import nn

import mfac_core.pruners.base
from mfac_core.errors import SettingError
from mfac_core.fisher.window import GradientWindow
from mfac_torch import (
    ACDCPruningModifier,
    GradSampler,
    MagnitudePruningModifier,
    MFACPruningModifier,
    ScheduledModifierManager,
    SetLearningRateModifier,
    TrainableParamsModifier,
    apply_masks,
    live_pruning,
)
from mfac_torch.live_pruning import TorchPruning
from mfac_torch.masking import HeldMasks
from mfac_torch.session import is_attached

pytestmark = pytest.mark.usefixtures("placement")  # on the CPU, and on a GPU

OPTIMIZERS = {
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.02),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "Adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.05),
}
MODIFIERS = {
    "M-FAC": MFACPruningModifier(
        init_sparsity=0.2,
        final_sparsity=0.75,
        start_epoch=1.0,
        end_epoch=3.0,
        update_frequency=1.0,
        num_grads=4,
        fisher_block_size=16,
        damp=0.01,
        num_recomputations=2,
    ),
    "magnitude": MagnitudePruningModifier(init_sparsity=0.2, final_sparsity=0.75, start_epoch=1.0, end_epoch=3.0),
    "AC/DC": ACDCPruningModifier(
        params="__ALL_PRUNABLE__", compression_sparsity=0.75, start_epoch=0.0, end_epoch=3.0, update_frequency=1.0
    ),
}
PLACES = {
    "result": (mfac_core.pruners.base, "PruneResult", 1),
    "window": (GradientWindow, "rebuilt", 1),
    "first weight": (live_pruning, "write_back", 1),
    "second weight": (live_pruning, "write_back", 2),
    "masks": (HeldMasks, "hold", 1),
    "zeros": (HeldMasks, "zero_weights", 1),
    "optimizer": (live_pruning, "reset_pruned_state", 1),
    "reset": (live_pruning, "reset_state", 1),
}


def failing(monkeypatch, place, error):
    """Let the first calls of something fail once it has done half of its work, or all of it."""
    owner, name, number = PLACES[place]
    original = getattr(owner, name)
    calls = []

    def call(*args, **kwargs):
        calls.append(name)
        result = original(*args, **kwargs)
        if len(calls) == number:
            raise error
        return result

    monkeypatch.setattr(owner, name, call)
    return calls


class Run:
    """One modifier at work, driven by hand."""

    def __init__(self, task, modifier, optimizer, sampled=False):
        self.task = task
        self.model = task.model()
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.pruning = TorchPruning(
            MODIFIERS[modifier].settings,
            self.model,
            steps_per_epoch=task.steps_per_epoch,
            optimizers=[self.optimizer],
            grad_sampler=GradSampler(self.batches, nn.functional.mse_loss) if sampled else None,
        )

    def batches(self):
        while True:
            yield self.task.batches[int(torch.randint(5, (1,)))]

    def step(self, number):
        self.optimizer.zero_grad()
        self.task.loss(self.model, self.task.batches[number % 5]).backward()
        self.pruning.observe_gradients(number)
        self.pruning.held_masks.zero_gradients()
        self.optimizer.step()
        self.pruning.held_masks.zero_weights()

    def everything(self):
        return copy.deepcopy(
            {
                "weights": self.model.state_dict(),
                "masks": self.pruning.masks,
                "optimizer": self.optimizer.state_dict(),
                "pruner": self.pruning.state_dict(),
                "random": torch.get_rng_state(),
            }
        )


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return isinstance(other, np.ndarray) and np.array_equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


@pytest.mark.parametrize("error", [MemoryError(), KeyboardInterrupt()], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("modifier", "optimizer", "sampled"),
    [("M-FAC", "Adam", False), ("M-FAC", "SGD", True), ("magnitude", "Adam", False), ("AC/DC", "SGD", False)]
    + [("AC/DC", "Adagrad", False)],
)
def test_a_pruning_step_that_fails_is_taken_back_and_its_retry_gives_the_same_bits(
    task, monkeypatch, modifier, optimizer, sampled, place, error
):
    one, other = (Run(task, modifier, optimizer, sampled) for _ in range(2))
    failed = 0
    for run in (one, other):
        torch.manual_seed(3)
        for number in range(17):
            with monkeypatch.context() as patch:
                if run is other:
                    failing(patch, place, error)
                before = run.everything()
                try:
                    run.pruning.prune_if_due(number)
                except type(error):
                    failed += 1
                    now = run.everything()
                    if modifier != "M-FAC":  # of its parts an earlier one may be done
                        assert equal(now, before)
                    assert torch.equal(now["random"], before["random"]) or now["pruner"]["parts_done"]
            run.pruning.prune_if_due(number)
            run.step(number)
    assert equal(one.everything(), other.everything())
    assert failed or place in {"window", "reset"}


def test_a_logger_that_fails_finds_the_pruning_step_done(task):
    class Full:
        def log_scalar(self, tag, value, step):
            raise OSError("the disk is full")

    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    manager = ScheduledModifierManager([MODIFIERS["magnitude"]])
    manager.modify(model, optimizer, task.steps_per_epoch, loggers=Full())
    failed = 0
    for step in range(20):
        try:
            task.train(model, optimizer, start=step, stop=step + 1)
        except OSError:
            failed += 1
            assert not any(model.get_parameter(name)[~mask].any() for name, mask in manager.masks.items())
    assert failed == len(manager._prunings[0].schedule)
    assert manager.state_dict()["step"] == 20
    assert manager.sparsity == 0.75


def test_training_goes_on_after_a_pruning_step_that_failed_in_it(task, monkeypatch):
    model = task.model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    manager = ScheduledModifierManager([MODIFIERS["M-FAC"]])
    manager.modify(model, optimizer, task.steps_per_epoch)
    task.train(model, optimizer, stop=4)
    with monkeypatch.context() as patch:
        failing(patch, "second weight", MemoryError())
        with pytest.raises(MemoryError):
            task.train(model, optimizer, start=4, stop=5)
    assert manager.masks == {}
    task.train(model, optimizer, start=5)
    assert manager.sparsity == 0.75
    assert manager.state_dict()["step"] == 20


# --- attaching


def changed_by(manager, model, optimizers):
    """All that modify() changes."""
    return {
        "manager": {key: value for key, value in vars(manager).items() if key != "modifiers"},
        "attached": manager.initialized,
        "weights": {name: value.detach().clone() for name, value in model.named_parameters()},
        "trained": [parameter.requires_grad for parameter in model.parameters()],
        "gradients": [parameter.grad is None for parameter in model.parameters()],
        "options": [
            {key: value for key, value in group.items() if key != "params"}
            for optimizer in optimizers
            for group in optimizer.param_groups
        ],
        "hooks": [
            len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)
            for optimizer in optimizers
        ],
        "followed": [is_attached(optimizer) for optimizer in optimizers],
    }


STAGES = [
    "mfac_torch.manager.attached",
    "mfac_torch.manager.check_trained",
    "mfac_torch.manager.TrainingChanges",
    "mfac_torch.manager.log_plan",
    "mfac_torch.manager.TrainingSession",
    "mfac_torch.session._untraced",
    "mfac_torch.session.TrainingChanges.set_trained",
    "torch.optim.Optimizer.register_step_post_hook",
    "torch.nn.Parameter.requires_grad_",
]
REPEATED = ["mfac_torch.session._untraced", *STAGES[-2:]]


@pytest.mark.parametrize(("stage", "number"), [*((stage, 1) for stage in STAGES), *((stage, 2) for stage in REPEATED)])
def test_what_fails_while_a_recipe_is_attached_changes_nothing(task, monkeypatch, stage, number):
    model = task.model()
    optimizers = [torch.optim.SGD(model[0].parameters(), lr=0.1), torch.optim.Adam(model[2].parameters(), lr=0.1)]
    manager = ScheduledModifierManager(
        [
            MODIFIERS["magnitude"],
            SetLearningRateModifier(learning_rate=0.01, start_epoch=0.0),
            TrainableParamsModifier(params=["0.bias", "2.bias"], trainable=False, start_epoch=0.0, end_epoch=2.0),
        ]
    )
    task.loss(model, task.batches[0]).backward()
    before = changed_by(manager, model, optimizers)
    calls = []
    path, name = stage.rsplit(".", 1)
    owner = pkgutil.resolve_name(path)
    original = getattr(owner, name)

    def call(*args, **kwargs):
        calls.append(name)
        result = None if name.startswith("register") else original(*args, **kwargs)
        if len(calls) == number:
            raise KeyboardInterrupt
        return original(*args, **kwargs) if result is None else result

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, call)
        with pytest.raises(KeyboardInterrupt):
            manager.modify(model, optimizers, task.steps_per_epoch)
    assert equal(changed_by(manager, model, optimizers), before)
    manager.modify(model, optimizers, task.steps_per_epoch)
    for step in range(20):
        task.loss(model, task.batches[step % 5]).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    manager.finalize(model)
    assert manager.sparsity == 0.75


@pytest.mark.parametrize("place", ["first weight", "second weight", "masks", "zeros"])
def test_one_shot_pruning_that_fails_leaves_the_model_as_it_was(task, monkeypatch, place):
    model = task.model()
    before = copy.deepcopy(model.state_dict())
    manager = ScheduledModifierManager(
        [
            MagnitudePruningModifier(params=["0.weight"], final_sparsity=0.5, end_epoch=0.0),
            MagnitudePruningModifier(params=["2.weight", "0.bias"], final_sparsity=0.5, end_epoch=0.0),
        ]
    )
    with monkeypatch.context() as patch:
        owner, name, number = PLACES[place]
        original, calls = getattr(owner, name), []

        def call(*args, **kwargs):
            calls.append(name)
            result = original(*args, **kwargs)
            if len(calls) == number + 1:  # the second modifier, once the first has pruned
                raise MemoryError
            return result

        patch.setattr(owner, name, call)
        with pytest.raises(MemoryError):
            manager.apply(model)
    assert equal(model.state_dict(), before)
    assert not manager.initialized
    manager.apply(model)
    assert int((model[0].weight == 0).sum()) == 24


# --- wrappers around optimizers


class Wrapper(torch.optim.Optimizer):
    """As trainers write them: an optimizer by its class that was never made as one."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    @property
    def state(self):
        return self.optimizer.state

    def step(self, closure=None):
        self.optimizer.step(closure)

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad()


def by_accelerate(model, optimizer):
    accelerate = pytest.importorskip("accelerate")
    return accelerate.Accelerator(cpu=True).prepare(model, optimizer)


@pytest.mark.parametrize(
    "wrap",
    [by_accelerate, lambda model, optimizer: (model, Wrapper(optimizer)), lambda m, o: (m, Wrapper(Wrapper(o)))],
    ids=["accelerate", "a wrapper", "two wrappers"],
)
def test_wrappers_around_optimizers_are_looked_through(task, wrap):
    def train(wrapped):
        model = task.model()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        prepared = wrap(model, optimizer) if wrapped else (model, optimizer)
        manager = ScheduledModifierManager([MODIFIERS["M-FAC"]])
        assert manager.modify(*prepared, task.steps_per_epoch) is prepared[1]
        assert is_attached(optimizer)
        with pytest.raises(RuntimeError, match="another manager is attached"):
            ScheduledModifierManager([MODIFIERS["magnitude"]]).modify(*prepared, task.steps_per_epoch)
        task.train(*prepared)
        manager.finalize(prepared[0])
        assert manager.sparsity == 0.75
        return model

    for one, other in zip(train(True).parameters(), train(False).parameters(), strict=True):
        assert torch.equal(one, other)


def test_an_optimizer_with_hooks_of_its_own_is_followed_itself(task):
    class Outer(torch.optim.SGD):
        def __init__(self, optimizer):
            super().__init__(optimizer.param_groups, lr=0.1)
            self.optimizer = optimizer

    model = task.model()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    outer = Outer(inner)
    ScheduledModifierManager([MODIFIERS["magnitude"]]).modify(model, outer, task.steps_per_epoch)
    assert (is_attached(outer), is_attached(inner)) == (True, False)


def test_an_optimizer_that_cannot_be_followed_is_refused(task):
    class Bare(torch.optim.Optimizer):
        def __init__(self, parameters):
            self.param_groups = [{"params": list(parameters)}]

    model = task.model()
    manager = ScheduledModifierManager([MODIFIERS["magnitude"]])
    with pytest.raises(TypeError, match=r"Bare that does not support hooks.*super\(\).__init__"):
        manager.modify(model, Bare(model.parameters()), task.steps_per_epoch)
    assert not manager.initialized


# --- weights that are stored in another form


class Doubled(torch.Tensor):
    """A tensor that wraps another, as quantized ones do."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, requires_grad=True)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"{function} of {cls.__name__}")

    def __repr__(self):
        return "Doubled()"


def of_subclass():
    layer = nn.Linear(4, 4)
    del layer.weight
    layer.register_parameter("weight", nn.Parameter(Doubled(torch.ones(4, 4))))
    return layer


@pytest.mark.parametrize("method", ["modify", "apply"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Linear(4, 4, dtype=torch.complex64), r"weight \(complex \(torch\.complex64\); remove it"),
        (lambda: nn.Linear(4, 4, device="meta"), r"weight \(on the meta device, without values; materialize"),
        (of_subclass, r"weight \(a Doubled, a tensor subclass .*; prune first"),
    ],
    ids=["complex", "meta", "subclass"],
)
def test_weights_in_a_form_that_cannot_be_pruned_are_refused_by_name(make, message, method):
    model = nn.Sequential(nn.Linear(4, 4), make())
    manager = ScheduledModifierManager([MagnitudePruningModifier(final_sparsity=0.5, end_epoch=1.0)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model[0].weight.detach().clone()
    with pytest.raises(SettingError, match=r"only plain, dense, real floating-point weights.*1\." + message):
        manager.apply(model) if method == "apply" else manager.modify(model, optimizer, 5)
    assert not manager.initialized
    assert not is_attached(optimizer)
    with pytest.raises(ValueError, match=r"only plain, dense, real floating-point weights.*1\." + message):
        apply_masks(model, {name: torch.zeros(4, 4, dtype=torch.bool) for name in ("0.weight", "1.weight")})
    assert torch.equal(model[0].weight, before)
