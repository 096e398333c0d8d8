"""Item vectors from who follows whom: a truncated singular value decomposition of discounted counts, no training.

F_ij = events of j at most `window` after one of i, in the same history / (count(i)^.5 count(j)^.4)
F ~ U S V^T,    vector_i = [U_i sqrt(S) ; V_i sqrt(S)]      i as one that is followed, and as one that follows
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from speeder_engine.encoders.features import Features, Flags
from speeder_engine.encoders.pairs import count_pairs
from speeder_engine.encoders.windows import Ints, check_histories
from speeder_engine.errors import ConfigError

WINDOW = 10
DISCOUNTS = (0.5, 0.4)  # exponents of the counts of the followed and of the following item
OVERSAMPLED, ITERATIONS = 16, 6  # of the randomised decomposition
SMALLEST = 1e-2  # part of the largest singular value of a half; what is smaller is noise to fold in with


def fit_neighbours(offsets: Ints, rows: Ints, num_items: int, rank: int, seed: int = 0) -> Features:
    """Vectors [num_items, 2 rank] of unit variance; items without a training event are not present.

    Histories are `rows[offsets[u]:offsets[u + 1]]`, oldest first. Equal seeds give equal vectors. ConfigError for a
    rank that the catalogue hasn't.
    """
    if not 0 < rank <= num_items:
        raise ConfigError(f"collaborative.neighbours: {rank} factors of {num_items} items; take at most as many")
    check_histories(offsets, rows, num_items)
    counts = np.bincount(rows, minlength=num_items)
    matrix = following(offsets, rows, num_items, counts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        size = min(rank + OVERSAMPLED, num_items)
        left, values, right = torch.svd_lowrank(matrix, q=size, niter=ITERATIONS)
    weights = values[:rank].clamp_min(0).sqrt()
    vectors = torch.cat([left[:, :rank] * weights, right[:, :rank] * weights], dim=1).numpy()
    seen = counts > 0
    vectors = vectors[seen] / max(float(vectors[seen].std()), 1e-12)
    return Features.of_present(vectors.astype(np.float32), seen)


def fold_in(offsets: Ints, rows: Ints, known: Features, new: Flags) -> Features:
    """Vectors of the `new` items, bool [I], in the space of the `known` ones [I, 2 rank], which need not be as fitted.

    With L and R the halves of the known vectors and F counted over these histories, F ~ c L R^T; new halves are the
    least squares of F[new, known] ~ c l R^T and of F[known, new] ~ c L r^T. Where nothing was tuned this is the
    decomposition's own U_i sqrt(S) = F_i V / sqrt(S).
    """
    check_histories(offsets, rows, len(known))
    matrix = following(offsets, rows, len(known), np.bincount(rows, minlength=len(known))).double()
    left, right = torch.from_numpy(known.values).double().chunk(2, dim=1)
    fitted = ((left.T @ left) * (right.T @ right)).sum()
    scale = max(float((left * (matrix @ right)).sum() / fitted.clamp_min(1e-12)), 1e-12)
    # rows of items that aren't known are zeros: nothing is read from them
    lefts = matrix @ torch.linalg.pinv(right, rtol=SMALLEST).T
    rights = matrix.T @ torch.linalg.pinv(left, rtol=SMALLEST).T
    vectors = torch.cat([lefts, rights], dim=1)[torch.from_numpy(new)] / scale
    return Features.of_present(vectors.numpy().astype(np.float32), new)


def following(offsets: Ints, rows: Ints, num_items: int, counts: NDArray[np.int64]) -> Tensor:
    """F as a sparse float32 [num_items, num_items]."""
    pairs, found = count_pairs(offsets, rows, num_items, WINDOW)
    earlier, later = pairs // num_items, pairs % num_items
    taken = np.maximum(counts, 1).astype(np.float64)
    discounted = found * taken[earlier] ** -DISCOUNTS[0] * taken[later] ** -DISCOUNTS[1]
    places = torch.from_numpy(np.stack([earlier, later]))
    return torch.sparse_coo_tensor(
        places, torch.from_numpy(discounted.astype(np.float32)), (num_items, num_items), check_invariants=True
    )
