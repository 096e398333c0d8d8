"""Attention over the paged cache against torch's own on each row's keys, laid out flat, in fp64."""

import pytest
import torch
from torch.nn import functional as F

from speeder_engine.triton_kernels.compressed_attention import AttentionRows, compressed_attention_ref

BLOCK, HEADS, KV_HEADS, DIM = 4, 6, 2, 8


def make_case(seed, shared_len, cached, new, candidates, dtype):
    """Random blocks; sequence b has `cached[b]` + `new[b]` history positions and `candidates[b]` candidates."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    batch, width = len(cached), -(-max(c + n for c, n in zip(cached, new, strict=True)) // BLOCK) + 1
    num_shared = -(-shared_len // BLOCK)
    order = torch.randperm(batch * width + 3, generator=generator) + num_shared
    tables = order[: batch * width].view(batch, width)
    k_cache, v_cache = (
        draw(len(order) + num_shared, BLOCK, KV_HEADS, DIM),
        draw(len(order) + num_shared, BLOCK, KV_HEADS, DIM),
    )
    sequence, local, visible, candidate = [], [], [], []
    for b in range(batch):
        for i in range(new[b] + candidates[b]):
            sequence.append(b)
            local.append(i)
            candidate.append(i >= new[b])
            visible.append(cached[b] + min(i + 1, new[b]))
    rows = AttentionRows(
        torch.tensor(sequence),
        torch.tensor(local),
        torch.tensor(visible),
        torch.tensor(candidate),
        -(-(max(local) + 1) // 16) * 16,
        tables,
        torch.arange(num_shared),
        shared_len,
    )
    n = len(sequence)
    return draw(n, HEADS, DIM), draw(n, KV_HEADS, DIM), draw(n, KV_HEADS, DIM), k_cache, v_cache, rows


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
