from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import mfac_core.backends.numpy_backend
from mfac_core import MemoryBudgetError, SettingError
from mfac_torch import GradSampler, sensitivity
from tests import reference

pytestmark = pytest.mark.usefixtures("placement")  # on the CPU, and on a GPU

LEVELS = (0.3, 0.6, 0.9)
OPTIONS = dict(sparsities=LEVELS, num_grads=6, num_batches=3, damp=1e-5)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(4 * 9, 5),
        nn.Linear(5, 3),
    ).double()


@pytest.fixture
def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(4, 2, 3, 3, generator=generator, dtype=torch.float64), torch.randint(3, (4,), generator=generator))
        for _ in range(8)
    ]


def loss_of(model, batches) -> float:
    model.eval()
    with torch.no_grad():
        return float(np.mean([float(nn.functional.cross_entropy(model(x), y)) for x, y in batches]))


def gradients_of(model, name, batches) -> np.ndarray:
    model.eval()
    parameter = dict(model.named_parameters())[name]
    rows = []
    for x, y in batches:
        (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), [parameter])
        rows.append(gradient.numpy().ravel())
    return np.stack(rows)


def expected(model, batches, *, fresh, num_grads=6, num_batches=3, held_out=None, **options):
    """The increases by the dense oracle, on copies of the model."""
    options = dict(block_size=2000, damping=1e-5, update="joint", scope="layer", num_recomputations=1) | options
    held_out = batches[:num_batches] if held_out is None else held_out
    dense_loss = loss_of(copy.deepcopy(model), held_out)
    measured, predicted = {}, {}
    for name in ("0.weight", "5.weight", "6.weight"):
        pruned = copy.deepcopy(model)
        parameter = dict(pruned.named_parameters())[name]
        rows = gradients_of(pruned, name, batches[:num_grads])
        masks, total = None, 0.0
        measured[name], predicted[name] = [], []
        for level in LEVELS:
            rows = gradients_of(pruned, name, batches[:num_grads]) if fresh else rows
            now = {name: parameter.detach().numpy()}
            result = reference.prune(now, rows, sparsity=level, masks=masks, **options)
            masks, total = result.masks, total + result.predicted_loss_increase
            with torch.no_grad():
                parameter.copy_(torch.from_numpy(result.weights[name]))
            measured[name].append(loss_of(pruned, held_out) - dense_loss)
            predicted[name].append(total)
    return dense_loss, measured, predicted


def assert_as_expected(result, dense_loss, measured, predicted) -> None:
    assert result.dense_loss == pytest.approx(dense_loss, rel=1e-9)
    assert list(result.measured) == list(measured)
    for name in measured:
        np.testing.assert_allclose(result.measured[name], measured[name], rtol=1e-5, atol=1e-8)
        np.testing.assert_allclose(result.predicted[name], predicted[name], rtol=1e-5, atol=1e-8)


def state_of(model) -> list[bytes | None]:
    tensors = [*model.parameters(), *model.buffers(), *(each.grad for each in model.parameters())]
    return [
        None
        if each is None
        else each.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
        if each.ndim
        else bytes(str(each), "ascii")
        for each in tensors
    ]


@pytest.mark.parametrize("fresh", [True, False])
def test_increases_are_those_of_the_dense_oracle(model, batches, fresh) -> None:
    result = sensitivity(model, batches, nn.functional.cross_entropy, fresh_grads=fresh, **OPTIONS)

    assert_as_expected(result, *expected(model, batches, fresh=fresh))
    assert result.num_weights == {"0.weight": 72, "5.weight": 180, "6.weight": 15}
    assert result.sparsities == LEVELS


@pytest.mark.parametrize(
    "keys, options",
    [
        (dict(num_grads=4), dict(num_grads=4)),
        (dict(num_batches=5), dict(num_batches=5)),
        (dict(fisher_block_size=16), dict(block_size=16)),
        (dict(fisher_block_size=None), dict(block_size=None)),
        (dict(damp=0.1), dict(damping=0.1)),
        (dict(damp="auto"), dict(damping="auto")),
        (dict(mask_type="channel"), dict(mask_type="channel")),
    ],
)
def test_each_setting_reaches_the_core(model, batches, keys, options) -> None:
    if "mask_type" in keys:
        model[0] = nn.Conv2d(2, 4, 3, padding=1).double()
    result = sensitivity(model, batches, nn.functional.cross_entropy, **OPTIONS | keys)

    assert_as_expected(result, *expected(model, batches, fresh=True, **options))


def test_the_loss_may_be_measured_on_other_batches(model, batches) -> None:
    result = sensitivity(
        model, batches[:6], nn.functional.cross_entropy, held_out=batches[6:], **OPTIONS | dict(num_batches=2)
    )

    assert_as_expected(result, *expected(model, batches, fresh=True, held_out=batches[6:]))


def test_a_sampler_with_its_loss_and_mode_is_taken(model, batches) -> None:
    sampler = GradSampler(batches[:6], nn.functional.cross_entropy)
    held_out = GradSampler(batches[6:])

    result = sensitivity(model, sampler, held_out=held_out, **OPTIONS | dict(num_batches=2))

    assert_as_expected(result, *expected(model, batches, fresh=True, held_out=batches[6:]))
    with pytest.raises(TypeError, match="the GradSampler has its own loss; leave loss_fn out"):
        sensitivity(model, sampler, nn.functional.cross_entropy)


