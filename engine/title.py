"""TitleTrie: a question and the titles that may answer it as one tree of tokens, every shared beginning once.

    question_0 - ... - question_Q-1 -+- The - Old - ...
                                     +- A - ...

A row sees its ancestors and itself; so one pass over the tree scores every title as a prompt of its own would.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class TitleTrie:
    """T rows: the question, then the nodes that others hang from. A leaf needs no row: nothing follows it."""

    tokens: Ints  # [T]
    parents: Ints  # [T] the row before, -1 before the first
    depths: Ints  # [T] rows before: the distance from the end of the history
    question_len: int
    edge_rows: Ints  # [E] every node of the trie, leaves too, as the row that predicts it
    edge_tokens: Ints  # [E] and the token to predict
    answers: Ints  # [C, L] each candidate's edges, -1 behind its last

    @classmethod
    def build(cls, question_ids: Sequence[int], answers: Sequence[Sequence[int]]) -> "TitleTrie":
        """`answers`: the token ids of every candidate's title; none where it has no title."""
        children: dict[tuple[int, int], int] = {}  # (edge before, -1 for none; token) -> edge
        paths: list[list[int]] = []
        for ids in answers:
            edge, path = -1, []
            for token in ids:
                edge = children.setdefault((edge, token), len(children))
                path.append(edge)
            paths.append(path)
        before = np.array([edge for edge, _ in children], dtype=np.int64)
        tokens = np.array([token for _, token in children], dtype=np.int64)
        inner = np.unique(before[before >= 0])  # edges that lead to a row
        question_len = len(question_ids)
        row_of = np.full(len(children) + 1, question_len - 1, dtype=np.int64)  # the last stands for "none before"
        row_of[inner] = question_len + np.arange(len(inner))
        edge_rows = row_of[before]
        parents = np.concatenate([np.arange(question_len) - 1, edge_rows[inner]])
        return cls(
            tokens=np.concatenate([np.array(question_ids, dtype=np.int64), tokens[inner]]),
            parents=parents,
            depths=_depths(parents),
            question_len=question_len,
            edge_rows=edge_rows,
            edge_tokens=tokens,
            answers=_padded(paths),
        )

    @property
    def num_rows(self) -> int:
        return len(self.tokens)

    @property
    def first_read(self) -> int:
        """Rows from here on predict a token of some title: the question's last, and all behind it."""
        return self.question_len - 1

    def paths(self) -> Ints:
        """[T, P]: the rows that each row sees, from the first of the question to itself, -1 behind."""
        paths = np.full((self.num_rows, int(self.depths.max()) + 1), -1, dtype=np.int64)
        for row, (parent, depth) in enumerate(zip(self.parents.tolist(), self.depths.tolist(), strict=True)):
            if parent >= 0:
                paths[row, :depth] = paths[parent, :depth]
            paths[row, depth] = row
        return paths


def _depths(parents: Ints) -> Ints:
    depths = np.zeros(len(parents), dtype=np.int64)
    for row, parent in enumerate(parents.tolist()):
        depths[row] = depths[parent] + 1 if parent >= 0 else 0
    return depths


def _padded(paths: Sequence[Sequence[int]]) -> Ints:
    padded = np.full((len(paths), max(map(len, paths), default=0)), -1, dtype=np.int64)
    for row, path in zip(padded, paths, strict=True):
        row[: len(path)] = path
    return padded
