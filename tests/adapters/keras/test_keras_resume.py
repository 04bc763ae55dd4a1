import numpy as np
import pytest

keras = pytest.importorskip("keras", reason="needs Keras: pip install 'mfac-core[keras]'")

from mfac_keras import MFACPruningCallback  # noqa: E402
from mfac_keras.state_file import read_states, write_state  # noqa: E402


class Stop(Exception):
    """What kills a run."""


class StopAt(keras.callbacks.Callback):
    """Kills a run in the middle of an epoch."""

    def __init__(self, step):
        super().__init__()
        self.left = step

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        if not self.left:
            raise Stop


def run(task, tmp_path, *, first=True, kill_at=None, state=True, **options):
    """Train as a script does that is started again after it was killed."""
    model = task.model(keras.optimizers.Adam(0.01))
    pruning = MFACPruningCallback(
        task.recipe(end_epoch=4.0, num_grads=7),
        state_path=tmp_path / "pruning.npz" if state else None,
        verbose=0,
        **options,
    )
    backup = keras.callbacks.BackupAndRestore(str(tmp_path / "backup"))
    callbacks = [pruning, backup] if first else [backup, pruning]
    if kill_at is not None:
        with pytest.raises(Stop):
            task.fit(model, *callbacks, StopAt(kill_at), epochs=5)
    else:
        task.fit(model, *callbacks, epochs=5)
    return model, pruning


