"""What Triton would compile for a GPU that isn't here: keys of its own cache, from launches whose kernels never run.

A script, since Triton must not have been told to interpret when it is imported. Prints JSON by variant: how many
kernels the warm-up meets, and the names of those that are met later.
"""

import importlib
import inspect
import json
import os
import pkgutil

os.environ["TRITON_INTERPRET"] = "0"

import numpy as np
from reference import make_tiny, make_titled
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from speeder_engine import Engine, EngineConfig, Item, Request, runner, triton_kernels
from speeder_engine.triton_kernels import few_rows

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
WRITE_INTO = ("compressed_attention", "tree_attention")  # their last argument


class AbsentGpu:
    """All that Triton asks of a driver before it launches."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def note_compilations():
    """A set that every key joins for which Triton would compile; nothing is."""
    met = set()
    driver.set_active(AbsentGpu())

    def note(self, key, *_):
        met.add((self.fn.__name__, key))

    JITFunction._do_compile = note
    return met


def launch_and_refer():
    """Every operation launches its kernels, as on a GPU, and computes as its reference does."""
    modules = [importlib.import_module(f"{triton_kernels.__name__}.{each.name}") for each in _submodules()]
    for module in (*modules, runner, few_rows):
        if hasattr(module, "runs_triton"):
            module.runs_triton = lambda *tensors: True
    for module in modules:
        for name, launch in inspect.getmembers(module, inspect.isfunction):
            operation = name.removeprefix("launch_")
            reference = getattr(module, f"{operation}_ref", None)
            if name.startswith("launch_") and launch.__module__ == module.__name__ and reference is not None:
                setattr(module, name, _both(launch, reference, operation in WRITE_INTO))


def _submodules():
    return pkgutil.iter_modules(triton_kernels.__path__)


def _both(launch, reference, writes_into):
    def run(*args, **kwargs):
        launch(*args, **kwargs)
        return args[-1].copy_(reference(*args[:-1])) if writes_into else reference(*args, **kwargs)

    return run


def met_by(met, variant):
    """How many kernels the warm-up meets, and the names of those that are met later: requests of all kinds, sessions,
    upserts that let the catalogue grow beyond what it was searched in."""
    (settings, k), titled = VARIANTS[variant], variant == "titles"
    tiny = make_titled(head_dim=32) if titled else make_tiny(1000, window=12, step=4, head_dim=32, num_layers=1)
    met.clear()
    engine, rng = Engine(tiny.parts(), EngineConfig(**SETTINGS | settings)), np.random.default_rng(0)
    if variant == "no graphs":  # buffers are staged all the same, as on a GPU
        engine._now().graphs._capture = None
    engine.warm_up()
    engine._now()._meet_kernels()  # as on a GPU
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
        engine.recommend_many(asked)
        engine.warm("ada", ids[: turn + 3])
        engine.scores(asked[:1], ids[:30])
        if turn % 4 == 3:
            vectors = rng.normal(size=(90, 8))
            engine.upsert([Item(f"{turn} {number}", vectors={"text": vector}) for number, vector in enumerate(vectors)])
    assert len(engine.catalogue) > 1024 or titled
    return len(warm), sorted({name for name, _ in met - warm})


def some(ids, rng, count):
    return [ids[row] for row in rng.permutation(len(ids))[:count]]


if __name__ == "__main__":
    met = note_compilations()
    launch_and_refer()
    print(json.dumps({variant: met_by(met, variant) for variant in VARIANTS}))
