import pytest

from mfac_core.errors import SettingError
from mfac_core.weight_names import Computed, ModelNames, matching_names, names_of_shapes, selected_names

SHAPES = {
    "stem.weight": (8, 3, 3, 3),
    "block1.conv.weight": (8, 8, 3, 3),
    "block1.bn.weight": (8,),
    "block1.bn.bias": (8,),
    "block2.conv.weight": (8, 8, 3, 3),
    "block2.conv.bias": (8,),
    "fc.weight": (4, 8),
    "fc.bias": (4,),
}
NET = names_of_shapes(SHAPES)
KERNELS = ["stem.weight", "block1.conv.weight", "block2.conv.weight", "fc.weight"]


def chosen(params, exclude=(), model=NET):
    return list(selected_names(params, exclude, model))


def refusal(params, exclude=(), model=NET):
    with pytest.raises(SettingError) as caught:
        selected_names(params, exclude, model)
    return str(caught.value)


@pytest.mark.parametrize(
    ("params", "exclude", "expected"),
    [
        (["block1"], [], ["block1.conv.weight"]),
        (["block2.conv", "fc"], [], ["block2.conv.weight", "fc.weight"]),
        (["fc", "fc.bias"], [], ["fc.weight", "fc.bias"]),
        (["__ALL_PRUNABLE__"], ["stem", "fc"], ["block1.conv.weight", "block2.conv.weight"]),
        (["__ALL_PRUNABLE__"], ["fc.weight"], KERNELS[:3]),
        (["__ALL_PRUNABLE__"], ["re:block"], ["stem.weight", "fc.weight"]),
        (["__ALL__"], ["re:.*bias$", "block1.bn"], KERNELS),
        (["re:(?!stem|fc).*"], ["block1.bn", "re:.*bias"], ["block1.conv.weight", "block2.conv.weight"]),
        (["fc.weight", "block1"], ["fc"], ["block1.conv.weight"]),
        (["__ALL__"], ["__ALL_PRUNABLE__"], ["block1.bn.weight", "block1.bn.bias", "block2.conv.bias", "fc.bias"]),
        (["__ALL_PRUNABLE__"], ["fc.bias"], KERNELS),
    ],
)
def test_layers_mean_their_prunable_weights_and_exclude_comes_last(params, exclude, expected):
    assert chosen(params, exclude) == expected


def test_a_layer_means_all_that_is_in_it_where_anything_is_meant():
    assert matching_names("block1", NET, whole_layers=True) == [
        "block1.conv.weight",
        "block1.bn.weight",
        "block1.bn.bias",
    ]


def test_a_weight_of_its_own_name_comes_before_a_layer_of_that_name():
    model = ModelNames(shapes={"a": (2, 2), "a.b": (3, 3)}, prunable=["a", "a.b"], layers={"a": ["a.b"]})
    assert chosen(["a"], model=model) == ["a"]


def test_a_weight_of_several_names_is_taken_out_by_each_of_them():
    model = ModelNames(
        shapes={"embed.weight": (9, 4), "head.weight": (9, 4), "fc.weight": (4, 4)},
        prunable=["embed.weight", "head.weight", "fc.weight"],
        layers={"head": ["head.weight"], "embed": ["embed.weight"], "fc": ["fc.weight"]},
        first_names={"head.weight": "embed.weight"},
    )
    assert chosen(["head"], model=model) == ["embed.weight"]
    for name in ("head", "embed", "head.weight", "re:head", "re:embed"):
        assert chosen(["__ALL_PRUNABLE__"], [name], model) == ["fc.weight"]


def test_a_layer_without_prunable_weights_says_so_and_what_it_holds():
    message = refusal(["block1.bn"])
    assert message == (
        "params: 'block1.bn' is a layer without weights of Linear and convolution layers; it has block1.bn.weight, "
        "block1.bn.bias: pruning normalization weights, biases or scales harms the model"
    )
    shapes = {"lstm.weight_ih": (8, 2), "lstm.bias_ih": (8,), "fc.weight": (2, 2)}
    model = ModelNames(shapes=shapes, prunable=["fc.weight"], layers={"lstm": ["lstm.weight_ih", "lstm.bias_ih"]})
    assert refusal(["lstm"], model=model).endswith("it has lstm.weight_ih, which you can write by name")


def test_all_entries_that_match_nothing_are_one_error():
    message = refusal(["block1", "blok2", "re:nothing"])
    assert "'blok2' matches no parameter of the model; the nearest names are block2.conv.weight" in message
    assert "'re:nothing' matches no parameter" in message


@pytest.mark.parametrize("entry", ["fc.bais", "block1.bn.wieght", "re:bn", "running_mean", "bias", "re:fc.bais"])
def test_nearest_names_are_of_what_one_prunes(entry):
    suggested = refusal([entry]).partition("the nearest names are ")[2]
    assert suggested and "bn" not in suggested and "bias" not in suggested


