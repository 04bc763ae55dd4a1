import io
import json
import zipfile

import numpy as np
import pytest

keras = pytest.importorskip("keras", reason="needs Keras: pip install 'mfac-core[keras]'")

from mfac_keras import MFACPruningCallback  # noqa: E402
from mfac_keras.state_file import check_state, read_state, read_states, write_state  # noqa: E402


def state(step):
    masks = {"a/kernel": np.arange(40).reshape(5, 8) % 3 > 0, "b/kernel": np.zeros((0, 4), bool)}
    window = {"rows": np.linspace(-1, 1, 60, dtype=np.float32).reshape(2, 30), "position": 1}
    pruner = {"method": "MFACPruner", "schedule": np.array([[5.0, 0.2]]), "masks": masks, "window": window}
    changes = {"options_done": [True, False], "weight_decays": {"0": None, "1": 0.5}}
    return {"step": step, "steps_per_epoch": 5, "fingerprints": None, "changes": changes, "prunings": [pruner]}


def is_equal(one, other):
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(is_equal(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return isinstance(other, list) and len(one) == len(other) and all(map(is_equal, one, other))
    if isinstance(one, np.ndarray):
        return isinstance(other, np.ndarray) and one.dtype == other.dtype and np.array_equal(one, other)
    return one == other


def damaged(whole):
    """Yield files that are damaged: cut off, with bytes that flipped, with holes of zeros, or with parts swapped."""
    for length in [*range(0, len(whole), 23), len(whole) - 1]:
        yield whole[:length]
    for place in range(0, len(whole), 7):
        for flip in (0x01, 0x80, 0xFF):
            yield whole[:place] + bytes([whole[place] ^ flip]) + whole[place + 1 :]
    for place in range(0, len(whole), 101):
        yield whole[:place] + bytes(min(64, len(whole) - place)) + whole[place + 64 :]
        yield whole[place:] + whole[:place]
    yield whole + whole[::-1]


def test_every_damage_is_a_value_error_or_none(tmp_path):
    path, expected = tmp_path / "state", state(5)
    write_state(path, expected)
    whole, count = path.read_bytes(), 0
    for content in damaged(whole):
        path.write_bytes(content)
        try:
            found = read_state(path, check_state)
        except ValueError as error:
            count += 1
            assert str(path) in str(error)
            assert str(error).endswith("remove it or name another")
        else:
            assert is_equal(found, expected)
    assert count > 1000


def npz(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def single(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def structured(structure, **arrays):
    return npz(structure=np.array(structure if isinstance(structure, str) else json.dumps(structure)), **arrays)


def bomb():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("structure.npy", bytes(10**7))
    return file.getvalue()


def absurd(shape):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": shape})
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("structure.npy", header.getvalue())
    return file.getvalue()


@pytest.mark.parametrize(
    "content",
    {
        "empty": b"",
        "text": b"my thesis",
        "one array": single(np.ones(3)),
        "no structure": npz(a=np.ones(3)),
        "pickled": npz(structure=np.array([{"step": 1}], dtype=object)),
        "no JSON": structured("{"),
        "deep JSON": structured("[" * 100_000),
        "a number": structured(5),
        "a list": structured([1]),
        "an array that is lacking": structured({"step": {"__array__": 3}}),
        "no step": structured({"prunings": []}),
        "a step that is a word": structured({"step": "x", "steps_per_epoch": 5, "changes": {}, "prunings": []}),
        "a step below 0": structured({"step": -1, "steps_per_epoch": 5, "changes": {}, "prunings": []}),
        "no steps in an epoch": structured({"step": 5, "steps_per_epoch": 0, "changes": {}, "prunings": []}),
        "prunings that are none": structured({"step": 5, "steps_per_epoch": 5, "changes": {}, "prunings": [3]}),
        "masks that are none": structured(
            {"step": 5, "steps_per_epoch": 5, "changes": {}, "prunings": [{"masks": {"a": [True]}}]}
        ),
        "a bomb": bomb(),
        "an absurd shape": absurd((2**40, 2**20)),
        "a shape that overflows": absurd((2**62, 8)),
    }.items(),
    ids=lambda item: item[0],
)
def test_what_is_no_state_is_a_value_error(tmp_path, content):
    path = tmp_path / "state"
    path.write_bytes(content[1])
    with pytest.raises(
        ValueError, match="is not the state of a pruning run, or is damaged; remove it or name another$"
    ):
        read_state(path, check_state)


def test_a_damaged_file_gives_way_to_the_whole_one_before_it_and_it_is_said(tmp_path, caplog):
    path = tmp_path / "state"
    write_state(path, state(5))
    write_state(path, state(10))
    whole = path.read_bytes()
    for length in (0, 3, 100, len(whole) - 1):
        caplog.clear()
        path.write_bytes(whole[:length])
        (found,) = read_states(path, check_state)
        assert found.state["step"] == 5
        assert found.is_previous
        assert f"{path} is not the state of a pruning run, or is damaged" in caplog.text
        assert f"The state that was written before it is used, {path}.previous" in caplog.text


def test_a_damaged_previous_file_is_said_and_where_none_is_whole_it_is_an_error(tmp_path, caplog):
    path = tmp_path / "state"
    write_state(path, state(5))
    write_state(path, state(10))
    path.with_name("state.previous").write_bytes(b"")
    assert [found.state["step"] for found in read_states(path)] == [10]
    assert f"{path}.previous is not the state" in caplog.text
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="state is not the state of a pruning run, or is damaged"):
        list(read_states(path))


def test_a_write_that_fails_leaves_both_states_as_they_were(tmp_path):
    path = tmp_path / "state"
    write_state(path, state(5))
    write_state(path, state(10))
    with pytest.raises(TypeError):
        write_state(path, {"step": object()})
    assert [found.state["step"] for found in read_states(path)] == [10, 5]


def test_a_resumed_run_with_a_damaged_file_goes_on_from_the_one_before_it(task, tmp_path, caplog):
    def run(folder, *, until=5):
        model = task.model()
        pruning = MFACPruningCallback(task.recipe(end_epoch=4.0), state_path=folder / "state", verbose=0)
        backup = keras.callbacks.BackupAndRestore(str(folder / "backup"), delete_checkpoint=False)
        task.fit(model, backup, pruning, epochs=until)
        return model, pruning

    whole = run(tmp_path / "whole")
    folder = tmp_path / "killed"
    run(folder, until=2)
    file = folder / "state"
    file.with_name("state.previous").write_bytes(file.read_bytes())
    file.write_bytes(file.read_bytes()[:-100])
    resumed = run(folder)

    assert "The state that was written before it is used" in caplog.text
    for a, b in zip(whole[1].masks.values(), resumed[1].masks.values(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert [found.state["step"] for found in read_states(file, check_state)] == [25, 20]
