"""What the operations of triton_kernels/ cost on the CPU: `pytest bench/bench_kernels.py`. The torch references there
are what `run.py kernels` times in larger shapes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_cases import Case, Maker

from speeder_engine.random_engine import SHAPES

MAKER = Maker(SHAPES["tiny"], 32, torch.device("cpu"), torch.float32)
CASES: dict[str, Callable[[], Case]] = {
    "norm": MAKER.norm,
    "swiglu": MAKER.gated,
    "embed": lambda: MAKER.embed(1000),
    "rope": MAKER.rope,
    "attention": MAKER.attention,
    "linear": MAKER.linear,
    "fused_linear": MAKER.fused,
    "fused_qkv": MAKER.fused_heads,
    "linear_int8": lambda: MAKER.small_linear("int8"),
    "experts": MAKER.experts,
    "keep_last": MAKER.last,
    "candidate_scores": lambda: MAKER.ranked(1000),
    "search": lambda: MAKER.search(10_000, 8),
}


@pytest.mark.parametrize("name", CASES)
def test_kernel(benchmark: Any, name: str) -> None:
    case = CASES[name]()
    with torch.inference_mode():
        benchmark.pedantic(case.call, rounds=200, warmup_rounds=10)
    benchmark.extra_info["gb_s"] = case.num_bytes / benchmark.stats["median"] / 1e9
