"""``params`` of the settings says which of the given weights a pruner prunes."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

from mfac_core import (
    ACDCSettings,
    ConstantSettings,
    MagnitudeSettings,
    MFACPruner,
    MFACSettings,
    SettingError,
    make_pruner,
)

SHAPES = {"stem": (4, 5), "block.0": (2, 6), "block.1": (3, 4), "head": (2, 3)}
GRADUAL = dict(final_sparsity=0.5, end_epoch=1.0, start_epoch=1.0)
METHODS = {
    "mfac": (MFACSettings, dict(**GRADUAL, num_gradients=3, block_size=8, damping=1e-2)),
    "magnitude": (MagnitudeSettings, GRADUAL),
    "magnitude, all compete": (MagnitudeSettings, dict(**GRADUAL, scope="global", initial_sparsity="__FROM_PARAM__")),
    "acdc": (ACDCSettings, dict(compression_sparsity=0.5, end_epoch=1.0)),
    "constant": (ConstantSettings, {}),
}
every_method = pytest.mark.parametrize("method", METHODS)


def arrays(seed: int = 0, names: Any = SHAPES) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    made = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    made["block.0"][0] = 0
    return {name: made[name] for name in names}


def make(method: str, weights: Any, **options: Any) -> Any:
    kind, changes = METHODS[method]
    params = options.pop("params", ("__ALL__",))
    return make_pruner(kind(**changes, params=params), weights, steps_per_epoch=2, **options)


def pruned(pruner: Any, names: Any) -> Any:
    if isinstance(pruner, MFACPruner):
        for seed in range(1, 4):
            pruner.observe(arrays(seed, names))
    while not pruner.is_finished:
        result = pruner.prune(arrays(names=names))
    return result


@every_method
@pytest.mark.parametrize(
    ("params", "chosen"),
    [
        (("block.1",), ["block.1"]),
        ((r"re:block[.]", "stem"), ["stem", "block.0", "block.1"]),
        (("head", "re:.*head"), ["head"]),
        (("__ALL__",), list(SHAPES)),
        (("__ALL_PRUNABLE__",), list(SHAPES)),
    ],
)
def test_a_run_on_more_weights_than_are_named_is_a_run_on_those(method, params, chosen):
    axes = {} if method == "constant" else {"axes": {"stem": (1, 0), "head": (0, 1)}}
    masks = {name: np.arange(np.prod(shape)).reshape(shape) % 5 > 0 for name, shape in SHAPES.items()}
    pruner = make(method, arrays(), params=params, masks=masks, **axes)
    fewer = {"axes": {name: each for name, each in axes["axes"].items() if name in chosen}} if axes else {}
    alone = make(method, arrays(names=chosen), masks={name: masks[name] for name in chosen}, **fewer)
    assert list(pruner.masks) == list(alone.masks) == chosen
    result, expected = pruned(pruner, SHAPES), pruned(alone, chosen)
    np.testing.assert_equal(result.masks, expected.masks)
    assert list(result.weights) == list(SHAPES)
    for name, array in result.weights.items():
        np.testing.assert_array_equal(array, expected.weights[name] if name in chosen else arrays()[name])
    assert result.sparsity == expected.sparsity == pruner.sparsity
    np.testing.assert_equal(pruner.state_dict(), alone.state_dict())


@every_method
def test_weights_that_are_not_in_scope_may_be_left_out_later(method):
    names = ["block.0", "block.1"]
    pruner, all_given = (make(method, arrays(), params=(r"re:block",)) for _ in range(2))
    result, expected = pruned(pruner, names), pruned(all_given, SHAPES)
    assert list(result.weights) == names
    for name in names:
        np.testing.assert_array_equal(result.weights[name], expected.weights[name])


@every_method
def test_an_entry_that_names_nothing_is_refused_with_the_nearest(method):
    with pytest.raises(SettingError, match=r"params: 'block\.2' matches no weight .* nearest names are block\.[01], "):
        make(method, arrays(), params=("stem", "block.2"))


def test_a_name_that_was_never_given_is_still_refused():
    pruner = make("mfac", arrays(), params=("stem",))
    before = copy.deepcopy(pruner.state_dict())
    with pytest.raises(ValueError, match="unknown: .'tail'"):
        pruner.observe({**arrays(1), "tail": np.zeros(3)})
    with pytest.raises(ValueError, match="missing: .'stem'"):
        pruner.prune({"head": arrays()["head"]}, 2)
    np.testing.assert_equal(pruner.state_dict(), before)
