import logging

import pytest
import torch
from torch import nn

from mfac_core.errors import SettingError
from mfac_torch import prunable_parameters
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
    with caplog.at_level(logging.INFO, logger="mfac_torch"):
        assert "conv.weight" not in select_parameters(zoo, ["__ALL_PRUNABLE__"])
    assert "left out of pruning: conv.weight" in caplog.text
    with pytest.raises(SettingError, match="leaves nothing to prune"):
        select_parameters(zoo, [r"re:conv\.weight"])


def test_frozen_parameters_that_a_pattern_selects_are_one_warning(zoo, caplog):
    for parameter in zoo.body.parameters():
        parameter.requires_grad_(False)
    zoo.head.weight.requires_grad_(False)
    zoo.rnn.requires_grad_(False)
    with caplog.at_level(logging.INFO, logger="mfac_torch"):
        select_parameters(zoo, ["__ALL_PRUNABLE__", "re:(body|conv)"])
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        (
            "WARNING",
            "frozen (requires_grad is False) and left out of pruning: body.0.weight, body.0.bias, body.2.weight, "
            "body.2.bias",
        ),
        ("INFO", "frozen (requires_grad is False) and left out of pruning: head.weight"),
    ]
    caplog.clear()
    select_parameters(zoo, ["re:.*"])
    (record,) = caplog.records
    assert record.getMessage().endswith(
        ": body.0.weight, body.0.bias, body.2.weight, body.2.bias, rnn.weight_ih_l0 and 4 more"
    )


def test_a_parametrized_layer_is_left_out_with_a_line(caplog):
    model = nn.Sequential(nn.Linear(3, 3), nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)))
    with caplog.at_level(logging.INFO, logger="mfac_torch"):
        assert list(prunable_parameters(model)) == ["0.weight"]
    assert "leaves out the layer '1'" in caplog.text


def test_a_lazy_layer_asks_for_a_first_batch():
    with pytest.raises(SettingError, match="run one batch"):
        select_parameters(nn.Sequential(nn.LazyLinear(3)), ["__ALL_PRUNABLE__"])
