"""Checkpoints round-trip; adapters are merged; what training doesn't change is not written twice."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from speeder_engine import ArtifactError, ConfigError, Engine, EngineConfig, SpeederError
from speeder_engine.bulk import recommend_file
from speeder_engine.catalogue import ItemTable
from speeder_engine.checkpoint import Checkpoint, TrainingState, check_replaceable
from speeder_engine.config import CompressorConfig, HeadsConfig, ModelConfig, PromptConfig
from speeder_engine.encoders.features import Features
from speeder_engine.encoders.fitted_text import FittedTextEncoder
from speeder_engine.evaluation.model_scorer import ModelScorer
from speeder_engine.export.engine_directory import engine_parts, export_engine
from speeder_engine.files import sha256_file
from speeder_engine.inspection import inspect_engine
from speeder_engine.models.families import decoder_config
from speeder_engine.models.prior import ConstantPrior
from speeder_engine.models.recommender import Recommender
from speeder_engine.parts import EngineParts
from speeder_engine.training.backbone import instruction_ids, load_pretrained, small_llama, train_tokenizer
from speeder_engine.training.config import BackboneConfig
from speeder_engine.training.recipe import load_recipe

TEXTS = [f"item {i} about {word}" for i, word in enumerate(["cats", "dogs", "birds", "trees", "stones", "rivers"] * 5)]
SMALL = BackboneConfig(vocab_size=300, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=48)


def make_checkpoint(backbone, tokenizer) -> Checkpoint:
    rng = np.random.default_rng(0)
    features = {
        "text": Features(rng.normal(size=(30, 8)).astype(np.float32), np.ones(30, bool)),
        "image": Features(np.zeros((30, 5), np.float32), np.zeros(30, bool)),
    }
    instruction = "Recommend:"
    config = ModelConfig(
        decoder_config(backbone.config),
        CompressorConfig({"text": 8, "image": 5}, 32, scale=0.02),
        PromptConfig(instruction, instruction_ids(tokenizer, instruction), 10, 5),
        HeadsConfig(),
    )
    ids = [f"{i:03d}" for i in range(30)]
    return Checkpoint(
        model=Recommender(config, backbone).eval(),
        tokenizer=tokenizer,
        table=ItemTable.fresh(ids, TEXTS, rng.normal(size=30).astype(np.float32)),
        features=features,
        encoders={"text": FittedTextEncoder.fit(TEXTS, dim=4)},
        training={"config": {}, "data": "none"},
        state=TrainingState(stage=1, epoch=2, tensors={"model.x": torch.arange(3.0)}),
    )


@pytest.fixture
def checkpoint():
    torch.manual_seed(0)
    tokenizer = train_tokenizer(TEXTS, SMALL.vocab_size)
    return make_checkpoint(small_llama(SMALL, len(tokenizer)), tokenizer)


def vectors(checkpoint: Checkpoint) -> torch.Tensor:
    scorer = ModelScorer(
        checkpoint.model, checkpoint.item_tokens(), ConstantPrior(torch.from_numpy(checkpoint.table.prior))
    )
    with torch.no_grad():
        return scorer.user_vectors([np.array(rows, np.int32) for rows in ([], [3], [5, 7, 9], list(range(15)))])


def test_round_trip(checkpoint, tmp_path):
    checkpoint.save(tmp_path / "c")
    loaded = Checkpoint.load(tmp_path / "c")
    torch.testing.assert_close(vectors(loaded), vectors(checkpoint), atol=0, rtol=0)
    assert loaded.table.item_ids == checkpoint.table.item_ids
    assert loaded.model.config == checkpoint.model.config
    assert loaded.state.stage == 1 and loaded.state.tensors["model.x"].tolist() == [0, 1, 2]
    assert loaded.encoders["text"].fingerprint == checkpoint.encoders["text"].fingerprint
    assert not [path for path in (tmp_path / "c").rglob("*") if path.suffix in (".pt", ".pkl", ".bin", ".pth")]


def test_what_training_does_not_change_is_linked(checkpoint, tmp_path):
    checkpoint.save(tmp_path / "c")
    first = (tmp_path / "c" / "features.safetensors").stat().st_ino
    encoder = sorted(p.stat().st_ino for p in (tmp_path / "c" / "encoders").rglob("*") if p.is_file())
    with torch.no_grad():
        checkpoint.model.retrieve.project.weight.add_(1.0)
    checkpoint.state = None
    checkpoint.save(tmp_path / "c")
    assert (tmp_path / "c" / "features.safetensors").stat().st_ino == first
    assert sorted(p.stat().st_ino for p in (tmp_path / "c" / "encoders").rglob("*") if p.is_file()) == encoder
    loaded = Checkpoint.load(tmp_path / "c")
    assert loaded.state is None
    torch.testing.assert_close(vectors(loaded), vectors(checkpoint), atol=0, rtol=0)


def test_an_exported_engine_scores_as_the_checkpoint(checkpoint, tmp_path):
    checkpoint.save(tmp_path / "c")
    export_engine(tmp_path / "c", tmp_path / "e")
    engine = Engine.load(tmp_path / "e", kv_budget="1MiB")
    expected = vectors(checkpoint)
    for rows, vector in zip(([], [3], [5, 7, 9], list(range(15))), expected, strict=True):
        found = engine.user_vector([f"{row:03d}" for row in rows])
        np.testing.assert_allclose(found, vector.numpy(), rtol=1e-4, atol=1e-5)


def test_adapters_on_a_local_folder_are_saved_alone_and_merged_on_export(tmp_path):
    """The way of a pretrained backbone: a transformers folder, LoRA on it, a checkpoint, an engine."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(TEXTS, 300)
    base = small_llama(SMALL, len(tokenizer))
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    adapted, tokenizer, _ = load_pretrained(BackboneConfig(source=str(tmp_path / "base")))
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    checkpoint = make_checkpoint(adapted.eval(), tokenizer)
    checkpoint.save(tmp_path / "c")
    assert (tmp_path / "c" / "backbone" / "adapter_config.json").is_file()
    before = vectors(checkpoint)
    loaded = Checkpoint.load(tmp_path / "c")
    torch.testing.assert_close(vectors(loaded), before)
    export_engine(tmp_path / "c", tmp_path / "e")
    engine = Engine.load(tmp_path / "e", kv_budget="0")
    np.testing.assert_allclose(engine.user_vector(["005", "007", "009"]), before[2].numpy(), rtol=1e-3, atol=1e-4)
    plain = make_checkpoint(small_llama(SMALL, len(tokenizer)), tokenizer)
    assert not torch.allclose(vectors(plain)[2], before[2], atol=1e-2)


