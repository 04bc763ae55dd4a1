"""A pruning step that an exception interrupts is done as a whole or not at all, and can be done again."""

from contextlib import ExitStack

import numpy as np
import pytest

keras = pytest.importorskip("keras", reason="needs Keras: pip install 'mfac-core[keras]'")

from mfac_keras import MFACPruningCallback  # noqa: E402
from mfac_keras.assigning import assign_all, snapshot  # noqa: E402
from mfac_keras.backends import current_backend  # noqa: E402
from mfac_keras.live_pruning import KerasPruning  # noqa: E402
from mfac_keras.optimizers import state_to_reset  # noqa: E402

KILLED_AT = 2  # which pruning step is interrupted, from 1
FEATURE = pytest.mark.feature("an interrupted pruning step is complete or has no effect")


class Fault:
    """Raises at a place, in the pruning step that is to be interrupted."""

    def __init__(self, error):
        self.error = error
        self.steps = self.calls = 0
        self.is_on = False

    def of(self, function, *, call=1, late=False):
        """Return the function with the fault in one of its calls, before or after the work is done."""

        def faulty(*args, **kwargs):
            self.calls += self.is_on
            hits = self.is_on and self.calls == call
            if hits and not late:
                self.is_on = False
                raise self.error
            result = function(*args, **kwargs)
            if hits:
                self.is_on = False
                raise self.error
            return result

        return faulty

    def count(self, function):
        """Return the function that begins a pruning step, with the fault switched on in the right one."""

        def counted(*args, **kwargs):
            self.steps += 1
            self.is_on = self.steps == KILLED_AT
            return function(*args, **kwargs)

        return counted


def place(monkeypatch, fault, where):
    monkeypatch.setattr(KerasPruning, "prune_if_due", fault.count(KerasPruning.prune_if_due))
    hooks = current_backend().Hooks
    match where.split():
        case ["result"]:
            import mfac_core.pruners.base as base

            monkeypatch.setattr(base, "PruneResult", fault.of(base.PruneResult))
        case ["conversion"]:
            backend = current_backend()
            monkeypatch.setattr(backend, "to_tensor", fault.of(backend.to_tensor, call=2))
        case ["write", number, *late]:
            monkeypatch.setattr(
                keras.Variable, "assign", fault.of(keras.Variable.assign, call=int(number), late=bool(late))
            )
        case ["report"]:
            monkeypatch.setattr(KerasPruning, "report", fault.of(KerasPruning.report))
        case ["hold"]:
            monkeypatch.setattr(hooks, "hold", fault.of(hooks.hold))
        case ["mask"]:
            monkeypatch.setattr(hooks, "_set_mask", fault.of(hooks._set_mask, call=2))


PLACES = ["result", "conversion", "write 1", "write 1 late", "write 2", "write 2 late", "report", "hold", "mask"]


