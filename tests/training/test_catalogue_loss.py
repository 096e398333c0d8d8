"""The loss in place of its scores, held against torch's own cross-entropy in fp64."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from speeder_engine.training import catalogue_loss as module
from speeder_engine.training.catalogue_loss import add_scaled, catalogue_loss

NUM_ROWS, NUM_ITEMS, WIDTH = 37, 211, 5


def parts(dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    drawn = {
        "vectors": torch.randn(NUM_ROWS, WIDTH, generator=generator, dtype=torch.float64) * 4,
        "tokens": torch.randn(NUM_ITEMS, WIDTH, generator=generator, dtype=torch.float64),
        "gamma": torch.tensor(0.7, dtype=torch.float64),
        "following": torch.rand(NUM_ROWS, NUM_ITEMS, generator=generator, dtype=torch.float64),
    }
    learning = {name: part.to(dtype).requires_grad_(name != "following") for name, part in drawn.items()}
    return learning | {"targets": torch.randint(NUM_ITEMS, (NUM_ROWS,), generator=generator)}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_value_and_gradients_equal_cross_entropy(dtype: torch.dtype, smoothing: float) -> None:
    ours, theirs = parts(dtype), parts(torch.float64)
    scores = add_scaled(ours["vectors"] @ ours["tokens"].T, ours["gamma"], ours["following"])
    loss = catalogue_loss(scores, ours["targets"], smoothing)
    expected = F.cross_entropy(
        theirs["vectors"] @ theirs["tokens"].T + theirs["gamma"] * theirs["following"],
        theirs["targets"],
        label_smoothing=smoothing,
    )
    (3 * loss).backward()
    (3 * expected).backward()
    bound = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(loss.double(), expected, rtol=bound, atol=bound)
    for name in ("vectors", "tokens", "gamma"):
        torch.testing.assert_close(ours[name].grad.double(), theirs[name].grad, rtol=bound, atol=bound)


def test_items_that_stand_for_nobody_take_no_part() -> None:
    left_out = torch.zeros(NUM_ITEMS)
    left_out[3::7] = torch.inf
    drawn = parts(torch.float32)
    drawn["targets"][(drawn["targets"] % 7) == 3] += 1
    scores = drawn["vectors"] @ drawn["tokens"].T - left_out
    expected = F.cross_entropy(scores, drawn["targets"])
    torch.testing.assert_close(catalogue_loss(scores, drawn["targets"]), expected)
    catalogue_loss(drawn["vectors"] @ drawn["tokens"].T - left_out, drawn["targets"]).backward()
    gradient = drawn["tokens"].grad
    assert gradient[3::7].abs().max() == 0
    assert torch.isfinite(gradient).all()


def test_large_scores_neither_overflow_nor_vanish() -> None:
    scores = torch.tensor([[1e4, 0.0, -1e4], [-1e4, -1e4, -1e4]])
    targets = torch.tensor([1, 2])
    expected = F.cross_entropy(scores, targets)
    torch.testing.assert_close(catalogue_loss(scores.clone(), targets), expected)


def test_nothing_to_learn_from_is_told_as_torch_tells_it() -> None:
    empty, none = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    assert catalogue_loss(empty, none).isnan()
    assert F.cross_entropy(empty, none).isnan()


def test_a_second_backward_pass_is_refused() -> None:
    scores = torch.randn(4, 5, requires_grad=True)
    loss = catalogue_loss(scores * 1, torch.zeros(4, dtype=torch.int64))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="compute the loss again"):
        loss.backward()


def test_more_scores_than_one_product_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_OF_DOT", 5)
    test_value_and_gradients_equal_cross_entropy(torch.float64, 0.1)
