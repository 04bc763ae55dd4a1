import doctest
import importlib
import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from mfac_core.errors import RecipeError
from mfac_torch import GradSampler, ScheduledModifierManager, apply_masks

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Lightning imports has warnings of its own
    datasets = pytest.importorskip("sklearn.datasets")
    pytest.importorskip("lightning.pytorch")
    from lightning.pytorch import Callback, LightningModule, Trainer, callbacks
    from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
    from lightning.pytorch.loggers import CSVLogger

from mfac_torch.lightning import PruningCallback

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning"),
]

BATCH = 64
STEPS_PER_EPOCH = 6
RECIPE = """
pruning_modifiers:
  - !MFACPruningModifier
    params: ["re:net.*weight"]
    init_sparsity: 0.2
    final_sparsity: 0.75
    start_epoch: 1.0
    end_epoch: 3.0
    update_frequency: 0.5
    num_grads: 4
    fisher_block_size: 50
    damp: 0.001
"""
WEIGHTS = 64 * 16 + 16 * 10


class ResumableLoader(DataLoader):
    """Goes on in the middle of an epoch, which Lightning asks of the loader."""

    drawn = 0

    def __iter__(self):
        skipped = self.drawn
        for index, batch in enumerate(super().__iter__()):
            if index >= skipped:
                self.drawn = (index + 1) % len(self)
                yield batch

    def state_dict(self):
        return {"drawn": self.drawn}

    def load_state_dict(self, state):
        self.drawn = state["drawn"]


def loader():
    images, labels = datasets.load_digits(return_X_y=True)
    images = torch.tensor(images[: BATCH * STEPS_PER_EPOCH], dtype=torch.float32) / 16
    return ResumableLoader(TensorDataset(images, torch.tensor(labels[: BATCH * STEPS_PER_EPOCH])), BATCH)


class Digits(LightningModule):
    """A classifier, written without a thought of pruning."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
        self.sparsities = []

    def forward(self, images):
        return self.net(images)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.sparsities.append(round(zeros(self) / WEIGHTS, 3))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)]


class TwoOptimizers(Digits):
    """The two layers have an optimizer each, stepped by hand."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        first.zero_grad()
        second.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        first.step()
        second.step()

    def configure_optimizers(self):
        return [torch.optim.Adam(self.net[index].parameters(), lr=0.01) for index in (0, 2)]


def zeros(model):
    return sum(int((layer.weight == 0).sum()) for layer in (model.net[0], model.net[2]))


def hooks(optimizer):
    return len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)


def trainer(folder, *callbacks, max_epochs=4, **options):
    options = {"logger": False, "enable_checkpointing": False, **options}
    return Trainer(
        max_epochs=max_epochs,
        accelerator="cpu",
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )


def fitted(folder, callback=None, *others, model=None, **options):
    model = model or Digits()
    callback = callback or PruningCallback(RECIPE)
    run = trainer(folder, callback, *others, **options)
    run.fit(model, loader())
    return model, callback, run


def test_a_recipe_runs_and_a_plain_module_remains(tmp_path):
    model, callback, run = fitted(tmp_path)
    assert zeros(model) == round(0.75 * WEIGHTS)
    assert callback.manager.sparsity == 0.75
    # sparsity grows at epochs 1, 1.5, 2, 2.5 and 3, and holds
    changes = [step + 1 for step in range(1, 24) if model.sparsities[step] != model.sparsities[step - 1]]
    assert changes == [6, 9, 12, 15, 18]
    assert all(hooks(optimizer) == 0 for optimizer in run.optimizers)
    assert sorted(model.state_dict()) == sorted(Digits().state_dict())


@pytest.mark.usefixtures("placement")
def test_the_masks_are_those_of_a_plain_loop(tmp_path):
    model, callback, _ = fitted(tmp_path)
    plain = Digits()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
    manager = ScheduledModifierManager.from_yaml(RECIPE)
    manager.modify(plain, optimizer, STEPS_PER_EPOCH)
    for _ in range(4):
        for batch in loader():
            optimizer.zero_grad()
            plain.training_step(batch, 0).backward()
            optimizer.step()
        scheduler.step()
    manager.finalize(plain)
    for name, weight in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight)
    assert callback.manager.masks.keys() == manager.masks.keys()


