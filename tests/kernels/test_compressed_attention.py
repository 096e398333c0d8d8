"""Attention over the paged cache against torch's own on each row's keys, laid out flat, in fp64; the kernels,
interpreted, against the reference."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_bounds import DTYPES, assert_as_near, huge
from torch.nn import functional as F

from speeder_engine.triton_kernels import compressed_attention as module
from speeder_engine.triton_kernels.compressed_attention import (
    QUANTIZED,
    AttentionRows,
    compressed_attention,
    compressed_attention_ref,
    launch_compressed_attention,
)
from speeder_engine.triton_kernels.qk_norm_rope_store import quantize

BLOCK, HEADS, KV_HEADS, DIM = 4, 6, 2, 8
CUTS = ["one pass", "spans"]


def make_case(seed, shared_len, cached, new, candidates, dtype, heads=(HEADS, KV_HEADS, DIM)):
    """Random blocks; sequence b has `cached[b]` + `new[b]` history positions and `candidates[b]` candidates."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    batch, width = len(cached), -(-max(c + n for c, n in zip(cached, new, strict=True)) // BLOCK) + 1
    num_shared = -(-shared_len // BLOCK)
    order = torch.randperm(batch * width + 3, generator=generator) + num_shared
    tables = order[: batch * width].view(batch, width)
    k_cache, v_cache = (
        draw(len(order) + num_shared, BLOCK, *heads[1:]),
        draw(len(order) + num_shared, BLOCK, *heads[1:]),
    )
    sequence, local, visible, candidate = [], [], [], []
    for b in range(batch):
        for i in range(new[b] + candidates[b]):
            sequence.append(b)
            local.append(i)
            candidate.append(i >= new[b])
            visible.append(cached[b] + min(i + 1, new[b]))
    rows = AttentionRows(
        torch.tensor(sequence, dtype=torch.int64),
        torch.tensor(local, dtype=torch.int64),
        torch.tensor(visible, dtype=torch.int64),
        torch.tensor(candidate, dtype=torch.bool),
        -(-(max(local, default=0) + 1) // 16) * 16,
        tables,
        torch.arange(num_shared),
        shared_len,
    )
    n = len(sequence)
    num_heads, *beside = heads
    return draw(n, num_heads, beside[1]), draw(n, *beside), draw(n, *beside), k_cache, v_cache, rows


def expected(q, k, v, k_cache, v_cache, rows):
    out = []
    for i in range(len(q)):
        blocks = rows.block_tables[rows.sequence[i]]
        keys, values = [], []
        for cache, own, parts in ((k_cache, k, keys), (v_cache, v, values)):
            parts.append(cache[rows.shared_blocks].flatten(0, 1)[: rows.shared_len])
            parts.append(cache[blocks].flatten(0, 1)[: rows.visible[i]])
            if rows.candidate[i]:
                parts.append(own[i : i + 1])
        keys, values = (torch.cat(parts).double().transpose(0, 1) for parts in (keys, values))
        answer = F.scaled_dot_product_attention(q[i].double().unsqueeze(1), keys, values, enable_gqa=True)
        out.append(answer[:, 0])
    return torch.stack(out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_rounded_is_exact_enough_for_every_order_of_sums(dtype):
    """Else a row's company decides, now and then, which of two neighbouring values it gets."""
    *tensors, rows = make_case(3, 13, [11] * 64, [4] * 64, [60] * 64, dtype)
    assert torch.equal(compressed_attention_ref(*tensors, rows), expected(*tensors, rows).to(dtype))


@pytest.mark.parametrize(
    ("shared_len", "cached", "new", "candidates"),
    [
        (5, [0], [1], [0]),
        (5, [0], [0], [3]),
        (8, [7], [1], [20]),
        (1, [0, 3, 9], [4, 0, 2], [0, 5, 1]),
        (13, [4, 0], [0, 17], [2, 0]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equals_torch_on_flat_keys(shared_len, cached, new, candidates, dtype):
    case = make_case(0, shared_len, cached, new, candidates, dtype)
    exact = expected(*case)
    found = compressed_attention_ref(*case)
    assert found.dtype == dtype
    lowest = exact.to(dtype).double()  # the best this dtype can hold
    atol = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    assert (found.double() - exact).abs().max() <= 2 * (lowest - exact).abs().max() + atol


def test_candidates_do_not_see_one_another():
    q, k, v, k_cache, v_cache, rows = make_case(1, 5, [3], [2], [4], torch.float32)
    whole = compressed_attention_ref(q, k, v, k_cache, v_cache, rows)
    k[4:], v[4:] = torch.randn_like(k[4:]), torch.randn_like(v[4:])
    changed = compressed_attention_ref(q, k, v, k_cache, v_cache, rows)
    assert torch.equal(changed[:4], whole[:4])
    assert not torch.allclose(changed[4:], whole[4:])


def test_selected_rows_are_the_same_rows():
    q, k, v, k_cache, v_cache, rows = make_case(2, 5, [3, 0], [2, 6], [4, 1], torch.float32)
    whole = compressed_attention_ref(q, k, v, k_cache, v_cache, rows)
    chosen = torch.tensor([1, 4, 12])
    few = compressed_attention_ref(q[chosen], k[chosen], v[chosen], k_cache, v_cache, rows.select(chosen))
    assert torch.equal(few, whole[chosen])


def spoil(caches, rows, value):
    """Fills in whatever no row may see: behind the instruction's end, behind histories' ends, blocks of nobody."""
    seen = torch.zeros(caches[0].shape[:2], dtype=torch.bool)
    seen.view(-1)[: rows.shared_len] = True
    for b, table in enumerate(rows.block_tables):
        length = int(rows.visible[rows.sequence == b].max()) if (rows.sequence == b).any() else 0
        positions = torch.arange(length)
        seen[table[positions // BLOCK], positions % BLOCK] = True
    for cache in caches:
        cache[~seen] = value


def launch(q, k, v, k_cache, v_cache, rows, scales=None):
    """Through the kernels, over caches spoiled where nothing valid stands, and into NaN."""
    caches = [k_cache.clone(), v_cache.clone()]
    if scales is None:
        spoil(caches, rows, float("nan"))
    else:
        scales = tuple(each.clone() for each in scales)
        spoil(scales, rows, float("nan"))
    return launch_compressed_attention(q, k, v, *caches, rows, scales, torch.full_like(q, float("nan")))


@pytest.fixture(params=CUTS)
def cut(request, monkeypatch):
    cut_into(request.param, monkeypatch)


def cut_into(name, monkeypatch):
    if name == "spans":
        monkeypatch.setattr(module, "ONE_PASS_KEYS", 0)
        monkeypatch.setattr(module, "SPAN", 12)
        monkeypatch.setattr(module, "KEYS", 16)


def check(case):
    *tensors, rows = case
    assert_as_near(launch(*case), lambda *given: compressed_attention_ref(*given, rows), *tensors)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shared_len", "cached", "new", "candidates"),
    [(1, [2], [0], [1]), (13, [4, 0, 37, 9], [0, 6, 1, 0], [2, 0, 5, 0])],
)
def test_the_kernels_equal_the_reference(shared_len, cached, new, candidates, dtype, cut):
    check(make_case(0, shared_len, cached, new, candidates, dtype))


@pytest.mark.parametrize("heads", [(3, 3, 6), (7, 1, 20), (36, 1, 16)])
def test_odd_heads(heads, cut):
    check(make_case(0, 5, [3, 0], [1, 3], [2, 0], torch.float16, heads))


@settings(deadline=None, max_examples=6)
@given(
    st.integers(1, 9),
    st.lists(st.tuples(st.integers(0, 20), st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=3),
    st.sampled_from(CUTS),
)
def test_any_lengths(shared_len, lengths, name):
    with pytest.MonkeyPatch.context() as patch:
        cut_into(name, patch)
        check(make_case(3, shared_len, *map(list, zip(*lengths, strict=True)), torch.float32, (2, 1, 6)))


def test_no_rows(cut):
    check(make_case(0, 5, [3], [0], [0], torch.float32))


@pytest.mark.usefixtures("rows_alike")
def test_a_rows_result_does_not_depend_on_its_company(cut):
    *tensors, rows = make_case(4, 5, [3, 9, 0], [1, 2, 3], [2, 5, 1], torch.float32)
    whole = launch(*tensors, rows)
    mine = (rows.sequence == 1).nonzero().flatten()
    q, k, v, *caches = tensors
    alone = rows.select(mine)
    alone = replace(alone, sequence=torch.zeros_like(mine), block_tables=rows.block_tables[1:2])
    assert torch.equal(launch(q[mine], k[mine], v[mine], *caches, alone), whole[mine])
    # every tile's first row left out
    kept = (rows.local % 8 != 0).nonzero().flatten()
    assert torch.equal(launch(q[kept], k[kept], v[kept], *caches, rows.select(kept)), whole[kept])


def test_keys_and_values_may_be_parts_of_a_projection(cut):
    q, k, v, *caches, rows = make_case(5, 5, [3], [0], [4], torch.float32)
    wide = torch.cat([torch.full_like(q, float("nan")), k, v], dim=1).flatten(1)
    parts = wide[:, q[0].numel() :].unflatten(1, (2 * KV_HEADS, DIM)).split(KV_HEADS, dim=1)
    assert torch.equal(launch(q, *parts, *caches, rows), launch(q, k, v, *caches, rows))


@pytest.mark.parametrize("small", QUANTIZED)
def test_quantized_caches(small, cut):
    q, k, v, *caches, rows = make_case(6, 5, [3, 18], [1, 0], [2, 3], torch.bfloat16)
    (k_cache, k_scale), (v_cache, v_scale) = (quantize(cache, small) for cache in caches)

    def reference(q, k, v, k_scale, v_scale):
        return compressed_attention_ref(q, k, v, k_cache, v_cache, rows, (k_scale, v_scale))

    found = launch(q, k, v, k_cache, v_cache, rows, (k_scale, v_scale))
    assert_as_near(found, reference, q, k, v, k_scale, v_scale)
    plain = compressed_attention_ref(q, k, v, *caches, rows)
    assert (found - plain).abs().max() < (0.05 if small == torch.int8 else 0.2)


def test_blocks_beyond_two_gigabytes(cut):
    q, k, v, *caches, rows = make_case(7, 3, [7], [0], [2], torch.float32, (2, 1, 16))
    small, k_scale = quantize(caches[0], torch.int8)
    last = 2**25 + 5
    cache, scale = huge(last + 1, BLOCK, 1, 16), torch.zeros(last + 1, BLOCK, 1)
    theirs = rows.block_tables[0]
    far = last - torch.arange(len(theirs))
    cache[0], scale[0] = small[0], k_scale[0]
    cache[far], scale[far] = small[theirs], k_scale[theirs]
    moved = replace(rows, block_tables=far[None].int())
    # one cache for both: each is large
    found = launch_compressed_attention(q, k, v, cache, cache, moved, (scale, scale), torch.empty_like(q))
    same = compressed_attention_ref(q, k, v, small, small, rows, (k_scale, k_scale))
    assert torch.allclose(found, same, atol=1e-5)


def test_the_public_function_writes_where_it_is_told():
    *tensors, rows = make_case(8, 5, [3], [2], [2], torch.float32)
    out = torch.empty(7, HEADS, DIM)
    compressed_attention(*tensors, rows, out=out[2:6])
    assert torch.equal(out[2:6], compressed_attention_ref(*tensors, rows)) and out[:2].isnan().all()
