"""Checkpoints round-trip; adapters are merged; what training doesn't change is not written twice."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from speeder_engine import ArtifactError, Engine, EngineConfig
from speeder_engine.catalogue import ItemTable
from speeder_engine.checkpoint import Checkpoint, TrainingState
from speeder_engine.config import CompressorConfig, HeadsConfig, ModelConfig, PromptConfig
from speeder_engine.encoders.features import Features
from speeder_engine.encoders.fitted_text import FittedTextEncoder
from speeder_engine.evaluation.model_scorer import ModelScorer
from speeder_engine.export.engine_directory import engine_parts, export_engine
from speeder_engine.models.families import decoder_config
from speeder_engine.models.prior import ConstantPrior
from speeder_engine.models.recommender import Recommender
from speeder_engine.training.backbone import instruction_ids, load_pretrained, small_llama, train_tokenizer
from speeder_engine.training.config import BackboneConfig

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


@pytest.mark.parametrize(
    "name", ["recommender.safetensors", "features.safetensors", "items.parquet", "checkpoint.json"]
)
def test_a_damaged_checkpoint_is_refused_by_name(checkpoint, tmp_path, name):
    checkpoint.save(tmp_path / "c")
    path = tmp_path / "c" / name
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ArtifactError) as caught:
        Checkpoint.load(tmp_path / "c")
    assert "\n" not in str(caught.value)


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
