"""Several real processes of JAX prune as one."""

import importlib.util
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

keras = pytest.importorskip("keras", reason="needs Keras: pip install 'mfac-core[keras]'")
pytestmark = [
    pytest.mark.backends("jax"),
    pytest.mark.feature("several processes: DataParallel (jax)"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that can be forked"),
]

SCRIPT = Path(__file__).with_name("jax_processes.py")
ALIKE = [
    "by_layer",
    "by_all",
    "in_one_block",
    "by_magnitude",
    "in_phases",
    "sampled",
    "from_tf_data",
    "one_shot",
    "by_groups",
]
REFUSED = {
    "without_distribution": "JAX runs in 2 processes, but no distribution is set.*DataParallel",
    "on_its_own_devices": "JAX runs in 2 processes, but .* leaves some of them out.*DataParallel",
    "measured": "sensitivity.*but it runs in 2",
    "sharded": "ModelParallel shards .*body/kernel.*2 processes.*DataParallel",
}
OTHERS = ["recalibrated", "exchange", "documented", "backed_up", "with_other_recipes", "failing_once", "saved"]


class Results:
    """What the processes of some runs have left."""

    def __init__(self, folder, size):
        self.folder = folder
        self.size = size

    def __call__(self, run):
        files = [self.folder / f"{run}-{rank}.pickle" for rank in range(self.size)]
        return [pickle.loads(file.read_bytes()) if file.exists() else None for file in files]

    def found(self, run):
        results = self(run)
        for result in results:
            assert "found" in result, result["where"]
        return [result["found"] for result in results]


def start(folder, size, *runs, **environment):
    done = subprocess.run(
        [sys.executable, SCRIPT, folder, str(size), *runs],
        check=False,
        env=os.environ | environment,
        timeout=600,
        capture_output=True,
        text=True,
    )
    return Results(folder, size), done


@pytest.fixture(scope="module")
def runs():
    spec = importlib.util.spec_from_file_location("jax_processes", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    results, done = start(tmp_path_factory.mktemp("two"), 2, *OTHERS, *ALIKE, *REFUSED)
    assert done.returncode == 0, done.stderr
    return results


@pytest.fixture(scope="module")
def four(two, tmp_path_factory):
    folder = tmp_path_factory.mktemp("four")
    shutil.copytree(two.folder, folder, dirs_exist_ok=True)
    results, done = start(folder, 4, "resumed")
    assert done.returncode == 0, done.stderr
    return results


@pytest.fixture(scope="module")
def whole(runs, tmp_path_factory):
    return runs.without_interruption(tmp_path_factory.mktemp("whole"))


def assert_same(found, wanted, *, exactly=False):
    for mask, (name, other) in zip(found["masks"].values(), wanted["masks"].items(), strict=True):
        np.testing.assert_array_equal(mask, other, err_msg=name)
    for one, other in zip(found["weights"], wanted["weights"], strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=0 if exactly else 1e-5)
    if "history" in found:
        assert found["history"] == wanted["history"]


def test_what_ranks_exchange_arrives_whole(two):
    for found in two.found("exchange"):
        assert all(all(each) for each in found["found"].values())
        for summed, exact in zip(found["summed"], found["exact"], strict=True):
            np.testing.assert_array_equal(summed, exact)
            assert summed.dtype == exact.dtype
    assert [found["rank"] for found in two.found("exchange")] == [0, 1]


@pytest.mark.parametrize("run", ALIKE)
def test_two_processes_prune_as_one(runs, two, tmp_path, run):
    first, second = two.found(run)
    assert first["masks"]
    assert_same(second, first, exactly=True)
    assert_same(first, getattr(runs, run)(tmp_path))


@pytest.mark.parametrize("run", [run for run in ALIKE if run != "in_one_block"])  # its second process is idle
def test_the_first_process_speaks_for_all(two, run):
    first, second = (result["logged"] for result in two(run))
    assert any("pruning step" in message for _, message in first)
    assert not second


@pytest.mark.parametrize("run", REFUSED)
def test_what_cannot_be_pruned_together_is_refused_by_name(two, run):
    for result in two(run):
        assert result["raised"] == "NotImplementedError"
        assert re.search(REFUSED[run], result["message"]), result["message"]


def test_processes_with_other_recipes_all_say_so(two):
    for result in two("with_other_recipes"):
        assert result["raised"] == "RankError"
        assert "ranks differ in the schedule" in result["message"]
        assert "use the same recipe on all ranks" in result["message"]


def test_a_process_that_cannot_write_undoes_the_pruning_step_on_all(two):
    first, second = two.found("failing_once")
    assert "rank 1 failed in" in first["raised"]
    assert "OSError: not today" in first["raised"]
    assert first["raised"].startswith("RankError")
    assert second["raised"] == "OSError: not today"
    assert_same(second, first, exactly=True)
    pruned = [1 - mask.mean() for mask in first["masks"].values()]
    np.testing.assert_allclose(pruned, 0.2, atol=0.02)  # after the first of the pruning steps


def test_each_process_keeps_its_own_columns_of_the_window(two):
    from mfac_keras.state_file import read_state

    names = sorted(path.name for path in (two.folder / "state").iterdir())
    assert names == [
        "pruning.npz",
        "pruning.npz.previous",
        "pruning.npz.rank-1-of-2",
        "pruning.npz.rank-1-of-2.previous",
    ]
    states = [read_state(two.folder / "state" / name)["prunings"][0]["window"] for name in (names[0], names[2])]
    (start, middle), (again, end) = (state["columns"] for state in states)
    assert (start, again, end) == (0, middle, states[0]["num_columns"])
    assert 0 < middle < end
    for state, width in zip(states, (middle, end - middle), strict=True):
        assert state["rows"].shape[1] == width
        assert state["position"] == 2  # it stopped in the middle of a window


def test_one_process_goes_on_where_two_stopped(runs, two, tmp_path, whole):
    shutil.copytree(two.folder, tmp_path, dirs_exist_ok=True)
    assert_same(runs.resumed(tmp_path), whole)


def test_four_processes_go_on_where_two_stopped(four, whole):
    first, *others = four.found("resumed")
    for other in others:
        assert_same(other, first, exactly=True)
    assert_same(first, whole)
    assert not any("collected anew" in message for _, message in four("resumed")[0]["logged"])


def test_statistics_are_averaged_over_the_batches_of_all_processes(runs, two, tmp_path):
    first, second = two.found("recalibrated")
    assert_same(second, first, exactly=True)
    assert_same(first, runs.recalibrated(tmp_path))


def test_two_processes_go_on_from_their_own_backups(two, whole):
    first, second = two.found("backed_up")
    assert_same(second, first, exactly=True)
    assert_same(first, whole)


def test_the_script_of_the_page_runs_in_two_processes(two):
    first, second = two.found("documented")
    assert_same(second, first, exactly=True)
    assert {path.name for path in two.folder.glob("pruning.npz*")} >= {"pruning.npz", "pruning.npz.rank-1-of-2"}


def test_a_process_that_is_killed_stops_the_others_before_they_save(tmp_path):
    from mfac_keras.state_file import read_states

    results, _ = start(tmp_path, 2, "killed")
    first, second = results("killed")
    assert second is None
    assert first["raised"] in {"RankError", "JaxRuntimeError"}
    assert first["seconds"] < 60
    assert [saved.state["step"] for saved in read_states(tmp_path / "killed.npz")] == [10, 5]
