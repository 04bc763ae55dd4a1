"""Checkpoints as files: whole after a kill at any moment, checked when they are read, loaded whole or not at all."""

import copy
import io
import os
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import mfac_core
import mfac_torch
from mfac_torch import (
    MagnitudePruningModifier,
    MFACPruningModifier,
    ScheduledModifierManager,
    SetLearningRateModifier,
)
from mfac_torch.export import load_masks, save_masks
from mfac_torch.tensor_files import read_tensors, write_tensors


class Run:
    """Two pruning modifiers, one with a gradient window, and a learning rate."""

    def __init__(self, task, seed=0, steps_per_epoch=5, **keys):
        self.task = task
        self.model = task.model(seed)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.02)
        self.manager = ScheduledModifierManager(
            [
                MFACPruningModifier(
                    params=["0.weight"],
                    init_sparsity=0.2,
                    final_sparsity=0.75,
                    start_epoch=1.0,
                    end_epoch=4.0,
                    update_frequency=1.0,
                    num_grads=4,
                    fisher_block_size=16,
                    damp=0.01,
                    **keys,
                ),
                MagnitudePruningModifier(params=["2.weight"], final_sparsity=0.5, start_epoch=1.0, end_epoch=4.0),
                SetLearningRateModifier(learning_rate=0.01, start_epoch=2.0),
            ]
        )
        self.manager.modify(self.model, self.optimizer, steps_per_epoch)

    def fit(self, start, stop):
        self.task.train(self.model, self.optimizer, start=start, stop=stop)
        return self

    def everything(self):
        return copy.deepcopy(
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "manager": self.manager.state_dict(),
                "masks": self.manager.masks,
                "numpy": np.random.get_state()[1].tobytes(),  # noqa: NPY002
                "python": str(random.getstate()),
            }
        )


def equal(one, other):
    if isinstance(one, torch.Tensor):
        is_alike = isinstance(other, torch.Tensor) and (one.dtype, one.layout) == (other.dtype, other.layout)
        return is_alike and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return isinstance(other, list | tuple) and len(one) == len(other) and all(map(equal, one, other))
    return type(one) is type(other) and one == other


@pytest.mark.usefixtures("placement")
def test_a_resumed_run_equals_one_that_was_not_interrupted(task, tmp_path):
    whole = Run(task).fit(0, 12)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(whole.optimizer, [3, 5])
    whole.manager.save_checkpoint(tmp_path / "c.pt", epoch=2, scheduler=scheduler.state_dict(), ema=torch.ones(2))
    whole.fit(12, 20)
    resumed = Run(task, seed=1)
    more = resumed.manager.load_checkpoint(tmp_path / "c.pt")
    assert more["epoch"] == 2
    assert torch.equal(more["ema"], torch.ones(2))
    scheduler.load_state_dict(more["scheduler"])
    resumed.fit(12, 20)
    assert equal(resumed.everything(), whole.everything())


def test_a_window_in_bfloat16_is_resumed_bit_for_bit_from_half_the_bytes(task, tmp_path):
    whole = Run(task, grads_dtype="bfloat16").fit(0, 8)  # in the middle of a window
    whole.manager.save_checkpoint(tmp_path / "c.pt")
    whole.fit(8, 20)
    resumed = Run(task, seed=1, grads_dtype="bfloat16")
    resumed.manager.load_checkpoint(tmp_path / "c.pt")
    rows = resumed.manager.state_dict()["prunings"][0]["window"]["rows"]
    assert len(rows) > 1 and rows.itemsize == 2
    resumed.fit(8, 20)
    assert equal(resumed.everything(), whole.everything())
    with pytest.raises(ValueError, match=r"window is bfloat16, this one is float32; .*grads_dtype"):
        Run(task).manager.load_checkpoint(tmp_path / "c.pt")


