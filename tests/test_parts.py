"""The engine directory end to end: what is written loads and answers the same, what was touched is refused by name."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from reference import make_tiny
from safetensors.torch import load_file, save_file

from speeder_engine import ArtifactError, Engine, EngineConfig, Request
from speeder_engine.artifact import write_artifact
from speeder_engine.config import FollowersConfig
from speeder_engine.errors import ConfigError
from speeder_engine.inspection import inspect_engine
from speeder_engine.parts import EngineParts
from speeder_engine.random_engine import random_parts


@pytest.fixture
def directory(tmp_path):
    make_tiny().parts().save(tmp_path / "engine")
    return tmp_path / "engine"


def rewritten(directory, change):
    """The directory with `change(folder)` applied and all hashes made right again: only the content is wrong."""
    manifest = json.loads((directory / "engine.json").read_text())
    fields = {name: manifest[name] for name in ("revision", "model", "limits")}

    def fill(folder):
        for name in manifest["files"]:
            (folder / name).write_bytes((directory / name).read_bytes())
        return change(folder, fields) or fields

    out = directory.with_name("rewritten")
    write_artifact(out, fill)
    return out


def test_a_loaded_engine_answers_as_the_one_that_was_saved(directory):
    history = ["0001", "0007", "0003"]
    expected = Engine(make_tiny().parts()).recommend(history)
    assert Engine.load(directory).recommend(history) == expected
    assert Engine.load(str(directory)).recommend(history) == expected


@pytest.mark.parametrize("cpu_path", ["auto", "torch"])
def test_parts_that_an_engine_has_cast_are_saved_as_it_serves_them(tmp_path, cpu_path):
    tiny = make_tiny(followers=FollowersConfig(window=3, last=5, keep=4))
    engine = Engine(tiny.parts(), EngineConfig(dtype="bfloat16", cpu_path=cpu_path))
    engine.save(tmp_path / "engine")
    loaded = Engine.load(tmp_path / "engine", dtype="bfloat16", cpu_path=cpu_path)
    for request in (Request(tiny.ids(range(6)), 120), Request(tiny.ids(range(6)), candidates=tiny.ids(range(20)))):
        assert loaded.recommend_many([request]) == engine.recommend_many([request])


@pytest.mark.parametrize("cpu_path", ["auto", "torch"])
def test_what_is_served_stands_whatever_is_copied_over_its_files(tmp_path, cpu_path):
    """Another model in place, as `cp` onto a served directory leaves it, and files cut to nothing, as it does first."""
    for seed in (0, 1):
        random_parts(num_items=50, seed=seed).save(tmp_path / f"{seed}")
    engine = Engine.load(tmp_path / "0", dtype="float32", cpu_path=cpu_path, kv_budget="1MiB")
    ids = engine.catalogue.item_ids
    asked = [Request(ids[:5], candidates=ids[9:20]), Request(ids[:7]), Request(ids[2:9], user_id="ada")]
    before = engine.recommend_many(asked)
    other = Engine.load(tmp_path / "1", dtype="float32", cpu_path=cpu_path, kv_budget="1MiB")
    assert other.recommend_many(asked) != before
    for path in (tmp_path / "1").glob("*.*"):
        (tmp_path / "0" / path.name).write_bytes(path.read_bytes())  # the same file, other bytes
    assert engine.recommend_many(asked) == before
    for path in (tmp_path / "0").glob("*.*"):
        os.truncate(path, 0)
    assert engine.recommend_many(asked) == before


def test_an_engine_takes_nothing_from_another_that_serves(tmp_path):
    """Engines of one `EngineParts`, in two types: natively each has its own; torch's are the parts' own."""
    parts = random_parts(num_items=50)
    asked = [Request(parts.catalogue.item_ids[:5], candidates=parts.catalogue.item_ids[9:20])]
    first = Engine(parts, EngineConfig(dtype="float32", kv_budget="1MiB"))
    before = first.recommend_many(asked)
    wide = Engine(parts, EngineConfig(dtype="bfloat16", kv_budget="1MiB")).recommend_many(asked)
    assert first.recommend_many(asked) == before != wide
    assert Engine(parts, EngineConfig(dtype="float32", kv_budget="1MiB")).recommend_many(asked) == before
    settings = {"cpu_path": "torch", "kv_budget": "1MiB"}
    serving = Engine(parts, EngineConfig(dtype="float32", **settings))
    answer = serving.recommend_many(asked)
    with pytest.raises(
        ConfigError, match=r"an engine on cpu in float32 has taken this model; read its directory again"
    ):
        Engine(parts, EngineConfig(dtype="bfloat16", **settings))
    assert serving.recommend_many(asked) == answer
    # what an engine serves is rounded to its type: no other one is made of it
    rounded = Engine(random_parts(num_items=50), EngineConfig(dtype="bfloat16", kv_budget="1MiB"))
    with pytest.raises(ConfigError, match="an engine on cpu in bfloat16 has taken this catalogue; read its dir"):
        Engine(rounded.parts, EngineConfig(dtype="float32"))


def test_item_tokens_are_held_once():
    """The catalogue's own copy, with room to grow, is what its parts hold, too."""
    engine = Engine(random_parts(num_items=50), EngineConfig(kv_budget="1MiB"))
    assert engine.parts.catalogue is engine.catalogue