def assert_equal_runs(one, other):
    for a, b in zip(one[0].get_weights(), other[0].get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(one[1].masks.values(), other[1].masks.values(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert one[1].sparsity == 0.75


@pytest.mark.feature("resume with BackupAndRestore, in either order")
@pytest.mark.parametrize("first", [True, False])
def test_a_resumed_run_equals_one_that_was_not_killed(task, tmp_path, first):
    whole = run(task, tmp_path / "whole", first=first)
    run(task, tmp_path / "killed", first=first, kill_at=13)
    resumed = run(task, tmp_path / "killed", first=first)
    assert_equal_runs(whole, resumed)


@pytest.mark.feature("resume with BackupAndRestore, in either order")
def test_a_run_killed_between_two_savings_goes_on_from_the_state_that_fits(task, tmp_path):
    whole = run(task, tmp_path / "whole")
    # The state of pruning is an epoch ahead of the backup.
    run(task, tmp_path / "killed", kill_at=13)
    state = next(read_states(tmp_path / "killed" / "pruning.npz"))
    write_state(tmp_path / "killed" / "pruning.npz", {**state, "step": 15})
    assert_equal_runs(whole, run(task, tmp_path / "killed"))


@pytest.mark.feature("resume with BackupAndRestore, in either order")
def test_without_its_state_a_run_takes_zeros_for_masks_and_says_so(task, tmp_path, caplog):
    run(task, tmp_path, kill_at=13, state=False)
    grown = []

    class Look(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            grown.append(sum(np.count_nonzero(kernel == 0) for kernel in task.kernels(self.model).values()))

    model = task.model(keras.optimizers.Adam(0.01))
    pruning = MFACPruningCallback(task.recipe(end_epoch=4.0), verbose=0)
    task.fit(model, pruning, keras.callbacks.BackupAndRestore(str(tmp_path / "backup")), Look(), epochs=5)
    assert "every weight in scope that is exactly zero is taken as pruned" in caplog.text
    assert min(grown) == grown[0] > 0.3 * 72
    assert pruning.sparsity == 0.75


@pytest.mark.once
@pytest.mark.feature("resume with BackupAndRestore, in either order")
def test_the_window_need_not_be_saved(task, tmp_path):
    run(task, tmp_path, kill_at=13, save_window=False)
    assert next(read_states(tmp_path / "pruning.npz"))["prunings"][0]["window"] is None
    assert run(task, tmp_path, save_window=False)[1].sparsity == 0.75


@pytest.mark.feature("a second fit goes on where the first ended (initial_epoch)")
def test_a_fit_that_goes_on_with_the_same_callback_equals_a_single_one(task):
    whole, halves = task.model(), task.model()
    pruning = MFACPruningCallback(task.recipe(end_epoch=4.0), verbose=0)
    task.fit(whole, pruning, epochs=5)
    again = MFACPruningCallback(task.recipe(end_epoch=4.0), verbose=0)
    task.fit(halves, again, epochs=2)
    task.fit(halves, again, epochs=5, initial_epoch=2)
    assert_equal_runs((whole, pruning), (halves, again))


@pytest.mark.once
@pytest.mark.feature("resume with BackupAndRestore, in either order")
def test_a_state_of_another_recipe_is_refused(task, tmp_path):
    run(task, tmp_path, kill_at=13)
    model = task.model(keras.optimizers.Adam(0.01))
    other = MFACPruningCallback(task.recipe(end_epoch=5.0), state_path=tmp_path / "pruning.npz")
    backup = keras.callbacks.BackupAndRestore(str(tmp_path / "backup"))
    with pytest.raises(ValueError, match="another method or schedule"):
        task.fit(model, backup, other, epochs=5)


@pytest.mark.once
@pytest.mark.feature("resume with BackupAndRestore, in either order")
def test_a_fit_that_begins_anew_over_a_state_says_so_and_what_is_no_state_is_not_touched(task, tmp_path, caplog):
    path = tmp_path / "state"
    task.fit(task.model(), MFACPruningCallback(task.recipe(), state_path=path, verbose=0), epochs=4)
    assert not caplog.text
    task.fit(task.model(), MFACPruningCallback(task.recipe(), state_path=path, verbose=0), epochs=4)
    assert f"{path} holds the state of a run at step 20, and will be replaced, because this fit begins" in caplog.text
    path.write_bytes(b"my thesis")
    with pytest.raises(
        ValueError, match=r"is not the state of a pruning run, or is damaged; remove it or name another$"
    ):
        task.fit(task.model(), MFACPruningCallback(task.recipe(), state_path=path, verbose=0), epochs=4)
    assert path.read_bytes() == b"my thesis"


@pytest.mark.once
@pytest.mark.feature("resume with BackupAndRestore, in either order")
def test_a_state_that_fits_in_part_changes_no_weight(task, tmp_path):
    def text(end):
        body = task.recipe("MagnitudePruningModifier", params="['re:.*body/kernel']", end_epoch=4.0)
        head = task.recipe("MagnitudePruningModifier", params="['re:.*head/kernel']", end_epoch=end)
        return body + head.partition("\n")[2]

    task.fit(task.model(), MFACPruningCallback(text(4.0), state_path=tmp_path / "state", verbose=0), epochs=3)
    model = task.model()
    before = model.get_weights()
    with pytest.raises(ValueError, match="belongs to another recipe or model"):
        task.fit(model, MFACPruningCallback(text(5.0), state_path=tmp_path / "state"), initial_epoch=3, epochs=5)
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))


@pytest.mark.feature("resume with BackupAndRestore, in either order")
def test_layers_that_keras_numbers_anew_are_the_same_layers(task, tmp_path, caplog):
    def model():
        layers = [keras.Input([6]), keras.layers.Dense(8, activation="tanh"), keras.layers.Dense(3)]
        made = keras.Sequential(layers)
        made.compile("sgd", "mse")
        return made

    def pruning():
        return MFACPruningCallback(task.recipe(end_epoch=4.0), state_path=tmp_path / "state", verbose=0)

    one, other = model(), model()
    assert {v.path for v in one.weights}.isdisjoint(v.path for v in other.weights)
    first = pruning()
    task.fit(one, first, epochs=2)
    other.set_weights(one.get_weights())
    second = pruning()
    task.fit(other, second, initial_epoch=2, epochs=3)
    assert "taken as pruned" not in caplog.text
    for early, late in zip(first.masks.values(), second.masks.values(), strict=True):
        assert not (late & ~early).any()


@pytest.mark.once
def test_a_state_comes_back_as_it_was_and_a_broken_file_is_refused(tmp_path):
    path = tmp_path / "folder" / "state"
    state = {"step": np.int64(3), "rates": [None, 0.5], "masks": {"a/kernel": np.array([True, False])}, "none": None}
    write_state(path, {"step": 2})
    write_state(path, state)
    latest, previous = read_states(path)
    assert latest["step"] == 3
    assert latest["rates"] == [None, 0.5]
    np.testing.assert_array_equal(latest["masks"]["a/kernel"], [True, False])
    assert previous == {"step": 2}
    path.write_bytes(b"no state")
    with pytest.raises(ValueError, match="is not the state of a pruning run"):
        next(read_states(path))
