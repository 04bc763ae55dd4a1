"""What is reported is counted from the weights, and what changes them beside the schedule is said."""

import copy
import logging
import math

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mfac_torch import ConstantPruningModifier, GradSampler, ScheduledModifierManager, apply_masks
from mfac_torch.export import load_masks, masks_of, save_masks

PRUNED = round(48 * 0.75) + round(24 * 0.75)
ALL = 72


def zeros(model):
    return sum(int((weight == 0).sum()) for weight in model.parameters() if weight.ndim > 1)


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def attached(task, optimizer_class=torch.optim.SGD, recipe=None, **options):
    model = task.model()
    optimizer = optimizer_class(model.parameters(), **{"lr": 0.05, **options})
    manager = ScheduledModifierManager.from_yaml(recipe or task.recipe("MagnitudePruningModifier"))
    manager.modify(model, optimizer, task.steps_per_epoch)
    return model, optimizer, manager


def dense(model):
    return {name: torch.full_like(value, 0.5) for name, value in model.state_dict().items()}


# --- at the end


@pytest.mark.usefixtures("placement")
@pytest.mark.parametrize("assign", [False, True])
def test_restored_weights_are_counted_left_and_said(task, caplog, assign):
    model, optimizer, manager = attached(task)
    task.train(model, optimizer)
    assert manager.sparsity == 0.75
    model.load_state_dict(dense(model), assign=assign)
    assert manager.sparsity == 0
    manager.finalize(model)
    assert zeros(model) == 0
    assert (manager.sparsity, manager.regrown()) == (0, {"0.weight": 36, "2.weight": 18})
    (warning,) = [each for each in warnings_of(caplog) if "are not zero" in each]
    for part in ("54 of 54 pruned weights", "0.weight, 2.weight", "load_state_dict", "hold=True", "apply_masks"):
        assert part in warning
    assert apply_masks(model, manager) == PRUNED
    assert (manager.sparsity, manager.regrown()) == (0.75, {})


def test_a_layer_that_was_replaced_counts_as_it_is(task, caplog):
    model, optimizer, manager = attached(task)
    task.train(model, optimizer)
    model[2] = nn.Linear(8, 10)
    assert manager.sparsity == 36 / (48 + 80)
    manager.finalize(model, hold=True)
    (warning,) = warnings_of(caplog)
    assert "2.weight: the model has other parameters under these names" in warning
    del model[2]
    assert manager.sparsity == 36 / 48


def test_restored_weights_are_set_to_zero_where_that_is_asked_for(task, caplog):
    model, optimizer, manager = attached(task)
    task.train(model, optimizer)
    model.load_state_dict(dense(model))
    manager.finalize(model, hold=True)
    assert (zeros(model), manager.sparsity) == (PRUNED, 0.75)
    (warning,) = warnings_of(caplog)
    assert "finalize has set 54 weights to zero" in warning


def test_nothing_is_said_where_weights_and_masks_agree(task, caplog):
    model, optimizer, manager = attached(task)
    task.train(model, optimizer)
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
    manager.finalize(model)
    assert warnings_of(caplog) == []


@pytest.mark.parametrize("hold", [None, True, False])
def test_finalize_after_one_shot_and_a_fine_tuning_of_ones_own(task, caplog, hold):
    model = task.model()
    manager = ScheduledModifierManager.from_yaml(task.recipe("MagnitudePruningModifier"))
    manager.apply(model, finalize=False)
    task.train(model, torch.optim.SGD(model.parameters(), lr=0.05), stop=2)
    with caplog.at_level(logging.INFO, logger="mfac_torch"):
        manager.finalize(model, hold=hold)
    assert zeros(model) == (0 if hold is False else PRUNED)
    (said,) = [record for record in caplog.records if "pruned weights are not zero" in record.getMessage()]
    assert said.levelno == (logging.INFO if hold is None else logging.WARNING)


# --- between two steps


@pytest.mark.parametrize("saved", [True, False])
def test_denser_weights_in_mid_run_are_said_once_and_pruned_again(task, caplog, saved):
    model, optimizer, manager = attached(task)
    task.train(model, optimizer, stop=12)
    reached = manager.sparsity
    caplog.clear()
    model.load_state_dict(dense(model))
    if saved:
        manager.state_dict()
    task.train(model, optimizer, start=12, stop=15)
    (warning,) = warnings_of(caplog)
    for part in ("0.weight, 2.weight", "at step 12", "load_state_dict", "next step sets these weights to zero"):
        assert part in warning
    assert manager.sparsity >= reached
    task.train(model, optimizer, start=15)
    manager.finalize(model)
    assert (zeros(model), len(warnings_of(caplog))) == (PRUNED, 1)