def test_the_revision_names_the_content(directory, tmp_path):
    make_tiny().parts().save(tmp_path / "same")
    make_tiny(seed=1).parts().save(tmp_path / "other")
    revisions = [EngineParts.load(path).revision for path in (directory, tmp_path / "same", tmp_path / "other")]
    assert revisions[0] == revisions[1] != revisions[2]


@pytest.mark.parametrize("name", ["weights.safetensors", "item_tokens.safetensors", "items.parquet", "engine.json"])
@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
def test_a_damaged_file_is_named(directory, name, damage):
    path = directory / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[:-7] if damage == "truncated" else content[:-9] + b"?" + content[-8:])
    with pytest.raises(ArtifactError) as caught:
        Engine.load(directory)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def drop_weight(folder, fields):
    weights = load_file(folder / "weights.safetensors")
    weights.pop("prompts.weight")
    save_file(weights, folder / "weights.safetensors")


def narrow_tokens(folder, fields):
    save_file({"item_tokens": torch.zeros(120, 47)}, folder / "item_tokens.safetensors")


def fewer_tokens(folder, fields):
    save_file({"item_tokens": torch.zeros(119, 48)}, folder / "item_tokens.safetensors")


def no_safetensors(folder, fields):
    (folder / "weights.safetensors").write_bytes(b"not a tensor in sight")


def strange_settings(folder, fields):
    return {**fields, "model": {**fields["model"], "prompt": {"instruction": "x"}}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_weight, "weights.safetensors: weights of another shape .*prompts.weight"),
        (narrow_tokens, "item_tokens.safetensors: tokens are 47 wide, the model 48"),
        (fewer_tokens, r"item tokens of shape \(119, 48\) for 120 items"),
        (no_safetensors, "weights.safetensors: no safetensors file"),
        (strange_settings, "engine.json: settings that fit no model"),
    ],
)
def test_content_that_does_not_fit_is_refused(directory, change, message):
    with pytest.raises(ArtifactError, match=message) as caught:
        Engine.load(rewritten(directory, change))
    assert "\n" not in str(caught.value)


def test_settings_that_fit_no_model_are_an_artifact_error_of_whoever_looks_into_it(directory):
    with pytest.raises(ArtifactError, match=r"engine.json: settings that fit no model: .*; export again"):
        inspect_engine(rewritten(directory, strange_settings))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_it_takes_is_told_of_weights_in_any_type(tmp_path, dtype):
    parts = random_parts(num_items=20, dtype=dtype)
    parts.save(tmp_path / "engine")
    summary = inspect_engine(tmp_path / "engine")
    weights = sum(weight.numel() for weight in parts.model.parameters())
    assert summary.num_parameters == weights
    engine = Engine.load(tmp_path / "engine", kv_budget="1MiB")
    assert summary.memory["float32"] == 4 * (weights + engine.catalogue.tokens.numel())


@pytest.mark.parametrize("what", ["nowhere", "file", "empty"])
def test_a_path_that_is_no_engine(tmp_path, what):
    path = tmp_path / what
    if what == "file":
        path.write_text("x")
    if what == "empty":
        path.mkdir()
    with pytest.raises(ArtifactError, match=f"no engine directory: .*{what}"):
        Engine.load(path)


KILLED = """
import sys, pathlib
from speeder_engine.random_engine import random_parts
parts = random_parts(num_items=120, seed=int(sys.argv[2]))
print("ready", flush=True)
while True:
    parts.save(pathlib.Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_a_killed_export_leaves_the_old_engine_or_the_new(tmp_path):
    """Killed at several moments of writing."""
    target = tmp_path / "engine"
    revisions = set()
    for trial in range(4):
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(target), str(trial % 2)], stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        time.sleep(0.05 + 0.037 * trial)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if target.exists():
            revisions.add(EngineParts.load(target).revision)
    assert revisions
