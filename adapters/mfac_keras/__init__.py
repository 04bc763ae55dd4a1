"""M-FAC pruning in Keras 3: recipes that run inside ``model.fit``, on the TensorFlow, torch and JAX backends.

Read in this order:

* ``callback``: :class:`MFACPruningCallback`, the entry point: gradual pruning, resume
* ``one_shot``: :func:`prune_one_shot`, without training
* ``recipes``: from the arguments of these two to settings
* ``session``: the work between training steps
* ``live_pruning``: one pruning modifier on one model: its weights, masks and gradient samples
* ``training_changes``: learning rates, weight decay, which variables are trained
* ``write_monitor``: notices what other code does to the weights in scope
* ``backends``: the hooks in the training step, and conversion, for each backend of Keras
* ``clock``, ``end_of_fit``: the epoch and step of a fit; its end after all callbacks
* ``state_file``, ``resuming``: the state on disk; which of several states a run resumes from
* ``conditions``: models, optimizers and losses that are refused before anything changes
* ``selection``, ``layout``: the variables that ``params`` names; the order of their axes
* ``sampling``: gradient samples outside the training loop
* ``optimizers``: the optimizers inside an optimizer, and their state
* ``batchnorm``: :func:`recalibrate_batchnorm`, moving statistics for the current weights
* ``layer_sensitivity``: :func:`sensitivity`, how much sparsity each variable bears
* ``assigning``, ``conversion``: values into variables, all or none; tensors on a GPU to arrays
* ``digits``, ``demo``: ``mfac demo --framework keras``
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