def test_what_leaves_no_trace_is_said_at_the_next_epoch(task, caplog):
    model, optimizer, _ = attached(task)
    task.train(model, optimizer, stop=11)
    before = model[0].weight.detach().clone()
    caplog.clear()

    def write(step):
        if step == 15:
            model[0].weight.data.copy_(before + 1.0)

    task.train(model, optimizer, start=11, stop=17, after_step=write)
    (warning,) = warnings_of(caplog)
    assert "(0.weight)" in warning


@pytest.mark.parametrize("write", ["copied", "taken"])
def test_what_leaves_no_trace_is_said_before_the_next_step_in_host_memory(task, caplog, write):
    model, optimizer, manager = attached(task)
    task.train(model, optimizer, stop=13)
    caplog.clear()
    for weight, value in zip(model.parameters(), dense(model).values(), strict=True):
        if write == "copied":
            weight.data.copy_(value)
        else:
            weight.data = value
    task.train(model, optimizer, start=13, stop=14)
    (warning,) = warnings_of(caplog)
    assert "(0.weight, 2.weight)" in warning
    assert "at step 13" in warning
    manager.finalize(model)


def test_an_average_that_is_swapped_in_for_validation_and_out_again_is_no_event(task, caplog):
    model, optimizer, _ = attached(task)
    average = copy.deepcopy(model.state_dict())

    def validate(step):
        own = copy.deepcopy(model.state_dict())
        model.load_state_dict(average)
        model.load_state_dict(own)

    task.train(model, optimizer, after_step=validate)
    assert warnings_of(caplog) == []


def test_a_model_that_is_loaded_too_late_is_said(task, caplog):
    model, optimizer, manager = attached(task)
    task.train(model, optimizer, stop=12)
    state = manager.state_dict()
    other, _, resumed = attached(task)
    resumed.load_state_dict(state)
    (warning,) = warnings_of(caplog)
    assert "load the model" in warning
    assert zeros(other) == zeros(model)


# --- optimizers that nobody follows


class SAM(torch.optim.Optimizer):
    """As it is found in the world: the loop calls first_step and second_step."""

    def __init__(self, params, lr, rho=0.05):
        super().__init__(params, {"lr": lr, "rho": rho})
        self.base_optimizer = torch.optim.SGD(self.param_groups, lr=lr, momentum=0.9)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self):
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["old"] = parameter.data.clone()
            parameter.add_(0.01 * parameter.grad)
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for parameter in self.param_groups[0]["params"]:
            parameter.data = self.state[parameter]["old"]
        self.base_optimizer.step()
        self.zero_grad()

    @torch.no_grad()
    def step(self, closure):
        with torch.enable_grad():
            closure()
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()


def train_with_sam(task, model, optimizer):
    for step in range(20):
        for half in (optimizer.first_step, optimizer.second_step):
            task.loss(model, task.batches[step % 5]).backward()
            half()


def test_an_optimizer_that_takes_the_place_of_another_is_named_at_its_first_step(task, caplog):
    model, optimizer, manager = attached(task)
    task.train(model, optimizer, stop=12)
    caplog.clear()
    second = torch.optim.Adam(model.parameters())
    task.train(model, second, start=12, stop=13)
    (warning,) = warnings_of(caplog)
    for part in (
        "Adam has taken a step on 0.weight",
        "the SGD given to modify() has taken no step since step 12",
        "the new one",
    ):
        assert part in warning
    task.train(model, second, start=13)
    assert len(warnings_of(caplog)) == 1
    manager.finalize(model)
    assert manager.sparsity == zeros(model) / ALL < 0.1
    unfinished, regrown = warnings_of(caplog)[1:]
    assert "the SGD given to modify() has taken no step since step 12" in unfinished
    assert "steps of Adam, which was not given to modify()" in regrown