def test_layers_are_suggested_too():
    assert "the nearest layers are block2, block1" in refusal(["blck2"])
    nested = names_of_shapes({f"block1.{number}.conv.weight": (2, 2) for number in range(3)})
    assert "the nearest layers are block1, " in refusal(["block1."], model=nested)


@pytest.mark.parametrize(
    ("entry", "suggested"),
    [
        ("conv*", None),
        ("block*.weight", "'re:block.*[.]weight$', and exclude for block1.bn.weight"),
        ("block?.conv.weight", "'re:block.[.]conv[.]weight$'"),
        ("block[12].conv.weight", "'re:block[12][.]conv[.]weight$'"),
        ("*.weight", "write __ALL_PRUNABLE__ for the weights of all"),
        (".*", "write __ALL_PRUNABLE__ for the weights of all"),
        ("ALL_PRUNABLE", "model; write __ALL_PRUNABLE__ for the weights of all"),
        ("__all_prunable__", "model; write __ALL_PRUNABLE__ for the weights of all"),
        ("all", "model; write __ALL_PRUNABLE__ for the weights of all"),
        ("block1.*", "write 'block1' for the weights of that layer without normalization and biases"),
        ("*", "__ALL_PRUNABLE__"),
        ("re:block*.bn.weight", None),
        (".*conv.weight", "a pattern begins with re:, so write 're:.*conv.weight'"),
        ("re:b*.conv.weight", "in a regular expression .* is any text, so write 're:b.*[.]conv[.]weight$'"),
        ("re:conv", "matched from the start of the name, so write 're:.*conv', and exclude for block2.conv.bias"),
    ],
)
def test_patterns_of_another_kind_are_suggested_as_they_are_written_here(entry, suggested):
    if suggested is None:
        assert "the nearest names are" in refusal([entry])
    else:
        assert suggested in refusal([entry])


def test_every_suggested_pattern_matches_something():
    for entry in ("block?.conv.weight", "*.weight", "block*", ".*conv.weight", "re:conv", "*"):
        pattern = "re:" + refusal([entry]).rpartition("'re:")[2].partition("'")[0]
        assert matching_names(pattern, NET)


def test_what_is_excluded_must_match_something_and_leave_something():
    assert refusal(["__ALL__"], ["fx", "re:nothing"]).startswith("exclude: 'fx' matches no parameter of the model; ")
    assert refusal(["fc"], ["fc.weight"]) == (
        "exclude: ['fc.weight'] leaves nothing to prune: it excludes every parameter that params ['fc'] selects"
    )


def test_frozen_weights_are_left_out_and_an_error_by_name():
    model = ModelNames(
        shapes=SHAPES, prunable=KERNELS, layers=NET.layers, frozen=["stem.weight", "block1.conv.weight", "fc.bias"]
    )
    assert chosen(["__ALL_PRUNABLE__"], model=model) == ["block2.conv.weight", "fc.weight"]
    assert refusal(["stem.weight"], model=model) == (
        "params: 'stem.weight' is frozen (requires_grad is False); unfreeze it, or remove it from params"
    )
    assert "stem.weight, block1.conv.weight are frozen" in refusal(["block1.conv.weight", "stem.weight"], model=model)
    assert "every parameter that it selects is frozen" in refusal(["stem"], model=model)
    assert "except those that exclude ['fc'] removes" in refusal(["stem", "fc"], ["fc"], model)


def test_a_computed_weight_is_named_with_what_computes_it():
    model = ModelNames(
        shapes={"0.weight_g": (3, 1), "0.weight_v": (3, 3)},
        layers={"0": ["0.weight_g", "0.weight_v"]},
        computed={"0.weight": Computed("weight_norm", (3, 3))},
    )
    for entry in ("0", "0.weight"):
        assert "computed from other parameters (weight_norm); remove the computation before pruning" in refusal(
            [entry], (), model
        )
    assert "the weights of all its layers are computed" in refusal(["__ALL_PRUNABLE__"], (), model)
    assert refusal(["__ALL_PRUNABLE__"], model=ModelNames(shapes={"a": (2,)})).endswith(
        "it has no Linear and convolution layers, so list in params what to prune"
    )


@pytest.mark.parametrize(
    ("name", "shape", "is_rare"),
    [
        ("bn.weight", (8,), True),
        ("norm.weight", (1, 8, 1, 1), True),
        ("layer.bias", (2, 3), True),
        ("attention/query/bias", (2, 3), True),
        ("rnn.bias_ih_l0", (8,), True),
        ("attention.in_proj_bias", (8, 2), True),
        ("scale", (), True),
        ("embed.weight", (10, 8), False),
        ("rnn.weight_ih_l0", (10, 8), False),
        ("bias_table.weight", (10, 8), False),
    ],
)
def test_what_is_rarely_pruned(name, shape, is_rare):
    assert ModelNames(shapes={name: shape}).is_rarely_pruned(name) == is_rare
    assert not ModelNames(shapes={name: shape}, prunable=[name]).is_rarely_pruned(name)
    assert ModelNames(shapes={name: shape}, normalization=[name]).is_rarely_pruned(name)
