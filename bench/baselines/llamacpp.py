"""llama.cpp with soft tokens: rows go in as embeddings, a candidate is a sequence of its own that shares the history.

Its own attention keeps sequences apart, so that all candidates take one pass; weights are those of the subject in a
GGUF file. Needs `pip install llama-cpp-python gguf`, which compiles llama.cpp: minutes, and so no extra brings it.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from baselines.base import Answer, Unavailable
from baselines.gguf_file import write_gguf
from subject import PromptRows, Subject
from torch import Tensor
from workload import BenchUser

BATCH = 512  # rows of a pass


class LlamaCpp:
    """Sequence 0 is the user's history; sequence c + 1 the same and candidate c. Of users who return, it keeps the one
    of the last `warm_up`."""

    key, has_warm, heavy = "llama_cpp", True, False

    def __init__(self, subject: Subject) -> None:
        """Raises Unavailable without the packages, off the CPU and for decoders that are no Qwen2 or Llama."""
        if subject.device.type != "cpu":
            raise Unavailable("llama_cpp is measured on the CPU alone")
        try:
            import gguf  # noqa: F401  what the weights are written with
            import llama_cpp
        except ImportError as error:
            needed = "pip install llama-cpp-python gguf"
            raise Unavailable(f"{error.name} is not installed: {needed} (it compiles for minutes)") from None
        self.api, self.subject = llama_cpp, subject
        self.label = f"llama.cpp, soft tokens, {str(subject.dtype).removeprefix('torch.')}"
        self.num_candidates, self.kept = subject.workload.num_candidates, ""
        self._batches: dict[tuple[int, int], Any] = {}
        self._load()
        instruction, count = subject.model.instruction, subject.layout.instruction_len
        positions = torch.arange(count)
        self._run(PromptRows(instruction, positions, positions <= positions[:, None], 0, 0))

    def _load(self) -> None:
        api = self.api
        self._silent = api.llama_log_callback(lambda *_: None)  # held: C calls it
        api.llama_log_set(self._silent, None)
        api.llama_backend_init()
        with tempfile.TemporaryDirectory(prefix="speeder-bench-") as folder:
            path = Path(folder, "model.gguf")
            write_gguf(self.subject, path)
            options = api.llama_model_default_params()
            options.use_mmap = False  # the file goes
            self.model = api.llama_model_load_from_file(str(path).encode(), options)
        if not self.model:
            raise Unavailable("llama.cpp can't load the weights in this shape")
        settings = api.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = BATCH
        settings.n_seq_max = self.num_candidates + 1
        settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
        settings.embeddings, settings.kv_unified, settings.pooling_type = True, True, 0
        if self.subject.dtype == torch.float32:
            # its fused attention works in half precision
            settings.type_k = settings.type_v = api.GGML_TYPE_F32
            settings.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.context = api.llama_init_from_model(self.model, settings)
        if not self.context:
            raise Unavailable("llama.cpp can't make a context for this shape")
        self.memory = api.llama_get_memory(self.context)

    def answer(self, user: BenchUser) -> Answer:
        self.kept = ""
        return self._answer(user, self.subject.rows(user))

    def warm_up(self, user: BenchUser) -> None:
        rows = self.subject.history_rows(user)
        self._forget(rows.past)
        self._run(rows)
        self.kept = user.user_id

    def answer_warm(self, user: BenchUser) -> Answer:
        if user.user_id != self.kept:
            raise ValueError(f"user {user.user_id}: nothing is kept; call warm_up before answer_warm")
        return self._answer(user, self.subject.rows(user, warm=True))

    def _answer(self, user: BenchUser, rows: PromptRows) -> Answer:
        self._forget(rows.past)
        hidden = self._run(rows)
        last = rows.num_new - 1
        return Answer(self.subject.rank(hidden[last], hidden[last + 1 :], user.candidates))

    def _forget(self, position: int) -> None:
        """Everything from this position on, in all sequences."""
        self.api.llama_memory_seq_rm(self.memory, -1, position, -1)

    def _run(self, rows: PromptRows) -> Tensor:
        """Final hidden states [N, d]."""
        batch, count = self._batch(rows.num_new, rows.num_candidates), rows.num_rows
        size = rows.embeddings.shape[1]
        np.ctypeslib.as_array(batch.embd, (count, size))[:] = rows.embeddings.float().numpy()
        np.ctypeslib.as_array(batch.pos, (count,))[:] = rows.positions.numpy()
        status = self.api.llama_decode(self.context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode of {count} rows failed with status {status}")
        found = np.ctypeslib.as_array(self.api.llama_get_embeddings(self.context), (count, size))
        return torch.from_numpy(found.copy()).to(self.subject.dtype)

    def _batch(self, num_new: int, num_candidates: int) -> Any:
        """Rows of the history belong to all sequences, a candidate to its own; the same for all requests of a size."""
        if (num_new, num_candidates) not in self._batches:
            size, count = self.subject.config.decoder.hidden_size, num_new + num_candidates
            batch = self.api.llama_batch_init(count, size, self.num_candidates + 1)
            batch.n_tokens = count
            for row in range(count):
                owners = range(self.num_candidates + 1) if row < num_new else [row - num_new + 1]
                batch.n_seq_id[row], batch.logits[row] = len(owners), 1
                for place, sequence in enumerate(owners):
                    batch.seq_id[row][place] = sequence
            self._batches[num_new, num_candidates] = batch
        return self._batches[num_new, num_candidates]

    def close(self) -> None:
        for batch in self._batches.values():
            self.api.llama_batch_free(batch)
        self._batches.clear()
        self.api.llama_free(self.context)
        self.api.llama_model_free(self.model)