def test_an_optimizer_replaced_after_the_last_pruning_step_is_named_too(task, caplog):
    model, optimizer, manager = attached(task)
    task.train(model, optimizer, stop=21)
    task.train(model, torch.optim.SGD(model.parameters(), lr=0.1), stop=2)
    manager.finalize(model)
    assert manager.sparsity == 0
    assert len(warnings_of(caplog)) == 2


def test_the_half_steps_of_sam_are_named_and_its_inner_optimizer_is_the_cure(task, caplog):
    model, optimizer, manager = attached(task, SAM)
    train_with_sam(task, model, optimizer)
    manager.finalize(model)
    step, unfinished = warnings_of(caplog)
    for part in ("SGD has taken a step", "the SAM given to modify() has taken no step at all", "base_optimizer"):
        assert part in step
    assert "the SAM given to modify() has taken no step at all" in unfinished
    caplog.clear()
    model = task.model()
    optimizer = SAM(model.parameters(), lr=0.05)
    manager = ScheduledModifierManager.from_yaml(task.recipe())
    manager.modify(model, optimizer.base_optimizer, task.steps_per_epoch)
    train_with_sam(task, model, optimizer)
    manager.finalize(model)
    assert (zeros(model), warnings_of(caplog)) == (PRUNED, [])


class Lookahead(torch.optim.Optimizer):
    """Steps of another optimizer, and slow weights that follow it."""

    def __init__(self, inner):
        self.inner = inner
        super().__init__(inner.param_groups, {})

    def step(self, closure=None):
        self.inner.step(closure)


def test_optimizers_inside_one_another_are_one(task, caplog):
    for given in ("inner", "outer"):
        model = task.model()
        inner = torch.optim.SGD(model.parameters(), lr=0.05)
        outer = Lookahead(inner)
        manager = ScheduledModifierManager.from_yaml(task.recipe())
        manager.modify(model, inner if given == "inner" else outer, task.steps_per_epoch)
        task.train(model, outer)
        manager.finalize(model)
        assert (zeros(model), warnings_of(caplog)) == (PRUNED, [])


def test_an_optimizer_of_other_weights_is_nobodys_business(task, caplog):
    model, optimizer, manager = attached(task)
    other = task.model(1)
    task.train(other, torch.optim.SGD(other.parameters(), lr=0.1), stop=3)
    task.train(model, optimizer)
    manager.finalize(model)
    task.train(model, torch.optim.SGD(model.parameters(), lr=0.1), stop=2)
    assert warnings_of(caplog) == []


def test_steps_by_hand_are_said_at_the_end(task, caplog):
    model, _, manager = attached(task)
    for batch in task.batches:
        task.loss(model, batch).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(0.01 * parameter.grad)
    manager.finalize(model)
    (warning,) = warnings_of(caplog)
    assert "the SGD given to modify() has taken no step at all" in warning


# --- averaged copies


@pytest.mark.usefixtures("placement")
def test_an_average_gets_the_zeros_of_the_masks(task):
    model, optimizer, manager = attached(task)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    assert apply_masks(average, manager) == 0  # before the first pruning step
    task.train(model, optimizer, after_step=lambda step: average.update_parameters(model))
    manager.finalize(model)
    assert zeros(average.module) < PRUNED
    assert apply_masks(average, manager) > 0
    assert zeros(average.module) == PRUNED
    assert apply_masks(average, manager.masks) == 0


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model.", "module._orig_mod.net."])
def test_a_state_dict_may_have_prefixes(task, prefix):
    masks = {"0.weight": torch.rand(8, 6) > 0.5, "2.weight": torch.rand(3, 8) > 0.5}
    state = {prefix + name: torch.ones_like(value) for name, value in task.model().state_dict().items()}
    state["n_averaged"] = 3
    assert apply_masks(state, masks) == sum(int((~mask).sum()) for mask in masks.values())
    for name, mask in masks.items():
        assert torch.equal(state[prefix + name] != 0, mask)
    plain = task.model()
    assert apply_masks(plain, {prefix + name: mask for name, mask in masks.items()}) > 0


