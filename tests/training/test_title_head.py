"""A model trained with a title head, from data to answers: the engine's titles, those of transformers, and resuming."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from counting import make_dataset
from reference import Tiny, reference_generation, reference_title_scores
from tiny_training import log_of, resumed_after
from transformers import AutoConfig, AutoModel, LlamaConfig, LlamaForCausalLM

from speeder_engine import Engine, Request
from speeder_engine.checkpoint import Checkpoint
from speeder_engine.config import HeadsConfig
from speeder_engine.data.candidates import draw_candidates
from speeder_engine.data.splits import leave_one_out
from speeder_engine.errors import ConfigError, SpeederWarning
from speeder_engine.evaluation.compare import compare, make_scorer
from speeder_engine.evaluation.engine_scorer import EngineScorer
from speeder_engine.evaluation.generation_scorer import GenerationScorer
from speeder_engine.evaluation.model_scorer import ModelScorer
from speeder_engine.evaluation.protocols import evaluate
from speeder_engine.export.engine_directory import export_engine
from speeder_engine.models.prior import ConstantPrior
from speeder_engine.training.backbone import train_tokenizer
from speeder_engine.training.config import BackboneConfig, Stage, TrainingConfig
from speeder_engine.training.fit import train
from speeder_engine.training.recipe import load_recipe

FIRST, SECOND = ("red", "old", "green", "lost", "last", "quiet"), ("king", "sea", "house", "road")
TITLES = tuple(f"The {first} {second}" for first in FIRST for second in SECOND)
NEGATIVES = 9  # of 24 items
CONFIG = TrainingConfig(
    instruction="Next:",
    question="Title:\n",
    window=10,
    window_step=5,
    backbone=BackboneConfig(vocab_size=420, hidden_size=32, num_heads=2, intermediate_size=64, dropout=0.0),
    stages=(Stage("S2", ("text", "collaborative"), 24, 1e-2, 0.1),),
    heads=HeadsConfig(title=True),
    title_weight=2.0,
    title_targets=6,
    judge="title_probability",
    batch_size=16,
    token_dropout=0.0,
    patience=24,
)


@pytest.fixture(scope="module")
def split():
    dataset = make_dataset(num_users=240)
    return leave_one_out(replace(dataset, items=replace(dataset.items, titles=TITLES)))


@pytest.fixture(scope="module")
def trained(split, tmp_path_factory):
    folder = tmp_path_factory.mktemp("titled")
    train(split, CONFIG, folder / "c")
    export_engine(folder / "c", folder / "e")
    return folder


def as_reference(checkpoint: Checkpoint, lm: LlamaForCausalLM) -> Tiny:
    """What tests/reference.py judges: the trained weights in a plain causal LM."""
    prompt, table = checkpoint.model.config.prompt, checkpoint.table
    return Tiny(
        checkpoint.model.eval(),
        checkpoint.item_tokens().clone(),
        torch.from_numpy(table.prior),
        list(table.item_ids),
        prompt.window,
        prompt.window_step,
        list(table.titles),
        checkpoint.tokenizer.backend_tokenizer,
        lm.eval(),
    )


def causal_lm(checkpoint: Checkpoint) -> LlamaForCausalLM:
    body = checkpoint.model.backbone
    lm = LlamaForCausalLM(LlamaConfig(**{**body.config.to_dict(), "tie_word_embeddings": True}))
    lm.model.load_state_dict(body.state_dict())
    return lm


def evaluated(scorer, split):
    queries = split.queries("test")
    return evaluate(
        scorer, queries, draw_candidates(split.dataset, queries, num_negatives=NEGATIVES), show_progress=False
    ).metrics


@pytest.mark.parametrize("head", ["title", "rank", "retrieve"])
def test_all_heads_learn_the_rule(split, trained, head):
    engine = Engine.load(trained / "e", dtype="float32", kv_budget="0")
    metrics = evaluated(EngineScorer(engine, split.dataset.item_ids, head=head), split)
    assert metrics["vhr@1"] > 0.8  # by chance 1 in 10
    assert metrics["valid_ratio"] == 1


@pytest.mark.parametrize("head", ["rank", "retrieve", None])
def test_a_checkpoint_answers_by_the_head_that_is_asked_for(split, trained, head):
    queries = split.queries("test").slice(0, 40)
    lists = draw_candidates(split.dataset, queries, num_negatives=NEGATIVES).rows
    checkpoint = make_scorer(str(trained / "c"), split, "test", head)
    engine = EngineScorer(Engine.load(trained / "e", dtype="float32", kv_budget="0"), split.dataset.item_ids, head=head)
    found = checkpoint.candidate_scores(queries, lists)
    np.testing.assert_allclose(found, engine.candidate_scores(queries, lists), atol=1e-3)
    other = make_scorer(str(trained / "c"), split, "test", "rank" if head == "retrieve" else "retrieve")
    assert not np.allclose(found, other.candidate_scores(queries, lists), atol=1e-1)


def test_a_head_that_a_checkpoint_has_not_is_refused(split, trained, tmp_path):
    checkpoint = Checkpoint.load(trained / "c")
    with pytest.raises(
        ConfigError, match="head 'title' takes an engine directory, a checkpoint answers by retrieve or"
    ):
        compare([str(trained / "c")], tmp_path, head="title")
    prior, tokens = ConstantPrior(torch.from_numpy(checkpoint.table.prior)), checkpoint.item_tokens()
    checkpoint.model.config = replace(checkpoint.model.config, heads=HeadsConfig(rank=False))
    with pytest.raises(ConfigError, match="head 'rank' of a model as trained; it scores candidates by retrieve"):
        ModelScorer(checkpoint.model, tokens, prior, head="rank")


def test_what_is_written_are_titles(split, trained):
    engine = Engine.load(trained / "e", dtype="float32", kv_budget="0")
    metrics = evaluated(GenerationScorer(engine, split.dataset.item_ids), split)
    assert metrics["valid_ratio"] > 0.8 and metrics["vhr@1"] > 0.8


def test_the_engine_scores_and_writes_as_transformers_does_on_the_full_prompt(trained):
    checkpoint = Checkpoint.load(trained / "c")
    tiny = as_reference(checkpoint, causal_lm(checkpoint))
    engine = Engine.load(trained / "e", dtype="float32", kv_budget="1MiB")
    ids = tiny.ids(range(len(TITLES)))
    for rows in ([], [3], list(range(5, 12)), list(range(20))):
        expected = reference_title_scores(tiny, rows, range(len(TITLES)))
        ranking = dict(engine.recommend(tiny.ids(rows), len(ids), candidates=ids, head="title", exclude_seen=False))
        found = torch.tensor([ranking[item_id] for item_id in ids])
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        assert engine.generate([Request(tiny.ids(rows))])[0].text == reference_generation(tiny, rows)


def test_a_resumed_run_ends_bit_for_bit_as_an_unbroken_one(split, tmp_path):
    config = replace(CONFIG, stages=(replace(CONFIG.stages[0], epochs=3),))
    unbroken = train(split, config, tmp_path / "a")
    resumed = resumed_after(1, split, config, tmp_path / "b")
    state = resumed.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in unbroken.model.state_dict().items())


def test_a_model_of_titles_alone(split, tmp_path):
    heads = HeadsConfig(retrieve=False, rank=False, title=True)
    off = dict.fromkeys(("retrieve_weight", "rank_weight", "order_weight"), 0.0)
    alone = replace(CONFIG, heads=heads, **off)
    train(split, alone, tmp_path / "c")
    log = log_of(tmp_path / "c")
    assert log[-1]["loss"] < log[0]["loss"] / 3  # of titles: there is no other
    assert log[-1]["title_probability"] > 3 * log[0]["title_probability"]
    export_engine(tmp_path / "c", tmp_path / "e")
    assert "ndcg@10" not in log[-1]
    engine = Engine.load(tmp_path / "e", dtype="float32", kv_budget="0")
    with pytest.warns(SpeederWarning, match="answered nothing out of the whole catalogue in 240 of 240"):
        metrics = evaluated(EngineScorer(engine, split.dataset.item_ids), split)
    assert metrics["vhr@1"] > 0.25  # by chance 1 in 10
    assert metrics["hr@10"] == metrics["coverage@10"] == 0
    checkpoint = make_scorer(str(tmp_path / "c"), split, "test")
    queries = split.queries("test").slice(0, 5)
    assert np.isneginf(checkpoint.scores(queries)).all()
    with pytest.raises(ConfigError, match="was trained for titles alone; export an engine"):
        checkpoint.candidate_scores(queries, np.zeros((5, 2), np.int32))


def write_causal_lm(folder, tied):
    tokenizer = train_tokenizer([*TITLES, "some words"], 300)
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=len(tokenizer) + 3,
        hidden_size=36,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=10,
        intermediate_size=37,
        tie_word_embeddings=tied,
        eos_token_id=[2, 5],
    )
    lm = LlamaForCausalLM(shape)
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return lm


@pytest.mark.parametrize("tied", [False, True])
def test_the_pretrained_recipe_keeps_the_vocabulary_of_its_backbone(split, tmp_path, tied):
    lm = write_causal_lm(tmp_path / "base", tied)
    recipe = load_recipe("pretrained")
    lora = recipe.backbone
    assert (lora.lora_rank, lora.lora_alpha, lora.lora_dropout, recipe.batch_size) == (8, 32, 0.1, 128)
    stages = tuple(replace(stage, epochs=1) for stage in recipe.stages if "image" not in stage.modalities)
    config = replace(recipe, backbone=replace(lora, source=str(tmp_path / "base")), stages=stages)
    checkpoint = train(split, config, tmp_path / "c")
    model = checkpoint.model
    assert model.config.vocabulary_tied is tied and model.config.prompt.end_ids == (2, 5)
    assert {name.split(".")[-2] for name, p in model.backbone.named_parameters() if p.requires_grad} == {"default"}
    loaded = Checkpoint.load(tmp_path / "c")
    head = loaded.model.vocabulary()
    assert torch.equal(head.embedding, lm.get_input_embeddings().weight)
    assert head.head is None if tied else torch.equal(head.head, lm.lm_head.weight)

    export_engine(tmp_path / "c", tmp_path / "e")
    engine = Engine.load(tmp_path / "e", dtype="float32", kv_budget="0")
    merged = loaded.merged_model().backbone
    lm.model.load_state_dict(merged.state_dict())
    tiny = as_reference(loaded, lm)
    ids = tiny.ids(range(len(TITLES)))
    ranking = dict(engine.recommend(tiny.ids([5, 6, 7]), len(ids), candidates=ids, head="title", exclude_seen=False))
    found = torch.tensor([ranking[item_id] for item_id in ids])
    expected = reference_title_scores(tiny, [5, 6, 7], range(len(TITLES)))
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)


def test_a_backbone_without_a_head_is_refused(split, tmp_path):
    tokenizer = train_tokenizer(["some words"], 270)
    shape = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    body = AutoModel.from_config(AutoConfig.for_model("llama", intermediate_size=32, **shape))
    body.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    config = replace(CONFIG, backbone=BackboneConfig(source=str(tmp_path / "base")))
    with pytest.raises(ConfigError, match=r"has no vocabulary head; heads\.title needs a whole causal LM"):
        train(split, config, tmp_path / "c")


def test_the_pretrained_recipe_asks_for_its_folder(split, tmp_path):
    with pytest.raises(ConfigError, match="no such folder; give a model's folder"):
        train(split, replace(load_recipe("pretrained"), stages=CONFIG.stages), tmp_path / "c")
