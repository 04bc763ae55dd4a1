import doctest
import importlib
import re
import warnings
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset, IterableDataset

from mfac_torch import GradSampler, ScheduledModifierManager

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what transformers imports has warnings of its own
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        GPT2Config,
        GPT2LMHeadModel,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

from mfac_torch.transformers import STATE_FILE, PruningCallback

pytestmark = [
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator is found"),
]

BATCH = 8
STEPS_PER_EPOCH = 6
EPOCHS = 4
RECIPE = """
pruning_modifiers:
  - !MFACPruningModifier
    params: ["re:bert.encoder.*dense.weight"]
    init_sparsity: 0.2
    final_sparsity: 0.75
    start_epoch: 1.0
    end_epoch: 3.0
    update_frequency: 0.5
    num_grads: 4
    fisher_block_size: 50
    damp: 0.001
"""
PRUNING_STEPS = [6, 9, 12, 15, 18]


class Sentences(Dataset):
    """Made text of 20 words: the class is whether word 7 comes before word 3."""

    def __init__(self, count=BATCH * STEPS_PER_EPOCH):
        generator = torch.Generator().manual_seed(1)
        words = [torch.randperm(20, generator=generator)[:12] for _ in range(count)]
        self.rows = [{"input_ids": each, "labels": torch.tensor(int(each[0] > each[1]))} for each in words]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return dict(self.rows[index])


class Sparsities(TrainerCallback):
    """Remembers the number of zeros after each step of the trainer, and may break off there."""

    def __init__(self, break_at=None):
        self.zeros = {}
        self.break_at = break_at

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.zeros[state.global_step] = zeros(model)
        if state.global_step == self.break_at:
            raise KeyboardInterrupt

    @property
    def changes(self):
        return [step for step, count in self.zeros.items() if count != self.zeros.get(step - 1, count)]


def bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=12,
        hidden_dropout_prob=0.1,
    )
    return BertForSequenceClassification(config)


def pruned_weights(model):
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.startswith("bert.encoder") and name.endswith("dense.weight")
    }


def zeros(model):
    return sum(int((weight == 0).sum()) for weight in pruned_weights(model).values())


def wanted(model, sparsity=0.75):
    return sum(round(weight.numel() * sparsity) for weight in pruned_weights(model).values())


def trainer(folder, callback, *others, model=None, data=None, **arguments):
    arguments = {
        "output_dir": str(folder),
        "num_train_epochs": EPOCHS,
        "per_device_train_batch_size": BATCH,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "logging_steps": 3,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        **arguments,
    }
    return Trainer(
        model=model or bert(),
        args=TrainingArguments(**arguments),
        train_dataset=data or Sentences(),
        eval_dataset=Sentences(BATCH),
        callbacks=[callback, *others],
    )


def raw_optimizer(run):
    return run.optimizer.optimizer


def hooks(optimizer):
    return len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)


def test_a_recipe_runs_and_a_plain_module_remains(tmp_path):
    callback, sparsities = PruningCallback(RECIPE), Sparsities()
    run = trainer(tmp_path, callback, sparsities, max_grad_norm=0.5)
    run.train()
    assert zeros(run.model) == wanted(run.model)
    assert callback.manager.sparsity == 0.75
    assert sparsities.changes == PRUNING_STEPS
    assert hooks(raw_optimizer(run)) == 0
    assert sorted(run.model.state_dict()) == sorted(bert().state_dict())
    logged = {row["step"]: row["sparsity"] for row in run.state.log_history if "sparsity" in row}
    assert logged[3] == 0.0
    assert logged[18] == 0.75


@pytest.mark.parametrize("killed_at", [12, 14])
def test_an_interrupted_and_resumed_run_ends_with_the_same_weights(tmp_path, killed_at):
    whole = trainer(tmp_path / "whole", PruningCallback(RECIPE))
    whole.train()

    checkpoints = {"save_strategy": "steps", "save_steps": 2}
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, PruningCallback(RECIPE), Sparsities(killed_at + 1), **checkpoints).train()
    folder = tmp_path / f"checkpoint-{killed_at}"
    assert sorted(path.name for path in folder.glob(f"{STATE_FILE}*")) == [STATE_FILE]

    callback = PruningCallback(ScheduledModifierManager.from_yaml(RECIPE))
    run = trainer(tmp_path, callback, **checkpoints)
    run.train(resume_from_checkpoint=True)
    assert zeros(run.model) == wanted(run.model)
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(run.model.state_dict()[name], weight), name