def test_compiled_layers_inside_a_model_have_the_names_of_plain_ones(task):
    model = task.model()
    model[0] = torch.compile(model[0], backend="eager")
    assert apply_masks(model, {"0.weight": torch.zeros(8, 6, dtype=torch.bool)}) == 48


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"fc.weight": torch.ones(8, 6)}, "the mask of fc.weight fits none of the tensors \\(0.weight"),
        ({"weight": torch.ones(8, 6)}, r"fits several tensors.*\(0.weight, 2.weight\)"),
        ({"2.weight": torch.ones(8, 3)}, r"has the shape \(8, 3\), and 2.weight has \(3, 8\)"),
        ({"a.0.weight": torch.ones(8, 6)}, r"the masks of .*0.weight both fit 0.weight"),
    ],
)
def test_masks_that_do_not_fit_are_refused_and_nothing_is_changed(task, masks, message):
    model = task.model()
    with pytest.raises(ValueError, match=message):
        apply_masks(model, {"0.weight": torch.zeros(8, 6, dtype=torch.bool)} | masks)
    assert zeros(model) == 0
    with pytest.raises(TypeError, match="the model is a int"):
        apply_masks(3, masks)
    with pytest.raises(TypeError, match="masks is a list"):
        apply_masks(model, [])


# --- zeros that are there


class Attentive(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.experts = nn.Parameter(torch.randn(2, 8, 8) / 3)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 12)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.norm(torch.einsum("bti,eoi->bto", x, self.experts)))


PARTS = ["embedding.weight", "attention.in_proj_weight", "experts", "attention.out_proj.weight"]


def pruned_attention():
    torch.manual_seed(0)
    model = Attentive()
    recipe = f"modifiers:\n  - !MagnitudePruningModifier {{params: {PARTS}, final_sparsity: 0.9, end_epoch: 0.0}}"
    manager = ScheduledModifierManager.from_yaml(recipe)
    manager.apply(model)
    return model, manager


def finetune(model, optimizer, steps=4):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        tokens = torch.randint(12, (4, 5), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()


def test_the_zeros_of_any_layer_are_found_and_held(tmp_path):
    model, manager = pruned_attention()
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    found = ConstantPruningModifier.from_sparse_model(model)
    assert {name for each in found for name in each.settings.params} == set(PARTS)
    holder = ScheduledModifierManager(found)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    holder.modify(model, optimizer, steps_per_epoch=4)
    finetune(model, optimizer)
    holder.finalize(model)
    assert holder.sparsity == pytest.approx(0.9, abs=0.01)
    for name, weight in model.named_parameters():
        assert not torch.equal(weight, before[name])
        if name in PARTS:
            assert torch.equal(weight == 0, before[name] == 0), name
    save_masks(model, tmp_path / "of_model")
    save_masks(manager, tmp_path / "of_manager")
    assert load_masks(tmp_path / "of_model").keys() == load_masks(tmp_path / "of_manager").keys()
    assert masks_of(model).keys() == manager.masks.keys()


@pytest.mark.parametrize("params", [None, "[__ALL__]", "[__ALL_PRUNABLE__]", str(PARTS)])
@pytest.mark.parametrize("given", [True, False])
def test_frozen_zeros_are_held_for_nothing(caplog, params, given):
    model, _ = pruned_attention()
    model.embedding.weight.requires_grad_(False)
    model.experts.requires_grad_(False)
    if params is None:
        manager = ScheduledModifierManager(ConstantPruningModifier.from_sparse_model(model))
    else:
        manager = ScheduledModifierManager.from_yaml(f"modifiers:\n  - !ConstantPruningModifier {{params: {params}}}")
    trained = list(model.parameters()) if given else [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01)
    frozen = model.embedding.weight.detach().clone()
    manager.modify(model, optimizer, steps_per_epoch=4)
    finetune(model, optimizer)
    assert torch.equal(model.embedding.weight, frozen)
    assert float((model.attention.out_proj.weight == 0).float().mean()) == pytest.approx(0.9, abs=0.02)
    assert manager.sparsity == pytest.approx(0.9 if params in (None, str(PARTS)) else manager.sparsity, abs=0.01)
    assert "embedding.weight" in manager.masks
    assert bool(model.norm.bias.any())
    manager.finalize(model)
    # what was pruned by name and is not selected by a keyword is said: its zeros are not held
    assert all("all zeros" in each or "not in scope" in each for each in warnings_of(caplog))


def test_what_is_unfrozen_later_and_given_to_the_optimizer_is_held_from_then_on(caplog):
    model, _ = pruned_attention()
    model.experts.requires_grad_(False)
    manager = ScheduledModifierManager(ConstantPruningModifier.from_sparse_model(model))
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=0.01)
    manager.modify(model, optimizer, steps_per_epoch=4)
    finetune(model, optimizer, 2)
    pruned = model.experts == 0
    model.experts.requires_grad_(True)
    optimizer.add_param_group({"params": [model.experts]})
    finetune(model, optimizer, 1)
    assert torch.equal(model.experts == 0, pruned)
    assert warnings_of(caplog) == []


