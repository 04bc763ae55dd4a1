"""Several processes: what they have, what they agree on, and how vectors move between them."""

from mfac_core.ranks.base import Alone, Ranks
from mfac_core.ranks.parts import Parts
from mfac_core.ranks.shards import Shards

__all__ = ["Alone", "Parts", "Ranks", "Shards"]
