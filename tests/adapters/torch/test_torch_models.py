"""Every kind of layer and parameter that a model may have."""

import pytest
import torch
from torch import nn

from mfac_core.errors import SettingError
from mfac_torch import (
    ACDCPruningModifier,
    ConstantPruningModifier,
    GradSampler,
    MagnitudePruningModifier,
    MFACPruningModifier,
    ScheduledModifierManager,
    prunable_parameters,
)
from mfac_torch.layout import weight_axes

pytestmark = pytest.mark.usefixtures("placement")  # on the CPU, and on a GPU

SCHEDULE = {"init_sparsity": 0.25, "final_sparsity": 0.5, "start_epoch": 1.0, "end_epoch": 2.0, "update_frequency": 1.0}


class Conv1D(nn.Module):
    """The linear layer of transformers: its weight is (inputs, outputs)."""

    def __init__(self, outputs, inputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 10)

    def forward(self, tokens):
        hidden = self.embed(tokens)
        return self.head(self.attend(hidden, hidden, hidden, need_weights=False)[0])


def prune_gradually(model, modifiers, make_loss, *, steps=6, optimizer=None, look=None):
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=0.01)
    manager = ScheduledModifierManager(modifiers)
    manager.modify(model, optimizer, steps_per_epoch=3)
    for step in range(steps):
        optimizer.zero_grad()
        make_loss().backward()
        optimizer.step()
        for name, mask in manager.masks.items():
            assert not model.get_parameter(name)[~mask].any()
        if look is not None:
            look(step + 1)
    return manager


def mfac(**keys):
    return MFACPruningModifier(**SCHEDULE | {"num_grads": 3, "damp": 0.01} | keys)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 8, 3, groups=2),
        nn.Conv2d(4, 8, 3, groups=4),
        nn.Conv1d(4, 6, 3),
        nn.Conv3d(4, 2, 2),
        nn.ConvTranspose1d(4, 6, 3),
        nn.ConvTranspose2d(4, 6, 3, groups=2),
    ],
    ids=["grouped", "depthwise", "1d", "3d", "transposed", "transposed and grouped"],
)
def test_convolutions_of_every_kind_are_pruned(layer):
    torch.manual_seed(0)
    shape = (2, 4, *[6] * (layer.weight.ndim - 2))
    model = nn.Sequential(layer)
    prune_gradually(model, [mfac()], lambda: model(torch.randn(shape)).square().mean())
    assert int((layer.weight == 0).sum()) == round(layer.weight.numel() * 0.5)


def test_embeddings_and_the_packed_projection_of_attention_are_pruned_by_name():
    torch.manual_seed(0)
    model = Attention()
    names = ["embed.weight", "attend.in_proj_weight"]

    def loss():
        tokens = torch.randint(10, (4, 5))
        return nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())

    manager = prune_gradually(model, [mfac(params=names)], loss)
    assert list(manager.masks) == names
    assert all(int((model.get_parameter(name) == 0).sum()) == model.get_parameter(name).numel() // 2 for name in names)
    assert list(prunable_parameters(model)) == ["attend.out_proj.weight", "head.weight"]


def test_the_linear_layer_of_transformers_is_prunable_and_lies_transposed():
    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(3, 4), nn.Linear(3, 2))
    assert list(prunable_parameters(model)) == ["0.weight", "1.weight"]
    assert weight_axes(model, prunable_parameters(model)) == {"0.weight": (1, 0)}
    with torch.no_grad():
        model[0].weight[:, 1] = 1e-3  # an output
    ScheduledModifierManager(
        [MagnitudePruningModifier(params=["0.weight"], mask_type="filter", final_sparsity=1 / 3, end_epoch=0.0)]
    ).apply(model)
    assert (model[0].weight == 0).sum(dim=0).tolist() == [0, 4, 0]


