"""Training scripts as they were written for SparseML 1.x: only their import lines are changed."""

import re

import pytest
import torch

GRADUAL = '''
import torch
from torch.nn import Conv2d, CrossEntropyLoss, Flatten, Linear, MaxPool2d, ReLU, Sequential
from torch.utils.data import DataLoader, TensorDataset
from sklearn.datasets import load_digits
from sparseml.pytorch.optim import ScheduledModifierManager

RECIPE = """---
version: 1.1.0

# General variables
num_epochs: 6.0
init_lr: 0.1
final_lr: 0.001

# Pruning variables
pruning_start: eval(0.25 * num_epochs)
pruning_end: eval(0.75 * num_epochs)
sparsity: 0.8

training_modifiers:
  - !EpochRangeModifier
      start_epoch: 0.0
      end_epoch: eval(num_epochs)

  - !LearningRateFunctionModifier
      start_epoch: 0.0
      end_epoch: eval(num_epochs)
      lr_func: cosine
      init_lr: eval(init_lr)
      final_lr: eval(final_lr)

pruning_modifiers:
  - !MFACPruningModifier
      params: __ALL_PRUNABLE__
      init_sparsity: 0.05
      final_sparsity: eval(sparsity)
      start_epoch: eval(pruning_start)
      end_epoch: eval(pruning_end)
      update_frequency: 0.5
      num_grads: {0.0: 16, 0.5: 24}
      fisher_block_size: 500
      damp: 0.001
      available_gpus: []
---

# A recipe
"""

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
labels = torch.tensor(digits.target)
train_loader = DataLoader(TensorDataset(images[:1400], labels[:1400]), batch_size=64, shuffle=True)

model = Sequential(
    Conv2d(1, 8, 3, padding=1), ReLU(), MaxPool2d(2), Conv2d(8, 16, 3, padding=1), ReLU(), Flatten(), Linear(256, 10)
)
device = "cuda:0" if torch.cuda.is_available() else "cpu"
model.to(device)
criterion = CrossEntropyLoss()
optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)  # lr will be overridden by recipe

manager = ScheduledModifierManager.from_yaml(RECIPE)
optimizer = manager.modify(model, optimizer, steps_per_epoch=len(train_loader))

model.train()
for epoch in range(manager.max_epochs):
    for inputs, targets in train_loader:
        inputs, targets = inputs.to(device), targets.to(device)
        optimizer.zero_grad()
        with torch.set_grad_enabled(True):
            loss = criterion(model(inputs), targets)
            loss.backward()
            optimizer.step()

manager.finalize(model)
manager.save("recipe.yaml")
torch.save(model.state_dict(), "pruned.pth")

model.eval()
accuracy = float((model(images[1400:].to(device)).argmax(dim=1).cpu() == labels[1400:]).float().mean())
'''

ONE_SHOT = '''
import torch
from torch.nn import CrossEntropyLoss, Linear, ReLU, Sequential
from torch.utils.data import DataLoader, TensorDataset
from sparseml.pytorch.optim import ScheduledModifierManager
from sparseml.pytorch.utils import GradSampler

torch.manual_seed(0)
dataset = TensorDataset(torch.randn(128, 20), torch.randint(3, (128,)))
device = "cpu"
model = Sequential(Linear(20, 32), ReLU(), Linear(32, 3))


def device_data_loader(data_loader):
    for sample in data_loader:
        img, target = [t.to(device) for t in sample]
        yield [img], {}, target


grad_sampler = GradSampler(device_data_loader(DataLoader(dataset, shuffle=True, batch_size=8)), CrossEntropyLoss())

manager = ScheduledModifierManager.from_yaml("""
modifiers:
  - !MFACPruningModifier
      params: __ALL_PRUNABLE__
      init_sparsity: 0.05
      final_sparsity: 0.5
      start_epoch: 0.0
      end_epoch: 1.0
      update_frequency: 1.0
      mfac_options:
        num_grads: 16
        fisher_block_size: 2000
        available_gpus: []
""")
manager.apply(model, grad_sampler=grad_sampler)
'''

