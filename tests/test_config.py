"""Settings: JSON both ways, unknown keys and wrong types refused by name."""

import json
from dataclasses import replace

import numpy as np
import pytest

from speeder_engine.config import EngineConfig, ModelConfig, PromptConfig, parse_bytes
from speeder_engine.errors import ConfigError
from speeder_engine.training.config import Stage, TrainingConfig
from speeder_engine.training.recipe import RECIPES, load_recipe

MODEL = {
    "decoder": {
        "vocab_size": 10,
        "hidden_size": 8,
        "num_layers": 1,
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_dim": 4,
        "intermediate_size": 16,
    },
    "compressor": {"modalities": {"text": 5}, "hidden_size": 8},
    "prompt": {"instruction": "x", "instruction_ids": [1, 2]},
}


def test_settings_survive_json():
    config = ModelConfig.from_json(MODEL)
    assert ModelConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    assert config.prompt.instruction_ids == (1, 2)
    training = TrainingConfig(stages=(Stage("S1", ("text",), 1, 1e-3),))
    assert TrainingConfig.from_json(json.loads(json.dumps(training.to_json()))) == training


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": {"instruction": "x", "instruction_ids": [1], "windw": 3}}, r"unknown keys \['windw'\]"),
        ({"prompt": {"instruction": "x"}}, "instruction_ids"),
        ({"prompt": {"instruction": "x", "instruction_ids": []}}, "can't be empty"),
        ({"prompt": {"instruction": "x", "instruction_ids": [1], "window": "50"}}, "window: expected int, got '50'"),
        ({"prompt": {"instruction": "x", "instruction_ids": [1], "window": True}}, "window: expected int, got True"),
        ({"prompt": {"instruction": "x", "instruction_ids": [1], "window": 5, "window_step": 6}}, "within 1..window"),
        ({"compressor": {"modalities": {"text": 5}, "hidden_size": 9}}, "9 wide, the decoder's embeddings 8"),
        ({"decoder": {**MODEL["decoder"], "num_heads": 3, "num_kv_heads": 2}}, "multiple of num_kv_heads"),
        ({"decoder": 3}, "DecoderConfig: expected an object, got int"),
        (
            {"decoder": {**MODEL["decoder"], "max_positions": 52}},
            r"prompts of 53 positions \(instruction 2, window 50, a candidate\), but the backbone was made for 52",
        ),
        ({"decoder": {**MODEL["decoder"], "exact_len": 52}}, "53 positions .* beyond 52 its attention window slides"),
    ],
)
def test_wrong_settings_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_json({**MODEL, **change})


def test_a_prompt_may_fill_what_the_backbone_takes():
    for name in ("max_positions", "exact_len"):
        ModelConfig.from_json({**MODEL, "decoder": {**MODEL["decoder"], name: 53}})


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("0", 0),
        ("1GiB", 2**30),
        ("1.5 MiB", 3 * 2**19),
        ("300MB", 3 * 10**8),
        (77, 77),
        ("5kb", 5000),
        ("2TB", 2 * 10**12),
        ("0.5TiB", 2**39),
    ],
)
def test_sizes(size, expected):
    assert parse_bytes(size) == expected


@pytest.mark.parametrize("size", ["", "GiB", "-1", "1 parsec", "1e9", "1,5GB"])
def test_no_sizes(size):
    with pytest.raises(ConfigError, match=r"kv_budget: .* is no size"):
        EngineConfig(kv_budget=size)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kv_budget": "9" * 400}, "kv_budget: .* is more than any memory"),
        ({"host_budget": str(10**30)}, "host_budget: .* is more than any memory"),
        ({"batch_wait_ms": 1e300}, r"batch_wait_ms must be within 0..3600000 \(an hour\), is 1e\+300"),
        ({"batch_wait_ms": float("inf")}, "EngineConfig.batch_wait_ms: expected a finite number, such as 1e6, got inf"),
        ({"batch_wait_ms": float("nan")}, "batch_wait_ms: expected a finite number"),
        ({"batch_wait_ms": -1.0}, "batch_wait_ms must be within"),
        ({"batch_wait_ms": "5"}, "EngineConfig.batch_wait_ms: expected float, got '5'"),
        ({"max_batch_users": "64"}, "EngineConfig.max_batch_users: expected int, got '64'"),
        ({"max_candidates": 0}, "EngineConfig.max_candidates must be within 1..2147483647, is 0"),
        ({"max_sessions": 64.0}, "EngineConfig.max_sessions: expected int, got 64.0"),
        ({"catalogue_capacity": True}, "EngineConfig.catalogue_capacity: expected int, got True"),
        ({"kv_budget": 1.5}, "EngineConfig.kv_budget: expected str or int, got 1.5"),
        ({"kv_budget": None}, "EngineConfig.kv_budget: expected str or int, got None"),
        ({"kv_budget": True}, "EngineConfig.kv_budget: expected str or int, got True"),
        ({"kv_budget": 10**5000}, "EngineConfig.kv_budget: expected a number of fewer digits, got int of thousands"),
        (
            {"max_sessions": -(10**5000)},
            "EngineConfig.max_sessions: expected a number of fewer digits, got int of thousands",
        ),
        ({"user_quota": 1.5}, "EngineConfig.user_quota: expected str or int, got 1.5"),
        ({"row_buckets": 16}, "EngineConfig.row_buckets: expected a list, got 16"),
        ({"row_buckets": ("16",)}, "EngineConfig.row_buckets: expected int, got '16'"),
        ({"debug": 1}, "EngineConfig.debug: expected bool, got 1"),
        ({"device": 0}, "EngineConfig.device: expected str, got 0"),
        ({"launches": "together"}, "launches: 'together' is not one of apart, fused, overlapped"),
        ({"row_buckets": (16, 10**10)}, "row_buckets must be rising multiples of 16 up to 65536"),
    ],
)
def test_nonsense_for_an_engine_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**settings)


