import copy
import logging

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from mfac_core.errors import SettingError
from mfac_torch import (
    ACDCPruningModifier,
    MagnitudePruningModifier,
    ScheduledModifierManager,
    prunable_parameters,
)
from mfac_torch.layout import weight_axes
from mfac_torch.selection import select_parameters


class Zoo(nn.Module):
    """One of each kind of layer, with a head tied to the embedding."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.conv = nn.Conv1d(8, 8, 3)
        self.up = nn.ConvTranspose2d(8, 4, 2)
        self.norm = nn.BatchNorm1d(8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.body = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.rnn = nn.LSTM(8, 8)
        self.head = nn.Linear(8, 10, bias=False)
        self.scale = nn.Parameter(torch.ones(1))


@pytest.fixture
def zoo():
    return Zoo()


def test_all_prunable_is_linear_and_convolution_weights_only(zoo):
    assert list(prunable_parameters(zoo)) == [
        "conv.weight",
        "up.weight",
        "attention.out_proj.weight",
        "body.0.weight",
        "body.2.weight",
        "head.weight",
    ]
    assert list(select_parameters(zoo, ["__ALL_PRUNABLE__"])) == list(prunable_parameters(zoo))


def test_all_is_every_parameter_in_order(zoo):
    assert list(select_parameters(zoo, ["__ALL__"])) == [name for name, _ in zoo.named_parameters()]


def test_exact_names_come_in_the_order_of_the_model_not_of_the_recipe(zoo):
    selected = select_parameters(zoo, ["head.weight", "embed.weight", "conv.bias"])
    assert list(selected) == ["embed.weight", "conv.bias", "head.weight"]
    assert selected["embed.weight"] is zoo.embed.weight


def test_patterns_match_from_the_start_of_the_dotted_name(zoo):
    assert list(select_parameters(zoo, [r"re:body\.\d+\.weight"])) == ["body.0.weight", "body.2.weight"]
    assert list(select_parameters(zoo, ["re:bod"])) == ["body.0.weight", "body.0.bias", "body.2.weight", "body.2.bias"]
    with pytest.raises(SettingError, match="matches no parameter"):
        select_parameters(zoo, ["re:0.weight"])


def test_a_parameter_selected_twice_counts_once(zoo):
    assert list(select_parameters(zoo, ["head.weight", "re:head", "__ALL_PRUNABLE__"])).count("head.weight") == 1


def test_tied_parameters_count_once_under_their_first_name_and_answer_to_every_name(zoo):
    zoo.head.weight = zoo.embed.weight
    assert "embed.weight" in prunable_parameters(zoo)
    assert "head.weight" not in prunable_parameters(zoo)
    assert list(select_parameters(zoo, ["head.weight"])) == ["embed.weight"]
    assert list(select_parameters(zoo, ["re:head"])) == ["embed.weight"]
    assert list(select_parameters(zoo, ["re:(head|embed)"])) == ["embed.weight"]


@pytest.mark.parametrize("entry", ["body.1.weight", "re:boddy", "bodyy.0.weight"])
def test_what_matches_nothing_is_an_error_with_the_nearest_names(zoo, entry):
    with pytest.raises(SettingError, match=r"params.*matches no parameter.*nearest names are.*body\.0\.") as caught:
        select_parameters(zoo, ["__ALL_PRUNABLE__", entry])
    assert repr(entry) in str(caught.value)
    assert caught.value.field == "params"


def test_a_pattern_that_is_not_one_is_refused_by_name(zoo):
    with pytest.raises(SettingError, match="not a regular expression"):
        select_parameters(zoo, ["re:(body"])


def test_a_frozen_parameter_is_an_error_by_name_and_left_out_by_token(zoo, caplog):
    zoo.conv.weight.requires_grad_(False)
    for params in (["conv.weight"], ["__ALL__", "conv.weight"], ["conv.weight", "__ALL__"]):
        with pytest.raises(SettingError, match=r"'conv\.weight' is frozen"):
            select_parameters(zoo, params)
    assert "conv.weight" not in select_parameters(zoo, ["__ALL_PRUNABLE__"])
    assert "frozen (requires_grad is False: conv.weight)" in caplog.text
    with pytest.raises(SettingError, match="leaves nothing to prune"):
        select_parameters(zoo, [r"re:conv\.weight"])


def test_frozen_parameters_are_selected_like_others_where_that_is_asked_for(zoo, caplog):
    zoo.conv.requires_grad_(False)
    assert "conv.weight" in select_parameters(zoo, ["__ALL_PRUNABLE__"], ["attention.in_proj_weight"], frozen_too=True)
    assert list(select_parameters(zoo, ["conv.weight"], frozen_too=True)) == ["conv.weight"]
    assert not caplog.records


def test_frozen_parameters_that_are_left_out_are_one_warning_with_their_share(zoo, caplog):
    for parameter in zoo.body.parameters():
        parameter.requires_grad_(False)
    zoo.head.weight.requires_grad_(False)
    zoo.rnn.requires_grad_(False)
    with caplog.at_level(logging.INFO, logger="mfac_torch"):
        select_parameters(zoo, ["__ALL_PRUNABLE__", "re:body"], ["attention"])
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith(
        "208 of 528 weights that params ['__ALL_PRUNABLE__', 're:body'] selects are not in scope: 208 frozen "
        "(requires_grad is False: body.0.weight, body.2.weight, head.weight); "
    )
    caplog.clear()
    select_parameters(zoo, ["re:(body|conv|rnn).*weight"])
    (record,) = caplog.records
    assert "640 frozen (requires_grad is False: body.0.weight, body.2.weight, rnn.weight_ih_l0 and 1 more)" in (
        record.getMessage()
    )
    caplog.clear()
    select_parameters(zoo, ["__ALL_PRUNABLE__"], ["body", "head", "attention.in_proj_weight"])
    select_parameters(zoo, ["conv.weight", "up"])
    assert not caplog.records


def test_a_parametrized_layer_is_left_out_with_a_line(caplog):
    model = nn.Sequential(nn.Linear(3, 3), nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)))
    with caplog.at_level(logging.INFO, logger="mfac_torch"):
        assert list(prunable_parameters(model)) == ["0.weight"]
    assert "leaves out the layer '1'" in caplog.text


def test_a_lazy_layer_asks_for_a_first_batch():
    with pytest.raises(SettingError, match="run one batch"):
        select_parameters(nn.Sequential(nn.LazyLinear(3)), ["__ALL_PRUNABLE__"])


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.norm = nn.LayerNorm((4, 2, 2))
        self.scale = nn.Parameter(torch.ones(1, 4, 1, 1))
        self.act = nn.ReLU()


def net():
    return nn.ModuleDict({"stem": nn.Conv2d(3, 4, 3), "block1": Block(), "block2": Block(), "fc": nn.Linear(4, 2)})


def test_a_layer_by_its_name_means_its_prunable_weights(caplog):
    assert list(select_parameters(net(), ["block1", "fc"])) == ["block1.conv.weight", "fc.weight"]
    assert not caplog.records
    for name in ("block1.bn", "block1.act"):
        with pytest.raises(SettingError, match=f"'{name}' is a layer without weights of Linear and convolution layers"):
            select_parameters(net(), [name])


def test_normalization_and_biases_that_a_pattern_catches_are_named(caplog):
    model = net()
    selected = select_parameters(model, ["re:(?!stem|fc|block2).*"])
    assert "block1.bn.weight" in selected  # old recipes go on meaning what they meant
    (record,) = caplog.records
    for name in ("conv.bias", "bn.weight", "bn.bias", "norm.weight", "norm.bias", "scale"):
        assert f"block1.{name}" in record.getMessage()
    assert "block1.conv.weight" not in record.getMessage()
    caplog.clear()
    select_parameters(model, ["__ALL__"])
    assert "selects normalization weights, biases or scales too" in caplog.text
    caplog.clear()
    select_parameters(model, ["block1.bn.weight", "fc.bias"])
    select_parameters(model, ["re:block1"], ["re:.*(bias|scale)", "block1.bn", "block1.norm"])
    assert not caplog.records


def test_exclude_takes_out_names_layers_and_patterns():
    chosen = select_parameters(net(), ["__ALL_PRUNABLE__"], ["stem", "re:block2", "fc.weight"])
    assert list(chosen) == ["block1.conv.weight"]
    with pytest.raises(SettingError, match=r"exclude: 'blok1' matches no parameter.*nearest"):
        select_parameters(net(), ["__ALL_PRUNABLE__"], ["blok1"])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (nn.utils.parametrizations.weight_norm, "reparametrized (weight_norm: 1.weight)"),
        (nn.utils.parametrizations.spectral_norm, "reparametrized (spectral_norm: 1.weight)"),
        (nn.utils.parametrizations.orthogonal, "reparametrized (orthogonal: 1.weight)"),
        (nn.utils.spectral_norm, "reparametrized (spectral_norm: 1.weight)"),
        (lambda layer: prune.identity(layer, "weight"), "reparametrized (identity: 1.weight)"),
        (lambda layer: layer.requires_grad_(False), "frozen (requires_grad is False: 1.weight)"),
    ],
    ids=["weight_norm", "spectral_norm", "orthogonal", "old spectral_norm", "prune", "frozen"],
)
@pytest.mark.parametrize("layer", [nn.Linear(6, 6), nn.Conv1d(3, 4, 3)], ids=["linear", "convolution"])
def test_each_reason_to_be_left_out_is_named_with_its_share(layer, change, reason, caplog):
    layer = copy.deepcopy(layer)
    model = nn.Sequential(nn.Linear(5, 4), change(layer))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert list(select_parameters(model, ["__ALL_PRUNABLE__"])) == ["0.weight"]
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert f"36 of 56 weights of Linear and convolution layers are not in scope: 36 {reason}" in record.getMessage()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    caplog.clear()
    select_parameters(model, ["__ALL_PRUNABLE__"], ["1"])
    assert not caplog.records


class Experts(nn.Module):
    def __init__(self, *, is_transposed=False):
        super().__init__()
        self.is_transposed = is_transposed
        self.gate_up = nn.Parameter(torch.randn(3, 8, 12))
        self.router = nn.Linear(8, 3)


def test_fused_experts_and_packed_attention_are_left_out_with_a_warning(caplog):
    model = nn.ModuleDict({"experts": Experts(), "attention": nn.MultiheadAttention(8, 2)})
    select_parameters(model, ["__ALL_PRUNABLE__"])
    (record,) = caplog.records
    assert "480 of 568 weights" in record.getMessage()
    assert "288 in arrays of three or more axes that belong to no such layer (experts.gate_up)" in record.getMessage()
    assert "192 packed (in_proj_weight of MultiheadAttention: attention.in_proj_weight)" in record.getMessage()


class LoRA(nn.Module):
    def __init__(self, base, first, second):
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.add_module(first, nn.Linear(base.in_features, 2, bias=False))
        self.add_module(second, nn.Linear(2, base.out_features, bias=False))


@pytest.mark.parametrize(("first", "second"), [("lora_A", "lora_B"), ("down", "up")])
def test_adapters_beside_a_frozen_base_are_named(first, second, caplog):
    model = nn.Sequential(LoRA(nn.Linear(8, 8), first, second), nn.Linear(8, 8))
    select_parameters(model, ["__ALL_PRUNABLE__"])
    share, adapters = (record.getMessage() for record in caplog.records)
    assert "64 of 160 weights" in share
    assert (
        f"low-rank adapters are pruned, but the frozen weights that they are added to are not: 0.{first}.weight, "
        in (adapters)
    )
    assert f"0.{second}.weight" in adapters


def test_the_warning_comes_once_for_all_modifiers_of_a_recipe_and_in_one_shot_too(caplog):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(False))
    recipe = """
    modifiers:
      - !MagnitudePruningModifier {final_sparsity: 0.5, start_epoch: 0.0, end_epoch: 1.0}
      - !MagnitudePruningModifier {final_sparsity: 0.75, start_epoch: 2.0, end_epoch: 3.0}
    """
    manager = ScheduledModifierManager.from_yaml(recipe)
    manager.modify(model, torch.optim.SGD(model.parameters(), lr=0.1), steps_per_epoch=2)
    assert caplog.text.count("16 of 32 weights") == 1
    manager.finalize()
    caplog.clear()
    ScheduledModifierManager.from_yaml(recipe).apply(model)
    assert caplog.text.count("16 of 32 weights") == 1


def test_exclude_reaches_every_modifier_and_is_saved(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    modifiers = [
        MagnitudePruningModifier(final_sparsity={0.5: ["0", "2"], 0.75: "1"}, exclude="2", params=[], end_epoch=1.0),
        ACDCPruningModifier(compression_sparsity=0.5, end_epoch=1.0, ignore=["0", "1"]),
    ]
    ScheduledModifierManager(modifiers).save(str(tmp_path / "recipe.yaml"))
    manager = ScheduledModifierManager.from_yaml(tmp_path / "recipe.yaml")
    assert [modifier.settings.exclude for modifier in manager.modifiers] == [("2",), ("0", "1")]
    manager.apply(model)
    assert [int((layer.weight == 0).sum()) for layer in model] == [8, 12, 8]


def two_of_four(weight):
    """Whether at most two of each four consecutive entries of the last axis are kept."""
    return bool(((weight.reshape(-1, 4) != 0).sum(dim=1) <= 2).all())


def prune_by(mask_type, model, params, final=0.5):
    ScheduledModifierManager(
        [MagnitudePruningModifier(params=params, mask_type=mask_type, final_sparsity=final, end_epoch=0.0)]
    ).apply(model)


@pytest.mark.parametrize("is_transposed", [False, True])
def test_inputs_of_stacked_matrices_are_the_last_axis_unless_their_module_says_otherwise(is_transposed):
    torch.manual_seed(0)
    model = Experts(is_transposed=is_transposed)
    prune_by("2:4", model, ["gate_up"])
    weight = model.gate_up.detach()
    inputs_last = weight.transpose(1, 2) if is_transposed else weight
    assert two_of_four(inputs_last) and not two_of_four(inputs_last.transpose(1, 2))
    model = Experts(is_transposed=is_transposed)
    prune_by("filter", model, ["gate_up"])
    rows = model.gate_up.transpose(1, 2) if is_transposed else model.gate_up
    zeros = (rows == 0).sum(dim=2)
    assert set(zeros.flatten().tolist()) == {0, rows.shape[2]}
    assert any(len(set(each)) > 1 for each in zeros.tolist())  # a filter is not a whole expert
    assert len({tuple(each) for each in zeros.tolist()}) > 1  # nor one of all experts


class OwnConvolution(nn.Module):
    def __init__(self, kernel_size):
        super().__init__()
        self.kernel_size = kernel_size
        self.weight = nn.Parameter(torch.randn(4, 8, 3, 3))


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (OwnConvolution(3), "weight"),
        (OwnConvolution((3, 3)), "weight"),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 4, 3)), "parametrizations.weight.original1"),
        (nn.utils.spectral_norm(nn.Conv2d(8, 4, 3)), "weight_orig"),
    ],
    ids=["own", "own with a tuple", "weight_norm", "old spectral_norm"],
)
def test_inputs_of_convolutions_are_the_second_axis_however_they_are_made(module, name):
    prune_by("2:4", module, [name])
    weight = module.get_parameter(name).detach()
    assert two_of_four(weight.movedim(1, -1)) and not two_of_four(weight.reshape(-1, 4))


def test_the_layout_of_other_layers():
    model = nn.ModuleDict({"two": nn.Bilinear(8, 4, 4), "rnn": nn.LSTM(8, 8), "attention": nn.MultiheadAttention(8, 2)})
    names = [name for name, parameter in model.named_parameters() if parameter.ndim > 1]
    assert weight_axes(model, names) == {"two.weight": (0, 1, 2)}


def test_a_weight_that_layers_read_differently_is_refused_by_name_where_a_pattern_needs_to_know():
    model = nn.ModuleDict({"down": nn.Conv2d(8, 8, 3), "up": nn.ConvTranspose2d(8, 8, 3), "fc": nn.Linear(8, 8)})
    model["up"].weight = model["down"].weight
    before = model["down"].weight.detach().clone()
    with pytest.raises(SettingError, match=r"mask_type: 2:4 needs outputs and inputs, .* not known for 'down\.weight'"):
        prune_by("2:4", model, ["__ALL_PRUNABLE__"])
    assert torch.equal(model["down"].weight, before)
    prune_by("unstructured", model, ["__ALL_PRUNABLE__"])


def test_all_layers_that_a_pattern_does_not_fit_are_named():
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(7, 8))
    with pytest.raises(SettingError, match=r"MagnitudePruningModifier.mask_type: .*'0\.weight'.*'2\.weight'") as caught:
        prune_by([1, 4], model, ["__ALL_PRUNABLE__"])
    assert "'1.weight'" not in str(caught.value)


def test_one_name_needs_no_list(zoo):
    assert list(select_parameters(zoo, "body")) == ["body.0.weight", "body.2.weight"]
    assert list(select_parameters(zoo, "body", exclude="body.2")) == ["body.0.weight"]
    with pytest.raises(SettingError, match="params: None must be a name or a non-empty list of names"):
        select_parameters(zoo, None)


@pytest.mark.parametrize(
    ("reparametrize", "is_said"),
    [
        (nn.utils.parametrizations.orthogonal, True),
        (nn.utils.parametrizations.weight_norm, False),
        (nn.utils.parametrizations.spectral_norm, False),
        (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), False),
    ],
    ids=["orthogonal", "weight_norm", "spectral_norm", "prune"],
)
def test_zeros_that_do_not_reach_the_weights_of_the_layer_are_a_warning(reparametrize, is_said, caplog):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    reparametrize(model[0])
    selected = select_parameters(model, ["re:.*"], ["re:.*bias"])
    assert len(selected) > 1
    assert ("other weights are computed from 0.parametrizations.weight.original and" in caplog.text) is is_said