def test_a_run_that_is_resumed_with_another_batch_size_goes_on_at_its_epoch(tmp_path, caplog):
    first = PruningCallback(RECIPE)
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, first, Sparsities(13), save_strategy="epoch").train()
    callback = PruningCallback(RECIPE)
    steps = {}

    class Begin(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            steps.setdefault(state.global_step, callback.manager.state_dict()["step"])

    run = trainer(tmp_path, callback, Begin(), per_device_train_batch_size=BATCH // 2)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
    assert "saved with 6 steps per epoch and this run has 12" in caplog.text
    assert (min(steps), steps[12]) == (12, 24)
    assert zeros(run.model) == wanted(run.model)


def test_a_state_of_pruning_that_is_damaged_is_named(tmp_path):
    trainer(tmp_path, PruningCallback(RECIPE), save_strategy="epoch").train()
    (tmp_path / "checkpoint-12" / STATE_FILE).write_bytes(b"x")
    with pytest.raises(ValueError, match=rf"checkpoint-12.{STATE_FILE} is damaged"):
        trainer(tmp_path, PruningCallback(RECIPE)).train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))


def test_a_checkpoint_of_another_folder_is_named(tmp_path):
    first = trainer(tmp_path / "first", PruningCallback(RECIPE), save_strategy="epoch")
    first.train()
    folder = str(tmp_path / "first" / "checkpoint-12")

    with pytest.raises(FileNotFoundError, match=r"resumes at step 12 .*checkpoint-12.*pass the folder"):
        trainer(tmp_path / "second", PruningCallback(RECIPE)).train(resume_from_checkpoint=folder)
    for arguments, options in [({}, {"resume_from_checkpoint": folder}), ({"resume_from_checkpoint": folder}, {})]:
        run = trainer(tmp_path / "second", PruningCallback(RECIPE, **options), **arguments)
        run.train(resume_from_checkpoint=folder)
        weights = first.model.state_dict()
        assert all(torch.equal(weight, weights[name]) for name, weight in run.model.state_dict().items())


def test_the_saved_state_holds_no_pickled_code(tmp_path):
    trainer(tmp_path, PruningCallback(RECIPE), save_strategy="epoch").train()
    state = torch.load(tmp_path / "checkpoint-12" / STATE_FILE, weights_only=True)
    assert state["step"] == 12


def test_checkpoints_without_the_gradient_window_are_smaller(tmp_path):
    sizes = {}
    for window in (True, False):
        folder = tmp_path / str(window)
        trainer(folder, PruningCallback(RECIPE, gradient_window=window), save_strategy="epoch").train()
        sizes[window] = (folder / "checkpoint-12" / STATE_FILE).stat().st_size
    kept = wanted(bert(), 0.3)  # some 0.68 are pruned by then
    assert sizes[True] - sizes[False] > 4 * 4 * kept


def test_accumulated_batches_make_one_step(tmp_path):
    sparsities = Sparsities()
    run = trainer(tmp_path, PruningCallback(RECIPE), sparsities, gradient_accumulation_steps=4)  # 4 batches, then 2
    run.train()
    assert sparsities.changes == [2, 3, 4, 5, 6]
    assert zeros(run.model) == wanted(run.model)


def test_bfloat16_autocast_prunes_to_the_same_sparsity(tmp_path):
    run = trainer(tmp_path, PruningCallback(RECIPE), bf16=True)
    run.train()
    assert zeros(run.model) == wanted(run.model)


