"""What is allocated and not written shows: torch.empty gives NaN here; and the interpreter does nothing in vain."""

import numpy as np
import pytest
import torch
from interpreter import spare

EMPTY, EMPTY_LIKE = torch.empty, torch.empty_like


def spoiled(tensor):
    return tensor.fill_(float("nan")) if tensor.is_floating_point() and tensor.itemsize > 1 else tensor.fill_(99)


@pytest.fixture(scope="module", autouse=True)
def nothing_is_empty():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", lambda *args, **kwargs: spoiled(EMPTY(*args, **kwargs)))
        patch.setattr(torch, "empty_like", lambda *args, **kwargs: spoiled(EMPTY_LIKE(*args, **kwargs)))
        yield


@pytest.fixture(scope="module", autouse=True)
def interpreter_is_spared():
    with pytest.MonkeyPatch.context() as patch:
        spare(patch)
        yield


@pytest.fixture
def rows_alike(monkeypatch):
    """Products in which a row's sum has one order wherever it stands, as on a GPU. The interpreter's are numpy's: its
    BLAS sums the rows at a tile's edge in another order on some CPUs (Zen 5)."""

    def matmul(a, b, dtype=None):
        return np.einsum("...ij,...jk->...ik", a, b, dtype=dtype, casting="unsafe", optimize=False)

    monkeypatch.setattr(np, "matmul", matmul)
