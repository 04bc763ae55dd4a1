import math

import numpy as np
import pytest
import torch
from torch import nn

from mfac_torch.masking import HeldMasks

pytestmark = pytest.mark.usefixtures("placement")  # on the CPU, and on a GPU

KEEP = np.array([[True, False, True], [False, True, True]])


@pytest.fixture
def weight():
    return nn.Parameter(torch.tensor([[1.0, -2.0, 3.0], [-4.0, 5.0, 6.0]]))


@pytest.fixture
def held(weight):
    held = HeldMasks({"weight": weight})
    held.hold({"weight": KEEP})
    return held


def test_pruned_weights_become_plus_zero_and_the_others_stay(held, weight):
    held.zero_weights()
    assert weight.tolist() == [[1, 0, 3], [0, 5, 6]]
    assert [math.copysign(1, weight[0, 1].item()), math.copysign(1, weight[1, 0].item())] == [1, 1]


def test_pruned_weights_become_zero_even_from_nan(held, weight):
    weight.data.fill_(math.nan)
    held.zero_weights()
    assert torch.equal(weight == 0, torch.from_numpy(~KEEP))


def test_gradients_are_zeroed_where_they_exist(held, weight):
    held.zero_gradients()
    assert weight.grad is None
    weight.grad = torch.full_like(weight, math.inf)
    held.zero_gradients()
    assert torch.equal(weight.grad == 0, torch.from_numpy(~KEEP))


def test_masks_keep_where_true_and_end_with_release(held, weight):
    assert torch.equal(held.masks["weight"], torch.from_numpy(KEEP))
    held.release()
    assert held.masks == {}
    held.zero_weights()
    assert weight[0, 1] == -2


def test_new_masks_replace_the_old(held, weight):
    held.hold({"weight": np.ones((2, 3), bool)})
    held.zero_weights()
    assert weight[0, 1] == -2


@pytest.mark.gpu("torch")
def test_masks_follow_a_parameter_to_another_device():
    layer = nn.Linear(3, 2, bias=False)
    held = HeldMasks({"weight": layer.weight})
    held.hold({"weight": KEEP})
    layer.to("cuda")
    held.zero_weights()
    assert torch.equal(layer.weight.cpu() == 0, torch.from_numpy(~KEEP))


def test_masks_follow_a_parameter_to_a_device_without_memory():
    layer = nn.Linear(3, 2, bias=False)
    held = HeldMasks({"weight": layer.weight})
    held.hold({"weight": KEEP})
    torch.utils.swap_tensors(layer.weight, nn.Parameter(layer.weight.to("meta")))
    held.zero_weights()
    assert held.masks["weight"].device.type == "meta"


def test_only_the_named_parameters_are_touched():
    first, second = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(2, 3))
    first.grad, second.grad = torch.ones(2, 3), torch.ones(2, 3)
    held = HeldMasks({"first": first, "second": second})
    held.hold({"first": KEEP, "second": KEEP})
    held.zero_weights(["second"])
    held.zero_gradients(["second"])
    assert (int((first == 0).sum()), int((second == 0).sum())) == (0, 2)
    assert (int((first.grad == 0).sum()), int((second.grad == 0).sum())) == (0, 2)