def test_what_is_not_held_is_said(caplog):
    model = nn.LSTM(4, 8)
    ConstantPruningModifier.from_sparse_model(model)
    assert "nothing to hold" in warnings_of(caplog)[0]
    caplog.clear()
    with torch.no_grad():
        model.bias_hh_l0[:16] = 0
        model.weight_hh_l0[:16] = 0
    assert [each.settings.params for each in ConstantPruningModifier.from_sparse_model(model)] == [("weight_hh_l0",)]
    (warning,) = warnings_of(caplog)
    assert "not held: bias_hh_l0" in warning


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_the_names_of_a_wrapped_model_are_those_of_the_model(task, wrap):
    model = task.model()
    ScheduledModifierManager.from_yaml(task.recipe("MagnitudePruningModifier")).apply(model)
    wrapped = wrap(model)
    assert list(masks_of(wrapped)) == list(masks_of(model)) == ["0.weight", "2.weight"]
    manager = ScheduledModifierManager(ConstantPruningModifier.from_sparse_model(wrapped))
    manager.modify(wrapped, torch.optim.SGD(model.parameters(), lr=0.05), task.steps_per_epoch)
    manager.finalize(wrapped)


class Adapted(nn.Module):
    """A frozen base and a LoRA adapter, whose second matrix begins at zero."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_a, self.lora_b = nn.Linear(6, 2, bias=False), nn.Linear(2, 3, bias=False)
        nn.init.zeros_(self.lora_b.weight)

    def forward(self, inputs):
        return self.base(inputs) + self.lora_b(self.lora_a(inputs))


@pytest.mark.usefixtures("placement")
@pytest.mark.parametrize("by_recipe", [True, False])
def test_an_adapter_learns_on_a_pruned_base(task, caplog, by_recipe):
    base = task.model()
    ScheduledModifierManager.from_yaml(task.recipe("MagnitudePruningModifier")).apply(base)
    model = Adapted(base)
    if by_recipe:
        recipe = "modifiers:\n  - !ConstantPruningModifier {params: __ALL_PRUNABLE__}"
        manager = ScheduledModifierManager.from_yaml(recipe)
    else:
        manager = ScheduledModifierManager(ConstantPruningModifier.from_sparse_model(model))
    optimizer = torch.optim.Adam([each for each in model.parameters() if each.requires_grad], lr=0.01)
    manager.modify(model, optimizer, task.steps_per_epoch)
    task.train(model, optimizer, stop=5)
    assert model.lora_b.weight.all()
    assert zeros(model) == PRUNED
    assert manager.sparsity == PRUNED / (ALL + 18 if by_recipe else ALL)
    assert warnings_of(caplog) == []


def test_other_modifiers_refuse_what_is_frozen_or_not_trained_as_before(task):
    model = task.model()
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    manager = ScheduledModifierManager.from_yaml(task.recipe("MagnitudePruningModifier"))
    with pytest.raises(ValueError, match=r"does not train 2\.weight"):
        manager.modify(model, optimizer, task.steps_per_epoch)


def test_quantized_weights_of_a_frozen_base_are_left_out(task):
    model = task.model()
    model.packed = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    assert ConstantPruningModifier.from_sparse_model(model) == []
    manager = ScheduledModifierManager.from_yaml("modifiers:\n  - !ConstantPruningModifier {params: __ALL__}")
    manager.modify(model, torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1), 5)
    assert math.isclose(manager.sparsity, 0.0)


def test_gradient_samples_of_a_sampler_are_no_steps_of_others(task, caplog):
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    manager = ScheduledModifierManager.from_yaml(task.recipe())
    sampler = GradSampler(task.batches, nn.functional.mse_loss)
    manager.modify(model, optimizer, task.steps_per_epoch, grad_sampler=sampler)
    task.train(model, optimizer)
    manager.finalize(model)
    assert warnings_of(caplog) == []
