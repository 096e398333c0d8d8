"""Limits on paper: what a chip's memory and multipliers allow, by shape and way to serve; nothing is measured here.

python bench/on_paper.py                         # an NVIDIA H200 by its measured ceilings
python bench/on_paper.py --copy-gb 30 --tflops 0.458 --price 0.1 --memory-gib 24
"""

import argparse
from dataclasses import dataclass

from workload import Workload

from speeder_engine.config import DecoderConfig
from speeder_engine.random_engine import SHAPES


@dataclass(frozen=True)
class Chip:
    copy_bytes: float  # a second
    flops: float  # a second
    memory_bytes: float
    price: float  # an hour


@dataclass(frozen=True)
class Body:
    """What a decoder's layers cost; embeddings and the vocabulary's head are not run."""

    config: DecoderConfig
    weight_bytes_each: float = 2.0

    @property
    def parameters(self) -> int:
        c = self.config
        attention = c.hidden_size * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
        return c.num_layers * (attention + 3 * c.hidden_size * c.intermediate_size)

    def flops(self, rows: int, keys: int) -> float:
        """Of a pass over `rows` that see `keys` each."""
        c = self.config
        return 2.0 * rows * self.parameters + 4.0 * rows * keys * c.num_layers * c.num_heads * c.head_dim

    @property
    def position_bytes(self) -> int:
        """Keys and values of one position in bf16."""
        return 4 * self.config.num_layers * self.config.num_kv_heads * self.config.head_dim


@dataclass(frozen=True)
class Way:
    """Rows computed and keys seen by each, for one user."""

    name: str
    rows: int
    keys: int
    decoded: int = 0  # further passes, one row each


def ways(workload: Workload) -> list[Way]:
    prefix = workload.instruction_len + workload.history_len
    return [
        Way("text, one prompt and its answer", workload.text_prompt_len, 450, workload.generated_tokens),
        Way("one token an item, 20 separate prompts", workload.num_candidates * (prefix + 1), prefix),
        Way("one pass, nothing shared", prefix + workload.num_candidates, prefix),
        Way("+ shared instruction (a new user)", workload.cold_rows, prefix),
        Way("+ session (a user who returns)", workload.warm_rows, prefix),
    ]


def row_of(body: Body, way: Way, chip: Chip) -> dict[str, float]:
    """A pass for one user, and as many as the multipliers allow when the weights' reading is shared."""
    flops, weight_bytes = body.flops(way.rows, way.keys), body.parameters * body.weight_bytes_each
    reads = weight_bytes / chip.copy_bytes
    alone = max(reads, flops / chip.flops) + way.decoded * reads
    flops += way.decoded * body.flops(1, 2 * way.keys)
    users = chip.flops / flops
    return {"ms": alone * 1e3, "users_s": users, "per_million": chip.price / 3600 * 1e6 / users}


def table(chip: Chip, workload: Workload) -> str:
    lines = [f"ceilings {chip.copy_bytes / 1e9:,.0f} GB/s, {chip.flops / 1e12:,.2f} TFLOP/s; {chip.price:g} an hour"]
    lines.append(f"{'':46} {'alone ms':>10} {'users/s':>10} {'a million':>10}  bound alone by")
    for name in ("0.5b", "1.5b", "7b"):
        body = Body(SHAPES[name])
        history = (workload.history_len + 1) * body.position_bytes
        left = chip.memory_bytes - body.parameters * body.weight_bytes_each
        sessions = f"{left / history / 1e3:,.0f} thousand sessions of {history / 1024:,.0f} KiB fit beside them"
        kept = sessions if left > 0 else "more than its memory"
        lines.append(f"{name}: {body.parameters / 1e9:.2f} G weights in the layers; {kept}")
        for way in ways(workload):
            row = row_of(body, way, chip)
            reads = body.parameters * body.weight_bytes_each / chip.copy_bytes * 1e3
            bound = "reading weights" if row["ms"] <= reads * (1 + way.decoded) else "products"
            costs = f"{row['ms']:10.3f} {row['users_s']:10,.0f} {row['per_million']:10.2f}"
            lines.append(f"  {way.name:44} {costs}  {bound}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--copy-gb", type=float, default=4300.0, help="memory read, GB/s")
    parser.add_argument("--tflops", type=float, default=790.0, help="bf16 products, TFLOP/s")
    parser.add_argument("--memory-gib", type=float, default=139.0)
    parser.add_argument("--price", type=float, default=4.0, help="of an hour, in any currency")
    options = parser.parse_args()
    chip = Chip(options.copy_gb * 1e9, options.tflops * 1e12, options.memory_gib * 2**30, options.price)
    print(table(chip, Workload()))


if __name__ == "__main__":
    main()