@pytest.mark.usefixtures("placement")
def test_a_language_model_of_conv1d_layers_with_a_sampler(tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=20, n_positions=12, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    text = Sentences()
    for row in text.rows:
        row["labels"] = row["input_ids"]

    def batches():
        for index in range(0, len(text), 4):
            ids = torch.stack([row["input_ids"] for row in text.rows[index : index + 4]])
            yield [], {"input_ids": ids, "labels": ids}, None

    recipe = RECIPE.replace("re:bert.encoder.*dense.weight", "re:transformer.h.*[.]c_.*weight")
    callback = PruningCallback(
        recipe.replace("start_epoch: 1.0", "start_epoch: 0.0"),
        grad_sampler=GradSampler(batches, lambda output, _: output.loss),
    )
    run = trainer(tmp_path, callback, model=GPT2LMHeadModel(config), data=text)
    run.train()
    masks = callback.manager.masks
    assert "transformer.h.0.attn.c_attn.weight" in masks
    parameters = dict(run.model.named_parameters())
    for name, mask in masks.items():
        assert int((parameters[name] == 0).sum()) == round(0.75 * mask.numel())


def test_the_loggers_are_told_the_sparsity_of_each_parameter(tmp_path):
    class Scalars:
        def __init__(self):
            self.values = {}

        def log_scalar(self, tag, value, step):
            self.values[tag, step] = value

    scalars = Scalars()
    trainer(tmp_path, PruningCallback(RECIPE, loggers=scalars)).train()
    assert scalars.values["ParamPruning/bert.encoder.layer.1.output.dense.weight", 18] == 0.75


def test_a_callback_that_broke_off_can_be_used_again(tmp_path):
    callback = PruningCallback(RECIPE)
    broken = trainer(tmp_path, callback, Sparsities(break_at=10))
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    run = trainer(tmp_path, callback)
    run.train()
    assert hooks(raw_optimizer(broken)) == 0
    assert zeros(run.model) == wanted(run.model)


def test_where_the_recipe_sets_the_learning_rate_the_scheduler_has_no_effect(tmp_path):
    class Rates(TrainerCallback):
        used = ()

        def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            self.used = (*self.used, optimizer.param_groups[0]["lr"])

    rates = Rates()
    recipe = (
        RECIPE
        + """
training_modifiers:
  - !SetLearningRateModifier
    start_epoch: 2.0
    learning_rate: 0.002
"""
    )
    run = trainer(tmp_path, PruningCallback(recipe), rates, warmup_steps=3)
    run.train()
    assert rates.used == (0.01,) * 12 + (0.002,) * 12
    logged = {row["step"]: row["learning_rate"] for row in run.state.log_history if "learning_rate" in row}
    assert (logged[12], logged[15]) == (0.01, 0.002)


def test_what_would_undo_the_pruning_is_refused(tmp_path):
    arguments = {"save_strategy": "epoch", "eval_strategy": "epoch", "metric_for_best_model": "loss"}
    run = trainer(tmp_path, PruningCallback(RECIPE), load_best_model_at_end=True, **arguments)
    with pytest.raises(ValueError, match="load_best_model_at_end would restore the weights of a checkpoint"):
        run.train()


def test_steps_per_epoch_is_asked_for_where_the_data_have_no_length(tmp_path):
    class Endless(IterableDataset):
        def __iter__(self):
            while True:
                yield from Sentences().rows

    with pytest.raises(ValueError, match="the data set has no length.*pass steps_per_epoch to PruningCallback"):
        trainer(tmp_path, PruningCallback(RECIPE), data=Endless(), max_steps=24).train()
    run = trainer(tmp_path, PruningCallback(RECIPE, steps_per_epoch=6), data=Endless(), max_steps=24)
    run.train()
    assert zeros(run.model) == wanted(run.model)


def test_examples_in_docstrings_run():
    assert doctest.testmod(importlib.import_module("mfac_torch.transformers")).failed == 0


def test_the_block_of_the_migration_page_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = Path(__file__).parents[3] / "docs" / "migration.md"
    blocks = re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    (block,) = (each for each in blocks if "mfac_torch.transformers" in each)
    exec(compile(block, page, "exec"), {"__name__": "__main__"})
