import numpy as np
import pytest
import torch
from torch import nn

from mfac_torch.conversion import to_array, to_tensor, write_back


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_host_floats_share_memory_with_the_array(dtype):
    tensor = torch.zeros(3, 4, dtype=dtype)
    array = to_array(tensor)
    tensor[1, 2] = 7
    assert array[1, 2] == 7
    assert array.dtype == np.dtype(str(dtype).removeprefix("torch."))


def test_strided_parameters_are_viewed_in_their_own_shape():
    weight = nn.Parameter(torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last))
    array = to_array(weight)
    assert np.shares_memory(array, weight.detach().numpy())
    np.testing.assert_array_equal(array, weight.detach().contiguous().numpy())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_floats_become_float32(dtype):
    tensor = torch.tensor([1.5, -2.25], dtype=dtype)
    array = to_array(tensor)
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array, [1.5, -2.25])


@pytest.mark.parametrize(
    ("tensor", "word"),
    [
        (torch.zeros(2, dtype=torch.int64), "int64"),
        (torch.zeros(2, dtype=torch.complex64), "complex64"),
        (torch.eye(2).to_sparse(), "sparse"),
        (torch.zeros(2, device="meta"), "meta"),
    ],
)
def test_tensors_without_dense_float_values_are_refused_by_name(tensor, word):
    with pytest.raises(TypeError, match=word):
        to_array(tensor)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_writing_back_keeps_what_the_parameter_is(dtype):
    weight = nn.Parameter(torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last).to(dtype))
    address, strides = weight.data_ptr(), weight.stride()
    values = np.arange(96, dtype=np.float32).reshape(2, 3, 4, 4)
    write_back(weight, values)
    np.testing.assert_array_equal(weight.detach().to(torch.float32).numpy(), values)
    assert (weight.data_ptr(), weight.stride(), weight.dtype) == (address, strides, dtype)
    assert weight.requires_grad
    assert weight.grad_fn is None


def test_writing_back_another_shape_is_refused_rather_than_broadcast():
    with pytest.raises(ValueError, match=r"\(1, 3\).*\(2, 3\)"):
        write_back(torch.zeros(2, 3), np.zeros((1, 3), np.float32))


def test_read_only_and_reversed_arrays_become_tensors():
    frozen = np.arange(3.0)
    frozen.flags.writeable = False
    assert to_tensor(frozen).tolist() == [0, 1, 2]
    assert to_tensor(np.arange(3.0)[::-1]).tolist() == [2, 1, 0]


def test_tensors_of_a_gpu_stay_tensors_that_share_their_memory(gpus):
    weight = nn.Parameter(torch.zeros(3))
    array = to_array(weight)
    assert isinstance(array, torch.Tensor)
    assert array.data_ptr() == weight.data_ptr()
    assert not array.requires_grad
    assert to_tensor(array) is array
    write_back(weight, array + 1)
    assert weight.tolist() == [1, 1, 1]
    assert weight.requires_grad
    assert to_array(weight.to(torch.bfloat16)).dtype == torch.float32
