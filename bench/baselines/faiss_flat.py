"""faiss-cpu over the catalogue: exact inner products, in fp32 or in half precision."""

from typing import Any

import numpy as np
import torch
from baselines.base import Unavailable
from numpy.typing import NDArray
from torch import Tensor

Found = tuple[NDArray[np.float32], NDArray[np.int64]]
FEWEST_MULTIPLIED = 4  # queries: on two cores fewer are faster one by one, more as a product


class FaissFlat:
    """`precision`: "float32" (IndexFlatIP), "float16" or "bfloat16" (a scalar quantiser, which decodes the table for
    every query and knows no other way).

    By itself faiss 1.15 scans the table for every query, too, until queries x width reach 128,000. That is tuned for
    many cores; on two it takes 64 queries several times as long as a product with BLAS, which batches get here.
    """

    def __init__(self, tokens: Tensor, precision: str = "float32", threads: int | None = None) -> None:
        """tokens [I, d]. Raises Unavailable without faiss."""
        try:
            import faiss
        except ImportError:
            raise Unavailable("faiss is not installed: pip install 'speeder-engine[bench]'") from None
        faiss.omp_set_num_threads(threads or torch.get_num_threads())
        self.settings = faiss.cvar
        self.threshold: int = self.settings.distance_compute_blas_threshold
        self.key, self.label = f"faiss_{precision}", f"faiss-cpu, flat, {precision}"
        self.index = self._empty(faiss, tokens.shape[1], precision)
        for part in tokens.split(1 << 16):
            self.index.add(part.float().cpu().numpy())

    @staticmethod
    def _empty(faiss: Any, width: int, precision: str) -> Any:
        if precision == "float32":
            return faiss.IndexFlatIP(width)
        kinds = {"float16": "QT_fp16", "bfloat16": "QT_bf16"}
        kind = getattr(faiss.ScalarQuantizer, kinds[precision])
        return faiss.IndexScalarQuantizer(width, kind, faiss.METRIC_INNER_PRODUCT)

    def search(self, queries: Tensor, k: int) -> Found:
        """queries [B, d] -> the best scores and rows [B, k]."""
        multiplied = len(queries) >= FEWEST_MULTIPLIED
        self.settings.distance_compute_blas_threshold = 1 if multiplied else self.threshold
        try:
            scores, rows = self.index.search(queries.float().cpu().numpy(), k)
        finally:
            self.settings.distance_compute_blas_threshold = self.threshold
        return scores, rows


class TorchTopK:
    """A matmul that writes all scores out, and torch's top-k over them."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens
        self.key, self.label = "torch_topk", f"torch matmul + topk, {str(tokens.dtype).removeprefix('torch.')}"

    @torch.inference_mode()
    def search(self, queries: Tensor, k: int) -> Found:
        """queries [B, d], in any dtype -> the best scores and rows [B, k]."""
        scores, rows = (queries.to(self.tokens.dtype) @ self.tokens.T).topk(k, dim=1)
        return scores.float().cpu().numpy(), rows.cpu().numpy()