INTEGRATION = '''
import math

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from sparseml.pytorch.optim import ScheduledModifierManager

torch.manual_seed(0)
train_loader = DataLoader(TensorDataset(torch.randn(64, 10), torch.randint(2, (64,))), batch_size=16)


class Classifier(nn.Module):
    """As models of SparseML do, it returns logits and classes."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(10, 2)

    def forward(self, x):
        logits = self.fc(x)
        return logits, torch.softmax(logits, dim=1)


class Board:
    def __init__(self):
        self.scalars = {}

    def log_scalar(self, tag, value, step=None, wall_time=None, level=None):
        self.scalars.setdefault(tag, []).append((step, value))


model, board = Classifier(), Board()
builders = []


def data_loader_builder(kwargs):
    template = dict(dataset=train_loader.dataset, batch_size=16, shuffle=True)
    builders.append(kwargs)
    if kwargs:
        template.update(kwargs)
    while True:  # infinite dataloading
        for inputs, targets in DataLoader(**template):
            yield [inputs], {}, targets


manager = ScheduledModifierManager.from_yaml("""
modifiers:
  - !EpochRangeModifier {start_epoch: 0.0, end_epoch: 3.0}
  - !SetLearningRateModifier {start_epoch: 0.0, learning_rate: 0.05}
  - !OBSPruningModifier
      params: ["re:.*weight"]
      init_sparsity: 0.2
      final_sparsity: 0.9
      start_epoch: 0.0
      end_epoch: 2.0
      update_frequency: 1.0
      num_grads: 12
      fisher_block_size: 50
      damp: 1e-3
      num_recomputations: 2
      grad_sampler_kwargs:
        batch_size: 4
""")
optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
scaler = torch.amp.GradScaler("cpu")

if not manager.initialized:
    manager.initialize(
        model,
        0,
        grad_sampler={
            "data_loader_builder": data_loader_builder,
            "loss_function": nn.functional.cross_entropy,
        },
    )
manager.initialize_loggers([board])
scheduler = None if manager.learning_rate_modifiers else torch.optim.lr_scheduler.StepLR(optimizer, 1)
epochs = manager.max_epochs if manager.epoch_modifiers and manager.max_epochs else 100
scaler = manager.modify(model, optimizer, steps_per_epoch=len(train_loader), wrap_optim=scaler)
pruning_end = math.ceil(max([mod.end_epoch for mod in manager.pruning_modifiers]))

for epoch in range(epochs):
    for inputs, targets in train_loader:
        logits, _ = model(inputs)
        scaler.scale(nn.functional.cross_entropy(logits, targets)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

checkpoint = {"state_dict": model.state_dict(), "recipe": str(manager), "manager": manager.state_dict()}
manager.finalize(model)
'''

OLDER = """
import torch
from torch import nn
from sparseml.pytorch.optim import ConstantPruningModifier, ScheduledModifierManager, ScheduledOptimizer

torch.manual_seed(0)
data = [(torch.randn(8, 6), torch.randn(8, 6)) for _ in range(5)]
model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
with torch.no_grad():
    model[0].weight[model[0].weight.abs() < 0.2] = 0
sparse = int((model[0].weight == 0).sum())

modifiers = ConstantPruningModifier.from_sparse_model(model)
manager = ScheduledModifierManager(modifiers=modifiers)
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
optimizer = ScheduledOptimizer(optimizer, model, manager, steps_per_epoch=len(data), loggers=[])
for epoch in range(2):
    for inputs, targets in data:
        optimizer.zero_grad()
        nn.functional.mse_loss(model(inputs), targets).backward()
        optimizer.step()
manager.finalize(model)
"""


def run(script, folder, monkeypatch):
    """Run a script in a folder, with its import lines changed and nothing else."""
    changed = re.sub(r"^from sparseml[\w.]* import", "from mfac_torch import", script, flags=re.MULTILINE)
    assert changed != script
    monkeypatch.chdir(folder)
    namespace = {"__name__": "__main__"}
    exec(compile(changed, "script", "exec"), namespace)
    return namespace


def sparsity(*layers):
    weights = [layer.weight for layer in layers]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what sklearn imports
def test_a_script_that_prunes_a_network_for_digits(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    after = run(GRADUAL, tmp_path, monkeypatch)
    model = after["model"]
    assert sparsity(model[0], model[3], model[6]) == pytest.approx(0.8, abs=0.002)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    saved = torch.load(tmp_path / "pruned.pth", weights_only=True)
    assert list(saved) == ["0.weight", "0.bias", "3.weight", "3.bias", "6.weight", "6.bias"]
    assert "MFACPruningModifier" in (tmp_path / "recipe.yaml").read_text()
    assert after["optimizer"].param_groups[0]["lr"] < 0.002


def test_a_script_that_prunes_in_one_shot_by_a_generator_of_samples(tmp_path, monkeypatch):
    model = run(ONE_SHOT, tmp_path, monkeypatch)["model"]
    assert sparsity(model[0], model[2]) == 0.5


def test_a_script_that_initializes_scales_and_samples(tmp_path, monkeypatch):
    after = run(INTEGRATION, tmp_path, monkeypatch)
    assert sparsity(after["model"].fc) == pytest.approx(0.9)
    assert after["builders"] == [{"batch_size": 4}] * 3 * 2
    assert after["board"].scalars["ParamPruning/fc.weight"][-1] == (8, pytest.approx(0.9))
    assert after["optimizer"].param_groups[0]["lr"] == 0.05
    assert (after["scheduler"], after["epochs"], after["pruning_end"]) == (None, 3, 2)


def test_a_script_of_the_older_kind_that_holds_zeros(tmp_path, monkeypatch):
    after = run(OLDER, tmp_path, monkeypatch)
    assert after["sparse"] > 0
    assert int((after["model"][0].weight == 0).sum()) == after["sparse"]
