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
    # The pruning state is an epoch ahead of the backup.
    run(task, tmp_path / "killed", kill_at=13)
    state = next(read_states(tmp_path / "killed" / "pruning.npz")).state
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
    assert "every weight in scope that is exactly zero counts as pruned" in caplog.text
    assert min(grown) == grown[0] > 0.3 * 72
    assert pruning.sparsity == 0.75


@pytest.mark.once
@pytest.mark.feature("resume with BackupAndRestore, in either order")
def test_the_window_need_not_be_saved(task, tmp_path):
    run(task, tmp_path, kill_at=13, save_window=False)
    assert next(read_states(tmp_path / "pruning.npz")).state["prunings"][0].get("window") is None
    assert run(task, tmp_path, save_window=False)[1].sparsity == 0.75


@pytest.mark.feature("a second fit continues where the first ended (initial_epoch)")
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
    with pytest.raises(ValueError, match="another pruning schedule"):
        task.fit(model, backup, other, epochs=5)


@pytest.mark.once
@pytest.mark.feature("resume with BackupAndRestore, in either order")
def test_a_fit_that_begins_anew_over_a_state_says_so_and_what_is_no_state_is_not_touched(task, tmp_path, caplog):
    path = tmp_path / "state"
    task.fit(task.model(), MFACPruningCallback(task.recipe(init_sparsity=0.5), state_path=path, verbose=0), epochs=4)
    assert not caplog.text
    task.fit(task.model(), MFACPruningCallback(task.recipe(init_sparsity=0.5), state_path=path, verbose=0), epochs=4)
    assert f"{path} holds the state of a run at step 20, which will be replaced, because this fit starts" in caplog.text
    path.write_bytes(b"my thesis")
    with pytest.raises(
        ValueError, match=r"is not the state of a pruning run, or is damaged; remove it or name another$"
    ):
        task.fit(
            task.model(), MFACPruningCallback(task.recipe(init_sparsity=0.5), state_path=path, verbose=0), epochs=4
        )
    assert path.read_bytes() == b"my thesis"


@pytest.mark.once
@pytest.mark.feature("resume with BackupAndRestore, in either order")
def test_a_state_that_fits_in_part_changes_no_weight(task, tmp_path):
    def text(end):
        body = task.recipe("MagnitudePruningModifier", params="['re:.*body/kernel']", end_epoch=4.0)
        head = task.recipe("MagnitudePruningModifier", params="['re:.*head/kernel']", end_epoch=end)
        return body + head.partition("\n")[2]

    model = task.model()
    task.fit(model, MFACPruningCallback(text(4.0), state_path=tmp_path / "state", verbose=0), epochs=3)
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
    assert "counts as pruned" not in caplog.text
    for early, late in zip(first.masks.values(), second.masks.values(), strict=True):
        assert not (late & ~early).any()


@pytest.mark.once
def test_a_state_comes_back_as_it_was_and_a_broken_file_is_refused(tmp_path):
    path = tmp_path / "folder" / "state"
    state = {"step": np.int64(3), "rates": [None, 0.5], "masks": {"a/kernel": np.array([True, False])}, "none": None}
    write_state(path, {"step": 2})
    write_state(path, state)
    latest, previous = (each.state for each in read_states(path))
    assert latest["step"] == 3
    assert latest["rates"] == [None, 0.5]
    np.testing.assert_array_equal(latest["masks"]["a/kernel"], [True, False])
    assert previous == {"step": 2}
    path.write_bytes(b"no state")
    path.with_name("state.previous").unlink()
    with pytest.raises(ValueError, match="is not the state of a pruning run"):
        next(read_states(path))


class Masks(keras.callbacks.Callback):
    """Keeps the masks after each training step."""

    def __init__(self, pruning):
        super().__init__()
        self.pruning = pruning
        self.seen = []

    def on_train_batch_end(self, batch, logs=None):
        self.seen.append({name: mask.copy() for name, mask in self.pruning.masks.items()})


@pytest.mark.feature("layers frozen and unfrozen between two fits")
@pytest.mark.parametrize("frozen_epochs", [1, 3])
def test_layers_that_are_unfrozen_join_the_pruning_that_goes_on(task, caplog, frozen_epochs):
    model = task.model(keras.optimizers.Adam(0.01))
    pruning = MFACPruningCallback(task.recipe(start_epoch=2.0, end_epoch=5.0), verbose=0)
    model.get_layer("body").trainable = False
    model.compile(keras.optimizers.Adam(0.01), "mse")
    task.fit(model, pruning, epochs=frozen_epochs)
    before = pruning.masks
    caplog.clear()
    model.get_layer("body").trainable = True
    model.compile(keras.optimizers.Adam(0.01), "mse")
    masks = Masks(pruning)
    task.fit(model, pruning, masks, epochs=6, initial_epoch=frozen_epochs)

    said = [line for line in caplog.messages if "came into scope" in line]
    assert said == [
        "since the state was saved, tiny/body/kernel came into scope (the next pruning step prunes them too); the "
        "gradient window starts empty"
    ]
    assert "counts as pruned" not in caplog.text
    if before:
        np.testing.assert_array_equal(before["tiny/head/kernel"], masks.seen[0]["tiny/head/kernel"])
        assert masks.seen[0]["tiny/body/kernel"].all()
    assert {name: np.mean(kernel == 0) for name, kernel in task.kernels(model).items()} == {
        "tiny/body/kernel": 0.75,
        "tiny/head/kernel": 0.75,
    }


