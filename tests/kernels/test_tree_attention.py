"""Attention of text in a tree against torch's own on each row's keys, laid out flat, in fp64."""

import pytest
import torch
from torch.nn import functional as F

from speeder_engine.triton_kernels import tree_attention as module
from speeder_engine.triton_kernels.compressed_attention import AttentionRows
from speeder_engine.triton_kernels.tree_attention import TreeRows, tree_attention, tree_attention_ref

BLOCK, HEADS, KV_HEADS, DIM = 4, 6, 2, 8


def make_case(seed, shared_len, lengths, sizes, dtype=torch.float32, spare=0):
    """Sequence s has `lengths[s]` history positions and a random tree of `sizes[s]` rows; `spare` keys are nobody's."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    width, num_shared = -(-max(lengths) // BLOCK) + 1, -(-shared_len // BLOCK)
    order = torch.randperm(len(lengths) * width, generator=generator) + num_shared
    caches = [draw(len(order) + num_shared, BLOCK, KV_HEADS, DIM) for _ in range(2)]
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
    keys, values = (draw(spare + count, KV_HEADS, DIM) for _ in range(2))
    return draw(count, HEADS, DIM), keys, values, *caches, rows


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
