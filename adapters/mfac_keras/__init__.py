"""M-FAC pruning in Keras 3: recipes at work inside ``model.fit``, on the TensorFlow, torch and JAX backends.

Read in this order:

* ``callback``: :class:`MFACPruningCallback`, the entry point: gradual pruning, resume
* ``one_shot``: :func:`prune_one_shot`, without training
* ``conditions``: what is refused before anything is changed
* ``session``: what happens between training steps
* ``training_changes``: learning rates, weight decay, which variables are trained
* ``live_pruning``: one pruning modifier at work on one model
* ``backends``: what happens inside the training step, for each backend of Keras
* ``optimizers``: what an optimizer is made of
* ``selection``, ``layout``: which variables ``params`` means, and the order of their axes
* ``sampling``: gradient samples outside the training loop
* ``batchnorm``: :func:`recalibrate_batchnorm`, moving statistics for the weights that there are now
* ``layer_sensitivity``: :func:`sensitivity`, how much sparsity each variable tolerates
* ``assigning``: values into variables, into all of them or into none
* ``state_file``, ``resuming``: the state on disk, and which of the saved ones a run goes on from
* ``end_of_fit``: the moment when all callbacks are done
* ``recipes``, ``conversion``: settings in, tensors to arrays
* ``digits``, ``demo``: what ``mfac demo --framework keras`` runs
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
