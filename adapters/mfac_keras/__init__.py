"""M-FAC pruning in Keras 3: recipes that run inside ``model.fit``, on the TensorFlow, torch and JAX backends.

``callback`` and ``one_shot`` are the entry points; docs/design.md lists all modules.
"""

from mfac_keras.batchnorm import recalibrate_batchnorm
from mfac_keras.callback import MFACPruningCallback
from mfac_keras.layer_sensitivity import sensitivity
from mfac_keras.one_shot import prune_one_shot
from mfac_keras.selection import prunable_variables, select_variables

__all__ = [
    "MFACPruningCallback",
    "prunable_variables",
    "prune_one_shot",
    "recalibrate_batchnorm",
    "select_variables",
    "sensitivity",
]