@pytest.mark.feature("layers frozen and unfrozen between two fits")
def test_layers_that_are_frozen_are_let_go_with_a_word(task, caplog):
    model = task.model(keras.optimizers.Adam(0.01))
    pruning = MFACPruningCallback(task.recipe(end_epoch=4.0), verbose=0)
    task.fit(model, pruning, epochs=3)
    before = pruning.masks
    model.get_layer("body").trainable = False
    model.compile(keras.optimizers.Adam(0.01), "mse")
    masks = Masks(pruning)
    task.fit(model, pruning, masks, epochs=5, initial_epoch=3)

    assert "since the state was saved, tiny/body/kernel left it (their masks are released)" in caplog.text
    assert list(pruning.masks) == ["tiny/head/kernel"]
    np.testing.assert_array_equal(before["tiny/head/kernel"], masks.seen[0]["tiny/head/kernel"])
    np.testing.assert_array_equal(before["tiny/body/kernel"], model.get_layer("body").kernel.numpy() != 0)


@pytest.mark.feature("layers frozen and unfrozen between two fits")
def test_the_zeros_of_a_sparse_base_that_is_unfrozen_are_held_by_a_constant_mask(task):
    model = task.model(keras.optimizers.Adam(0.01))
    body = model.get_layer("body")
    body.kernel.assign(body.kernel.numpy() * (np.arange(48).reshape(6, 8) % 2))
    body.trainable = False
    model.compile(keras.optimizers.Adam(0.01), "mse")
    pruning = MFACPruningCallback(task.recipe("MagnitudePruningModifier") + CONSTANT, verbose=0)
    task.fit(model, pruning, epochs=2)
    body.trainable = True
    model.compile(keras.optimizers.Adam(0.01), "mse")
    task.fit(model, pruning, epochs=4, initial_epoch=2)
    assert (body.kernel.numpy().ravel()[::2] == 0).all()


CONSTANT = "  - !ConstantPruningModifier {params: ['re:.*body/kernel', 're:.*head/bias']}\n"


@pytest.mark.feature("resume with another batch size")
def test_a_run_that_goes_on_with_another_batch_size_keeps_masks_and_epochs(task, tmp_path, caplog):
    recipe = task.recipe(end_epoch=4.0)
    model, path = task.model(keras.optimizers.Adam(0.01)), tmp_path / "state"
    first = MFACPruningCallback(recipe, state_path=path, verbose=0)
    task.fit(model, first, epochs=2)
    pruning = MFACPruningCallback(recipe, state_path=path, verbose=0)
    masks = Masks(pruning)
    caplog.clear()
    task.fit(model, pruning, masks, epochs=5, initial_epoch=2, batch_size=8)

    said = [line for line in caplog.messages if "steps per epoch" in line]
    assert said == [
        "the state was saved with 5 steps per epoch and this run has 10 (another batch size or gradient accumulation): "
        "it resumes at the same epoch, 2.00, which is step 20"
    ]
    assert "counts as pruned" not in caplog.text
    for name, mask in first.masks.items():
        np.testing.assert_array_equal(mask, masks.seen[0][name])
    changes = [i + 1 for i, (a, b) in enumerate(zip(masks.seen, masks.seen[1:], strict=False)) if not _equal(a, b)]
    assert changes == [9, 19]  # the steps of epochs 3 and 4, counted from 0
    assert pruning.sparsity == 0.75


def _equal(one, other):
    return all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.feature("resume with BackupAndRestore, in either order")