@pytest.fixture
def adapted(tmp_path):
    """A checkpoint with adapters, on a base model in a folder of its own, which has a head as well."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(TEXTS, 300)
    LlamaForCausalLM(small_llama(SMALL, len(tokenizer)).config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    body, tokenizer, _ = load_pretrained(BackboneConfig(source=str(tmp_path / "base")))
    make_checkpoint(body.eval(), tokenizer).save(tmp_path / "c")
    return unlisted(tmp_path / "c")


@pytest.mark.parametrize("file", ["c/backbone/adapter_model.safetensors", "base/model.safetensors"])
def test_adapters_and_their_base_are_never_completed_at_random(adapted, tmp_path, file):
    Checkpoint.load(adapted)
    names = sorted(load_file(tmp_path / file))
    first = next(name for name in names if "q_proj" in name)
    rewrite(tmp_path / file, lambda weights: weights.pop(first))
    assert f"{tmp_path / file}: {first.removeprefix('model.')} is missing" in refusal(adapted)


def test_adapters_find_their_base_from_any_folder(adapted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    body, tokenizer, _ = load_pretrained(BackboneConfig(source="./base"))
    make_checkpoint(body.eval(), tokenizer).save(tmp_path / "near")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    Checkpoint.load(tmp_path / "near")
    (tmp_path / "base").rename(tmp_path / "moved")
    assert f"adapters of '{tmp_path / 'base'}', which is no folder here; put that model back" in refusal(adapted)


def test_adapters_stay_with_the_base_they_were_trained_on(adapted, tmp_path):
    """Weights of the same names and shapes are another model all the same."""
    checkpoint = Checkpoint.load(adapted)
    rewrite(
        tmp_path / "base" / "model.safetensors", lambda weights: weights.update({n: w + 1 for n, w in weights.items()})
    )
    assert f"{tmp_path / 'base'}: is not the model that {adapted / 'backbone'} was trained on; put" in refusal(adapted)
    checkpoint.save(tmp_path / "copy")  # says what it was trained on, not what lies there now
    assert "is not the model that" in refusal(tmp_path / "copy")


def unlisted(folder: Path) -> Path:
    """As the first checkpoints were written: no file's hash is known."""
    manifest = json.loads((folder / "checkpoint.json").read_text())
    kept = {name: value for name, value in manifest.items() if name not in ("files", "digest")}
    (folder / "checkpoint.json").write_text(json.dumps(kept))
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(ArtifactError) as caught:
        Checkpoint.load(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


FILES = (
    "checkpoint.json",
    "recommender.safetensors",
    "features.safetensors",
    "items.parquet",
    "backbone/config.json",
    "backbone/model.safetensors",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "encoders/text/encoder.json",
    "encoders/text/encoder.safetensors",
    "state/progress.json",
    "state/tensors.safetensors",
)


def test_one_flipped_byte_of_any_file_is_refused_by_name(checkpoint, tmp_path):
    checkpoint.save(tmp_path / "c")
    assert {path.relative_to(tmp_path / "c").as_posix() for path in (tmp_path / "c").rglob("*.*")} == set(FILES)
    for name in FILES:
        path = tmp_path / "c" / name
        content = path.read_bytes()
        path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
        assert str(path) in refusal(tmp_path / "c")
        path.write_bytes(content)
    (tmp_path / "c" / "backbone" / "adapter_config.json").write_text("{}")
    assert "'backbone/adapter_config.json' is not listed in checkpoint.json" in refusal(tmp_path / "c")


def test_what_is_linked_is_not_hashed_again(checkpoint, tmp_path, monkeypatch):
    checkpoint.save(tmp_path / "c")
    loaded, read = Checkpoint.load(tmp_path / "c"), []
    monkeypatch.setattr("speeder_engine.artifact.sha256_file", lambda path: read.append(path.name) or sha256_file(path))
    for each in (checkpoint, loaded):
        read.clear()
        each.save(tmp_path / "c")
        assert sorted(read) == sorted(
            ["config.json", "model.safetensors", "recommender.safetensors", "progress.json", "tensors.safetensors"]
        )
    Checkpoint.load(tmp_path / "c")


def test_a_checkpoint_without_hashes_is_still_read(checkpoint, tmp_path):
    checkpoint.save(tmp_path / "c")
    loaded = Checkpoint.load(unlisted(tmp_path / "c"))
    torch.testing.assert_close(vectors(loaded), vectors(checkpoint), atol=0, rtol=0)
    loaded.save(tmp_path / "c")
    assert len(json.loads((tmp_path / "c" / "checkpoint.json").read_text())["files"]) == len(FILES) - 1


@pytest.mark.parametrize("damage", [lambda whole: whole[:20], lambda whole: b"", lambda whole: b"\xff\x00" * 50])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_without_hashes_is_refused_by_name(checkpoint, tmp_path, name, damage):
    checkpoint.save(tmp_path / "c")
    path = unlisted(tmp_path / "c") / name
    path.write_bytes(damage(path.read_bytes()))
    # transformers reads a folder at once
    named = path.parent if path.parent.name in ("backbone", "tokenizer", "text") else path
    assert str(named) in refusal(tmp_path / "c")


@pytest.mark.parametrize("progress", [[], {}, {"stage": 1}, {"more": 1}, {"stage": "1"}, {"best": None}])
def test_progress_that_is_no_progress_is_refused(checkpoint, tmp_path, progress):
    checkpoint.save(tmp_path / "c")
    path = unlisted(tmp_path / "c") / "state" / "progress.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps({**whole, **progress} if progress and progress != {"stage": 1} else progress))
    assert f"{path}: not where a run stands, but " in refusal(tmp_path / "c")


def rewrite(path: Path, change) -> None:
    weights = load_file(path)
    change(weights)
    save_file(weights, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda weights: weights.pop("norm.weight"), "norm.weight is missing"),
        (lambda weights: weights.update({"norm.weight": torch.zeros(8)}), "norm.weight has another shape"),
        (lambda weights: weights.update({"layers.9.x": torch.zeros(8)}), "layers.9.x belongs to no part of the model"),
    ],
)
def test_a_backbone_is_never_completed_at_random(checkpoint, tmp_path, change, reason):
    checkpoint.save(tmp_path / "c")
    path = unlisted(tmp_path / "c") / "backbone" / "model.safetensors"
    rewrite(path, change)
    assert f"{path}: {reason}" in refusal(tmp_path / "c")


