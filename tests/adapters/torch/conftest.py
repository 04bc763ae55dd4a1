"""What the tests of the adapter share: a tiny training run, virtual GPUs, and processes for several ranks."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from mfac_core.backends import lookup
from mfac_core.fisher import kernels
from mfac_torch import conversion
from mfac_torch.array_kernels import KERNELS
from tests.adapters.torch.rank_processes import RankProcesses
from tests.adapters.torch.virtual_gpus import NoFloat64, VirtualGpus

torch.set_num_threads(1)

STEPS_PER_EPOCH = 5


class TinyTask:
    """Fixed data of 5 batches per epoch, and the loop a user would write."""

    steps_per_epoch = STEPS_PER_EPOCH

    def __init__(self):
        generator = torch.Generator().manual_seed(7)
        self.batches = [
            (torch.randn(16, 6, generator=generator), torch.randn(16, 3, generator=generator))
            for _ in range(STEPS_PER_EPOCH)
        ]

    @staticmethod
    def model(seed=0):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

    @staticmethod
    def loss(model, batch):
        inputs, targets = batch
        return nn.functional.mse_loss(model(inputs), targets)

    def train(self, model, optimizer, *, start=0, stop=20, after_step=None):
        """Make the optimizer steps from ``start`` to ``stop``, none of which knows of pruning."""
        for step in range(start, stop):
            optimizer.zero_grad()
            self.loss(model, self.batches[step % STEPS_PER_EPOCH]).backward()
            optimizer.step()
            if after_step is not None:
                after_step(step + 1)

    @staticmethod
    def recipe(modifier="MFACPruningModifier", **keys):
        """A recipe that prunes in epochs 1, 2, 3 and 4, which are steps 5, 10, 15 and 20."""
        schedule = {
            "params": "__ALL_PRUNABLE__",
            "init_sparsity": 0.2,
            "final_sparsity": 0.75,
            "start_epoch": 1.0,
            "end_epoch": 4.0,
            "update_frequency": 1.0,
        }
        of_mfac = {"num_grads": 4, "fisher_block_size": 16, "damp": 0.01} if "MFAC" in modifier else {}
        lines = "".join(f"    {key}: {value}\n" for key, value in (schedule | of_mfac | keys).items())
        return f"pruning_modifiers:\n  - !{modifier}\n{lines}"


@pytest.fixture
def task():
    return TinyTask()


@pytest.fixture
def gpus(monkeypatch):
    """Make the tensors of the CPU those of a GPU, as far as pruning can see, and return the backend of the GPUs."""
    backend = VirtualGpus()
    monkeypatch.setitem(lookup._registered, "torch", backend)
    monkeypatch.setattr(conversion, "_is_on_cpu", lambda tensor: False)
    return backend


@pytest.fixture
def no_float64(gpus):
    """Run on virtual GPUs without float64, like Apple's, and return their backend."""
    kernels.register("torch", replace(KERNELS, wide_dtype=lambda x: torch.float32))
    try:
        with NoFloat64():
            yield gpus
    finally:
        kernels.register("torch", KERNELS)


@pytest.fixture(params=["cpu", "gpu"])
def placement(request):
    """Run a test twice: with the model on the CPU, and on a GPU."""
    if request.param == "gpu":
        request.getfixturevalue("gpus")
    return request.param


@pytest.fixture(scope="session")
def rank_processes():
    """Four processes of ``torch.distributed``, started by the first test that uses them."""
    processes = RankProcesses()
    yield processes
    processes.close()


@pytest.fixture
def one_process(tmp_path):
    """Let this process be a process group."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