def test_recomputations_have_gradients_of_their_own(model, batches) -> None:
    seen = []

    def loss_fn(output, target):
        seen.append(int((model[5].weight == 0).sum()))
        return nn.functional.cross_entropy(output, target)

    keys = OPTIONS | dict(sparsities=(0.75,), num_recomputations=2, num_batches=1, num_grads=1)
    sensitivity(model, batches, loss_fn, params=["5"], **keys)

    assert seen == [0, 0, 90, 135]  # the dense loss, the gradients of both parts, the loss; half of what is left goes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_bit_for_bit(model, batches, dtype, fresh, training) -> None:
    model.to(dtype).train(training)
    model[1].eval()
    model[0].to(memory_format=torch.channels_last)
    model[6].weight.requires_grad_(False)
    model[0].weight.grad = torch.randn_like(model[0].weight)
    optimizer = torch.optim.SGD([model[5].weight], lr=0.1)
    batches = [(x.to(dtype), y) for x, y in batches]
    before, flags = state_of(model), [module.training for module in model.modules()]
    strides = [each.stride() for each in model.parameters()]

    result = sensitivity(
        model, GradSampler(batches, nn.functional.cross_entropy, training=training), fresh_grads=fresh, **OPTIONS
    )

    assert list(result.measured) == ["0.weight", "5.weight"]
    assert all(np.isfinite(increases).all() for increases in result.measured.values())
    assert state_of(model) == before
    assert [module.training for module in model.modules()] == flags
    assert [each.stride() for each in model.parameters()] == strides
    assert not model[6].weight.requires_grad
    assert optimizer.param_groups[0]["params"][0] is model[5].weight


@pytest.mark.parametrize("calls", [1, 10, 37])
def test_the_model_is_left_bit_for_bit_after_an_exception(model, batches, calls) -> None:
    before, left = state_of(model), [calls]

    def loss_fn(output, target):
        left[0] -= 1
        if not left[0]:
            raise RuntimeError("out of paper")
        return nn.functional.cross_entropy(output, target)

    with pytest.raises(RuntimeError, match="out of paper"):
        sensitivity(model, batches, loss_fn, **OPTIONS)
    assert state_of(model) == before


def test_params_and_exclude_select_as_for_pruning_and_wrappers_are_looked_through(model, batches) -> None:
    wrapped = nn.DataParallel(model)
    keys = OPTIONS | dict(sparsities=(0.5,))

    result = sensitivity(wrapped, batches, nn.functional.cross_entropy, params=["re:.*weight"], exclude=["0"], **keys)

    assert list(result.measured) == ["1.weight", "5.weight", "6.weight"]
    with pytest.raises(SettingError, match="nothing.weight"):
        sensitivity(model, batches, nn.functional.cross_entropy, params=["nothing.weight"])


def test_patterns_follow_the_layout_of_the_layer(batches) -> None:
    model = nn.Sequential(nn.ConvTranspose2d(2, 4, 3), nn.Flatten(), nn.Linear(100, 3)).double()
    seen = []

    def loss_fn(output, target):
        seen.append(model[0].weight.detach().clone())
        return nn.functional.cross_entropy(output, target)

    sensitivity(model, batches, loss_fn, params=["0.weight"], mask_type="filter", **OPTIONS | dict(sparsities=(0.5,)))

    assert (seen[-1] == 0).all(dim=0).all(dim=-1).all(dim=-1).sum() == 2  # outputs are the second axis


def test_a_shuffling_loader_serves(model, batches) -> None:
    inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=4, shuffle=True)

    assert len(sensitivity(model, loader, nn.functional.cross_entropy, **OPTIONS).measured) == 3


@pytest.mark.parametrize("keys, error, message", [
    (dict(num_batches=0), SettingError, "num_batches: 0 must be a positive integer"),
    (dict(num_grads={0.0: 64}), SettingError, "the same for all layers"),
    (dict(sparsities=(0.9, 0.5)), SettingError, "each above the previous one"),
    (dict(num_grads="x"), SettingError, "^num_grads: 'x' must be a positive integer"),
    (dict(num_grads=0), SettingError, "^num_grads: 0 must be a positive integer"),
    (dict(damp=0.0), SettingError, "^damp: 0.0 is out of range; the rule is damp > 0"),
    (dict(fisher_block_size=0), SettingError, "^fisher_block_size: 0 must be a positive integer"),
    (dict(mask_type="2:3"), SettingError, "2:3 allows a sparsity of at most"),
])  # fmt: skip
def test_bad_settings_are_refused_by_name(model, batches, keys, error, message) -> None:
    before = state_of(model)

    with pytest.raises(error, match=message):
        sensitivity(model, batches, nn.functional.cross_entropy, **OPTIONS | keys)
    assert state_of(model) == before


def test_samples_that_do_not_fit_are_refused_before_they_are_drawn(model, batches, monkeypatch) -> None:
    monkeypatch.setattr(mfac_core.backends.numpy_backend.NumpyBackend, "free_bytes", lambda self, device: 2_000_000)

    def refused():
        raise AssertionError("drawn")

    with pytest.raises(MemoryBudgetError, match=r"num_gradients \(num_grads in a recipe\) of at most"):
        sensitivity(model, GradSampler(refused, nn.functional.cross_entropy), num_grads=10_000)


def test_names_go_into_a_modifier_as_they_are(model, batches) -> None:
    from mfac_torch import MFACPruningModifier, ScheduledModifierManager

    result = sensitivity(model, batches, nn.functional.cross_entropy, **OPTIONS)
    targets = result.final_sparsity(max(max(each) for each in result.measured.values()))
    manager = ScheduledModifierManager([MFACPruningModifier(final_sparsity=targets, end_epoch=0.0, num_grads=4)])
    manager.apply(model, grad_sampler=GradSampler(batches, nn.functional.cross_entropy))

    assert targets == {0.9: ["0.weight", "5.weight", "6.weight"]}
    assert [int((model[place].weight == 0).sum()) for place in (0, 5, 6)] == [65, 162, 14]