@pytest.mark.parametrize("mask_type", ["filter", "channel", "2:4", "block4"])
def test_patterns_of_zeros_follow_outputs_and_inputs_of_transposed_convolutions(mask_type):
    torch.manual_seed(0)
    plain, turned = nn.Conv2d(8, 4, 3, bias=False), nn.ConvTranspose2d(8, 4, 3, bias=False)
    with torch.no_grad():
        turned.weight.copy_(plain.weight.transpose(0, 1))
    for layer in (plain, turned):
        ScheduledModifierManager(
            [MagnitudePruningModifier(mask_type=mask_type, final_sparsity=0.5, end_epoch=0.0)]
        ).apply(layer)
    assert 0 < int((plain.weight == 0).sum()) < plain.weight.numel()
    assert torch.equal(turned.weight.transpose(0, 1), plain.weight)


def test_a_weight_that_is_tied_to_an_embedding_is_pruned_once():
    torch.manual_seed(0)
    model = nn.ModuleDict({"embed": nn.Embedding(12, 4), "head": nn.Linear(4, 12, bias=False)})
    model["head"].weight = model["embed"].weight

    def loss():
        tokens = torch.randint(12, (10,))
        return nn.functional.cross_entropy(model["head"](model["embed"](tokens)), tokens)

    manager = prune_gradually(model, [mfac(params=["re:.*weight"])], loss)
    assert list(manager.masks) == ["embed.weight"]
    assert int((model["head"].weight == 0).sum()) == 24
    assert manager.sparsity == 0.5


def test_a_layer_without_gradient_in_some_steps_is_pruned_all_the_same():
    torch.manual_seed(0)
    model = nn.ModuleDict({"always": nn.Linear(4, 4), "sometimes": nn.Linear(4, 4)})
    calls = []

    def loss():
        calls.append(len(calls))
        hidden = model["always"](torch.randn(8, 4))
        return (model["sometimes"](hidden) if len(calls) % 2 else hidden).square().mean()

    prune_gradually(model, [mfac()], loss)
    assert int((model["sometimes"].weight == 0).sum()) == 8


def test_a_layer_that_is_frozen_after_modify_keeps_its_masks():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    def freeze(step):
        model[0].weight.requires_grad_(step != 4)
        model[0].weight.grad = None if step == 4 else model[0].weight.grad

    manager = prune_gradually(model, [mfac()], lambda: model(torch.randn(8, 4)).square().mean(), look=freeze)
    assert manager.sparsity == 0.5
    assert int((model[0].weight == 0).sum()) == 8


def test_a_model_that_changes_its_dtype_after_modify_goes_on_being_pruned():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    dtype = [torch.float32]

    def to_double(step):
        if step == 4:
            dtype[0] = torch.float64
            model.to(torch.float64)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    prune_gradually(
        model,
        [mfac()],
        lambda: model(torch.randn(8, 4, dtype=dtype[0])).square().mean(),
        optimizer=optimizer,
        look=to_double,
    )
    assert int((model[0].weight == 0).sum()) == 8
    assert model[0].weight.dtype == torch.float64


@pytest.mark.gpu("torch")
def test_a_model_that_moves_to_a_gpu_after_modify_goes_on_being_pruned():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    def move(step):
        if step == 4:
            model.cuda()

    prune_gradually(
        model,
        [mfac()],
        lambda: model(torch.randn(8, 4, device=model[0].weight.device)).square().mean(),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.01),
        look=move,
    )
    assert int((model[0].weight == 0).sum()) == 8


def test_one_sparsity_for_each_list_of_names():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 10), nn.Linear(10, 10), nn.Linear(10, 4))
    groups = {0.5: ["0.weight"], 0.8: ["1.weight", "2.weight"]}
    manager = prune_gradually(
        model, [mfac(params=[], final_sparsity=groups)], lambda: model(torch.randn(8, 4)).square().mean()
    )
    assert [round(float((model[index].weight == 0).float().mean()), 3) for index in range(3)] == [0.5, 0.8, 0.8]
    assert len(manager.modifiers) == 1


