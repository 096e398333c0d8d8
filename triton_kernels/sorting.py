"""Bitonic networks over the last dimension of int64 keys [R, N], N a power of two.

What tl.sort and tl.topk do, with a sum in place of their xor: the interpreter takes sums of whole arrays, but calls
Python for every element of a reduction it doesn't know.
"""

from speeder_engine.triton_kernels.language import tl, triton


@triton.jit
def _exchange(x, HALF: tl.constexpr, BLOCK: tl.constexpr, RISING: tl.constexpr):
    """Puts keys HALF apart in order: the larger first in even blocks of BLOCK, last in odd ones; RISING: otherwise."""
    PAIRS: tl.constexpr = x.shape[1] // (2 * HALF)
    pairs = tl.reshape(x, [x.shape[0], PAIRS, 2, HALF])
    other = tl.sum(pairs, axis=2, keep_dims=True) - pairs
    place = tl.reshape(tl.arange(0, x.shape[1]), [1, PAIRS, 2, HALF])
    keeps_larger = ((place // HALF) % 2 == (place // BLOCK) % 2) != RISING
    return tl.reshape(tl.where((pairs > other) == keeps_larger, pairs, other), [x.shape[0], x.shape[1]])


@triton.jit
def _sort_blocks(x, DEPTH: tl.constexpr, RISING: tl.constexpr):
    """Sorts blocks of 2 ** DEPTH of which one half rises and the other falls."""
    for step in tl.static_range(DEPTH):
        x = _exchange(x, 2 ** (DEPTH - 1 - step), 2**DEPTH, RISING)
    return x


@triton.jit
def largest(x, DEPTH: tl.constexpr, FOLDS: tl.constexpr, RISING: tl.constexpr):
    """The K = 2 ** DEPTH largest of each row of K * 2 ** FOLDS, falling or RISING."""
    for depth in tl.static_range(1, DEPTH + 1):
        x = _sort_blocks(x, depth, RISING)
    for _ in tl.static_range(FOLDS):
        # the larger ones of a falling and a rising block, pair by pair, are the larger half of both
        halved = tl.max(tl.reshape(x, [x.shape[0], x.shape[1] // 2 ** (DEPTH + 1), 2, 2**DEPTH]), axis=2)
        x = _sort_blocks(tl.reshape(halved, [x.shape[0], x.shape[1] // 2]), DEPTH, RISING)
    return x


@triton.jit
def merge_sorted(falling, rising, DEPTH: tl.constexpr):
    """The K = 2 ** DEPTH largest of two [R, K], falling."""
    return _sort_blocks(tl.maximum(falling, rising), DEPTH, False)