def test_a_part_that_no_model_has_is_refused(checkpoint, tmp_path):
    checkpoint.save(tmp_path / "c")
    path = unlisted(tmp_path / "c") / "recommender.safetensors"
    rewrite(path, lambda weights: weights.update(stray=torch.zeros(1)))
    assert f"{path}: stray belongs to no part of the model" in refusal(tmp_path / "c")


def test_other_folders_are_refused(checkpoint, tmp_path):
    with pytest.raises(ArtifactError, match="no checkpoint here"):
        Checkpoint.load(tmp_path)
    checkpoint.save(tmp_path / "c")
    manifest = json.loads((tmp_path / "c" / "checkpoint.json").read_text())
    (tmp_path / "c" / "checkpoint.json").write_text(json.dumps({**manifest, "format_version": 9}))
    with pytest.raises(ArtifactError, match="format version 9, this package reads 1"):
        Checkpoint.load(tmp_path / "c")


def test_engines_of_other_dtypes_load(checkpoint, tmp_path):
    checkpoint.save(tmp_path / "c")
    parts = export_engine(tmp_path / "c", tmp_path / "e")
    full = Engine.load(tmp_path / "e").recommend(["003", "004"], k=30)
    half = Engine(parts, EngineConfig(dtype="bfloat16")).recommend(["003", "004"], k=30)
    np.testing.assert_allclose([dict(half)[i] for i in full.items], full.scores, atol=0.05)


