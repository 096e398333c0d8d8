"""The text rows of a forward pass: questions and title tries, behind the rows of all items."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from speeder_engine.cache import CachePlan
from speeder_engine.prompt import PromptLayout
from speeder_engine.query import Query
from speeder_engine.title import Ints, TitleTrie
from speeder_engine.triton_kernels.compressed_attention import AttentionRows
from speeder_engine.triton_kernels.tree_attention import TreeRows


@dataclass(frozen=True)
class TextRows:
    """T rows of the queries that are answered in words. None is written to the cache."""

    tokens: Tensor  # int64 [T]
    positions: Tensor  # int64 [T]
    tree: TreeRows
    read_rows: Tensor  # int64 [R] whose final hidden state is read, counted among the text rows
    reads: tuple[slice, ...]  # [B] each query's among them, empty where it has none

    @property
    def num_rows(self) -> int:
        return self.tokens.shape[0]


def make_text_rows(
    queries: Sequence[Query], plan: CachePlan, layout: PromptLayout, shared_blocks: Tensor, device: torch.device
) -> TextRows | None:
    """None where no query has a trie."""
    asked = [(b, query.trie, len(query.window)) for b, query in enumerate(queries) if query.trie is not None]
    if not asked:
        return None
    members, tries, lengths = zip(*asked, strict=True)
    sizes = np.array([trie.num_rows for trie in tries])
    starts = np.cumsum(sizes) - sizes
    visible = np.repeat(np.array(lengths), sizes)
    prefix = AttentionRows(
        sequence=_tensor(np.repeat(np.arange(len(tries)), sizes), device),
        local=_tensor(np.arange(sizes.sum()) - np.repeat(starts, sizes), device),
        visible=_tensor(visible, device),
        candidate=torch.zeros(int(sizes.sum()), dtype=torch.bool, device=device),
        rows_per_sequence=int(sizes.max()),
        block_tables=_tensor(plan.block_tables[list(members)], device),
        shared_blocks=shared_blocks,
        shared_len=layout.instruction_len,
    )
    reads = [
        np.arange(start + trie.first_read, start + trie.num_rows) for start, trie in zip(starts, tries, strict=True)
    ]
    ends = dict(zip(members, np.cumsum([len(each) for each in reads]).tolist(), strict=True))
    counts = {b: len(each) for b, each in zip(members, reads, strict=True)}
    return TextRows(
        tokens=_tensor(np.concatenate([trie.tokens for trie in tries]), device),
        positions=_tensor(layout.instruction_len + visible + np.concatenate([t.depths for t in tries]), device),
        tree=TreeRows(prefix, _tensor(_paths(tries, starts), device)),
        read_rows=_tensor(np.concatenate(reads), device),
        reads=tuple(slice(ends[b] - counts[b], ends[b]) if b in ends else slice(0, 0) for b in range(len(queries))),
    )


def _paths(tries: Sequence[TitleTrie], starts: Ints) -> Ints:
    """[T, P] of all tries, counted among all text rows."""
    each = [trie.paths() for trie in tries]
    paths = np.full((sum(map(len, each)), max(path.shape[1] for path in each)), -1, dtype=np.int64)
    for start, path in zip(starts.tolist(), each, strict=True):
        paths[start : start + len(path), : path.shape[1]] = np.where(path < 0, -1, path + start)
    return paths


def _tensor(array: NDArray[np.integer[Any]], device: torch.device) -> Tensor:
    return torch.from_numpy(array.astype(np.int64)).to(device)
