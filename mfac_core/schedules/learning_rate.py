"""The learning rate that a recipe asks for at an epoch: pure functions."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from typing import Any

from mfac_core.settings.training import LearningRateFunction, LearningRateSchedule, SetLearningRate

__all__ = ["learning_rate_at"]

# in epochs: an epoch computed as a step divided by the steps per epoch may miss a boundary by rounding
_NOISE = 1e-9


def learning_rate_at(
    settings: SetLearningRate | LearningRateFunction | LearningRateSchedule, epoch: float
) -> float | None:
    """Return the learning rate that settings ask for at an epoch; ``None`` before ``start_epoch``.

    From ``end_epoch`` on it stays: at the ``final`` of a function, and at the last value of a schedule.

    Example:
        >>> warm_up = LearningRateFunction(function="linear", initial=0.0, final=0.1, end_epoch=4.0)
        >>> learning_rate_at(warm_up, 1.0), learning_rate_at(warm_up, 9.0)
        (0.025, 0.1)
    """
    if epoch < settings.start_epoch - _NOISE:
        return None
    elapsed = max(0.0, epoch - settings.start_epoch)
    match settings:
        case SetLearningRate():
            return settings.learning_rate
        case LearningRateFunction():
            return _function_value(settings, elapsed)
        case LearningRateSchedule():
            return _schedule_value(settings, elapsed)


def _function_value(settings: LearningRateFunction, elapsed: float) -> float:
    duration = settings.end_epoch - settings.start_epoch
    if elapsed >= duration - _NOISE:
        return settings.final
    passed = elapsed / duration
    match settings.function:
        case "cosine":
            passed = (1.0 - math.cos(math.pi * passed)) / 2.0
        case "cyclic_linear":
            cycles = math.floor(elapsed / settings.cycle_epochs + _NOISE)
            begun = cycles * settings.cycle_epochs
            passed = max(0.0, elapsed - begun) / min(settings.cycle_epochs, duration - begun)
    return settings.initial + passed * (settings.final - settings.initial)


def _schedule_value(settings: LearningRateSchedule, elapsed: float) -> float:
    options: Mapping[str, Any] = settings.options
    gamma = float(options.get("gamma", 0.1))
    duration = settings.end_epoch - settings.start_epoch
    ended = elapsed >= duration - _NOISE
    elapsed = min(elapsed, duration)
    match settings.kind:
        case "StepLR":
            return settings.initial * gamma ** _periods(elapsed, options["step_size"], ended)
        case "MultiStepLR":
            # all milestones lie before the end
            passed = bisect_right(options["milestones"], settings.start_epoch + elapsed + _NOISE)
            return float(settings.initial * gamma**passed)
        case "ExponentialLR":
            return settings.initial * gamma ** _periods(elapsed, 1.0, ended)
        case "CosineAnnealingWarmRestarts":
            return _cosine_with_restarts(settings.initial, options, _periods(elapsed, 1.0, ended))


def _periods(elapsed: float, period: float, ended: bool) -> int:
    """Return how many periods have passed, without one that ends exactly at the end of the schedule."""
    if ended:
        return max(0, math.ceil(elapsed / period - _NOISE) - 1)
    return math.floor(elapsed / period + _NOISE)


def _cosine_with_restarts(initial: float, options: Mapping[str, Any], epochs: int) -> float:
    cycle, factor, lowest = options["T_0"], options.get("T_mult", 1), float(options.get("eta_min", 0.0))
    if factor == 1:
        epochs %= cycle
    while epochs >= cycle:
        epochs, cycle = epochs - cycle, cycle * factor
    return lowest + (initial - lowest) * (1.0 + math.cos(math.pi * epochs / cycle)) / 2.0
