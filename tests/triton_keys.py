"""What Triton would compile for a GPU that isn't here: keys of its own cache, from launches whose kernels never run.

A script, since Triton must not have been told to interpret when it is imported. Prints JSON by variant: how often each
kernel is compiled in the warm-up, and which are later.
"""

import gc
import json
import os
from collections import Counter

os.environ["TRITON_INTERPRET"] = "0"

import numpy as np
from launchers import deciding_modules, launchers
from reference import make_tiny, make_titled
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from speeder_engine import Engine, EngineConfig, Item, Request

SETTINGS = {"cpu_path": "torch", "graphs": "on", "freeze_gc": False, "dtype": "bfloat16", "kv_budget": "4MiB"}
SETTINGS |= {"max_batch_users": 20, "max_batch_rows": 400, "row_buckets": (16, 64, 256)}
# settings that differ, and the k that are asked for
VARIANTS = {
    "fused": ({}, 17),
    "overlapped": ({"launches": "overlapped"}, 17),
    "apart": ({"launches": "apart"}, 17),
    "float16": ({"dtype": "float16"}, 17),
    "8 bits": ({"weights": "int8", "kv": "int8"}, 17),
    "two stages": ({"search": "two_stage"}, 17),
    "hardly a bucket": ({"row_buckets": (16,)}, 17),
    "no graphs": ({}, 17),
    "titles": ({}, 17),
    "deep": ({"warm_k": 100}, 129),
    "deeper than was said": ({"warm_k": 20}, 129),
}


class AbsentGpu:
    """All that Triton asks of a driver before it launches."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


class AbsentKernel:
    """What Triton keeps of a key in the place of a compiled kernel: launched, it notes that it was met."""

    function = packed_metadata = None

    def __init__(self, met, name, key):
        self.met, self.name, self.key = met, name, key

    def launch_metadata(self, *_):
        return None

    def run(self, *_):
        self.met.add((self.name, self.key))


def note_compilations():
    """A set that every key joins that is launched, and that Triton would have compiled before; nothing is."""
    met = set()
    driver.set_active(AbsentGpu())

    def stand_in(self, key, signature, device, *_):
        kernels = self.device_caches[device][0]
        kernels[key] = AbsentKernel(met, self.fn.__name__, key)
        return kernels[key]

    JITFunction._do_compile = stand_in
    return met


def launch_and_refer():
    """Every operation launches its kernels, as on a GPU, and computes as its reference does; but for attention, which
    took half of the time: what it gives decides over no launch, so that it gives its queries back."""
    found = list(launchers())
    for module in deciding_modules():
        module.runs_triton = lambda *tensors: True
    for each in found:
        reference = _queries if each.operation == "compressed_attention" else each.reference
        setattr(each.module, each.name, _both(each.launch, reference))


def _queries(q, *others):
    *_, out = others
    return out.copy_(q)


def _both(launch, reference):
    def run(*args, **kwargs):
        launch(*args, **kwargs)
        return reference(*args, **kwargs)

    return run


def met_by(met, variant):
    """How often each kernel is compiled in the warm-up, and which are later: by requests of all kinds, sessions that
    hold nothing, a part and all of a history, upserts that let the catalogue grow beyond what it was searched in."""
    (settings, k), titled = VARIANTS[variant], variant == "titles"
    tiny = make_titled(head_dim=32) if titled else make_tiny(1000, window=12, step=4, head_dim=32, num_layers=1)
    met.clear()
    engine, rng = Engine(tiny.parts(), EngineConfig(**SETTINGS | settings)), np.random.default_rng(0)
    if variant == "no graphs":  # buffers are staged all the same, as on a GPU
        engine._now().graphs._capture = None
    engine.warm_up()
    engine._now()._precompile()  # as on a GPU
    warm, ids = set(met), tiny.item_ids
    heads = ["rank", "retrieve", *["title"] * titled]
    for turn in range(12):
        asked = []
        for user in rng.permutation(60)[: (1, 2, 9, 20)[turn % 4]]:
            options = {}
            if rng.random() < 0.5:
                options = {"candidates": some(ids, rng, rng.integers(1, 30)), "head": rng.choice(heads)}
            if rng.random() < 0.3:
                options["allow"] = some(ids, rng, 60)
            history = [ids[row] for row in rng.integers(0, len(ids), rng.integers(0, 16))]
            who = f"{user}" if rng.random() < 0.7 else None
            asked.append(Request(history, int(rng.integers(1, k)), user_id=who, **options))
        for _ in range(2):  # the second time sessions hold all
            engine.recommend_many(asked)
        search_exactly(engine, [Request(each.history, each.k, allow=each.allow) for each in asked])
        engine.warm("ada", ids[: turn + 3])
        engine.scores(asked[:1], ids[:30])
        if turn % 4 == 3:
            vectors = rng.normal(size=(90, 8))
            engine.upsert([Item(f"{turn} {number}", vectors={"text": vector}) for number, vector in enumerate(vectors)])
    assert len(engine.catalogue) > 1024 or titled
    return Counter(name for name, _ in warm), sorted({name for name, _ in met - warm})


def search_exactly(engine, requests):
    """As where two stages are not certain of anybody's answer."""
    serving = engine._now()
    with serving.lock:
        queries = [serving.resolve(each) for each in requests]
        with serving.forward(queries) as done:
            serving.scorer.search_exactly(queries, range(len(queries)), done.vectors)


def some(ids, rng, count):
    return [ids[row] for row in rng.permutation(len(ids))[:count]]


if __name__ == "__main__":
    met = note_compilations()
    launch_and_refer()
    gc.freeze()  # an engine collects garbage when it warms up: what was imported is none
    print(json.dumps({variant: met_by(met, variant) for variant in VARIANTS}))
