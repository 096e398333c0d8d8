"""SwiGLU's kernel, interpreted, against its reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_bounds import DTYPES, assert_as_near

from speeder_engine.triton_kernels.swiglu import launch_swiglu, swiglu, swiglu_ref


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(3, 37), (1, 1), (2, 1030), (0, 5)])
def test_equals_the_reference(rows, size, dtype):
    torch.manual_seed(0)
    gate_up = (torch.randn(rows, 2 * size) * 4).to(dtype)
    assert_as_near(launch_swiglu(gate_up), swiglu_ref, gate_up, slack=4)


@settings(deadline=None, max_examples=8)
@given(st.integers(1, 4), st.integers(1, 70), st.sampled_from(DTYPES))
def test_any_shape(rows, size, dtype):
    gate_up = torch.linspace(-9, 9, rows * 2 * size).view(rows, 2 * size).to(dtype)
    assert_as_near(launch_swiglu(gate_up), swiglu_ref, gate_up, slack=4)


def test_a_gradient_goes_through_the_reference():
    gate_up = torch.randn(2, 6, requires_grad=True)
    swiglu(gate_up).sum().backward()
    assert gate_up.grad is not None
