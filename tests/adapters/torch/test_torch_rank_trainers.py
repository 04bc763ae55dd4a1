"""Trainers over two processes, launched as by ``torchrun``: they end like one process with the whole batches."""

import os
import warnings
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, SequentialSampler

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what the trainers import has warnings of its own
    accelerate = pytest.importorskip("accelerate")
    pytest.importorskip("transformers")
    pytest.importorskip("lightning.pytorch")
    from lightning.fabric import Fabric
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.strategies import ModelParallelStrategy
    from torch.distributed.fsdp import fully_shard
    from transformers import Trainer

from mfac_torch import ScheduledModifierManager
from mfac_torch.lightning import PruningCallback as LightningPruning
from mfac_torch.transformers import STATE_FILE
from mfac_torch.transformers import PruningCallback as TrainerPruning
from tests.adapters.torch import test_torch_lightning as of_lightning
from tests.adapters.torch import test_torch_transformers as of_transformers
from tests.adapters.torch.rank_processes import RankProcesses
from tests.adapters.torch.rank_training import full_weights, logged

pytestmark = [*of_lightning.pytestmark, *of_transformers.pytestmark]


@pytest.fixture(scope="module")
def pair():
    """Two processes of their own, because trainers keep global state."""
    processes = RankProcesses(2)
    yield processes
    processes.close()


@contextmanager
def launched(group):
    """Set what ``torchrun`` does, and nothing for a single process."""
    names = {}
    if group is not None:
        rank, size = str(group.rank()), str(group.size())
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "GROUP_RANK": "0"}
        names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "tests"}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def size_of(group):
    return 1 if group is None else group.size()


def assert_like_alone(outcomes, alone):
    """Assert that all ranks have ended alike, and like a single process."""
    for masks, weights in outcomes:
        assert masks.keys() == alone[0].keys()
        assert all(torch.equal(mask, alone[0][name]) for name, mask in masks.items())
        for name, weight in weights.items():
            torch.testing.assert_close(weight, alone[1][name], rtol=1e-4, atol=1e-5)
            assert torch.equal(weight, outcomes[0][1][name])


def outcome(manager, model):
    weights = {name: torch.from_numpy(weight) for name, weight in full_weights(model).items()}
    return manager.masks, weights


# --- Hugging Face


def bert():
    """The model of the tests of one process, without dropout."""
    model = of_transformers.bert()
    for module in model.modules():
        for name in ("p", "dropout_prob"):
            if hasattr(module, name):
                setattr(module, name, 0.0)
    return model


