"""M-FAC pruning in Keras 3: recipes at work inside ``model.fit``, on the TensorFlow, torch and JAX backends.

Read in this order:

* ``callback``: :class:`MFACPruningCallback`, the entry point: gradual pruning, resume
* ``one_shot``: :func:`prune_one_shot`, without training
* ``session``: what happens between training steps
* ``training_changes``: learning rates, weight decay, which variables are trained
* ``live_pruning``: one pruning modifier at work on one model
* ``backends``: what happens inside the training step, for each backend of Keras
* ``optimizers``: what an optimizer is made of
* ``selection``, ``layout``: which variables ``params`` means, and the order of their axes
* ``sampling``: gradient samples outside the training loop
* ``recipes``, ``state_file``, ``conversion``: settings in, state on disk, tensors to arrays
"""

from mfac_keras.callback import MFACPruningCallback
from mfac_keras.one_shot import prune_one_shot
from mfac_keras.selection import prunable_variables, select_variables

__all__ = ["MFACPruningCallback", "prunable_variables", "prune_one_shot", "select_variables"]
