"""The native CPU path. Addresses are those of CPU tensors in one piece; `engine/native/` checks them."""

from collections.abc import Mapping

Matrix = tuple[int, str, int, int]  # address, "float32" or "bfloat16", rows, columns

def best_kernels() -> str: ...
def has_kernels(name: str) -> bool: ...
def advise_huge(address: int, num_bytes: int) -> None: ...
def read(address: int, num_bytes: int, isa: str, threads: int) -> float: ...
def top_scores(search: Mapping[str, int | str], isa: str, threads: int) -> None: ...

class Linear:
    def __init__(self, weight: Matrix, bias: int, type: str, gated: bool, isa: str, threads: int) -> None: ...
    def run(self, rows: int, num_rows: int, out: int) -> None: ...

class Decoder:
    def __init__(
        self,
        *,
        hidden: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        intermediate: int,
        eps: float,
        weights: str,
        cache: str,
        isa: str,
        threads: int,
    ) -> None: ...
    def add_layer(
        self,
        *,
        qkv: Matrix,
        out: Matrix,
        gate_up: Matrix,
        down: Matrix,
        biases: list[int],
        norms: list[int],
    ) -> None: ...
    def set_norm(self, weight: int) -> None: ...
    def forward(self, given: Mapping[str, int | str]) -> None: ...
    threads: int
    kept_rows: int
    work_per_thread: float
    @property
    def num_layers(self) -> int: ...
    @property
    def weight_bytes(self) -> int: ...
    @property
    def scratch_bytes(self) -> int: ...