def test_zeros_that_are_there_are_where_pruning_begins():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 10))
    with torch.no_grad():
        model[0].weight[:3] = 0
    seen = []
    manager = prune_gradually(
        model,
        [MagnitudePruningModifier(**SCHEDULE | {"init_sparsity": "__FROM_PARAM__", "final_sparsity": 0.6})],
        lambda: model(torch.randn(8, 4)).square().mean(),
        look=lambda step: seen.append(int((model[0].weight == 0).sum())),
    )
    assert manager.sparsity == 0.6
    assert seen[2:] == [12, 12, 12, 24]


def test_constant_modifiers_of_a_pruned_model_hold_its_zeros_and_no_others():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Conv2d(1, 1, 3), nn.Linear(8, 1))
    with torch.no_grad():
        model[0].weight[:2] = 0
        model[1].weight[0, :3] = 0  # less than one in ten
    modifiers = ConstantPruningModifier.from_sparse_model(model)
    assert [modifier.settings.params for modifier in modifiers] == [("0.weight",)]
    before = model[1].weight.detach().clone()
    prune_gradually(model, modifiers, lambda: model[3](model[1](model[0](torch.randn(16, 8)))).square().mean())
    assert (model[0].weight == 0).sum(dim=1).tolist() == [8, 8, 0, 0, 0, 0, 0, 0]
    assert not torch.any((model[1].weight == 0) & (before == 0))


def test_constant_masks_are_released_at_their_end():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8))
    with torch.no_grad():
        model[0].weight[:2] = 0
    zeros = []
    prune_gradually(
        model,
        [ConstantPruningModifier(params="__ALL_PRUNABLE__", start_epoch=0.0, end_epoch=1.0)],
        lambda: model(torch.randn(16, 8)).square().mean(),
        look=lambda step: zeros.append(int((model[0].weight == 0).sum())),
    )
    assert zeros == [16, 16, 16, 0, 0, 0]


def test_a_name_that_matches_nothing_names_the_nearest():
    with pytest.raises(SettingError, match=r"'1\.wait' matches no parameter.*nearest names are 1\.weight"):
        prune_gradually(nn.Sequential(nn.ReLU(), nn.Linear(2, 2)), [mfac(params=["1.wait"])], lambda: None)


def test_recomputations_draw_fresh_samples_for_each_part():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))
    drawn = []

    def batches():
        while True:
            drawn.append(int((model[0].weight == 0).sum()))
            yield torch.randn(4, 6), torch.randn(4, 2)

    manager = ScheduledModifierManager(
        [MFACPruningModifier(final_sparsity=0.5, end_epoch=0.0, num_grads=3, damp=0.01, num_recomputations=4)]
    )
    manager.apply(model, grad_sampler=GradSampler(batches, nn.functional.mse_loss))
    assert int((model[0].weight == 0).sum()) == 12
    to_measure_the_loss_on = [0, 0, 0]
    assert drawn == [0, 0, 0, *to_measure_the_loss_on, 4, 4, 4, 7, 7, 7, 10, 10, 10]


@pytest.mark.parametrize("resets", [True, False])
def test_phases_alternate_and_momentum_is_forgotten_when_weights_come_back(resets):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    zeros, momentum = [], []

    def look(step):
        zeros.append(int((model[0].weight == 0).sum()))
        remembered = optimizer.state[model[0].weight].get("momentum_buffer", torch.zeros(1))  # none after a reset
        momentum.append(float(remembered.abs().max()))

    prune_gradually(
        model,
        [
            ACDCPruningModifier(
                params="__ALL_PRUNABLE__",
                compression_sparsity=0.5,
                start_epoch=0.0,
                end_epoch=4.0,
                update_frequency=1.0,
                momentum_buffer_reset=resets,
            )
        ],
        lambda: model(torch.randn(16, 8)).square().mean(),
        optimizer=optimizer,
        look=look,
        steps=14,
    )
    # dense for 3 steps, compressed for 3, dense again for 3, then compressed to the end
    assert zeros[1] == 0
    assert zeros[2:5] == [32] * 3
    assert zeros[6:8] == [0] * 2
    assert zeros[8:] == [32] * 6
    assert (momentum[5] == 0) == resets
    assert momentum[4] > 0
