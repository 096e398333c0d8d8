"""The table of docs/deployment.md: every graph, flavour and dtype, measured beside `Engine` on this CPU.

python bench/onnx_table.py demo/engine
python bench/onnx_table.py --shape 24,896,14,2,4864 --items 2394 --graphs recommend,extend --parity-users 50
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch

from speeder_engine import Engine, Item
from speeder_engine.catalogue import Catalogue, ItemTable
from speeder_engine.config import CompressorConfig, DecoderConfig, ModelConfig, PromptConfig
from speeder_engine.export import OnnxConfig, OnnxEngine, export_onnx
from speeder_engine.models.compressor import Compressor
from speeder_engine.models.recommender import ServingModel
from speeder_engine.parts import EngineParts

HEADER = "| graph | flavour | dtype | size | export | max error | same top 10 | ONNX Runtime | Engine fp32 |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", nargs="?", type=Path, help="an engine directory; without it a random model")
    parser.add_argument("--shape", default="2,96,4,2,256", help="layers,hidden,heads,kv heads,ffn of a random model")
    parser.add_argument("--items", type=int, default=2394)
    parser.add_argument("--graphs", default="score,recommend,extend,compress")
    parser.add_argument(
        "--kinds", default="standard:float32,standard:float16,standard:bfloat16,ort:float32,ort:float16"
    )
    parser.add_argument("--parity-users", type=int, default=1000)
    parser.add_argument("--runs", type=int, default=200)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        engine = arguments.engine or Path(folder, "engine")
        if arguments.engine is None:
            random_engine([int(size) for size in arguments.shape.split(",")], arguments.items).save(engine)
        print(HEADER)
        print("|---|---|---|---|---|---|---|---|---|")
        for kind in arguments.kinds.split(","):
            flavour, dtype = kind.split(":")
            config = OnnxConfig(flavour, dtype, tuple(arguments.graphs.split(",")))
            measure(engine, Path(folder, "onnx"), config, arguments)


def random_engine(shape: list[int], num_items: int) -> EngineParts:
    """Weights as they begin, an instruction of 16 tokens, a window of 50."""
    torch.manual_seed(0)
    layers, hidden, heads, kv_heads, ffn = shape
    head_dim = hidden // heads
    decoder = DecoderConfig(512, hidden, layers, heads, kv_heads, head_dim, ffn, qkv_bias=True)
    scale = 0.02
    compressor = CompressorConfig({"text": 384, "image": 64}, hidden, scale=scale)
    config = ModelConfig(decoder, compressor, PromptConfig("made", tuple(range(16))))
    model = ServingModel(config)
    with torch.no_grad():
        model.instruction.normal_(0, scale)
        model.rank.weight.normal_(0, hidden**-0.5)
        model.decoder.inv_freq.copy_(10_000.0 ** (-torch.arange(0, head_dim, 2) / head_dim))
    ids = [f"{i:05d}" for i in range(num_items)]
    table = ItemTable.fresh(ids, ids, np.zeros(num_items, np.float32))
    catalogue = Catalogue(table, torch.randn(num_items, hidden) * scale)
    weights = dict(Compressor(compressor).state_dict())
    return EngineParts(config, model.requires_grad_(False).eval(), catalogue, weights)


def measure(source: Path, out: Path, config: OnnxConfig, arguments: argparse.Namespace) -> None:
    manifest = export_onnx(source, out, config, arguments.parity_users)
    size = sum(entry["size"] for entry in manifest["files"].values()) / 2**20
    latency: dict[str, tuple[str, str]] = {}
    if config.dtype != "bfloat16":
        with (
            Engine.load(source, device="cpu", dtype="float32") as engine,
            OnnxEngine.load(out, threads=1) as onnx,
        ):
            for name in config.graphs:
                ours, theirs = interleaved(*PAIRS[name](engine, onnx), arguments.runs)
                latency[name] = f"{ours:.2f} ms", f"{theirs:.2f} ms"
    for name, graph in manifest["graphs"].items():
        parity = graph["parity"]
        checked = (
            ("not run", "not run")
            if isinstance(parity, str)
            else (f"{parity['max_error']:.1e} ({parity['max_absolute_error']:.1e})", f"{parity['same_top']:.1%}")
        )
        cells = name, config.flavour, config.dtype, f"{size:.1f} MiB", f"{graph['export_cpu_seconds']:.1f} s", *checked
        print(f"| {' | '.join((*cells, *latency.get(name, ('not run', ''))))} |", flush=True)


Call = Callable[[int], object]


def recommend_calls(engine: Engine, onnx: OnnxEngine) -> tuple[Call, Call]:
    """A cold user with 30 items."""
    return lambda i: onnx.recommend(items(engine, i, 30)), lambda i: engine.recommend(items(engine, i, 30))


def score_calls(engine: Engine, onnx: OnnxEngine) -> tuple[Call, Call]:
    """A cold user with 30 items and 20 candidates."""
    named = list(engine.catalogue.item_ids[:20])
    return (
        lambda i: onnx.recommend(items(engine, i, 30), candidates=named),
        lambda i: engine.recommend(items(engine, i, 30), candidates=named),
    )


def extend_calls(engine: Engine, onnx: OnnxEngine) -> tuple[Call, Call]:
    """A returning user with one more item, of at most 50."""

    def one_more(each: Engine | OnnxEngine) -> Call:
        return lambda i: each.recommend(items(engine, 0, 20 + i % 20), user_id="returning")

    return one_more(onnx), one_more(engine)


def compress_calls(engine: Engine, onnx: OnnxEngine) -> tuple[Call, Call]:
    """One new item."""
    widths = engine.parts.config.compressor.modalities
    vectors = {name: np.ones(width, np.float32) for name, width in widths.items()}
    embedder = engine._now().embedder
    features = {name: vector[None] for name, vector in vectors.items()}
    return lambda i: onnx.compress(features), lambda i: embedder.tokens([Item("new", vectors=vectors)])


PAIRS = {"score": score_calls, "recommend": recommend_calls, "extend": extend_calls, "compress": compress_calls}


def items(engine: Engine, seed: int, count: int) -> list[str]:
    ids = engine.catalogue.item_ids
    return [ids[row] for row in np.random.default_rng(seed).integers(0, len(ids), count)]


def interleaved(ours: Call, theirs: Call, runs: int) -> tuple[float, float]:
    """Medians in ms of the one thread's processor time, the two in turn: what others do on the machine is left out."""
    times: tuple[list[float], list[float]] = ([], [])
    for run in range(runs + 5):
        for call, into in zip((ours, theirs), times, strict=True):
            started = time.thread_time()
            call(run)
            into.append((time.thread_time() - started) * 1e3)
    first, second = (float(np.median(each[5:])) for each in times)
    return first, second


if __name__ == "__main__":
    main()
