from __future__ import annotations

import math

import pytest
import torch
from torch.optim import lr_scheduler

from mfac_core.schedules.learning_rate import learning_rate_at
from mfac_core.settings.training import LearningRateSchedule


def stepped_once_per_epoch(kind: str, options: dict[str, object], *, initial: float, epochs: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=initial)
    scheduler = getattr(lr_scheduler, kind)(optimizer, **options)
    rates = []
    for _ in range(epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("StepLR", {"step_size": 3}),
        ("StepLR", {"step_size": 1, "gamma": 1.1}),
        ("MultiStepLR", {"milestones": [4, 9, 9, 20], "gamma": 0.3}),
        ("ExponentialLR", {"gamma": 0.95}),
        ("CosineAnnealingWarmRestarts", {"T_0": 5}),
        ("CosineAnnealingWarmRestarts", {"T_0": 3, "T_mult": 2, "eta_min": 0.01}),
        ("CosineAnnealingWarmRestarts", {"T_0": 1, "T_mult": 3}),
    ],
)
@pytest.mark.parametrize("start_epoch", [0.0, 2.0, 0.7])
def test_schedules_are_those_of_pytorch(kind, options, start_epoch):
    expected = stepped_once_per_epoch(kind, options, initial=0.4, epochs=40)
    shifted = {
        name: [start_epoch + milestone for milestone in value] if name == "milestones" else value
        for name, value in options.items()
    }
    settings = LearningRateSchedule(kind=kind, options=shifted, initial=0.4, start_epoch=start_epoch)

    for part_of_epoch in (0.0, 0.01, 0.5, 0.99):
        rates = [learning_rate_at(settings, start_epoch + epoch + part_of_epoch) for epoch in range(40)]
        assert rates == pytest.approx(expected, rel=1e-12)


def test_an_end_keeps_what_pytorch_had_reached():
    options = {"T_0": 6, "eta_min": 0.05}
    last = stepped_once_per_epoch("CosineAnnealingWarmRestarts", options, initial=0.4, epochs=6)[-1]
    settings = LearningRateSchedule(
        kind="CosineAnnealingWarmRestarts", options=options, initial=0.4, start_epoch=1.0, end_epoch=7.0
    )

    assert learning_rate_at(settings, 7.0) == learning_rate_at(settings, 50.0) == pytest.approx(last)
    assert not math.isclose(last, 0.4)
