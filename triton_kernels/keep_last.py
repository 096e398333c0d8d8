"""h(last) of every sequence: a new history row's final hidden state, or the one kept with an unchanged session.

last_b            = hidden_(last_read_b)      where a history row of b is new
                  = kept_(kept_slots_b)       elsewhere
kept_(keep_slots_b) = last_b

What is read in `kept` is written by nobody of the same batch: a session has one writer a step. What nobody keeps goes
to one slot that nobody reads.
"""

import torch
from torch import Tensor

from speeder_engine.triton_kernels.add_rms_norm import row_options
from speeder_engine.triton_kernels.language import await_others, on, overlap_options, runs_triton, tl, triton
from speeder_engine.triton_kernels.specimen import Specimen


def keep_last(
    hidden: Tensor, last_read: Tensor, is_new: Tensor, kept: Tensor, kept_slots: Tensor, keep_slots: Tensor
) -> Tensor:
    """hidden [R, d], kept [S, d] of the same type; per sequence int64 rows of them and bool `is_new` [B] -> [B, d]."""
    given = (hidden, last_read, is_new, kept, kept_slots, keep_slots)
    if runs_triton(hidden, kept):
        with on(kept.device):
            return launch_keep_last(*given)
    return keep_last_ref(*given)


def keep_last_ref(
    hidden: Tensor, last_read: Tensor, is_new: Tensor, kept: Tensor, kept_slots: Tensor, keep_slots: Tensor
) -> Tensor:
    last = kept[kept_slots]
    if hidden.shape[0]:
        last = torch.where(is_new.unsqueeze(1), hidden[last_read], last)
    kept[keep_slots] = last
    return last


@triton.jit
def _keep_last_kernel(
    hidden, last_read, is_new, kept, kept_slots, keep_slots, out, size, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
):  # fmt: skip
    await_others(OVERLAP)
    user, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    valid = column < size
    new = tl.load(is_new + user) != 0
    fresh = hidden + tl.load(last_read + user).to(tl.int64) * size
    old = kept + tl.load(kept_slots + user).to(tl.int64) * size
    last = tl.load(fresh + column, mask=valid & new, other=0.0).to(tl.float32)
    last += tl.load(old + column, mask=valid & (new == 0), other=0.0).to(tl.float32)
    last = last.to(out.dtype.element_ty)
    tl.store(kept + tl.load(keep_slots + user).to(tl.int64) * size + column, last, mask=valid)
    tl.store(out + user * size + column, last, mask=valid)


def launch_keep_last(
    hidden: Tensor, last_read: Tensor, is_new: Tensor, kept: Tensor, kept_slots: Tensor, keep_slots: Tensor
) -> Tensor:
    num_users, size = last_read.shape[0], kept.shape[1]
    assert hidden.shape[1] == size and hidden.dtype == kept.dtype
    assert hidden.is_contiguous() and kept.is_contiguous() and is_new.dtype == torch.bool
    for each in (last_read, is_new, kept_slots, keep_slots):
        assert each.shape == (num_users,) and each.is_contiguous()
    out = torch.empty(num_users, size, dtype=kept.dtype, device=kept.device)
    if num_users:
        _keep_last_kernel[(num_users,)](
            hidden, last_read, is_new, kept, kept_slots, keep_slots, out, size, **row_options(size),
            **overlap_options(kept.device),
        )  # fmt: skip
    return out


def _specimen(label: str, size: int, overlap: bool = False) -> Specimen:
    options = row_options(size)
    types = dict.fromkeys(("hidden", "kept", "out"), "*bf16")
    types |= dict.fromkeys(("last_read", "kept_slots", "keep_slots"), "*i64") | {"is_new": "*i1", "size": "i32:16"}
    arguments = {**types, "BLOCK": options["BLOCK"], "OVERLAP": overlap}
    since = 90 if overlap else 80
    return Specimen(label, _keep_last_kernel, arguments, num_warps=options["num_warps"], since=since)


SPECIMENS = (_specimen("0.5B bf16", 896), _specimen("7B bf16", 3584), _specimen("0.5B bf16, overlapped", 896, True))
