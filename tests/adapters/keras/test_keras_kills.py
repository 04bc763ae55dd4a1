"""A run that is killed at any place of saving ends with the masks of one that was not."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

keras = pytest.importorskip("keras", reason="needs Keras: pip install 'mfac-core[keras]'")

from mfac_keras.state_file import read_states  # noqa: E402

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that can be forked and killed")

SCRIPT = Path(__file__).with_name("killed_runs.py")
FEATURE = pytest.mark.feature("resume with BackupAndRestore, in either order")


@pytest.fixture(scope="module")
def runs():
    spec = importlib.util.spec_from_file_location("killed_runs", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


def kill(folder, *cases):
    arguments = [word for case in cases for word in case]
    subprocess.run([sys.executable, SCRIPT, folder, *arguments], check=True, timeout=280)


@pytest.fixture(scope="module")
def folder(runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    kill(folder, *((place, order) for place in runs.PLACES for order in runs.ORDERS))
    return folder


@pytest.fixture(scope="module")
def whole(runs, tmp_path_factory):
    return runs.train(tmp_path_factory.mktemp("whole"), "pruning first")


def assert_equal_runs(one, other):
    assert one[1].masks
    for a, b in zip(one[1].masks.values(), other[1].masks.values(), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(one[0].get_weights(), other[0].get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@FEATURE
@pytest.mark.parametrize("order", ["pruning first", "backup first"])
@pytest.mark.parametrize("place", ["in the state", "between the two", "in the weights", "after both"])
def test_a_killed_run_ends_as_one_that_was_not_killed(runs, folder, whole, place, order, caplog):
    resumed = runs.train(folder / f"{place}-{order}", order)

    assert_equal_runs(whole, resumed)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


@FEATURE
@pytest.mark.parametrize("order", ["pruning first", "backup first"])
def test_weights_that_are_an_epoch_ahead_go_on_with_their_own_masks_and_it_is_said(runs, folder, order, caplog):
    seen = []

    class Look(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append(dict(pruning.masks))

    target = folder / f"before the epoch-{order}"
    saved = next(read_states(target / "pruning.npz")).state["prunings"][0]["masks"]
    task = runs.conftest.TinyTask()
    pruning, callbacks = runs.callbacks_of(target, order)
    task.fit(task.model(keras.optimizers.Adam(0.01)), *callbacks, Look(), epochs=runs.EPOCHS)

    for (name, mask), first in zip(saved.items(), seen[0].values(), strict=True):
        np.testing.assert_array_equal(mask.T, first, err_msg=name)  # kernels of dense layers, transposed
    assert "training resumes at epoch 3 with the weights of epoch 4 (was the process killed between" in caplog.text
    assert pruning.sparsity == 0.75


@FEATURE
def test_a_run_that_is_killed_twice_in_the_same_epoch_goes_on_all_the_same(runs, tmp_path, whole):
    case = ("between the two", "backup first")
    kill(tmp_path, case, case)

    assert_equal_runs(whole, runs.train(tmp_path / "-".join(case), case[1]))


@FEATURE
@pytest.mark.parametrize("order", ["pruning first", "backup first"])
def test_a_finished_training_that_is_run_again_knows_its_masks(runs, tmp_path, order, caplog):
    model, pruning = runs.train(tmp_path, order)
    caplog.clear()
    again, repeated = runs.train(tmp_path, order)

    assert_equal_runs((model, pruning), (again, repeated))
    assert repeated.sparsity == 0.75
    assert not caplog.records or "fit ended" not in caplog.text