def test_weights_of_another_run_get_no_masks_of_a_state_and_the_log_names_it(task, tmp_path, caplog):
    path = tmp_path / "state"
    task.fit(task.model(), MFACPruningCallback(task.recipe(end_epoch=4.0), state_path=path, verbose=0), epochs=3)
    stranger = task.model()
    before = stranger.get_weights()

    class Stop(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            raise InterruptedError

    pruning = MFACPruningCallback(task.recipe(end_epoch=4.0), state_path=path, verbose=0)
    with pytest.raises(InterruptedError):
        task.fit(stranger, pruning, Stop(), initial_epoch=3, epochs=5)
    assert "no saved pruning state matches the weights (the saved states are of epoch 3, 2)" in caplog.text
    assert all(np.array_equal(a, b) for a, b in zip(before, stranger.get_weights(), strict=True))


@pytest.mark.feature("resume with BackupAndRestore, in either order")
def test_weights_that_were_saved_with_less_precision_go_on_with_the_state_of_their_zeros(task, tmp_path, caplog):
    model, path = task.model(), tmp_path / "state"
    first = MFACPruningCallback(task.recipe(end_epoch=4.0), state_path=path, verbose=0)
    task.fit(model, first, epochs=3)
    rounded = task.model()
    rounded.set_weights([each.astype("float16").astype("float32") for each in model.get_weights()])
    pruning = MFACPruningCallback(task.recipe(end_epoch=4.0), state_path=path, verbose=0)
    masks = Masks(pruning)
    task.fit(rounded, pruning, masks, initial_epoch=3, epochs=5)
    assert "the weights differ from those of the pruning state of epoch 3" in caplog.text
    assert _equal(first.masks, masks.seen[0])
    assert "counts as pruned" not in caplog.text


@pytest.mark.feature("a second fit continues where the first ended (initial_epoch)")
def test_dense_weights_that_were_put_back_are_not_pruned_in_silence(task, caplog):
    model, pruning = task.model(), MFACPruningCallback(task.recipe(), verbose=0)
    dense = model.get_weights()
    task.fit(model, pruning, epochs=4)
    model.set_weights(dense)
    task.fit(model, pruning, initial_epoch=4, epochs=5)
    assert "no saved pruning state matches the weights" in caplog.text
    assert pruning.sparsity == 0
    assert all(kernel.all() for kernel in task.kernels(model).values())


@pytest.mark.feature("a second fit continues where the first ended (initial_epoch)")
def test_a_fit_without_an_epoch_to_train_leaves_masks_and_sparsity(task, tmp_path, caplog):
    path = tmp_path / "state"
    model, pruning = task.model(), MFACPruningCallback(task.recipe(), state_path=path, verbose=0)
    task.fit(model, pruning, epochs=4)
    masks = pruning.masks
    caplog.clear()
    task.fit(model, pruning, initial_epoch=4, epochs=4)
    assert _equal(masks, pruning.masks)
    assert pruning.sparsity == 0.75
    other = MFACPruningCallback(task.recipe(), state_path=path, verbose=0)
    task.fit(model, other, initial_epoch=4, epochs=4)
    assert _equal(masks, other.masks)
    assert other.sparsity == 0.75
    without = MFACPruningCallback(task.recipe(), verbose=0)
    task.fit(model, without, initial_epoch=4, epochs=4)
    assert _equal(masks, without.masks)
    assert "fit ended" not in caplog.text


@pytest.mark.feature("resume with BackupAndRestore, in either order")
@pytest.mark.parametrize(
    "broken",
    [
        {"changes": {"options_done": [False], "weight_decays": {"1": 0.5}}},
        {"changes": {"options_done": [False], "weight_decays": {"0": "much"}}},
        {"changes": {"options_done": [False], "weight_decays": {"0": float("nan")}}},
        {"changes": {"options_done": [False, False], "weight_decays": {}}},
        {"changes": {"options_done": ["x"], "weight_decays": {}}},
        {"changes": {}},
        {"prunings": []},
        {"prunings": [{"masks": {}}, {"masks": {}}]},
    ],
    ids=str,
)
def test_a_state_that_is_broken_in_part_changes_nothing(task, broken):
    decay = "training_modifiers:\n  - !SetWeightDecayModifier {start_epoch: 0.0, weight_decay: 0.25}\n"
    text = task.recipe("MagnitudePruningModifier") + task.recipe("MagnitudePruningModifier").partition("\n")[2] + decay
    saved_model, pruning = task.model(keras.optimizers.AdamW()), MFACPruningCallback(text, verbose=0)
    task.fit(saved_model, pruning, epochs=2)
    state = pruning._last_session.state_dict()
    model, other = task.model(keras.optimizers.AdamW()), MFACPruningCallback(text, verbose=0)
    task.fit(model, other, epochs=1)
    session = other._last_session
    weights, before = model.get_weights(), session.state_dict()
    with pytest.raises(ValueError, match=r"."):
        session.resume(session.parsed({**state, **broken}))
    after = session.state_dict()
    assert before["changes"] == after["changes"]
    for one, another in zip(before["prunings"], after["prunings"], strict=True):
        assert one["pruning_steps_done"] == another["pruning_steps_done"]
        assert _equal(one["masks"], another["masks"])
    assert all(np.array_equal(a, b) for a, b in zip(weights, model.get_weights(), strict=True))