@pytest.mark.parametrize("killed_at", [12, 14])
def test_an_interrupted_and_resumed_run_ends_with_the_same_weights(tmp_path, killed_at):
    class Killed(Digits):
        def on_train_batch_start(self, batch, batch_idx):
            if self.global_step == killed_at + 1:
                raise KeyboardInterrupt

    checkpoints = {"dirpath": tmp_path / "checkpoints", "every_n_train_steps": 2}
    with pytest.raises(SystemExit):  # what Lightning makes of it
        fitted(tmp_path, None, ModelCheckpoint(**checkpoints), model=Killed(), enable_checkpointing=True)
    (saved,) = (tmp_path / "checkpoints").iterdir()
    assert f"step={killed_at}" in saved.name

    model, callback = Digits(), PruningCallback(RECIPE)
    run = trainer(tmp_path, callback, ModelCheckpoint(**checkpoints), enable_checkpointing=True)
    run.fit(model, loader(), ckpt_path=saved, weights_only=True)
    whole, *_ = fitted(tmp_path)
    assert zeros(model) == round(0.75 * WEIGHTS)
    for name, weight in whole.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name


def test_the_random_numbers_of_the_process_are_restored_only_if_asked(tmp_path):
    _, _, run = fitted(tmp_path, max_epochs=2)
    run.save_checkpoint(tmp_path / "two.ckpt")

    def resumed(*, seed, rng):
        seen = []

        class Begin(Callback):
            def on_fit_start(self, trainer, pl_module):
                torch.manual_seed(seed)

            def on_train_epoch_start(self, trainer, pl_module):
                seen.append(torch.get_rng_state())

        callback = PruningCallback(RECIPE, rng=rng)
        trainer(tmp_path, callback, Begin()).fit(Digits(), loader(), ckpt_path=tmp_path / "two.ckpt", weights_only=True)
        return seen[0]

    assert torch.equal(resumed(seed=1, rng=True), resumed(seed=2, rng=True))
    assert not torch.equal(resumed(seed=1, rng=False), resumed(seed=2, rng=False))