def assert_equal_weights(one, other):
    for a, b in zip(one.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(one.optimizer.variables, other.optimizer.variables, strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())


trained = []  # what the tests compare with is trained once


@pytest.fixture
def whole(task):
    if not trained:
        model = task.model(keras.optimizers.Adam(0.01))
        task.fit(model, MFACPruningCallback(task.recipe(end_epoch=4.0, num_grads=7), verbose=0), epochs=5)
        trained.append(model)
    return trained[0]


def interrupted(task, monkeypatch, recipe, where, error):
    """Train with a fault at a place, and go on in a further fit; between the two nothing is half done."""
    model, pruning = task.model(keras.optimizers.Adam(0.01)), MFACPruningCallback(recipe, verbose=0)
    with monkeypatch.context() as patches:
        place(patches, Fault(error), where)
        with pytest.raises(type(error)):
            task.fit(model, pruning, epochs=5)
    pruning.close()
    assert pruning.masks
    for name, mask in pruning.masks.items():
        np.testing.assert_array_equal(mask, task.kernels(model)[name] != 0)
    task.fit(model, pruning, epochs=5, initial_epoch=KILLED_AT)
    return model, pruning


@FEATURE
@pytest.mark.parametrize("error", [MemoryError(), KeyboardInterrupt(), RuntimeError()], ids=repr)
@pytest.mark.parametrize("where", PLACES)
def test_an_interrupted_pruning_step_is_whole_or_not_done_and_a_further_fit_gives_the_same_bits(
    task, whole, monkeypatch, where, error
):
    model, pruning = interrupted(task, monkeypatch, task.recipe(end_epoch=4.0, num_grads=7), where, error)

    assert_equal_weights(whole, model)
    assert pruning.sparsity == 0.75


@FEATURE
@pytest.mark.parametrize("where", ["write 2", "write 4", "write 6 late"])
def test_optimizers_forget_with_the_weights_that_come_back_or_not_at_all(task, where):
    model = task.model(keras.optimizers.Adam(0.01))
    pruning = MFACPruningCallback(
        "pruning_modifiers:\n  - !ACDCPruningModifier {params: __ALL_PRUNABLE__, compression_sparsity: 0.5, "
        "start_epoch: 0.0, end_epoch: 4.0, update_frequency: 1.0}",
        verbose=0,
    )
    number, *late = where.split()[1:]
    before = {}

    fault = Fault(RuntimeError())
    with pytest.MonkeyPatch.context() as patches:
        prune_if_due = KerasPruning.prune_if_due

        def looking(pruning, step, *args):
            if pruning.is_due(step) and pruning.masks:  # the step that resets the optimizer
                variables = [*pruning.variables.values()]
                variables += state_to_reset(model.optimizer, pruning.variables.values())
                before.update({id(variable): np.array(variable.numpy(), copy=True) for variable in variables})
                before["variables"] = variables
                fault.is_on = True
            prune_if_due(pruning, step, *args)

        patches.setattr(KerasPruning, "prune_if_due", looking)
        patches.setattr(keras.Variable, "assign", fault.of(keras.Variable.assign, call=int(number), late=bool(late)))
        with pytest.raises(RuntimeError):
            task.fit(model, pruning, epochs=4)

    assert len(before["variables"]) == 6
    for variable in before["variables"]:
        np.testing.assert_array_equal(variable.numpy(), before[id(variable)])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int32"])
def test_values_are_assigned_to_all_variables_or_to_none(dtype):
    variables = [keras.Variable(keras.ops.cast([1, 2, 3], dtype), dtype=dtype, trainable=False) for _ in range(3)]
    new = keras.ops.cast([4, 5, 6], dtype)

    def failing():
        yield variables[0], new
        raise MemoryError

    with pytest.raises(MemoryError):
        assign_all(failing())
    with pytest.raises(ValueError, match="shape"):
        assign_all([(variables[0], new), (variables[1], new), (variables[2], keras.ops.cast([1], dtype))])
    with pytest.raises(ZeroDivisionError), ExitStack() as undo:
        snapshot(variables, undo)
        assign_all((variable, new) for variable in variables)
        raise ZeroDivisionError
    for variable in variables:
        assert np.asarray(variable.numpy(), "float64").tolist() == [1, 2, 3]
    assign_all((variable, new) for variable in variables)
    for variable in variables:
        assert np.asarray(variable.numpy(), "float64").tolist() == [4, 5, 6]


@pytest.mark.once
def test_an_epoch_that_was_interrupted_begins_anew_without_a_warning(task, caplog):
    class Interrupts(keras.callbacks.Callback):
        steps = 0

        def on_train_batch_end(self, batch, logs=None):
            self.steps += 1
            if self.steps == 7:
                raise KeyboardInterrupt

    model, pruning = task.model(), MFACPruningCallback(task.recipe(init_sparsity=0.5), verbose=0)
    with pytest.raises(KeyboardInterrupt):
        task.fit(model, pruning, Interrupts())
    task.fit(model, pruning, initial_epoch=1)
    assert pruning.sparsity == pytest.approx(0.75, abs=0.01)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
