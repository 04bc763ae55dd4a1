import logging

from mfac_core.left_out import selection_warnings, warn_once
from mfac_core.weight_names import Computed, ModelNames, layers_of_names, selected_names

SHAPES = {
    "a.weight": (3000, 1000),
    "a.bias": (3000,),
    "b.weight": (2000, 1000),
    "norm.weight": (1000,),
    "experts.up": (4, 1000, 1000),
    "position": (1, 50, 1000),
    "attention.in_proj_weight": (3, 10),
    "c.weight_v": (10, 10),
}


def model_of(**changes):
    facts = {
        "shapes": SHAPES,
        "prunable": ["a.weight", "b.weight"],
        "layers": layers_of_names(SHAPES),
        "frozen": ["b.weight"],
        "computed": {"c.weight": Computed("weight_norm", (10, 10))},
        "packed": {"attention.in_proj_weight": "in_proj_weight of MultiheadAttention"},
    }
    return ModelNames(**facts | changes)


def warnings_of(params, exclude=(), **changes):
    model = model_of(**changes)
    return selection_warnings(params, exclude, model, selected_names(params, exclude, model))


def test_what_all_prunable_leaves_out_is_one_warning_with_its_share_by_reason():
    assert warnings_of(["__ALL_PRUNABLE__"]) == [
        "6.0 M of 9.0 M weights of Linear and convolution layers are not in scope: 2.0 M frozen (requires_grad is "
        "False: b.weight), 4.0 M in arrays of three or more axes that belong to no such layer (experts.up), 30 packed "
        "(in_proj_weight of MultiheadAttention: attention.in_proj_weight), 100 reparametrized (weight_norm: "
        "c.weight); the reported sparsity counts the 3.0 M weights in scope alone. List in exclude what is left "
        "dense on purpose"
    ]


def test_nothing_is_said_of_what_was_left_out_on_purpose_or_is_selected():
    exclude = ["b", "experts", "attention", "c"]
    assert warnings_of(["__ALL_PRUNABLE__"], exclude) == []
    assert warnings_of(["a.weight"]) == []
    assert warnings_of(["a"]) == []
    assert warnings_of(["__ALL_PRUNABLE__", "experts.up", "attention.in_proj_weight"], ["b", "c"]) == []


def test_layers_of_other_kinds_are_named_where_they_are_most_of_the_model():
    shapes = {"embed.weight": (100, 10), "lstm.weight": (40, 10), "lstm.bias": (40,), "head.weight": (5, 10)}
    facts = {"shapes": shapes, "prunable": ["head.weight"], "layers": layers_of_names(shapes)}
    facts |= {"frozen": [], "computed": {}, "packed": {}}
    (warning,) = warnings_of(["__ALL_PRUNABLE__"], **facts)
    assert warning.startswith(
        "1,400 weights of layers of other kinds are not in scope (embed.weight, lstm.weight); the reported "
        "sparsity counts the 50 weights in scope alone"
    )
    assert warnings_of(["__ALL_PRUNABLE__"], ["embed", "lstm"], **facts) == []
    assert warnings_of(["__ALL_PRUNABLE__"], **facts | {"frozen": ["embed.weight", "lstm.weight"]}) == []
    assert warnings_of(["__ALL_PRUNABLE__", "lstm.weight", "embed.weight"], **facts) == []
    assert warnings_of(["head"], **facts) == []
    assert warnings_of(["__ALL_PRUNABLE__"], **facts | {"shapes": shapes | {"head.weight": (200, 10)}}) == []


def test_a_layer_is_said_to_lack_what_is_frozen_in_it():
    shapes = {"body.a.weight": (4, 4), "body.b.weight": (4, 4), "head.weight": (4, 4)}
    (warning,) = warnings_of(
        ["body"],
        shapes=shapes,
        prunable=list(shapes),
        layers=layers_of_names(shapes),
        frozen=["body.b.weight", "head.weight"],
        computed={},
        packed={},
    )
    assert warning.startswith("16 of 32 weights of Linear and convolution layers are not in scope: 16 frozen")
    assert "head" not in warning


def test_of_a_pattern_only_what_it_matches_is_said_to_be_left_out():
    (warning,) = warnings_of(["re:[ab][.]weight"])
    assert warning.startswith("2.0 M of 5.0 M weights that params ['re:[ab][.]weight'] selects are not in scope: 2.0 M")
    assert warnings_of(["re:a[.]weight"]) == []


def test_normalization_and_biases_that_are_caught_are_named_and_those_of_their_own_name_are_not():
    (warning,) = warnings_of(["re:(a|norm)[.]"])
    assert warning.startswith(
        "params 're:(a|norm)[.]' selects normalization weights, biases or scales too: a.bias, norm.weight. "
    )
    assert "__ALL_PRUNABLE__" in warning and "exclude" in warning
    assert warnings_of(["a.bias", "norm.weight", "re:(a|norm)[.]"]) == []
    assert warnings_of(["re:(a|norm)[.]"], ["a.bias", "norm"]) == []
    assert any("norm.weight" in each for each in warnings_of(["__ALL__"]))


def lora(names, frozen="q.base_layer.weight", shape=(8, 6)):
    high, wide = shape
    shapes = {frozen: shape, names[0]: (2, wide), names[1]: (high, 2), "head.weight": (6, 8)}
    return selection_warnings(
        ["__ALL_PRUNABLE__"],
        [frozen],
        model := ModelNames(shapes=shapes, prunable=list(shapes), layers=layers_of_names(shapes), frozen=[frozen]),
        selected_names(["__ALL_PRUNABLE__"], [frozen], model),
    )


def test_low_rank_adapters_beside_frozen_weights_are_named():
    for names in (["q.lora_A.default.weight", "q.lora_B.default.weight"], ["q.down.weight", "q.up.weight"]):
        (warning,) = lora(names)
        assert warning.startswith("low-rank adapters are pruned")
        assert ", ".join(names) in warning and "head.weight" not in warning
    (warning,) = lora(["q.lora_A", "q.lora_B"], frozen="q.weight")
    assert "q.lora_A, q.lora_B" in warning


def test_other_layers_beside_frozen_weights_are_no_adapters():
    assert lora(["k.down.weight", "v.up.weight"]) == []


def test_a_warning_is_logged_once_where_there_is_a_memory(caplog):
    logger = logging.getLogger("mfac_core")
    logged: set[str] = set()
    for _ in range(2):
        warn_once(logger, ["this 100%"], logged)
    assert [record.getMessage() for record in caplog.records] == ["this 100%"]
    warn_once(logger, ["this 100%"])
    assert len(caplog.records) == 2


def test_weights_that_others_are_computed_from_are_named_where_zeros_do_not_carry_over():
    names = ["fc.parametrizations.weight.original", "fc.bias"]
    shapes = dict(zip(names, [(4, 4), (4,)], strict=True))
    for params in (["re:fc"], names):
        found = {}
        for keeps_zeros in (True, False):
            computed = {"fc.weight": Computed("orthogonal", (4, 4), keeps_zeros=keeps_zeros)}
            found[keeps_zeros] = warnings_of(
                params, shapes=shapes, prunable=[], frozen=[], packed={}, computed=computed
            )
        (added,) = set(found[False]) - set(found[True])
        assert added.startswith(
            f"other weights are computed from {names[0]} and are not necessarily zero where these are"
        )