@pytest.mark.parametrize("already", ["files", "checkpoint"])
def test_what_is_not_ours_is_never_replaced(checkpoint, tmp_path, already):
    out = tmp_path / "out"
    if already == "checkpoint":
        checkpoint.save(out)
    out.mkdir(exist_ok=True)
    (out / "precious.txt").write_text("keep")
    with pytest.raises(ArtifactError, match=r"out: (is not empty and no checkpoint|also holds 'precious.txt')"):
        checkpoint.save(out)
    assert (out / "precious.txt").read_text() == "keep"


@pytest.mark.parametrize("tied", [False, True])
def test_a_title_head_goes_with_the_checkpoint_into_the_engine(tmp_path, tied):
    torch.manual_seed(0)
    tokenizer = train_tokenizer(TEXTS, SMALL.vocab_size)
    shape = small_llama(SMALL, len(tokenizer)).config
    lm = LlamaForCausalLM(LlamaConfig(**{**shape.to_dict(), "tie_word_embeddings": tied}))
    checkpoint = make_checkpoint(lm.model, tokenizer)
    config = checkpoint.model.config
    prompt = replace(config.prompt, question="Title:", question_ids=tuple(tokenizer("Title:")["input_ids"]))
    config = replace(config, heads=HeadsConfig(title=True), prompt=prompt, vocabulary_tied=tied)
    checkpoint.model = Recommender(config, lm.model).eval()
    if checkpoint.model.vocabulary_head is not None:
        with torch.no_grad():
            checkpoint.model.vocabulary_head.copy_(lm.lm_head.weight)
    checkpoint.save(tmp_path / "c")
    assert ("vocabulary_head" in load_file(tmp_path / "c" / "recommender.safetensors")) is not tied
    export_engine(tmp_path / "c", tmp_path / "e")
    vocabulary = Engine.load(tmp_path / "e").model.vocabulary
    hidden = torch.randn(3, 32)
    torch.testing.assert_close(vocabulary.logits(hidden), lm.lm_head(hidden))
    candidates = [f"{i:03d}" for i in range(30)]
    in_memory = Engine(engine_parts(checkpoint), EngineConfig(dtype="float32"))
    loaded = Engine.load(tmp_path / "e", dtype="float32")
    for engine in (in_memory, loaded):
        assert len(engine.recommend(["003"], 30, candidates=candidates, head="title")) == 30
    assert loaded.recommend([], candidates=candidates, head="title") == in_memory.recommend(
        [], candidates=candidates, head="title"
    )


@pytest.mark.parametrize("wrong", ["x" * 300, "a\0b", None])
def test_a_path_that_is_none_is_said_by_whoever_is_given_it(wrong, tmp_path):
    readers = (Checkpoint.load, EngineParts.load, inspect_engine, load_recipe)
    writers = (lambda path: export_engine(tmp_path, path), lambda path: recommend_file(None, tmp_path, path, 1))
    for ask in (*readers, *writers):
        with pytest.raises(
            ConfigError, match=r"give the path of|expected the path of|recipe: give a packaged one's name"
        ):
            ask(wrong)
    for ask in readers:
        with pytest.raises(SpeederError):
            ask(str(tmp_path / "nowhere"))


def test_a_file_in_its_place_is_refused_before_anything_is_trained(tmp_path):
    (tmp_path / "mine").write_text("keep")
    with pytest.raises(
        ArtifactError, match="mine: something else stands where a folder must go; remove it or choose another name"
    ):
        check_replaceable(tmp_path / "mine")
    with pytest.raises(ArtifactError, match="mine/run: can't be written: Not a directory; a file stands"):
        check_replaceable(tmp_path / "mine" / "run")