def test_a_run_that_is_resumed_with_another_batch_size_goes_on_at_its_epoch(tmp_path, caplog):
    first, saved, run = fitted(tmp_path, max_epochs=2)
    run.save_checkpoint(tmp_path / "two.ckpt")
    model, callback = Digits(), PruningCallback(RECIPE)
    smaller = DataLoader(loader().dataset, BATCH // 2)
    seen = {}

    class Begin(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            seen.setdefault(trainer.current_epoch, (callback.manager.state_dict()["step"], callback.manager.masks))

    trainer(tmp_path, callback, Begin()).fit(model, smaller, ckpt_path=tmp_path / "two.ckpt", weights_only=True)
    assert "saved with 6 steps per epoch and this run has 12" in caplog.text
    assert min(seen) == 2
    step, masks = seen[2]
    assert step == 24
    assert all(torch.equal(mask, saved.manager.masks[name]) for name, mask in masks.items())
    assert zeros(model) == round(0.75 * WEIGHTS)


def test_a_checkpoint_saved_after_the_end_can_be_resumed_too(tmp_path):
    _, _, run = fitted(tmp_path, max_epochs=2)
    run.save_checkpoint(tmp_path / "two.ckpt")
    model = Digits()
    trainer(tmp_path, PruningCallback(RECIPE)).fit(model, loader(), ckpt_path=tmp_path / "two.ckpt", weights_only=True)
    whole, *_ = fitted(tmp_path)
    assert torch.equal(model.net[0].weight, whole.net[0].weight)


def test_a_new_fit_begins_anew_whatever_a_test_has_loaded(tmp_path):
    class Tested(Digits):
        def test_step(self, batch, batch_idx):
            pass

    model, callback, run = fitted(tmp_path, model=Tested())
    run.save_checkpoint(tmp_path / "done.ckpt")
    run.test(model, loader(), ckpt_path=tmp_path / "done.ckpt", verbose=False, weights_only=True)
    model = Digits()
    trainer(tmp_path, callback).fit(model, loader())
    assert model.sparsities[4] == 0.0
    assert zeros(model) == round(0.75 * WEIGHTS)


def test_an_exception_leaves_a_plain_module(tmp_path):
    class Breaks(Digits):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            super().on_train_batch_end(outputs, batch, batch_idx)
            if self.global_step == 10:
                raise ZeroDivisionError

    model, callback = Breaks(), PruningCallback(RECIPE)
    run = trainer(tmp_path, callback)
    with pytest.raises(ZeroDivisionError):
        run.fit(model, loader())
    assert all(hooks(optimizer) == 0 for optimizer in run.optimizers)
    trainer(tmp_path, callback).fit(Digits(), loader())  # the callback is free for another run
    assert callback.manager.sparsity == 0.75


def test_accumulated_batches_make_one_step(tmp_path):
    model, *_ = fitted(tmp_path, accumulate_grad_batches=4)  # 4 batches, then the 2 that are left
    changes = [batch + 1 for batch in range(1, 24) if model.sparsities[batch] != model.sparsities[batch - 1]]
    assert changes == [6, 10, 12, 16, 18]
    assert zeros(model) == round(0.75 * WEIGHTS)


def test_bfloat16_autocast_prunes_to_the_same_sparsity(tmp_path):
    model, *_ = fitted(tmp_path, precision="bf16-mixed", gradient_clip_val=1.0)
    assert zeros(model) == round(0.75 * WEIGHTS)
    assert model.net[0].weight.dtype == torch.float32


def test_several_optimizers_stepped_by_hand(tmp_path):
    model, *_ = fitted(tmp_path, model=TwoOptimizers())
    assert zeros(model) == round(0.75 * WEIGHTS)
    changes = [step + 1 for step in range(1, 24) if model.sparsities[step] != model.sparsities[step - 1]]
    assert changes == [6, 9, 12, 15, 18]


def test_gradient_samples_may_come_from_a_sampler(tmp_path):
    callback = PruningCallback(
        RECIPE.replace("start_epoch: 1.0", "start_epoch: 0.0"),
        grad_sampler=GradSampler(loader(), nn.functional.cross_entropy),
    )
    model, *_ = fitted(tmp_path, callback)
    assert model.sparsities[0] == 0.2
    assert zeros(model) == round(0.75 * WEIGHTS)


def test_the_loggers_of_the_trainer_are_told_the_sparsity(tmp_path):
    logger = CSVLogger(tmp_path)
    fitted(tmp_path, logger=logger)
    lines = (line.split(",") for line in (tmp_path / logger.log_dir / "metrics.csv").read_text().splitlines())
    header, *rows = lines
    logged = [dict(zip(header, row, strict=True)) for row in rows]
    by_step = {int(row["step"]): row["ParamPruning/net.0.weight"] for row in logged if row["ParamPruning/net.0.weight"]}
    assert list(by_step) == [6, 9, 12, 15, 18]
    assert float(by_step[18]) == 0.75
    assert [round(float(row["sparsity"]), 3) for row in logged if row["sparsity"]][2:] == [0.75, 0.75]


def test_steps_per_epoch_is_asked_for_where_the_trainer_does_not_know_it(tmp_path):
    class Endless(IterableDataset):
        def __iter__(self):
            while True:
                yield from zip(*loader().dataset.tensors, strict=True)

    endless = DataLoader(Endless(), BATCH)
    with pytest.raises(ValueError, match="how many batches an epoch has; pass steps_per_epoch to PruningCallback"):
        trainer(tmp_path, PruningCallback(RECIPE), max_steps=24, max_epochs=-1).fit(Digits(), endless)
    with pytest.raises(ValueError, match="GradientAccumulationScheduler gives epochs different numbers of steps"):
        trainer(tmp_path, PruningCallback(RECIPE), GradientAccumulationScheduler({0: 1, 2: 2})).fit(Digits(), loader())
    model = Digits()
    callback = PruningCallback(RECIPE, steps_per_epoch=STEPS_PER_EPOCH)
    trainer(tmp_path, callback, max_steps=24, max_epochs=-1).fit(model, endless)
    assert zeros(model) == round(0.75 * WEIGHTS)


def test_checkpoints_without_the_gradient_window_are_smaller(tmp_path):
    sizes = {}
    for window in (True, False):
        _, _, run = fitted(tmp_path, PruningCallback(RECIPE, gradient_window=window), max_epochs=2)
        run.save_checkpoint(tmp_path / f"{window}.ckpt")
        sizes[window] = (tmp_path / f"{window}.ckpt").stat().st_size
    rows, bytes_per_row = 4, 4 * WEIGHTS // 4  # more than a quarter of the weights are left by then
    assert sizes[True] - sizes[False] > rows * bytes_per_row


def test_the_trainer_of_pytorch_lightning_takes_the_same_callback(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        older = pytest.importorskip("pytorch_lightning")

    net = Digits().net

    class Same(older.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    run = older.Trainer(
        max_epochs=3,
        accelerator="cpu",
        callbacks=[PruningCallback(RECIPE)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    run.fit(Same(), loader())
    assert sum(int((layer.weight == 0).sum()) for layer in (net[0], net[2])) == round(0.75 * WEIGHTS)


def test_two_that_set_the_learning_rate_are_warned_of(tmp_path, caplog):
    recipe = RECIPE + "training_modifiers:\n  - !SetLearningRateModifier\n    learning_rate: 0.01\n"
    fitted(tmp_path, PruningCallback(recipe), max_epochs=1)
    assert "the recipe sets the learning rate and so does a scheduler of the LightningModule" in caplog.text


def test_a_wrong_recipe_is_refused_when_the_callback_is_made():
    with pytest.raises(RecipeError, match="final_sparsty"):
        PruningCallback(RECIPE.replace("final_sparsity", "final_sparsty"))


def test_examples_in_docstrings_run():
    assert doctest.testmod(importlib.import_module("mfac_torch.lightning")).failed == 0


def test_the_block_of_the_migration_page_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = Path(__file__).parents[3] / "docs" / "migration.md"
    blocks = re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    (block,) = (each for each in blocks if "mfac_torch.lightning" in each)
    exec(compile(block, page, "exec"), {"__name__": "__main__"})


# --- what other callbacks do to the weights


def averaging(name):
    made = getattr(callbacks, name, None)
    if made is None:
        pytest.skip(f"this Lightning has no {name}")
    return made(0.01, swa_epoch_start=1) if name == "StochasticWeightAveraging" else made()


class WithNormalization(Digits):
    """Stochastic weight averaging adds an epoch for its statistics."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(10)

    def forward(self, images):
        return self.norm(self.net(images))


class Restoring(callbacks.Callback):
    """Puts the weights of the first epoch back, as callbacks that keep the best do."""

    def __init__(self, hook):
        setattr(self, hook, lambda trainer, pl_module: pl_module.load_state_dict(self.best))

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 0:
            self.best = {name: value.clone() for name, value in pl_module.state_dict().items()}


@pytest.mark.parametrize("pruning_first", [True, False])
@pytest.mark.parametrize("name", ["StochasticWeightAveraging", "WeightAveraging", "EMAWeightAveraging"])
@pytest.mark.parametrize("kind", [Digits, WithNormalization])
def test_an_average_of_the_weights_has_the_zeros_that_are_reported(tmp_path, pruning_first, name, kind):
    class Validated(kind):
        def validation_step(self, batch, batch_idx):
            self.validated = round(zeros(self) / WEIGHTS, 3)

    model, callback = Validated(), PruningCallback(RECIPE)
    both = [callback, averaging(name)] if pruning_first else [averaging(name), callback]
    writer = ModelCheckpoint(dirpath=tmp_path / "checkpoints", every_n_epochs=1, save_last=True)
    run = trainer(tmp_path, *both, writer, max_epochs=5, enable_checkpointing=True)
    run.fit(model, loader(), loader())
    assert zeros(model) == round(0.75 * WEIGHTS)
    assert callback.manager.sparsity == 0.75
    assert model.validated == 0.75
    run.save_checkpoint(tmp_path / "end.ckpt")
    for path in [tmp_path / "end.ckpt", *(tmp_path / "checkpoints").iterdir()]:
        saved = Digits()
        saved.load_state_dict(torch.load(path, weights_only=True)["state_dict"], strict=False)
        assert zeros(saved) == round(0.75 * WEIGHTS), path.name


@pytest.mark.parametrize("pruning_first", [True, False])
@pytest.mark.parametrize("hook", ["on_train_end", "on_fit_end"])
def test_weights_that_another_callback_puts_back_are_left_and_said(tmp_path, caplog, pruning_first, hook):
    model, callback, restoring = Digits(), PruningCallback(RECIPE), Restoring(hook)
    trainer(tmp_path, *([callback, restoring] if pruning_first else [restoring, callback])).fit(model, loader())
    assert torch.equal(model.net[0].weight, restoring.best["net.0.weight"])
    assert callback.manager.sparsity == zeros(model) / WEIGHTS < 0.25
    (warning,) = [record.getMessage() for record in caplog.records if "are not zero" in record.getMessage()]
    assert "net.0.weight" in warning
    assert "restored" in warning
    assert "apply_masks" in warning


@pytest.mark.parametrize("hook", ["on_train_end", "on_fit_end"])
def test_weights_that_the_module_itself_puts_back_are_said(tmp_path, caplog, hook):
    model, callback = Digits(), PruningCallback(RECIPE)
    best = {name: value.clone() for name, value in model.state_dict().items()}
    setattr(model, hook, lambda: model.load_state_dict(best))
    trainer(tmp_path, callback).fit(model, loader())
    assert callback.manager.sparsity == zeros(model) / WEIGHTS == 0
    (warning,) = [record.getMessage() for record in caplog.records if "are not zero" in record.getMessage()]
    assert "apply_masks" in warning


def test_an_average_of_weights_before_the_last_pruning_step_is_said_with_its_cure(tmp_path, caplog):
    callback = PruningCallback(RECIPE)
    trainer(tmp_path, callback, averaging("StochasticWeightAveraging"), max_epochs=5).fit(Digits(), loader())
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning.startswith("StochasticWeightAveraging replaced the weights by an average")
    assert "after the last pruning step" in warning


def test_a_model_that_fabric_has_wrapped_keeps_its_names(tmp_path):
    fabric = pytest.importorskip("lightning.fabric").Fabric(accelerator="cpu", devices=1)
    inner = nn.Sequential(nn.Linear(4, 3))
    model, optimizer = fabric.setup(inner, torch.optim.SGD(inner.parameters(), lr=0.1))
    manager = ScheduledModifierManager.from_yaml(RECIPE.replace("re:net.*weight", "0.weight"))
    manager.modify(model, optimizer, steps_per_epoch=1)
    for _ in range(8):
        optimizer.zero_grad()
        fabric.backward(model(torch.ones(2, 4)).square().sum())
        optimizer.step()
    manager.finalize(model)
    assert list(manager.masks) == ["0.weight"]
    assert apply_masks(model, manager) == 0


def test_early_stopping_beside_it_changes_nothing(tmp_path, caplog):
    for first in (True, False):
        callback, stopping = PruningCallback(RECIPE), callbacks.EarlyStopping("sparsity", mode="max", patience=5)
        model = Digits()
        trainer(tmp_path, *([callback, stopping] if first else [stopping, callback])).fit(model, loader())
        assert zeros(model) == round(0.75 * WEIGHTS)
    assert not [record for record in caplog.records if record.name == "mfac_torch"]
