"""Attention of text in a tree against torch's own on each row's keys, laid out flat, in fp64; the kernels, interpreted,
against the reference."""

from dataclasses import replace

import pytest
import torch
from kernel_bounds import DTYPES, assert_as_near
from torch.nn import functional as F

from speeder_engine.triton_kernels import compressed_attention
from speeder_engine.triton_kernels import tree_attention as module
from speeder_engine.triton_kernels.compressed_attention import QUANTIZED, AttentionRows
from speeder_engine.triton_kernels.qk_norm_rope_store import quantize
from speeder_engine.triton_kernels.tree_attention import (
    TreeRows,
    launch_tree_attention,
    tree_attention,
    tree_attention_ref,
)

BLOCK, HEADS, KV_HEADS, DIM = 4, 6, 2, 8


def make_case(seed, shared_len, lengths, sizes, dtype=torch.float32, spare=0, heads=(HEADS, KV_HEADS, DIM)):
    """Sequence s has `lengths[s]` history positions and a random tree of `sizes[s]` rows; `spare` keys are nobody's."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    width, num_shared = -(-max(lengths) // BLOCK) + 1, -(-shared_len // BLOCK)
    order = torch.randperm(len(lengths) * width, generator=generator) + num_shared
    caches = [draw(len(order) + num_shared, BLOCK, *heads[1:]) for _ in range(2)]
    paths, sequence, local = [], [], []
    for s, size in enumerate(sizes):
        start = spare + len(paths)
        for i in range(size):
            parent = int(torch.randint(-1, i, (), generator=generator)) if i else -1
            paths.append([*(paths[start - spare + parent] if parent >= 0 else []), start + i])
            sequence.append(s)
            local.append(i)
    longest = max(map(len, paths))
    prefix = AttentionRows(
        torch.tensor(sequence),
        torch.tensor(local),
        torch.tensor(lengths)[sequence],
        torch.zeros(len(sequence), dtype=torch.bool),
        max(sizes),
        order.view(len(lengths), width),
        torch.arange(num_shared),
        shared_len,
    )
    rows = TreeRows(prefix, torch.tensor([path + [-1] * (longest - len(path)) for path in paths]))
    count = len(paths)
    keys, values = (draw(spare + count, *heads[1:]) for _ in range(2))
    return draw(count, heads[0], heads[2]), keys, values, *caches, rows


def expected(q, k, v, k_cache, v_cache, rows):
    out, prefix = [], rows.prefix
    for i in range(len(q)):
        path = rows.paths[i][rows.paths[i] >= 0]
        flat = []
        for cache, own in ((k_cache, k), (v_cache, v)):
            shared = cache[prefix.shared_blocks].flatten(0, 1)[: prefix.shared_len]
            history = cache[prefix.block_tables[prefix.sequence[i]]].flatten(0, 1)[: prefix.visible[i]]
            flat.append(torch.cat([shared, history, own[path]]).double().transpose(0, 1))
        answer = F.scaled_dot_product_attention(q[i].double().unsqueeze(1), *flat, enable_gqa=True)
        out.append(answer[:, 0])
    return torch.stack(out)


@pytest.mark.parametrize(
    ("shared_len", "lengths", "sizes", "spare"),
    [(5, [0], [1], 0), (8, [7], [20], 3), (1, [0, 3, 9], [4, 1, 12], 0), (13, [4, 16], [1, 30], 7)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equals_torch_on_flat_keys(shared_len, lengths, sizes, spare, dtype):
    case = make_case(0, shared_len, lengths, sizes, dtype, spare)
    exact = expected(*case)
    found = tree_attention(*case)
    assert found.dtype == dtype
    assert torch.equal(found, exact.to(dtype)) or (found.double() - exact).abs().max() < 1e-6


def test_a_row_sees_its_ancestors_and_no_other():
    q, k, v, k_cache, v_cache, rows = make_case(1, 5, [3], [20])
    whole = tree_attention_ref(q, k, v, k_cache, v_cache, rows)
    k[7], v[7] = torch.randn_like(k[7]), torch.randn_like(v[7])
    changed = (tree_attention_ref(q, k, v, k_cache, v_cache, rows) != whole).flatten(1).any(1)
    assert torch.equal(changed, (rows.paths == 7).any(1))


def test_some_rows_at_once_and_selected_rows_are_the_same_rows(monkeypatch):
    q, k, v, k_cache, v_cache, rows = make_case(2, 5, [3, 0], [9, 6])
    whole = tree_attention_ref(q, k, v, k_cache, v_cache, rows)
    chosen = torch.tensor([1, 4, 12])
    assert torch.equal(tree_attention_ref(q[chosen], k, v, k_cache, v_cache, rows.select(chosen)), whole[chosen])
    monkeypatch.setattr(module, "ROWS_AT_ONCE", 4)
    assert torch.equal(tree_attention_ref(q, k, v, k_cache, v_cache, rows), whole)


def launch(q, k, v, k_cache, v_cache, rows, scales=None):
    """Through the kernels, over a cache and keys spoiled where nothing valid stands, and into NaN."""
    prefix, caches = rows.prefix, [k_cache.clone(), v_cache.clone()]
    seen = torch.zeros(k_cache.shape[:2], dtype=torch.bool)
    seen.view(-1)[: prefix.shared_len] = True
    for b, table in enumerate(prefix.block_tables):
        positions = torch.arange(int(prefix.visible[prefix.sequence == b].max()))
        seen[table[positions // BLOCK], positions % BLOCK] = True
    scales = None if scales is None else tuple(each.clone() for each in scales)
    for each in scales or caches:
        each[~seen] = float("nan")
    nobody = torch.ones(len(k), dtype=torch.bool)
    nobody[rows.paths[rows.paths >= 0]] = False
    k, v = (each.masked_fill(nobody[:, None, None], float("nan")) for each in (k, v))
    return launch_tree_attention(q, k, v, *caches, rows, scales, torch.full_like(q, float("nan")))


def check(case):
    *tensors, rows = case
    assert_as_near(launch(*case), lambda *given: tree_attention_ref(*given, rows), *tensors)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shared_len", "lengths", "sizes", "spare"), [(5, [0], [1], 0), (1, [0, 3, 9], [2, 1, 6], 3), (13, [4], [9], 0)]
)
def test_the_kernels_equal_the_reference(shared_len, lengths, sizes, spare, dtype):
    check(make_case(0, shared_len, lengths, sizes, dtype, spare))


@pytest.mark.parametrize("heads", [(3, 3, 6), (7, 1, 20), (20, 1, 16)])
def test_odd_heads(heads, monkeypatch):
    monkeypatch.setattr(compressed_attention, "SPAN", 8)
    check(make_case(3, 13, [17, 2], [3, 2], torch.float16, heads=heads))


def test_paths_longer_than_a_step(monkeypatch):
    monkeypatch.setattr(module, "PATH_KEYS", 16)
    q, k, v, *caches, rows = make_case(4, 5, [3], [40])
    chain = torch.arange(40).expand(40, 40)
    rows = replace(rows, paths=chain.where(chain <= chain.T, -1)).select(torch.tensor([0, 15, 16, 39]))
    check((q[[0, 15, 16, 39]], k, v, *caches, rows))


def test_no_text():
    q, k, v, *caches, rows = make_case(5, 5, [3], [2])
    none = torch.empty(0, dtype=torch.int64)
    rows = rows.select(none)
    assert launch_tree_attention(q[none], k, v, *caches, rows, None, q[none].clone()).shape == (0, HEADS, DIM)


@pytest.mark.parametrize("small", QUANTIZED)
def test_quantized_caches(small):
    q, k, v, *caches, rows = make_case(6, 5, [3, 7], [3, 2], torch.bfloat16)
    (k_cache, k_scale), (v_cache, v_scale) = (quantize(cache, small) for cache in caches)

    def reference(q, k, v, k_scale, v_scale):
        return tree_attention_ref(q, k, v, k_cache, v_cache, rows, (k_scale, v_scale))

    found = launch(q, k, v, k_cache, v_cache, rows, (k_scale, v_scale))
    assert_as_near(found, reference, q, k, v, k_scale, v_scale)
