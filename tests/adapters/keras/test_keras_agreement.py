"""The same weights and the same gradients give the same masks through the core and both adapters."""

import numpy as np
import pytest

keras = pytest.importorskip("keras", reason="needs Keras: pip install 'mfac-core[keras]'")

from mfac_core import load_recipe  # noqa: E402
from mfac_core.pruners import make_pruner  # noqa: E402
from mfac_keras.live_pruning import KerasPruning  # noqa: E402

ROWS = 6


def recipe(**keys):
    lines = "".join(f"  {key}: {value}\n" for key, value in keys.items())
    return f"m_modifiers:\n- !MFACPruningModifier\n  start_epoch: 1\n  end_epoch: 1\n  num_grads: {ROWS}\n{lines}"


@pytest.fixture
def model():
    keras.utils.set_random_seed(3)
    return keras.Sequential(
        [
            keras.Input([8, 8, 4]),
            keras.layers.Conv2D(8, 3, name="conv"),
            keras.layers.Conv2DTranspose(4, 3, name="up"),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(8, name="dense"),
        ]
    )


def through_keras(settings, model, rows):
    pruning = KerasPruning(settings, model, steps_per_epoch=ROWS)
    for step, row in enumerate(rows):
        gradients = zip(pruning.variables.values(), pruning.forms.values(), row, strict=True)
        pruning.observe_gradients(step, {id(v): form.of(array).ravel() for v, form, array in gradients})
    pruning.prune_if_due(ROWS)
    return list(pruning.masks.values())


def through_torch(text, weights, rows):
    torch = pytest.importorskip("torch")
    from mfac_torch import ScheduledModifierManager

    module = torch.nn.Sequential(
        torch.nn.Conv2d(4, 8, 3, bias=False),
        torch.nn.ConvTranspose2d(8, 4, 3, bias=False),
        torch.nn.Linear(4, 8, bias=False),
    )
    with torch.no_grad():
        for parameter, weight in zip(module.parameters(), weights, strict=True):
            parameter.copy_(torch.from_numpy(weight.copy()))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    manager = ScheduledModifierManager.from_yaml(text)
    manager.modify(module, optimizer, steps_per_epoch=ROWS)
    for row in rows:
        for parameter, gradient in zip(module.parameters(), row, strict=True):
            parameter.grad = torch.from_numpy(gradient.copy())
        optimizer.step()
    return [mask.numpy() for mask in manager.masks.values()]


def through_the_core(settings, weights, rows, axes):
    named = {str(place): weight for place, weight in enumerate(weights)}
    pruner = make_pruner(settings, named, steps_per_epoch=ROWS, axes=axes)
    for row in rows:
        pruner.observe(dict(zip(named, row, strict=True)))
    return list(pruner.prune(named, ROWS).masks.values())


@pytest.mark.feature("the same masks as the core and mfac_torch")
@pytest.mark.parametrize(
    "keys",
    [
        {"final_sparsity": 0.7, "fisher_block_size": 10},
        {"final_sparsity": 0.7, "fisher_block_size": "null", "global_sparsity": "true"},
        {"final_sparsity": 0.5, "fisher_block_size": 10, "mask_type": '"2:4"'},
        {"final_sparsity": 0.5, "fisher_block_size": 10, "mask_type": "block4"},
    ],
    ids=["layer", "global", "2:4", "block"],
)
def test_the_masks_are_the_same(model, keys):
    text = recipe(**keys, damp=1e-3)
    settings = load_recipe(text).pruning[0]
    rng = np.random.default_rng(1)
    kernels = KerasPruning(settings, model, steps_per_epoch=ROWS)
    forms = list(kernels.forms.values())
    weights = [form.of(v.numpy()).copy() for form, v in zip(forms, kernels.variables.values(), strict=True)]
    rows = [[rng.standard_normal(w.shape).astype("float32") for w in weights] for _ in range(ROWS)]
    in_keras = [[form.back(g) for form, g in zip(forms, row, strict=True)] for row in rows]
    found = through_keras(settings, model, in_keras)
    assert sum(int((~mask).sum()) for mask in found) == round(
        settings.final_sparsity * sum(mask.size for mask in found)
    )
    of_core = through_the_core(settings, weights, rows, {"1": (1, 2, 3, 0)})
    of_torch = through_torch(text, weights, rows)
    for one, core, torch in zip(found, of_core, of_torch, strict=True):
        np.testing.assert_array_equal(one, core)
        np.testing.assert_array_equal(one, torch)
