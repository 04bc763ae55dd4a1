"""What a run says: in the log, and to objects that take numbers."""

import logging

import pytest
import torch

from mfac_torch import ScheduledModifierManager


def attached(task, recipe, **modify):
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    manager = ScheduledModifierManager.from_yaml(recipe)
    manager.modify(model, optimizer, task.steps_per_epoch, **modify)
    return model, optimizer, manager


class Writer:
    """Has the method of TensorBoard's writer and no other."""

    def __init__(self):
        self.scalars = []

    def add_scalar(self, tag, scalar_value, global_step=None, walltime=None):
        self.scalars.append((tag, scalar_value, global_step))


class Logger:
    """Has the signature of SparseML's loggers."""

    def __init__(self):
        self.scalars = []

    def log_scalar(self, tag, value, step=None, wall_time=None, level=None):
        self.scalars.append((tag, value, step))


def test_writers_and_loggers_are_told_the_sparsity_of_each_parameter(task):
    writer, logger = Writer(), Logger()
    model, optimizer, _ = attached(task, task.recipe(), loggers=[writer, logger])
    task.train(model, optimizer)
    assert writer.scalars == logger.scalars
    assert [step for _, _, step in writer.scalars] == [5, 5, 10, 10, 15, 15, 20, 20]
    assert writer.scalars[-2:] == [("ParamPruning/0.weight", 0.75, 20), ("ParamPruning/2.weight", 0.75, 20)]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what tensorboard imports
def test_tensorboard_shows_the_sparsity_of_each_parameter(task, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path) as writer:
        model, optimizer, _ = attached(task, task.recipe(), loggers=writer)
        task.train(model, optimizer)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Tags()["scalars"] == ["ParamPruning/0.weight", "ParamPruning/2.weight"]
    assert [event.step for event in events.Scalars("ParamPruning/0.weight")] == [5, 10, 15, 20]
    assert events.Scalars("ParamPruning/2.weight")[-1].value == pytest.approx(0.75)


def test_loggers_may_be_given_before_modify_and_are_forgotten_at_the_end(task):
    first, second = Logger(), Logger()
    model, optimizer = task.model(), None
    manager = ScheduledModifierManager.from_yaml(task.recipe("MagnitudePruningModifier"))
    for kept, logger in ((True, first), (False, second)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        if kept:
            manager.initialize_loggers(logger)
        manager.modify(model, optimizer, task.steps_per_epoch)
        task.train(model, optimizer, stop=5)
        manager.finalize(model)
    assert len(first.scalars) == 2
    assert second.scalars == []
    with pytest.raises(TypeError, match="no method log_scalar"):
        manager.initialize_loggers([print])


def test_modify_says_what_each_modifier_matches_and_when_it_prunes(task, caplog):
    recipe = task.recipe() + (
        "  - !MagnitudePruningModifier {params: [0.bias], final_sparsity: 0.5, start_epoch: 1.0, end_epoch: 1.0}\n"
    )
    with caplog.at_level(logging.INFO, logger="mfac_torch"):
        attached(task, recipe)
    lines = [record.getMessage() for record in caplog.records]
    # a window of 4 x 72 float32, and room for a block of 4 x 16, its copy and its factor
    assert lines == [
        "MFACPruningModifier 1: 72 weights in 2 parameters (0.weight, 2.weight), up to 2,944 bytes of "
        "memory; 4 pruning steps from epoch 1 (step 5), sparsity 0.2, "
        "to epoch 4 (step 20), sparsity 0.75; computed on cpu (the recipe names no devices: computed "
        "where the weights are)",
        "MagnitudePruningModifier 2: 8 weights in 1 parameter (0.bias); one pruning step at epoch 1 (step 5), "
        "sparsity 0.5",
        "MFACPruningModifier 1: prunes each layer to the same sparsity, and does each pruning step in one pass: the "
        "default of older recipes, and not the most accurate; write global_sparsity: true and num_recomputations: auto "
        "(and update: joint, damp: auto)",
    ]


@pytest.mark.parametrize("several", [False, True])
def test_each_line_says_what_it_is_about(task, caplog, several):
    one = task.recipe("MagnitudePruningModifier", params="[0.weight]")
    other = task.recipe("MagnitudePruningModifier", params="[2.weight]").partition("\n")[2]
    model, optimizer, manager = attached(task, one + other * several)
    with caplog.at_level(logging.INFO, logger="mfac_torch"):
        task.train(model, optimizer, stop=6)
        manager.finalize()
    messages = [record.getMessage() for record in caplog.records]
    names = (
        ["MagnitudePruningModifier 1: 0.weight", "MagnitudePruningModifier 2: 2.weight"] if several else ["0.weight"]
    )
    for name in names:
        assert sum(message.startswith("pruning step") and f"({name})" in message for message in messages) == 1
        assert sum(f"without the pruning step of epoch 4 ({name}): sparsity is 0.2" in each for each in messages) == 1


def test_modify_does_not_explain_devices_that_the_recipe_names(task, caplog):
    with caplog.at_level(logging.INFO, logger="mfac_torch"):
        attached(task, task.recipe(available_devices="[cpu]"))
    assert caplog.messages[0].endswith("computed on cpu")


def test_each_planned_step_is_there_for_those_who_look_closer(task, caplog):
    with caplog.at_level(logging.DEBUG, logger="mfac_torch"):
        attached(task, task.recipe())
    steps = [record.getMessage() for record in caplog.records if record.levelno == logging.DEBUG]
    assert len(steps) == 4
    assert "step=10" in steps[1]


def test_warnings_of_the_linter_are_said_once_at_modify(task, caplog):
    recipe = task.recipe(num_grads=9) + "  - !EpochRangeModifier {start_epoch: 0.0, end_epoch: 3.0}\n"
    with caplog.at_level(logging.WARNING):
        attached(task, recipe)
    assert caplog.text.count("has 5 of 9 gradient samples") == 1
    assert caplog.text.count("train longer or end pruning earlier") == 1


def test_what_a_recipe_alone_shows_is_warned_of_when_it_is_loaded(task, caplog):
    recipe = task.recipe() + "  - !EpochRangeModifier {start_epoch: 0.0, end_epoch: 3.0}\n"
    ScheduledModifierManager.from_yaml(recipe)
    assert "train longer or end pruning earlier" in caplog.text


def test_a_sampler_leaves_no_window_to_warn_of(task, caplog):
    sampler = {"data_loader_builder": lambda: task.batches, "loss_function": torch.nn.functional.mse_loss}
    with caplog.at_level(logging.WARNING):
        attached(task, task.recipe(num_grads=9), grad_sampler=sampler)
    assert caplog.text == ""


@pytest.mark.parametrize(("rank", "times"), [("0", 1), ("1", 0), (None, 1)])
def test_warnings_of_a_recipe_are_logged_once_before_there_is_a_process_group(rank, times, monkeypatch, caplog):
    # as in Hugging Face's Trainer, whose callbacks are made before it is
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("RANK", rank or "1")
    if rank is not None:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    keys = "final_sparsity: 0.8, start_epoch: 1.0, end_epoch: 2.0"
    ScheduledModifierManager.from_yaml(f"pruning_modifiers: [!MFACPruningModifier {{params: __ALL__, {keys}}}]\n")
    assert sum("in one pass within each layer" in line for line in caplog.messages) == times