@contextmanager
def in_order():
    """Let the trainer take the data in order, whatever the number of ranks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_get_train_sampler", lambda self, *args: SequentialSampler(self.train_dataset))
        yield


def train_bert(group, folder, resume=None):
    with launched(group), in_order(), logged() as lines:
        callback = TrainerPruning(of_transformers.RECIPE, resume_from_checkpoint=resume)
        run = of_transformers.trainer(
            folder,
            callback,
            model=bert(),
            per_device_train_batch_size=of_transformers.BATCH // size_of(group),
            average_tokens_across_devices=False,  # which multiplies the loss by the number of ranks
            save_strategy="steps",
            save_steps=7,
        )
        run.train(resume_from_checkpoint=None if resume is None else str(resume))
        assert not any("anew" in line for line in lines), lines
        return callback.manager.masks, {name: each.detach() for name, each in run.model.named_parameters()}


@pytest.fixture(scope="module")
def bert_alone(tmp_path_factory):
    """A folder of a run of one process, and how it ended."""
    folder = tmp_path_factory.mktemp("bert")
    return folder, train_bert(None, folder)


def test_hugging_face_and_its_checkpoints(pair, bert_alone, tmp_path):
    _, alone = bert_alone
    assert_like_alone(pair.run(train_bert, tmp_path), alone)
    folder = tmp_path / "checkpoint-14"  # with the rows of steps 13 and 14
    assert sorted(each.name for each in folder.glob(f"{STATE_FILE}*")) == [STATE_FILE, f"{STATE_FILE}.rank-1-of-2"]
    assert_like_alone(pair.run(train_bert, tmp_path, folder), alone)
    assert_like_alone([train_bert(None, tmp_path, folder)], alone)


def test_two_ranks_resume_a_checkpoint_of_one_process(pair, bert_alone, tmp_path):
    folder, alone = bert_alone
    assert_like_alone(pair.run(train_bert, tmp_path, folder / "checkpoint-14"), alone)


# --- Accelerate


def train_accelerated(group, folder, first=0, last=4):
    """Train some epochs, beginning with a checkpoint unless they are the first; save one after the last."""
    with launched(group):
        accelerator = accelerate.Accelerator(cpu=True)
        model = of_lightning.Digits()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        loader = DataLoader(of_lightning.loader().dataset, of_lightning.BATCH // size_of(group))
        prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        manager = ScheduledModifierManager.from_yaml(of_lightning.RECIPE)
        manager.modify(prepared, optimizer, steps_per_epoch=len(loader))
        if first:
            accelerator.load_state(folder)
            manager.load_state(folder / "pruning.pt")
        for _ in range(first, last):
            for images, labels in loader:
                optimizer.zero_grad()
                accelerator.backward(nn.functional.cross_entropy(prepared(images), labels))
                optimizer.step()
        accelerator.save_state(folder)
        manager.save_state(folder / "pruning.pt")
        found = outcome(manager, model)
        manager.finalize()
        return found


def test_a_loop_with_accelerate(pair, tmp_path):
    alone = train_accelerated(None, tmp_path / "alone")
    pair.run(train_accelerated, tmp_path / "two", 0, 2)
    assert_like_alone(pair.run(train_accelerated, tmp_path / "two", 2, 4), alone)


# --- Lightning


class Sharded(of_lightning.Digits):
    """The same model, whose weights are sharded over ranks."""

    def configure_model(self):
        for layer in (self.net[0], self.net[2]):
            fully_shard(layer, mesh=self.device_mesh["data_parallel"])
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def on_train_batch_end(self, outputs, batch, batch_idx):
        pass


def fit(group, folder, how="ddp", resume=None):
    with launched(group), logged() as lines:
        options = {}
        if group is not None:
            sharded = ModelParallelStrategy(data_parallel_size=group.size(), tensor_parallel_size=1)
            options = {"strategy": how if how == "ddp" else sharded, "devices": group.size()}
            options["use_distributed_sampler"] = False  # which shuffles
        model = of_lightning.Digits() if group is None or how == "ddp" else Sharded()
        callback = LightningPruning(of_lightning.RECIPE)
        checkpoints = ModelCheckpoint(folder, "{step}", every_n_train_steps=7, save_top_k=-1)
        run = of_lightning.trainer(folder, callback, checkpoints, enable_checkpointing=True, **options)
        data = of_lightning.loader().dataset
        size = size_of(group)
        order = DistributedSampler(data, size, 0 if group is None else group.rank(), shuffle=False)
        loader = of_lightning.ResumableLoader(data, of_lightning.BATCH // size, sampler=order)
        run.fit(model, loader, ckpt_path=resume, weights_only=True if resume else None)
        assert not any("anew" in line for line in lines), lines
        return outcome(callback.manager, model)


@pytest.fixture(scope="module")
def digits_alone(tmp_path_factory):
    """A folder of a run of one process, and how it ended."""
    folder = tmp_path_factory.mktemp("digits")
    return folder, fit(None, folder)


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_lightning_and_its_checkpoints(pair, digits_alone, tmp_path, how):
    _, alone = digits_alone
    assert_like_alone(pair.run(fit, tmp_path, how), alone)
    saved = tmp_path / "step=14.ckpt"  # with the rows of steps 13 and 14
    assert_like_alone(pair.run(fit, tmp_path / "same", how, saved), alone)
    if how == "ddp":  # the checkpoint of the other strategy is a folder
        assert_like_alone(pair.run(fit, tmp_path / "other", "fsdp2", saved), alone)
        assert_like_alone([fit(None, tmp_path / "alone", resume=saved)], alone)


# --- Fabric


def train_with_fabric(group, folder):
    with launched(group):
        options = {} if group is None else {"strategy": "ddp", "devices": group.size()}
        fabric = Fabric(accelerator="cpu", **options)
        fabric.launch()
        model = of_lightning.Digits()
        wrapped, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
        loader = fabric.setup_dataloaders(
            DataLoader(of_lightning.loader().dataset, of_lightning.BATCH // size_of(group))
        )
        manager = ScheduledModifierManager.from_yaml(of_lightning.RECIPE)
        manager.modify(wrapped, optimizer, steps_per_epoch=len(loader))
        for _ in range(4):
            for images, labels in loader:
                optimizer.zero_grad()
                fabric.backward(nn.functional.cross_entropy(wrapped(images), labels))
                optimizer.step()
        found = outcome(manager, model)
        manager.finalize()
        return found


def test_a_loop_with_fabric(pair, tmp_path):
    assert_like_alone(pair.run(train_with_fabric, tmp_path), train_with_fabric(None, tmp_path))