def test_the_one_before_is_kept_and_used_where_the_newest_is_damaged(task, tmp_path, caplog):
    run = Run(task).fit(0, 6)
    file, previous = tmp_path / "c.pt", tmp_path / "c.pt.previous"
    run.manager.save_checkpoint(file, number=1)
    run.manager.save_checkpoint(file, number=2)
    whole = file.read_bytes()
    for damaged in (b"", whole[:1000], whole[: len(whole) // 2], b"x" * 100, flipped(whole)):
        file.write_bytes(damaged)
        caplog.clear()
        resumed = Run(task, seed=1)
        assert resumed.manager.load_checkpoint(file) == {"number": 1}
        assert equal(resumed.everything(), run.everything())
        assert "c.pt is damaged and cannot be read" in caplog.text
        assert "resumes from the previous checkpoint" in caplog.text
    file.unlink()
    assert Run(task).manager.load_checkpoint(file) == {"number": 1}
    file.write_bytes(whole)
    previous.write_bytes(b"")
    assert Run(task).manager.load_checkpoint(file) == {"number": 2}
    file.write_bytes(flipped(whole))
    with pytest.raises(ValueError, match=r"c\.pt is damaged.*c\.pt\.previous is damaged"):
        Run(task).manager.load_checkpoint(file)
    previous.unlink()
    with pytest.raises(ValueError, match=r"c\.pt is damaged"):
        Run(task).manager.load_checkpoint(file)
    with pytest.raises(FileNotFoundError):
        Run(task).manager.load_checkpoint(tmp_path / "other.pt")


def flipped(content):
    """Change one bit of a number in the file."""
    with zipfile.ZipFile(io.BytesIO(content)) as records:
        largest = max(records.infolist(), key=lambda each: each.file_size)
        place = content.index(records.read(largest)) + largest.file_size // 2
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def test_what_cannot_be_read_again_is_not_written(task, tmp_path):
    run = Run(task)
    run.manager.save_checkpoint(tmp_path / "c.pt", number=1)
    with pytest.raises(TypeError, match=r"again: more\.logs\.1\.task is a \w+; save .*state_dict\(\) of an object"):
        run.manager.save_checkpoint(tmp_path / "c.pt", logs=[{"loss": 1.0}, {"task": lambda: task}])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.pt"]
    assert run.manager.load_checkpoint(tmp_path / "c.pt") == {"number": 1}


def test_a_file_of_something_else_is_refused(task, tmp_path):
    torch.save({"model": {}}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match=r"c\.pt is not a checkpoint of a manager"):
        Run(task).manager.load_checkpoint(tmp_path / "c.pt")


def test_optimizers_that_are_no_list_are_refused(task, tmp_path):
    run = Run(task)
    run.manager.save_checkpoint(tmp_path / "c.pt")
    write_tensors(tmp_path / "c.pt", {**read_tensors(tmp_path / "c.pt"), "optimizers": 3})
    with pytest.raises(ValueError, match="the checkpoint is broken: optimizers is a int and must be a list"):
        run.manager.load_checkpoint(tmp_path / "c.pt")


def other_model(run):
    run.manager.finalize()
    run.model = nn.Sequential(run.model[0], nn.Tanh(), nn.Linear(8, 3, bias=False))
    run.optimizer = torch.optim.Adam(run.model.parameters(), lr=0.02)
    run.manager.modify(run.model, run.optimizer, 5)
    return {}


def test_an_object_in_a_checkpoint_is_refused_in_one_plain_sentence(task, tmp_path):
    run = Run(task)
    scheduler = torch.optim.lr_scheduler.StepLR(run.optimizer, 3)
    with pytest.raises(TypeError, match=r"again: more\.scheduler is a StepLR; save tensors") as raised:
        run.manager.save_checkpoint(tmp_path / "c.pt", scheduler=scheduler)
    assert "\x1b" not in str(raised.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_model, "weights of the checkpoint do not fit"),
        (lambda run: {"optimizer": [run.optimizer, torch.optim.SGD(run.model.parameters())]}, "state of 1 optimizers"),
        (lambda run: {"optimizer": torch.optim.Adam([run.model[0].weight])}, "Adam optimizer in the checkpoint does"),
        (
            lambda run: {"optimizer": torch.optim.SGD(run.model.parameters())},
            "another optimizer than this SGD",
        ),
        (lambda run: {"model": nn.Linear(3, 3)}, "weights of the checkpoint do not fit"),
    ],
)
def test_a_checkpoint_that_fits_in_part_changes_nothing(task, tmp_path, change, message):
    Run(task).fit(0, 7).manager.save_checkpoint(tmp_path / "c.pt")
    run = Run(task, seed=1)
    options = change(run)
    before = run.everything()
    with pytest.raises(ValueError, match=message):
        run.manager.load_checkpoint(tmp_path / "c.pt", **options)
    assert equal(run.everything(), before)