def test_numbers_of_numpy_and_lists_are_taken_as_what_they_are():
    config = EngineConfig(max_sessions=np.int64(7), batch_wait_ms=2, kv_budget=np.int64(1 << 20), row_buckets=[16, 32])
    assert config == EngineConfig(max_sessions=7, batch_wait_ms=2.0, kv_budget=1048576, row_buckets=(16, 32))
    assert json.loads(json.dumps(config.to_json()))["max_sessions"] == 7


def test_the_window_must_hold_something():
    with pytest.raises(ConfigError, match="window must be at least 1"):
        PromptConfig("x", (1,), window=0)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_packaged_recipes_load(path):
    config = load_recipe(path.stem)
    assert config.stages[0].modalities == ("text",)
    assert set(config.modalities) == {"text", "image", "collaborative"}


def test_recipes_that_are_none(tmp_path):
    known = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
    with pytest.raises(ConfigError, match=f"recipe nope: no such file; packaged recipes are {known}"):
        load_recipe("nope")
    (tmp_path / "bad.yaml").write_text("stages: [unclosed")
    with pytest.raises(ConfigError, match="no valid YAML"):
        load_recipe(tmp_path / "bad.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"instruction: \xe9")
    with pytest.raises(ConfigError, match=r"latin\.yaml: no valid YAML: .*utf-8"):
        load_recipe(tmp_path / "latin.yaml")
    with pytest.raises(ConfigError, match="recipe: give a packaged one's name or a YAML file's path, not None"):
        load_recipe(None)
    (tmp_path / "twice.yaml").write_text("seed: 1\nheads: {rank: true}\nseed: 2")
    with pytest.raises(ConfigError, match=r"twice\.yaml: no valid YAML: 'seed' stands there a second time.* line 3"):
        load_recipe(tmp_path / "twice.yaml")
    with pytest.raises(ConfigError, match=r"recipe \./nope: no such file"):
        load_recipe("./nope")
    (tmp_path / "typo.yaml").write_text("batchsize: 3")
    with pytest.raises(ConfigError, match=r"unknown keys \['batchsize'\]"):
        load_recipe(tmp_path / "typo.yaml")
    (tmp_path / "strange.yaml").write_text("stages: [{name: S1, modalities: [smell], epochs: 1, learning_rate: 0.1}]")
    with pytest.raises(ConfigError, match=r"stage 'S1': unknown modalities \['smell'\]"):
        load_recipe(tmp_path / "strange.yaml")
    (tmp_path / "list.yaml").write_text("[small]")
    with pytest.raises(ConfigError, match=r"list\.yaml: expected keys and their values, got \['small'\]"):
        load_recipe(tmp_path / "list.yaml")


def test_numbers_of_a_recipe_may_be_spelled_with_an_exponent(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "{extends: small, weight_decay: 1e-3, max_grad_norm: .5e1, instruction: 'a 1e3', stages: "
        "[{name: S1, modalities: [text], epochs: 1, learning_rate: 2.5E-4}]}"
    )
    mine = load_recipe(tmp_path / "mine.yaml")
    assert (mine.weight_decay, mine.stages[0].learning_rate, mine.instruction) == (1e-3, 2.5e-4, "a 1e3")
    assert mine.max_grad_norm == 5


def test_a_path_needs_no_suffix_and_mappings_may_be_laid_over_others(tmp_path):
    (tmp_path / "base").write_text("{extends: small, weight_decay: 0.5}")
    stages = "[&first {name: A, modalities: [text], epochs: 2, learning_rate: 0.1}, {<<: *first, name: B, epochs: 1}]"
    (tmp_path / "mine.yaml").write_text(f"{{extends: ./base, stages: {stages}}}")
    mine = load_recipe(tmp_path / "mine.yaml")
    assert mine.weight_decay == 0.5 and [(each.name, each.epochs) for each in mine.stages] == [("A", 2), ("B", 1)]


def test_a_wrong_value_names_its_recipe(tmp_path):
    (tmp_path / "mine.yaml").write_text("{extends: small, backbone: null}")
    with pytest.raises(ConfigError, match=r"recipe .*mine\.yaml: BackboneConfig: expected an object, got NoneType"):
        load_recipe(tmp_path / "mine.yaml")


def test_a_recipe_lays_its_keys_over_the_one_it_extends(tmp_path):
    small = load_recipe("small")
    (tmp_path / "mine.yaml").write_text("{extends: small, collaborative: {dim: 32}, followers: null}")
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "longer.yaml").write_text(
        "{extends: ../mine.yaml, stages: [{name: S1, modalities: [text], epochs: 9, learning_rate: 0.1}]}"
    )
    mine = replace(small, collaborative=replace(small.collaborative, dim=32), followers=None)
    assert small.followers is not None
    assert load_recipe(tmp_path / "mine.yaml") == mine
    longer = replace(mine, stages=(Stage("S1", ("text",), 9, 0.1),))
    assert load_recipe(tmp_path / "deeper" / "longer.yaml") == longer


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("nope", r"recipe .*mine\.yaml: extends: nope: no such file; packaged recipes are demo, "),
        ("other.yaml", r"recipe .*other\.yaml: extends: mine\.yaml: extends itself; leave extends out of one of them"),
        ("[small, demo]", r"extends: name one packaged recipe or YAML file, not \['small', 'demo'\]"),
        ("list.yaml", r"recipe .*list\.yaml: expected keys and their values, got \['small'\]"),
    ],
)
def test_what_no_recipe_can_extend(tmp_path, base, message):
    (tmp_path / "mine.yaml").write_text(f"extends: {base}")
    (tmp_path / "other.yaml").write_text("extends: mine.yaml")
    (tmp_path / "list.yaml").write_text("[small]")
    with pytest.raises(ConfigError, match=message):
        load_recipe(tmp_path / "mine.yaml")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 0}, "window must be positive, is 0"),
        ({"batch_size": 0}, "batch_size must be positive"),
        ({"patience": -1}, "patience must be positive"),
        ({"max_grad_norm": -1.0}, "max_grad_norm must be positive"),
        ({"validation_users": 0}, "validation_users must be positive"),
        ({"rank_negatives": -1}, "rank_negatives must be positive"),
        ({"rank_negatives": 100000}, "rank_negatives must be at most 1000"),
        ({"seed": -1}, r"seed must be within 0\.\."),
        ({"seed": 2**63 - 1}, r"seed must be within 0\.\."),
        ({"batch_size": 2**31}, "batch_size must be at most 2147483647, is 2147483648"),
        ({"window": 2**63}, "window must be at most 2147483647"),
        ({"max_grad_norm": float("inf")}, "max_grad_norm: expected a finite number, such as 1e6, got inf"),
        ({"weight_decay": float("nan")}, "weight_decay: expected a finite number, such as 1e6, got nan"),
        ({"weight_decay": 10**400}, "weight_decay: expected a finite number, such as 1e6, got 1000"),
        ({"live_prior": {"half_lives_days": [float("inf")]}}, "half_lives_days: expected a finite number"),
        ({"collaborative": {"learning_rate": float("inf")}}, "learning_rate: expected a finite number"),
        ({"calendar_days": 1e-9}, "calendar_days must be 0 or within a minute .* and a century, is 1e-09"),
        ({"calendar_days": 1e9}, "calendar_days must be 0 or within a minute .* and a century"),
        ({"followers": {"last": 10**21}}, r"followers.last must be within 1\.\.2147483647, is 1000"),
        ({"followers": {"window": 0}}, r"followers.window must be within 1\.\.2147483647, is 0"),
        ({"instruction": "\ud800"}, "instruction: .* is no valid Unicode text"),
        ({"question": "\ud800"}, "question: .* is no valid Unicode text"),
        (
            {"stages": [{"name": "\ud800", "modalities": ["text"], "epochs": 1, "learning_rate": 0.1}]},
            "its name is no valid Unicode text",
        ),
        ({"token_dropout": 1.0}, "token_dropout must be at least 0 and below 1, is 1.0"),
        ({"backbone": {"hidden_size": 33}}, "hidden_size 33 must be an even multiple of num_heads 2"),
        ({"backbone": {"num_heads": 0}}, "num_heads must be positive"),
        ({"backbone": {"dropout": 2.0}}, "dropout must be at least 0 and below 1"),
        ({"backbone": {"vocab_size": 3}}, "vocab_size: 3 can't hold all bytes"),
        ({"collaborative": {"epochs": 0}}, "collaborative.epochs must be positive"),
        ({"stages": []}, "stages: at least one"),
        ({"rank_weight": 0.0}, "heads.rank and rank_weight"),
        ({"heads": {"rank": False}}, "heads.rank and rank_weight"),
        ({"heads": {"title": True}}, "heads.title and title_weight: give the head a weight"),
    ],
)
def test_nonsense_in_a_recipe_is_found_before_training(settings, message):
    with pytest.raises(ConfigError, match=message):
        TrainingConfig.from_json(settings)
