"""What all ranks would log alike is logged by the first."""

from __future__ import annotations

import logging

from mfac_core.ranks.base import Ranks

__all__ = ["logger_of"]


def logger_of(ranks: Ranks, logger: logging.Logger) -> logging.Logger:
    """Return a logger itself on rank 0, and one that is silent on the others.

    Example:
        >>> from mfac_core.ranks import Alone
        >>> logger_of(Alone(), logging.getLogger("mfac_core")).name
        'mfac_core'
    """
    if ranks.rank == 0:
        return logger
    silent = logging.Logger(logger.name)
    silent.disabled = True
    return silent
