"""The catalogue's best for each user, on the CPU."""

from collections.abc import Sequence

import torch
from torch import Tensor

from speeder_engine import _cpu
from speeder_engine.native.support import NUMBERS
from speeder_engine.triton_kernels.top_scores import Answerable, RowLists, top_scores


def search_catalogue(
    vectors: Tensor,
    table: Tensor,
    prior: Tensor,
    answerable: Answerable,
    k: int | Sequence[int],
    kernels: str | None,
) -> tuple[Tensor, Tensor]:
    """`top_scores` by the native kernels that `pick_kernels` found, or without them; k: of all, or [B], each user's.
    What stands beyond a user's own k means nothing."""
    if kernels is None:
        return top_scores(vectors, table, prior, answerable, k if isinstance(k, int) else max(k))
    return native_top_scores(vectors, table, prior, answerable, k, kernels)


def native_top_scores(
    vectors: Tensor, table: Tensor, prior: Tensor, answerable: Answerable, k: int | Sequence[int], kernels: str
) -> tuple[Tensor, Tensor]:
    """As `top_scores`: vectors [B, d] and table [I, d], both fp32 or both bf16; prior [I], already weighted.

    Returns scores fp32 [B, k'] and rows [B, k'], k' = min(k, I), equal scores by row; what may not be answered is -inf,
    its row 0. With a k for each user, k' is that of the deepest, and beyond a user's own nothing is written.
    """
    (num_users, size), num_items = vectors.shape, table.shape[0]
    asked = [k] * num_users if isinstance(k, int) else k
    kept = min(k if isinstance(k, int) else max(asked, default=0), num_items)
    depths = torch.tensor([min(each, kept) for each in asked], dtype=torch.int32)
    scores = torch.empty(num_users, kept, dtype=torch.float32)
    rows = torch.empty(num_users, kept, dtype=torch.int64)
    if not num_users or not kept:
        return scores, rows
    vectors, prior = vectors.contiguous(), prior.float().contiguous()
    assert vectors.dtype == table.dtype and table.is_contiguous() and answerable.available.is_contiguous()
    assert len(asked) == num_users
    allowed, limited = answerable.allowed, answerable.limited
    search: dict[str, int | str] = {
        "table": table.data_ptr(),
        "users": vectors.data_ptr(),
        "type": NUMBERS[table.dtype],
        "num_items": num_items,
        "num_users": num_users,
        "size": size,
        "k": kept,
        "depths": depths.data_ptr(),
        "prior": prior.data_ptr(),
        "available": answerable.available.data_ptr(),
        **_lists("excluded", answerable.excluded),
        **_lists("allowed", allowed),
        "limited": 0 if limited is None else limited.data_ptr(),
        "scores": scores.data_ptr(),
        "rows": rows.data_ptr(),
    }
    _cpu.top_scores(search, kernels, torch.get_num_threads())
    return scores, rows


def _lists(name: str, lists: RowLists | None) -> dict[str, int]:
    if lists is None:
        return {f"{name}_rows": 0, f"{name}_starts": 0}
    assert lists.rows.dtype == lists.starts.dtype == torch.int32
    return {f"{name}_rows": lists.rows.data_ptr(), f"{name}_starts": lists.starts.data_ptr()}
