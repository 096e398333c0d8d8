"""What is allocated and not written shows: torch.empty gives NaN here."""

import pytest
import torch

EMPTY, EMPTY_LIKE = torch.empty, torch.empty_like


def spoiled(tensor):
    return tensor.fill_(float("nan")) if tensor.is_floating_point() and tensor.itemsize > 1 else tensor.fill_(99)


@pytest.fixture(scope="module", autouse=True)
def nothing_is_empty():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", lambda *args, **kwargs: spoiled(EMPTY(*args, **kwargs)))
        patch.setattr(torch, "empty_like", lambda *args, **kwargs: spoiled(EMPTY_LIKE(*args, **kwargs)))
        yield
