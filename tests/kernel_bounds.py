"""How near a kernel has to come to its reference, and tensors that punish whoever computes their addresses narrowly."""

import numpy as np
import torch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# what a sum in another order may change; in bf16 one step more, since the interpreter cuts off where a GPU rounds
SLACK = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def assert_as_near(found, reference, *tensors, slack=1.0):
    """`reference(*tensors)` in the tensors' own type sets the bound: found may be twice as far from what it gives in
    fp32, and a step of the type further."""
    low = reference(*tensors)
    exact = reference(*(each.float() if is_wide(each) else each for each in tensors))
    for ours, theirs, best in zip(*map(as_tuple, (found, low, exact)), strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        if not ours.numel():
            continue
        allowed = 2 * (theirs.float() - best).abs().max() + slack * SLACK[ours.dtype] * max(best.abs().max(), 1)
        error = (ours.float() - best).abs().max()
        assert error <= allowed, f"{ours.dtype}: {error} from the reference, {allowed} is allowed"


def is_wide(value):
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.itemsize > 1


def as_tuple(value):
    return value if isinstance(value, tuple) else (value,)


def huge(rows, *shape):
    """int8 zeros [rows, *shape] of more than 2 ** 31 bytes, and as many before them: an offset of 32 bits that wraps
    around reads or writes there, and not where it should. Pages that nobody touches cost nothing."""
    size = rows * int(np.prod(shape))
    assert size > 2**31
    return torch.from_numpy(np.zeros(2**31 + size, np.int8))[2**31 :].view(rows, *shape)
