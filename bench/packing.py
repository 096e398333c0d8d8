"""What packing spares a backbone: forward and backward passes over the same histories, padded by length and packed.

    python bench/packing.py DATA --hidden-size 64 --layers 2 --batches 20

Both kinds take turns, batch by batch; a backbone from scratch, in `--precision`, on one thread.
"""

import argparse
import json
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from commands import run_command

from speeder_engine.config import CompressorConfig, ModelConfig, PromptConfig
from speeder_engine.data.dataset import load_dataset
from speeder_engine.data.splits import leave_one_out
from speeder_engine.models.families import decoder_config
from speeder_engine.models.recommender import Recommender
from speeder_engine.training.backbone import small_llama
from speeder_engine.training.batches import TrainingBatch, TrainingBatches
from speeder_engine.training.config import BackboneConfig, TrainingConfig
from speeder_engine.training.heap import keep_freed_memory
from speeder_engine.training.packing import Packing, packed_forward
from speeder_engine.training.precision import autocast

INSTRUCTION = 3  # rows
CPU = torch.device("cpu")


def make_model(shape: BackboneConfig, window: int) -> Recommender:
    """Of which only the backbone is asked."""
    backbone = small_llama(shape, shape.vocab_size)
    prompt = PromptConfig("", tuple(range(INSTRUCTION)), window, 1)
    compressor = CompressorConfig({"text": 1}, shape.hidden_size)
    return Recommender(ModelConfig(decoder_config(backbone.config), compressor, prompt), backbone)


def step(model: Recommender, batch: TrainingBatch, packed: bool, precision: str) -> tuple[float, int, int]:
    """Seconds of a forward and backward pass, rows that were computed, rows that were real."""
    num_rows = INSTRUCTION + batch.rows.shape[1]
    hidden_size = model.config.decoder.hidden_size
    embeddings = torch.randn(len(batch), num_rows, hidden_size, requires_grad=True)
    positions = torch.arange(num_rows).expand(len(batch), -1)
    real = torch.arange(num_rows) < INSTRUCTION + batch.lengths.unsqueeze(1)
    started = time.perf_counter()
    computed = real.numel()
    with autocast(precision, CPU):
        if packed:
            packing = Packing.of(real)
            computed = packing.num_places
            hidden = packed_forward(model, packing, embeddings, positions, None)
        else:
            hidden = model(embeddings, positions, None)
    hidden[real].float().square().mean().backward()
    return time.perf_counter() - started, computed, int(real.sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a data folder")
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--window", type=int, default=50)
    parser.add_argument("--batches", type=int, default=20, help="of each kind")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    given = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    split = leave_one_out(load_dataset(given.data))
    shape = BackboneConfig(
        hidden_size=given.hidden_size,
        num_layers=given.layers,
        num_heads=given.heads,
        intermediate_size=4 * given.hidden_size,
    )
    model = make_model(shape, given.window)
    kinds = {}
    for name, packing in (("padded", False), ("packed", True)):
        config = TrainingConfig(window=given.window, batch_size=given.batch_size, packing=packing)
        kinds[name] = TrainingBatches(split.train, split.dataset.num_items, config).epoch(0)
    found: dict[str, tuple[float, ...]] = dict.fromkeys(kinds, (0.0, 0, 0))
    for number, pair in enumerate(zip(*kinds.values(), strict=False)):
        if number > given.batches:
            break
        for name, batch in zip(kinds, pair, strict=True):
            of_step = step(model, batch, name == "packed", given.precision)
            if number:  # the first warms up
                found[name] = tuple(a + b for a, b in zip(found[name], of_step, strict=True))
    seconds = {name: total / real for name, (total, _, real) in found.items()}
    shares = {name: round(1 - real / computed, 4) for name, (_, computed, real) in found.items()}
    told = {"padding": shares, "us_per_real_row": {n: round(1e6 * s, 2) for n, s in seconds.items()}}
    print(json.dumps(told | {"padded_vs_packed": round(seconds["padded"] / seconds["packed"], 3)}))


if __name__ == "__main__":
    run_command(main)
