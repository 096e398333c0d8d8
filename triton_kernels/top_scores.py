"""Scores of the whole catalogue and their top k, without writing the scores out.

score_bi = scale_i (u_b . z_i) + prior_i      -inf where user b may not be answered item i; scale_i = 1 but for int8
top k by score, equal scores by row

A score and its row become one 64-bit key whose order is the answer's: programs keep the largest keys of a part of the
catalogue in registers, sorted lists of them are merged until one is left. The scores a program computes do not depend
on how the catalogue or the users are divided among programs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from speeder_engine.triton_kernels.language import interpreted, next_power_of_2, on, runs_triton, tl, triton
from speeder_engine.triton_kernels.sorting import largest, merge_sorted
from speeder_engine.triton_kernels.specimen import Specimen

MAX_K = 256  # more does not fit into registers
BLOCK_USERS = 16
SHORT = 64  # a list that small programs keep
MERGED_KEYS = 2048  # of one program that merges lists
MOST_TILES = 64  # of one program
PROGRAMS = 1024  # enough to fill any GPU several times
WIDENED_AT_ONCE = 65_536  # rows of a table, to fp32
ROW_TILE = 16  # rows of a matrix product on the CPU: a row's arithmetic must not depend on how many stand beside it


@dataclass(frozen=True)
class RowLists:
    """A list of catalogue rows for each of B users, ascending and without repetition, one behind the other."""

    rows: Tensor  # int32 [E]
    starts: Tensor  # int32 [B + 1]

    @classmethod
    def build(cls, lists: Sequence[NDArray[np.int32]], device: torch.device) -> "RowLists":
        starts = np.zeros(len(lists) + 1, np.int32)
        np.cumsum([len(each) for each in lists], out=starts[1:])
        rows = np.concatenate(lists) if lists else np.empty(0, np.int32)
        return cls(torch.from_numpy(rows).to(device), torch.from_numpy(starts).to(device))


@dataclass(frozen=True)
class Answerable:
    """Which of I items each of B users may be answered; no [B, I] mask exists."""

    available: Tensor  # bool [I]: to anybody
    excluded: RowLists  # never these
    allowed: RowLists | None = None  # only these, where `limited`
    limited: Tensor | None = None  # bool [B]; given with `allowed`

    @classmethod
    def build(
        cls, available: Tensor, excluded: Sequence[NDArray[np.int32]], allowed: Sequence[NDArray[np.int32] | None]
    ) -> "Answerable":
        """From the lists of every user; an allow list that is None allows all."""
        device = available.device
        denied = RowLists.build(excluded, device)
        limited = [each is not None for each in allowed]
        if not any(limited):
            return cls(available, denied)
        lists = [np.empty(0, np.int32) if each is None else each for each in allowed]
        return cls(available, denied, RowLists.build(lists, device), torch.tensor(limited, device=device))

    def hide(self, scores: Tensor) -> Tensor:
        """scores [B, I] with -inf, in place, where no answer may come from."""
        if self.allowed is not None and self.limited is not None:
            starts = self.allowed.starts.tolist()
            for b in torch.nonzero(self.limited).flatten().tolist():
                rows = self.allowed.rows[starts[b] : starts[b + 1]].long()
                kept = scores[b, rows]
                scores[b] = float("-inf")
                scores[b, rows] = kept
        scores.masked_fill_(~self.available, float("-inf"))
        users = torch.arange(scores.shape[0], device=scores.device)
        users = users.repeat_interleave(self.excluded.starts.diff(), output_size=self.excluded.rows.shape[0])
        scores[users, self.excluded.rows.long()] = float("-inf")
        return scores


def top_scores(
    vectors: Tensor, table: Tensor, prior: Tensor, answerable: Answerable, k: int, scales: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """vectors [B, d], table [I, d] of the same dtype, or int8 with scales [I]; prior [I] (already weighted).

    Returns scores [B, k'] in fp32, descending, and rows [B, k'] with k' = min(k, I); those not to be answered are -inf.
    """
    if runs_triton(vectors, table, scales) and vectors.shape[0] and 0 < min(k, table.shape[0]) <= MAX_K:
        with on(vectors.device):
            return launch_top_scores(vectors, table, prior, answerable, k, scales)
    return top_scores_ref(vectors, table, prior, answerable, k, scales)


def top_scores_ref(
    vectors: Tensor, table: Tensor, prior: Tensor, answerable: Answerable, k: int, scales: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    num_users = vectors.shape[0]
    # summed in fp32, as the kernel does: in bf16 many of the best would be equals
    padded = F.pad(vectors, (0, 0, 0, -num_users % ROW_TILE)).float()
    scores = padded.new_empty(num_users, table.shape[0])
    for start in range(0, table.shape[0], WIDENED_AT_ONCE):
        part = slice(start, start + WIDENED_AT_ONCE)
        scores[:, part] = (padded @ table[part].float().T)[:num_users]
    if scales is not None:
        scores *= scales
    scores += prior.float()
    return stable_top(answerable.hide(scores), min(k, scores.shape[1]))


def stable_top(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """torch.topk of scores [B, I] with its freedom taken away: among equal scores the lowest rows win, in order."""
    values, rows = scores.topk(min(k + 1, scores.shape[1]), dim=1)
    torn = values[:, k - 1] == values[:, k] if 0 < k < values.shape[1] else scores.new_zeros(0, dtype=torch.bool)
    values, rows = values[:, :k], rows[:, :k]
    for b in torch.nonzero(torn).flatten().tolist():
        above = torch.nonzero(values[b] > values[b, -1]).shape[0]
        rows[b, above:] = torch.nonzero(scores[b] == values[b, -1]).flatten()[: k - above]
    by_row = rows.argsort(dim=1)
    values, rows = values.gather(1, by_row), rows.gather(1, by_row)
    by_score = torch.argsort(values, dim=1, descending=True, stable=True)
    return values.gather(1, by_score), rows.gather(1, by_score)


def launch_top_scores(
    vectors: Tensor, table: Tensor, prior: Tensor, answerable: Answerable, k: int, scales: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    (num_users, size), num_items = vectors.shape, table.shape[0]
    length = min(k, num_items)
    _check(vectors, table, answerable, scales)
    options = partial_options(length, vectors.element_size(), table.element_size(), num_users == 1)
    tiles = tiles_of_program(num_items, num_users, options["BLOCK_ITEMS"])
    num_lists = triton.cdiv(num_items, tiles * options["BLOCK_ITEMS"])
    lists = torch.empty(num_users, num_lists, options["K"], dtype=torch.int64, device=vectors.device)
    scores = torch.empty(num_users, length, dtype=torch.float32, device=vectors.device)
    rows = torch.empty(num_users, length, dtype=torch.int64, device=vectors.device)
    if num_users == 0 or length == 0:
        return scores, rows
    excluded, allowed, limited = answerable.excluded, answerable.allowed, answerable.limited
    named = excluded if allowed is None else allowed
    _partial_top_kernel[(num_lists * triton.cdiv(num_users, BLOCK_USERS),)](
        vectors, table, scales, prior.float().contiguous(), answerable.available,
        excluded.rows, excluded.starts, named.rows, named.starts, limited, lists,
        num_users, num_items, num_lists, tiles, SIZE=size, ALONE=num_users == 1, SCALED=scales is not None,
        LIMITED=limited is not None, WIDE=interpreted(vectors), **options,
    )  # fmt: skip
    merge_lists(lists, scores, rows)
    return scores, rows


def _check(vectors: Tensor, table: Tensor, answerable: Answerable, scales: Tensor | None) -> None:
    """The layout the kernels rely on."""
    (num_users, size), num_items = vectors.shape, table.shape[0]
    assert table.shape[1] == size and vectors.is_contiguous() and table.is_contiguous()
    assert table.dtype == (vectors.dtype if scales is None else torch.int8), f"table of {table.dtype}"
    assert vectors.numel() < 2**31 and num_items < 2**31 - 2**16, "counted in 32 bits"
    assert scales is None or (scales.dtype == torch.float32 and scales.is_contiguous())
    assert answerable.available.dtype == torch.bool and answerable.available.shape == (num_items,)
    for lists in (answerable.excluded, answerable.allowed):
        assert lists is None or (lists.rows.dtype == lists.starts.dtype == torch.int32)
        assert lists is None or lists.starts.shape == (num_users + 1,)
    assert (answerable.allowed is None) == (answerable.limited is None)


def list_length(k: int) -> int:
    """Of the lists that k answers are picked from: a kernel is compiled for a few lengths, and not for every k."""
    return max(16, next_power_of_2(k))


def partial_options(length: int, vector_size: int, item_size: int, alone: bool) -> dict[str, int]:
    """Block sizes for `length` answers to one user or several; vectors and table are of elements of so many bytes.

    What is read ahead shares the registers with the keys. Where the list is short programs are small: several share a
    multiprocessor, and while one sorts the others read.
    """
    assert length <= MAX_K, f"{length} answers: {MAX_K} fit into registers"
    kept = list_length(length)
    small, wide = kept <= SHORT, max(vector_size, item_size)
    return {
        "K": kept,
        "DEPTH": kept.bit_length() - 1,
        "BLOCK_USERS": BLOCK_USERS,
        "BLOCK_ITEMS": max(64 if small else 128, kept),
        "BLOCK_SIZE": (128 // wide if alone else 32) if small else max(16, min(64, 16384 // (wide * kept))),
        "num_warps": 4 if small else 8,
        # what is widened to fp32 is held in registers when it is read ahead
        "num_stages": 1 if item_size < vector_size == 4 else 4 if small else 3,
    }


def tiles_of_program(num_items: int, num_users: int, block_items: int) -> int:
    """The part of a program is as large as leaves enough programs. No constant of the kernel: it hangs on how many ask,
    and they must not wait for a compiler."""
    tiles = num_items * triton.cdiv(num_users, BLOCK_USERS) // (block_items * PROGRAMS)
    return min(MOST_TILES, next_power_of_2(tiles + 1))


def merge_lists(lists: Tensor, scores: Tensor, rows: Tensor) -> None:
    """Lists of keys [B, L, K], in any order, -> scores and rows [B, k], best first."""
    num_users, num_lists, kept = lists.shape
    while True:
        options = merge_options(kept, num_lists)
        num_merged = triton.cdiv(num_lists, options["LISTS"])
        merged = torch.empty(num_users, num_merged, kept, dtype=torch.int64, device=lists.device)
        _merge_lists_kernel[(num_users, num_merged)](
            lists, merged, scores, rows, num_lists, num_merged, scores.shape[1], LAST=num_merged == 1, **options
        )
        if num_merged == 1:
            return
        lists, num_lists = merged, num_merged


def precompile_merges(k: int, num_items: int, device: torch.device) -> None:
    """Launches every kernel that merges the lists of a search for k of up to `num_items`. Which of them one takes hangs
    on how many items there are by then, and no search is to wait for a compiler because an item was added."""
    kept = list_length(k)
    smallest = partial_options(k, 1, 1, True)["BLOCK_ITEMS"]
    most_lists = max(min(triton.cdiv(num_items, smallest), PROGRAMS), triton.cdiv(num_items, MOST_TILES * smallest))
    few, most = (merge_options(kept, num_lists)["LISTS"] for num_lists in (1, MERGED_KEYS))
    scores, rows = torch.empty(1, k, device=device), torch.empty(1, k, dtype=torch.int64, device=device)
    with on(device):
        for num_lists in sorted({1, few + 1, most + 1}):
            if num_lists <= max(most_lists, 1):
                merge_lists(torch.zeros(1, num_lists, kept, dtype=torch.int64, device=device), scores, rows)


def merge_options(kept: int, num_lists: int) -> dict[str, int]:
    """A few lists or as many as fit: a size for every number of them would be a compilation for every batch."""
    most = MERGED_KEYS // kept
    few = min(most, max(16, kept // 2))  # PROGRAMS lists leave no more behind the first round
    lists = few if num_lists <= few else most
    return {"K": kept, "DEPTH": kept.bit_length() - 1, "LISTS": lists, "FOLDS": lists.bit_length() - 1}


@triton.jit(do_not_specialize=["num_users", "num_items", "num_lists", "tiles"])
def _partial_top_kernel(
    vectors, table, scales, prior, available, excluded, excluded_starts, allowed, allowed_starts, limited, lists,
    num_users, num_items, num_lists, tiles,
    SIZE: tl.constexpr, K: tl.constexpr, DEPTH: tl.constexpr, BLOCK_USERS: tl.constexpr, BLOCK_ITEMS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, ALONE: tl.constexpr, SCALED: tl.constexpr, LIMITED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The K largest keys of `tiles` tiles of items, for a block of users; ALONE: for the one there is."""
    LINES: tl.constexpr = 1 if ALONE else BLOCK_USERS  # what is sorted
    user_blocks = tl.cdiv(num_users, BLOCK_USERS)
    # programs that read the same items stand side by side, so that they meet in the L2 cache
    number = tl.program_id(0) // user_blocks
    first_user = (tl.program_id(0) % user_blocks) * BLOCK_USERS
    users = first_user + tl.arange(0, LINES)
    real = users < num_users
    first = number * (tiles * BLOCK_ITEMS)
    end = first + tiles * BLOCK_ITEMS
    at, stop = _list_from(excluded, excluded_starts, users, real, first)
    if LIMITED:
        is_limited = tl.load(limited + users, mask=real, other=0) != 0
        allowed_at, allowed_stop = _list_from(allowed, allowed_starts, users, real, first)
    NOTHING: tl.constexpr = -(2**63)
    best = tl.full([LINES, K], NOTHING, tl.int64)
    worst = tl.full([LINES], NOTHING, tl.int64)
    while first < end:
        items = first + tl.arange(0, BLOCK_ITEMS)
        inside = items < num_items
        beside = first_user + tl.arange(0, BLOCK_USERS)
        found = _products(vectors, table, beside, beside < num_users, first, inside, SIZE, BLOCK_SIZE, WIDE)
        if ALONE:  # the others are zeros
            found = tl.sum(found, axis=0, keep_dims=True)
        if SCALED:
            found = found * tl.load(scales + items, mask=inside, other=0.0)[None, :]
        found = found + tl.load(prior + items, mask=inside, other=0.0)[None, :]
        hidden, at = _mark(excluded, at, stop, items, first + BLOCK_ITEMS)
        if LIMITED:
            named, allowed_at = _mark(allowed, allowed_at, allowed_stop, items, first + BLOCK_ITEMS)
            hidden = hidden | (is_limited[:, None] & (named == 0))
        hidden = hidden | (tl.load(available + items, mask=inside, other=0) == 0)[None, :]
        keys = answer_keys(tl.where(hidden, float("-inf"), found), items[None, :])
        keys = tl.where(inside[None, :] & real[:, None], keys, NOTHING)
        if tl.max((tl.max(keys, axis=1) > worst).to(tl.int32), axis=0) > 0:
            FOLDS: tl.constexpr = (BLOCK_ITEMS // K).bit_length() - 1
            best = merge_sorted(best, largest(keys, DEPTH, FOLDS, True), DEPTH)
            worst = tl.min(best, axis=1)
        first += BLOCK_ITEMS
    places = (users.to(tl.int64) * num_lists + number)[:, None] * K + tl.arange(0, K)[None, :]
    tl.store(lists + places, best, mask=real[:, None])


@triton.jit
def _products(
    vectors, table, users, real, first, inside, SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """u . z [users, items] in fp32, for the items from `first` on; int8 tokens are exact in every dtype of vectors."""
    DOT: tl.constexpr = tl.float32 if WIDE else vectors.dtype.element_ty
    columns = tl.arange(0, BLOCK_SIZE)
    ours = vectors + users[:, None] * SIZE + columns[None, :]
    tokens = table + first.to(tl.int64) * SIZE + tl.arange(0, inside.shape[0])[None, :] * SIZE + columns[:, None]
    total = tl.zeros([users.shape[0], inside.shape[0]], tl.float32)
    for start in range(0, SIZE, BLOCK_SIZE):
        within = columns < SIZE - start
        left = tl.load(ours + start, mask=real[:, None] & within[None, :], other=0.0).to(DOT)
        right = tl.load(tokens + start, mask=inside[None, :] & within[:, None], other=0).to(DOT)
        total = tl.dot(left, right, total, input_precision="ieee")
    return total


@triton.jit
def _list_from(rows, starts, users, real, first):
    """Each user's list, from its first entry that is not below `first`: index of that, and of the end."""
    at = tl.load(starts + users, mask=real, other=0)
    stop = tl.load(starts + users + 1, mask=real, other=0)
    end = stop
    while tl.max((at < end).to(tl.int32), axis=0) > 0:
        middle = (at + end) // 2
        is_open = at < end
        below = tl.load(rows + middle, mask=is_open, other=0) < first
        at = tl.where(is_open & below, middle + 1, at)
        end = tl.where(is_open & (below == 0), middle, end)
    return at, stop


@triton.jit
def _mark(rows, at, stop, items, end):
    """bool [users, items]: which items stand in each list from `at` on; and each list's first entry from `end` on."""
    marked = (at[:, None] < 0) & (items[None, :] < 0)
    entry = tl.load(rows + at, mask=at < stop, other=0x7FFFFFFF)
    while tl.min(entry, axis=0) < end:
        marked = marked | (items[None, :] == entry[:, None])
        at += (entry < end).to(tl.int32)
        entry = tl.load(rows + at, mask=at < stop, other=0x7FFFFFFF)
    return marked, at


@triton.jit
def answer_keys(scores, rows):
    """int64 in the order of the answer: by score, then the lower row first."""
    bits = tl.where(scores == 0, 0.0, scores).to(tl.int32, bitcast=True)  # -0.0 equals 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - rows).to(tl.int64)


@triton.jit(do_not_specialize=["num_lists", "num_merged", "k"])
def _merge_lists_kernel(
    lists, merged, scores, rows, num_lists, num_merged, k,
    K: tl.constexpr, DEPTH: tl.constexpr, LISTS: tl.constexpr, FOLDS: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Up to LISTS lists of K keys of one user -> one; the last one is taken apart into scores and rows."""
    user, number = tl.program_id(0).to(tl.int64), tl.program_id(1)
    places = number * (LISTS * K) + tl.arange(0, LISTS * K)[None, :]
    keys = tl.load(lists + user * num_lists * K + places, mask=places < num_lists * K, other=-(2**63))
    best = largest(keys, DEPTH, FOLDS, False)
    columns = tl.arange(0, K)[None, :]
    if LAST:
        ordered = (best >> 32).to(tl.int32)
        found = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        tl.store(scores + user * k + columns, found, mask=columns < k)
        tl.store(rows + user * k + columns, 0x7FFFFFFF - (best & 0x7FFFFFFF), mask=columns < k)
    else:
        tl.store(merged + (user * num_merged + number) * K + columns, best)


def _partial_specimen(label: str, kind: str, size: int, k: int, element_size: int, alone: bool = False) -> Specimen:
    int8 = element_size == 1
    options = partial_options(k, 4 if kind == "*fp32" else 2, element_size, alone)
    launch = {name: options.pop(name) for name in ("num_warps", "num_stages")}
    pointers = {"vectors": kind, "table": "*i8" if int8 else kind, "scales": "*fp32", "prior": "*fp32"}
    pointers |= dict.fromkeys(("available", "limited"), "*i1") | {"lists": "*i64"}
    pointers |= dict.fromkeys(("excluded", "excluded_starts", "allowed", "allowed_starts"), "*i32")
    numbers = dict.fromkeys(("num_users", "num_items", "num_lists", "tiles"), "i32")
    flags = {"SIZE": size, "ALONE": alone, "SCALED": int8, "LIMITED": True, "WIDE": False}
    return Specimen(label, _partial_top_kernel, {**pointers, **numbers, **flags, **options}, **launch)


def _merge_specimen(k: int, last: bool) -> Specimen:
    types = {"lists": "*i64", "merged": "*i64", "scores": "*fp32", "rows": "*i64"}
    numbers = dict.fromkeys(("num_lists", "num_merged", "k"), "i32")
    label = f"k {k}{' last' if last else ''}"
    return Specimen(label, _merge_lists_kernel, {**types, **numbers, "LAST": last, **merge_options(k, 1000)})


SPECIMENS = (
    _partial_specimen("0.5B bf16 k 16", "*bf16", 896, 16, 2),
    _partial_specimen("0.5B bf16 k 16, alone", "*bf16", 896, 16, 2, alone=True),
    _partial_specimen("0.5B fp32 k 16, alone", "*fp32", 896, 16, 4, alone=True),
    _partial_specimen("0.5B int8 k 64", "*bf16", 896, 64, 1),
    _partial_specimen("0.5B int8 k 64, alone", "*bf16", 896, 64, 1, alone=True),
    _partial_specimen("7B bf16 k 256, alone", "*bf16", 3584, 256, 2, alone=True),
    _partial_specimen("7B bf16 k 128", "*bf16", 3584, 128, 2),
    _partial_specimen("7B bf16 k 256", "*bf16", 3584, 256, 2),
    _partial_specimen("7B int8 k 256", "*bf16", 3584, 256, 1),
    _partial_specimen("0.5B fp32 k 256", "*fp32", 896, 256, 4),
    _partial_specimen("0.5B fp32, int8 k 256", "*fp32", 896, 256, 1),
    _merge_specimen(16, False),
    _merge_specimen(256, True),
)
