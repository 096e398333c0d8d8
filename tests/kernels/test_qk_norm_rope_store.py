"""Norm, rotation and store in one kernel, interpreted, against the reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_bounds import DTYPES, assert_as_near, huge

from speeder_engine.triton_kernels.qk_norm_rope_store import (
    LARGEST,
    launch_qk_norm_rope_store,
    qk_norm_rope_store_ref,
    quantize,
)

BLOCKS, BLOCK = 3, 4
EPS = 1e-6


def make_case(rows, heads, kv_heads, dim, dtype, normed=True, read=None):
    """A fused projection's parts, the tables of positions, a slot for every other row but the last, and norms."""
    generator = torch.Generator().manual_seed(rows * dim)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    wide = draw(rows, (heads + 2 * kv_heads) * dim)
    q, k, v = wide.split([heads * dim, kv_heads * dim, kv_heads * dim], dim=1)
    if read is not None:
        q = draw(len(read), heads * dim)
    mapped = max(rows - 1, 0)
    slots = torch.randperm(BLOCKS * BLOCK, generator=generator)[:mapped].where(torch.arange(mapped) % 2 == 0, -1)
    angles = torch.randn(rows, dim, generator=generator)
    return (
        q.unflatten(1, (heads, dim)),
        k.unflatten(1, (kv_heads, dim)),
        v.unflatten(1, (kv_heads, dim)),
        angles.cos(),
        angles.sin(),
        slots,
        *((draw(dim), draw(dim)) if normed else (None, None)),
        read,
    )


def run(function, q, k, v, cos, sin, slots, norm_q, norm_k, read, positions=None):
    """Rotated q and k, and the caches, -7 where nothing was written."""
    caches = [torch.full((BLOCKS, BLOCK, *k.shape[1:]), -7.0, dtype=k.dtype) for _ in range(2)]
    return *function(q, k, v, cos, sin, *caches, slots, (norm_q, norm_k), EPS, read, None, positions), *caches


def check(case):
    assert_as_near(
        run(launch_qk_norm_rope_store, *case), lambda *given: run(qk_norm_rope_store_ref, *given), *case, slack=8
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(6, 2, 10), (3, 3, 6), (7, 1, 16)])
@pytest.mark.parametrize("normed", [True, False])
def test_equals_the_reference(heads, kv_heads, dim, normed, dtype):
    check(make_case(5, heads, kv_heads, dim, dtype, normed))


@pytest.mark.parametrize("dtype", DTYPES)
def test_some_rows_of_q_and_all_keys(dtype):
    check(make_case(5, 6, 2, 8, dtype, read=torch.tensor([4, 1])))


@pytest.mark.parametrize("read", [None, torch.tensor([4, 1])])
def test_cos_and_sin_are_looked_up_by_position(read):
    """Rows in any order, some at the same position; the same bits as with rows of them."""
    case, angles = make_case(5, 6, 2, 8, torch.float32, read=read), torch.randn(9, 8)
    positions = torch.tensor([8, 0, 3, 3, 5])
    tables, rows = ((x.cos(), x.sin()) for x in (angles, angles[positions]))
    by_position = (*case[:3], *tables, *case[5:], positions)
    check(by_position)
    found = run(launch_qk_norm_rope_store, *by_position)
    expected = run(launch_qk_norm_rope_store, *case[:3], *rows, *case[5:])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def test_nothing_is_read_and_nothing_is_there():
    check(make_case(3, 2, 1, 8, torch.float32, read=torch.empty(0, dtype=torch.int64)))
    check(make_case(0, 2, 1, 8, torch.float32))


@settings(deadline=None, max_examples=6)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 12), st.booleans())
def test_any_shape(rows, kv_heads, group, half, normed):
    check(make_case(rows, kv_heads * group, kv_heads, 2 * half, torch.float16, normed))


@pytest.mark.parametrize("small", list(LARGEST))
def test_small_caches_hold_scaled_rows(small):
    q, k, v, cos, sin, slots, *norms, _ = make_case(5, 4, 2, 12, torch.float32)
    v[0] = 0
    found = []
    for function in (launch_qk_norm_rope_store, qk_norm_rope_store_ref):
        caches = [torch.full((BLOCKS, BLOCK, 2, 12), 9.0).to(small) for _ in range(2)]
        scales = tuple(torch.full((BLOCKS, BLOCK, 2), 0.5) for _ in range(2))
        function(q, k, v, cos, sin, *caches, slots, tuple(norms), EPS, None, scales)
        found.append([cache.float() * scale.unsqueeze(-1) for cache, scale in zip(caches, scales, strict=True)])
    for ours, theirs in zip(*found, strict=True):
        # one step of the type, where the last bit of what is rounded decides
        assert (ours - theirs).abs().max() <= theirs.abs().max() / (127 if small == torch.int8 else 8)
        assert (ours - theirs).abs().mean() <= 1e-3 * theirs.abs().mean()


@pytest.mark.parametrize("small", list(LARGEST))
def test_quantized_rows_come_back(small):
    x = torch.randn(50, 3, 16) * torch.logspace(-6, 6, 50)[:, None, None]
    quantized, scale = quantize(x, small)
    error = (quantized.float() * scale.unsqueeze(-1) - x).abs().amax(-1)
    assert (error <= x.abs().amax(-1) * (0.51 / 127 if small == torch.int8 else 1 / 16)).all()


def test_slots_beyond_two_gigabytes():
    q, k, v, cos, sin, slots, *norms, _ = make_case(3, 4, 2, 16, torch.float32)
    last = 2**26 + 3
    cache, scale = huge(last + 1, 1, 2, 16), torch.zeros(last + 1, 1, 2)
    other = torch.zeros(8, 1, 2, 16, dtype=torch.int8), torch.zeros(8, 1, 2)
    slots = torch.tensor([last, 2, -1], dtype=torch.int32)
    launch_qk_norm_rope_store(q, k, v, cos, sin, cache, cache, slots, tuple(norms), EPS, None, (scale, scale))
    near = torch.tensor([5, 2, -1])
    qk_norm_rope_store_ref(q, k, v, cos, sin, other[0], other[0], near, tuple(norms), EPS, None, (other[1], other[1]))
    assert other[0][5].any() and torch.equal(cache[last], other[0][5]) and torch.equal(cache[2], other[0][2])