def test_checkpoints_are_about_a_run_in_progress(task, tmp_path):
    manager = ScheduledModifierManager([MagnitudePruningModifier(final_sparsity=0.5, end_epoch=1.0)])
    with pytest.raises(RuntimeError, match=r"call modify\(\) first"):
        manager.save_checkpoint(tmp_path / "c.pt")
    with pytest.raises(RuntimeError, match=r"call modify\(\) first"):
        manager.load_checkpoint(tmp_path / "c.pt")


KILLED = """
import importlib.util, os, signal, sys
import torch

def module(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found

task = module("conftest", sys.argv[1]).TinyTask()
tests = module("tests", sys.argv[2])
path = sys.argv[3]
run = tests.Run(task).fit(0, 6)
run.manager.save_checkpoint(path, number=0)

def kill_at(number):
    seen = 0
    def count(event, args):
        nonlocal seen
        if event in {"open", "os.rename", "os.link", "os.remove", "mfac.write"} and path in str(args):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(count)

def in_pieces(save):
    def write(content, file):
        import io
        whole = io.BytesIO()
        save(content, whole)
        data = whole.getvalue()
        for start in range(0, len(data), len(data) // 4):
            sys.audit("mfac.write", path)
            file.write(data[start : start + len(data) // 4])
            file.flush()
    return write

def child(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

number, saved, kills = 1, 0, 0
while True:
    def save():
        torch.save = in_pieces(torch.save)
        kill_at(number)
        run.manager.save_checkpoint(path, number=number)
    result = child(save)
    def load():
        found = tests.Run(task, seed=1).manager.load_checkpoint(path)["number"]
        if result == 0:
            assert found == number, (found, number)
        else:
            assert found <= number, (found, number)
    assert result in (0, -signal.SIGKILL), result
    assert child(load) == 0, number
    if result == 0:
        break
    kills += 1
    number += 1
print(kills)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_process_that_is_killed_at_any_moment_leaves_a_checkpoint(tmp_path):
    here = Path(__file__).parent
    paths = [Path(package.__file__).parents[1] for package in (mfac_core, mfac_torch)]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLED, here / "conftest.py", __file__, tmp_path / "c.pt"],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))},
    )
    assert int(done.stdout) >= 8


# --- damaged states


def leaves(state, path=()):
    """Yield the path of each entry, and of each collection of entries."""
    if path:
        yield path
    inside = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    for key, value in inside:
        yield from leaves(value, (*path, key))


def with_change(state, path, change):
    changed = copy.deepcopy(state)
    place = changed
    for key in path[:-1]:
        place = place[key]
    change(place, path[-1])
    return changed


def value_at(state, path):
    for key in path:
        state = state[key]
    return state


def put(value):
    return lambda place, key: place.__setitem__(key, value)


def remove(place, key):
    del place[key]


def mutations(value):
    yield "removed", remove
    for wrong in ("x", None, [], {}, -1, 1.5, 10**30, float("nan"), torch.tensor(float("nan")), object()):
        yield repr(wrong)[:20], put(wrong)
    if isinstance(value, torch.Tensor):
        yield "another shape", put(torch.cat([value.reshape(-1), value.reshape(-1)[:1]]))
        yield "turned", put(value[None])
        yield "float", put(value.double() + 0.5)
        yield "bfloat16", put(value.to(torch.bfloat16))
        yield "sparse", put(value.float().to_sparse())
        yield "NaN", put(torch.full_like(value, float("nan"), dtype=torch.float32))
        yield "array", put(value.numpy())
    if isinstance(value, dict):
        yield "keys", lambda place, key: place.__setitem__(key, {f"other {k}": v for k, v in value.items()})
    if isinstance(value, list):
        yield "longer", lambda place, key: place.__setitem__(key, [*value, *value])


def harmless(path, name, changed):
    """Return whether a mutation leaves a whole state, by a rule."""
    value = None if name == "removed" else value_at(changed, path)
    if path[-1] == "gauss":
        # the second number of a pair is in hand, or not; NumPy looks at it only then
        return name != "removed" and (type(value) is float and value == value or (value is None and "python" in path))
    if path[-1] == "window" and path[0] == "prunings":
        return name in {"removed", "None"}  # rows are collected anew
    if path[0] == "prunings" and name == "array":
        return True  # the same numbers
    if path[-1] == "refused_rows":
        return type(value) is int and value >= 0  # a count for the log
    if path[-1] == "initial_sparsities":
        return name == "None"  # none were measured
    if path[-1] == "parts" and path[0] == "prunings" and name == "removed":
        return True  # a state of an older release
    if path[-1] == "steps_per_epoch" and path[0] == "prunings":
        return name == "removed"  # a state of an older release
    if path[-1] == "last_optimizer":
        return name in {"removed", "None"}  # known after a round
    if path == ("saved_by",):
        return name in {"removed", "None"}  # a state of an older release
    return path == ("random", "cuda") and value == []


def test_a_state_with_any_one_fault_is_refused_and_changes_nothing(task):
    state = Run(task).fit(0, 12).manager.state_dict()
    run = Run(task, seed=1).fit(0, 3)
    before = run.everything()
    tried = refused = 0
    wrong = []
    for path in leaves(state):
        if "words" in path[:-1]:
            continue
        for name, change in mutations(value_at(state, path)):
            changed = with_change(state, path, change)
            if equal(changed, state) or harmless(path, name, changed):
                continue
            tried += 1
            try:
                run.manager.load_state_dict(changed)
            except ValueError:
                refused += 1
            except Exception as error:
                wrong.append((path, name, repr(error)))
            else:
                wrong.append((path, name, "taken"))
                run = Run(task, seed=1).fit(0, 3)
                before = run.everything()
            if not equal(run.everything(), before):
                wrong.append((path, name, "changed"))
    assert wrong == []
    assert tried == refused > 400
    for whole in (None, 3, "x", [], {}, torch.zeros(3)):
        with pytest.raises(ValueError, match="state"):
            run.manager.load_state_dict(whole)
    run.manager.load_state_dict(state, rng=True)
    assert equal(run.manager.state_dict(), state)


@pytest.mark.parametrize(
    "words",
    [
        {"numpy": {"position": 625}},
        {"numpy": {"position": -1}},
        {"python": {"version": 2}},
        {"python": {"words": torch.full((625,), 2**31)}},
        {"torch": torch.zeros(5056, dtype=torch.uint8)},
    ],
)
def test_random_numbers_that_could_not_go_on_are_refused(task, words):
    state = Run(task).manager.state_dict()
    for key, value in words.items():
        state["random"][key] = state["random"][key] | value if isinstance(value, dict) else value
    with pytest.raises(ValueError, match="state is broken"):
        Run(task).manager.load_state_dict(state)


# --- other steps per epoch


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("now", [2, 3, 10])
def test_a_state_of_another_batch_size_goes_on_at_the_same_epoch(task, caplog, now, strict):
    saved = Run(task).fit(0, 10)
    state = saved.manager.state_dict()
    run = Run(task, seed=1, steps_per_epoch=now)
    run.model.load_state_dict(saved.model.state_dict())
    run.manager.load_state_dict(state, strict=strict)
    assert run.manager.state_dict()["step"] == 2 * now
    assert equal(run.manager.masks, saved.manager.masks)
    assert equal(run.model.state_dict(), saved.model.state_dict())
    (line,) = [record.message for record in caplog.records if "steps per epoch" in record.message]
    assert line.endswith(f"resumes at the same epoch, 2.00, which is step {2 * now}")
    assert run.manager.sparsity == saved.manager.sparsity
    run.fit(2 * now, 2 * now + 1)
    assert run.optimizer.param_groups[0]["lr"] == 0.01
    assert run.manager.sparsity < 0.6
    run.fit(2 * now + 1, 4 * now)
    assert run.manager.sparsity == pytest.approx((0.75 * 48 + 0.5 * 24) / 72)


def test_a_state_in_the_middle_of_a_window_keeps_its_rows(task):
    saved = Run(task).fit(0, 13)
    run = Run(task, steps_per_epoch=10)
    run.manager.load_state_dict(saved.manager.state_dict())
    rows = [each.state_dict()["prunings"][0]["window"]["rows"] for each in (saved.manager, run.manager)]
    assert torch.equal(*rows)


def test_a_state_of_an_older_release_goes_on_at_the_same_epoch(task):
    state = Run(task).fit(0, 10).manager.state_dict()
    for pruning in state["prunings"]:
        del pruning["steps_per_epoch"]
    run = Run(task, steps_per_epoch=10)
    run.manager.load_state_dict(state)
    assert run.manager.state_dict()["step"] == 20


# --- files of masks


@pytest.mark.parametrize("content", [b"", b"x" * 50, b"\x00" * 100])
def test_damaged_masks_are_a_value_error(tmp_path, content):
    file = tmp_path / "masks.safetensors"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"masks\.safetensors is not a file of masks, or is damaged"):
        load_masks(file)


def test_masks_that_are_no_booleans_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"w": torch.ones(3)}, tmp_path / "m.safetensors", metadata={"format": "mfac-masks-1"})
    with pytest.raises(ValueError, match=r"the mask of w is of torch\.float32"):
        load_masks(tmp_path / "m.safetensors")
    with pytest.raises(FileNotFoundError):
        load_masks(tmp_path / "none.safetensors")


def test_masks_that_cannot_be_written_leave_those_before(tmp_path, monkeypatch):
    file = tmp_path / "m.safetensors"
    save_masks({"w": torch.tensor([True, False])}, file)

    def full(number):
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="full"):
        save_masks({"w": torch.tensor([True, True])}, file)
    assert load_masks(file)["w"].tolist() == [True, False]
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


# --- torch.distributed.checkpoint


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_state_that_torch_creates_for_an_optimizer_is_no_step_of_training(task, optimizer):
    """To describe the state of an optimizer that has none, torch makes a step with rates and gradients of zero."""

    def trained(*, is_attached):
        model = task.model()
        made = optimizer(model.parameters(), lr=0.02)
        manager = ScheduledModifierManager.from_yaml(task.recipe("MagnitudePruningModifier", start_epoch=0.0))
        if is_attached:
            manager.modify(model, made, 5)
        before = copy.deepcopy(dict(model.state_dict()))
        of_model, of_optimizer = get_state_dict(model, made)
        set_state_dict(model, made, model_state_dict=of_model, optim_state_dict=of_optimizer)
        assert equal(dict(model.state_dict()), before)
        if not is_attached:
            manager.modify(model, made, 5)
        for step in range(8):
            assert manager.state_dict()["step"] == step
            task.train(model, made, start=step, stop=step + 1)
            made.zero_grad()
            if is_attached:
                get_state_dict(model, made)
        return dict(model.state_dict()), manager.masks

    assert equal(trained(is_attached=True), trained(is_attached=False))


def test_a_step_of_training_at_a_rate_of_zero_counts(task):
    run = Run(task)
    for group in run.optimizer.param_groups:
        group["lr"] = 0.0
    task.loss(run.model, task.batches[0]).backward()
    run.optimizer.step(closure=None)
    assert run.manager.state_dict()["step"] == 1
