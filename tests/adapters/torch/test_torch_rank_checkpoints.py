"""Checkpoints of several ranks: saved by all or by rank 0 alone, resumed by any number, after a kill at any moment."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from mfac_core.session.rank_states import share_of
from mfac_torch.tensor_files import read_tensors
from tests.adapters.torch.conftest import TinyTask
from tests.adapters.torch.rank_training import Run, assert_equal_runs, logged
from tests.adapters.torch.test_torch_checkpoint import flipped

RECIPE = TinyTask.recipe()  # prunes at steps 5, 10, 15 and 20, with the gradients of the 4 steps before
ONLY_A_LEARNING_RATE = "training_modifiers:\n  - !SetLearningRateModifier\n    learning_rate: 0.01\n"
SAVED_AT = 12  # rows of two steps are stored


class Divisible(Run):
    """A run whose batches have parts of the same size on 2, 3 and 4 ranks."""

    def batch(self, step):
        inputs, targets = self.task.batches[step % len(self.task.batches)]
        return inputs[self.rank : 12 : self.size], targets[self.rank : 12 : self.size]


def save(group, path, options, *, ranks=None, steps=SAVED_AT, seed=0):
    """Train, and let all ranks or some save a checkpoint; return the outcome at the end of training."""
    run = Divisible(group, RECIPE, model=lambda: TinyTask.model(seed), **options)
    run.train(0, steps)
    if ranks is None or run.rank in ranks:
        run.manager.save_checkpoint(path, step=steps)
    return run.train(steps, 20).outcome()


def load(group, path, options, *, start=SAVED_AT):
    """Resume from a checkpoint on all ranks; return the outcome at the end of training."""
    with logged() as lines:
        run = Divisible(group, RECIPE, model=lambda: TinyTask.model(1), **options)
        assert run.manager.load_checkpoint(path)["step"] == start
        return run.train(start, 20).outcome(lines)


def undisturbed(seed=0):
    return Divisible(None, RECIPE, model=lambda: TinyTask.model(seed)).train().outcome()


def files(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def run_on(rank_processes, size, function, *args, **keywords):
    """Run a function on ranks, or in this process."""
    if size == 1:
        return [function(None, *args, **keywords)]
    return rank_processes.run(_with_keywords, function, args, keywords, size=size)


def _with_keywords(group, function, args, keywords):
    return function(group, *args, **keywords)


@pytest.fixture(scope="module")
def saved_by_two(rank_processes, tmp_path_factory):
    """The folder in which two ranks have saved a checkpoint."""
    folder = tmp_path_factory.mktemp("two")
    assert_equal_runs(run_on(rank_processes, 2, save, folder / "c.pt", {}), undisturbed())
    return folder


@pytest.fixture
def two(saved_by_two, tmp_path):
    """A copy of that folder."""
    return shutil.copytree(saved_by_two, tmp_path / "two")


def test_each_rank_writes_a_file_of_its_own(two):
    assert files(two) == ["c.pt", "c.pt.rank-1-of-2"]
    whole, other = read_tensors(two / "c.pt")["manager"], read_tensors(two / "c.pt.rank-1-of-2")
    assert (whole["saved_by"]["rank"], other["saved_by"]["rank"]) == (0, 1)
    assert whole["saved_by"]["run"] == other["saved_by"]["run"] != 0


@pytest.mark.parametrize("size", [1, 2, 3])
def test_any_number_of_ranks_resumes_in_the_middle_of_a_window(rank_processes, two, size):
    outcomes = run_on(rank_processes, size, load, two / "c.pt", {})
    assert_equal_runs(outcomes, undisturbed())
    assert not any("anew" in line for outcome in outcomes for line in outcome.lines)


@pytest.mark.parametrize("size", [1, 2])
def test_rank_0_may_save_alone_at_the_cost_of_the_rows(rank_processes, tmp_path, size):
    outcomes = run_on(rank_processes, 2, save, tmp_path / "c.pt", {}, ranks=[0])
    assert_equal_runs(outcomes, undisturbed())  # nobody waits, and nothing changes
    assert files(tmp_path) == ["c.pt"]
    check_rows_lost(run_on(rank_processes, size, load, tmp_path / "c.pt", {}))


def check_rows_lost(outcomes, *reasons):
    """Check that a resumed run has collected its rows anew, said so once, and prunes as planned all the same."""
    lines = [line for outcome in outcomes for line in outcome.lines]
    assert sum("anew" in line for line in lines) == 1, lines
    for reason in reasons:
        assert sum(reason in line for line in lines) == 1, lines
    for outcome in outcomes:
        assert outcome.sparsity == pytest.approx(0.75, abs=0.01)
        for name, mask in outcome.masks.items():
            np.testing.assert_array_equal(mask, outcomes[0].masks[name])


def save_twice(group, path, killed):
    """Save a checkpoint on all ranks, train on, and save another one on all but one rank."""
    run = Divisible(group, RECIPE).train(0, 7)
    run.manager.save_checkpoint(path, step=7)
    run.train(7, SAVED_AT)
    if run.rank != killed:
        run.manager.save_checkpoint(path, step=SAVED_AT)
    return run.outcome()


def masks_in(path):
    return {name: mask for each in read_tensors(path)["manager"]["prunings"] for name, mask in each["masks"].items()}


def test_a_kill_before_another_rank_has_written_loses_rows_and_no_mask(rank_processes, tmp_path):
    path = tmp_path / "c.pt"
    saved = rank_processes.run(save_twice, path, 1, size=2)
    assert files(tmp_path) == ["c.pt", "c.pt.previous", "c.pt.rank-1-of-2"]
    check_rows_lost(run_on(rank_processes, 2, load, path, {}), "c.pt.rank-1-of-2 belongs to another checkpoint")
    resumed = rank_processes.run(loaded_masks, path, size=3)
    for masks in resumed:
        assert masks.keys() == saved[0].masks.keys()
        assert all(np.array_equal(mask, saved[0].masks[name]) for name, mask in masks.items())


def loaded_masks(group, path):
    run = Divisible(group, RECIPE, model=lambda: TinyTask.model(1))
    run.manager.load_checkpoint(path)
    return {name: mask.numpy() for name, mask in run.manager.masks.items()}


def test_a_kill_before_rank_0_has_written_leaves_the_checkpoint_before(rank_processes, tmp_path):
    path = tmp_path / "c.pt"
    rank_processes.run(save_twice, path, 0, size=2)
    assert files(tmp_path) == ["c.pt", "c.pt.rank-1-of-2", "c.pt.rank-1-of-2.previous"]
    assert_equal_runs(run_on(rank_processes, 3, load, path, {}, start=7), undisturbed())


def test_a_file_of_the_same_step_of_another_run_is_not_used(rank_processes, two):
    run_on(rank_processes, 2, save, two / "c.pt", {}, ranks=[0], seed=3)
    check_rows_lost(run_on(rank_processes, 2, load, two / "c.pt", {}), "c.pt.rank-1-of-2 belongs to another checkpoint")


def test_a_save_is_of_the_loaded_run_until_the_next_step_begins_a_new_one(rank_processes, two):
    (loaded, first, again, second), of_other_rank = rank_processes.run(numbers_of_runs, two / "c.pt", size=2)
    assert of_other_rank == [loaded, first, again, second]
    assert loaded == again == read_tensors(two / "c.pt")["manager"]["saved_by"]["run"]
    assert len({loaded, first, second}) == 3


def numbers_of_runs(group, path):
    run = Divisible(group, RECIPE)
    numbers = []
    for _ in range(2):
        run.manager.load_checkpoint(path)
        numbers.append(run.manager.state_dict()["saved_by"]["run"])
        run.train(SAVED_AT, SAVED_AT + 1)
        numbers.append(run.manager.state_dict()["saved_by"]["run"])
    return numbers


@pytest.mark.parametrize("size", [1, 2])
def test_a_damaged_file_of_a_rank_costs_its_rows_only(rank_processes, two, size):
    file = two / "c.pt.rank-1-of-2"
    file.write_bytes(flipped(file.read_bytes()))
    check_rows_lost(run_on(rank_processes, size, load, two / "c.pt", {}), "c.pt.rank-1-of-2 is damaged")


def test_the_ranks_share_the_reading(rank_processes, two):
    for size in (2, 3):
        read = rank_processes.run(files_read, two / "c.pt", size=size)
        of_others = [path for paths in read for path in paths if path != "c.pt"]
        assert of_others == ["c.pt.rank-1-of-2"]


def files_read(group, path):
    run = Divisible(group, RECIPE)
    names = []
    import mfac_torch.state_files as module

    actual = module.read_tensors
    module.read_tensors = lambda path: (names.append(Path(path).name), actual(path))[1]
    try:
        run.manager.load_checkpoint(path)
    finally:
        module.read_tensors = actual
    return names


@pytest.mark.parametrize("size", range(1, 10))
@pytest.mark.parametrize("num_states", [1, 2, 3, 8])
def test_each_saved_state_is_loaded_by_one_rank(size, num_states):
    shares = [share_of(rank, size, num_states) for rank in range(size)]
    assert [index for share in shares for index in share] == list(range(num_states))
    if size == num_states:
        assert shares == [range(rank, rank + 1) for rank in range(size)]


@pytest.mark.parametrize("recipe", [RECIPE, ONLY_A_LEARNING_RATE], ids=["pruning", "without pruning"])
def test_no_two_ranks_write_one_file(rank_processes, tmp_path, recipe):
    written = rank_processes.run(files_written, tmp_path, recipe, size=3)
    assert written == [
        [f"{name}{end}" for name in ("c.pt", "state.pt")] for end in ("", ".rank-1-of-3", ".rank-2-of-3")
    ]


def files_written(group, folder, recipe):
    run = Divisible(group, recipe)
    names = []
    import mfac_torch.tensor_files as module

    actual = module.write_file
    module.write_file = lambda path, *args, **kwargs: (names.append(Path(path).name), actual(path, *args, **kwargs))
    try:
        run.manager.save_checkpoint(folder / "c.pt")
        run.manager.save_state(folder / "state.pt")
    finally:
        module.write_file = actual
    return names


# --- random number generators


def draw():
    return float(torch.rand(()))


def draw_after_saving(group, path):
    run = Divisible(group, RECIPE).train(0, 3)
    torch.manual_seed(100 + run.rank)
    run.manager.save_checkpoint(path)
    return draw()


def draw_after_loading(group, path, rng):
    with logged() as lines:
        run = Divisible(group, RECIPE)
        torch.manual_seed(200 + run.rank)
        run.manager.load_checkpoint(path, rng=rng)
        return draw(), [line for line in lines if "random number generators" in line]


def test_random_numbers_continue_only_on_the_rank_that_saved_them(rank_processes, tmp_path):
    path = tmp_path / "c.pt"
    saved = rank_processes.run(draw_after_saving, path, size=2)
    assert saved[0] != saved[1]
    assert rank_processes.run(draw_after_loading, path, True, size=2) == [(each, []) for each in saved]
    own = []
    for rank in range(3):
        torch.manual_seed(200 + rank)
        own.append(draw())
    assert [number for number, _ in rank_processes.run(draw_after_loading, path, False, size=2)] == own[:2]
    of_three = rank_processes.run(draw_after_loading, path, True, size=3)
    assert [number for number, _ in of_three] == own
    assert all("left as they are: rank" in lines[0] for _, lines in of_three)


def test_a_rank_without_a_file_keeps_its_random_numbers(rank_processes, tmp_path):
    path = tmp_path / "c.pt"
    saved = rank_processes.run(draw_after_saving, path, size=2)
    (tmp_path / "c.pt.rank-1-of-2").unlink()
    (first, quiet), (second, told) = rank_processes.run(draw_after_loading, path, True, size=2)
    assert (first, quiet) == (saved[0], [])
    assert second not in saved
    assert len(told) == 1


# --- sharded weights, whose model and optimizer torch.distributed.checkpoint saves


def save_parts(group, folder, options):
    run = Divisible(group, RECIPE, **options).train(0, SAVED_AT)
    model, optimizer = get_state_dict(run.model, run.optimizers[0])
    dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=folder, process_group=group)
    run.manager.save_state(folder / "pruning.pt")
    return run.train(SAVED_AT, 20).outcome()


def load_parts(group, folder, options):
    with logged() as lines:
        run = Divisible(group, RECIPE, model=lambda: TinyTask.model(1), **options)
        model, optimizer = get_state_dict(run.model, run.optimizers[0])
        dcp.load({"model": model, "optimizer": optimizer}, checkpoint_id=folder, process_group=group)
        set_state_dict(run.model, run.optimizers[0], model_state_dict=model, optim_state_dict=optimizer)
        run.manager.load_state(folder / "pruning.pt")
        return run.train(SAVED_AT, 20).outcome(lines)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
@pytest.mark.parametrize(
    ("saved", "resumed"),
    [
        ((2, {}), (3, {"how": "fsdp2"})),
        ((2, {}), (4, {"how": "hsdp"})),
        ((3, {"how": "fsdp2"}), (2, {"how": "fsdp2"})),
        ((2, {"how": "fsdp2"}), (3, {})),
        ((4, {"how": "hsdp"}), (1, {})),
        ((1, {}), (4, {"how": "fsdp2"})),
    ],
    ids=str,
)
def test_sharded_ranks_resume_what_others_have_saved(rank_processes, tmp_path, saved, resumed):
    assert_equal_runs(run_on(rank_processes, saved[0], save_parts, tmp_path, saved[1]), undisturbed())
    outcomes = run_on(rank_processes, resumed[0], load_parts, tmp_path, resumed[1])
    assert_equal_runs(outcomes, undisturbed())
    assert not any("anew" in line for outcome in outcomes for line in outcome.lines)


def refused(group, path):
    run = Divisible(group, RECIPE, how="fsdp2")
    messages = []
    for method in (run.manager.save_checkpoint, run.manager.load_checkpoint):
        with pytest.raises(NotImplementedError) as raised:
            method(path)
        messages.append(str(raised.value))
    return messages


def test_one_file_of_sharded_weights_is_refused(rank_processes, two):
    before = (two / "c.pt").read_bytes()
    for save_message, load_message in rank_processes.run(refused, two / "c.pt", size=2):
        assert "save_checkpoint() does not support the FSDPSequential" in save_message
        assert "torch.distributed.checkpoint, and the pruning state with manager.save_state(path)" in save_message
        assert "with manager.load_state(path)" in load_message
    assert (two / "c.pt").read_bytes() == before


# --- the states of all ranks in one


def gather(group, path, options):
    run = Divisible(group, RECIPE, **options).train(0, SAVED_AT)
    states = run.manager.gather_state_dicts()
    if run.rank == 0:
        torch.save([run.model.state_dict(), run.optimizers[0].state_dict(), states], path)
    dist.barrier(group)
    return [(state["saved_by"]["rank"], len(state["prunings"][0]["masks"])) for state in states]


def load_gathered(group, path):
    with logged() as lines:
        run = Divisible(group, RECIPE, model=lambda: TinyTask.model(1))
        model, optimizer, states = torch.load(path, weights_only=True)
        run.model.load_state_dict(model)
        run.optimizers[0].load_state_dict(optimizer)
        run.manager.load_state_dict(states)
        return run.train(SAVED_AT, 20).outcome(lines)


def test_rank_0_gathers_the_states_of_all_ranks(rank_processes, tmp_path):
    path = tmp_path / "all.pt"
    assert rank_processes.run(gather, path, {}, size=3) == [[(rank, 2) for rank in range(3)], [], []]
    for size in (1, 2):
        assert_equal_runs(run_on(rank_processes, size, load_gathered, path), undisturbed())


def test_states_of_different_saves_are_refused(rank_processes, two, tmp_path):
    run_on(rank_processes, 2, save, tmp_path / "other.pt", {}, seed=3)
    states = [read_tensors(two / "c.pt")["manager"], read_tensors(tmp_path / "other.pt.rank-1-of-2")]
    run = Divisible(None, RECIPE)
    for wrong in (states, states[:1] * 2, []):
        with pytest.raises(ValueError, match="state"):
            run.manager.load_state_dict(wrong)


def test_a_rank_that_cannot_give_its_state_is_named(rank_processes):
    outcomes = rank_processes.outcomes(gather_without, 1, size=2)
    assert "raised RankError: rank 1 failed in gathering the states of all ranks: MemoryError" in outcomes[0]
    assert "raised MemoryError" in outcomes[1]


def gather_without(group, rank):
    run = Divisible(group, RECIPE).train(0, 3)
    if run.rank == rank:
        run.manager._session.state_dict = raise_memory_error
    run.manager.gather_state_dicts()


def raise_memory_error(**keywords):
    raise MemoryError
