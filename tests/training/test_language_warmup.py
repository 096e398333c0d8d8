"""A decoder from scratch that has read the catalogue: better on text it hasn't read, the same twice, trained on."""

import json
from dataclasses import replace

import pytest
import torch
from tiny_training import resumed_after
from torch import nn

from speeder_engine.training.backbone import small_llama, train_tokenizer
from speeder_engine.training.config import BackboneConfig, Stage, TrainingConfig
from speeder_engine.training.fit import train
from speeder_engine.training.language_warmup import encoded_lines, next_token_loss, packed_rows, warm_up

WORDS = ("cat", "dog", "bird", "tree", "stone", "river")
TEXTS = [f"The {a} and the {b} by the {c}." for a in WORDS for b in WORDS for c in WORDS]
BACKBONE = BackboneConfig(vocab_size=300, hidden_size=32, num_heads=2, intermediate_size=64, warmup_epochs=3)


def make_body() -> tuple[nn.Module, object]:
    torch.manual_seed(0)
    tokenizer = train_tokenizer(TEXTS, BACKBONE.vocab_size)
    return small_llama(BACKBONE, len(tokenizer)), tokenizer


def held_out_loss(body, tokenizer, texts) -> float:
    body.eval()
    with torch.no_grad():
        return float(next_token_loss(body, packed_rows(encoded_lines(tokenizer, texts), torch.arange(len(texts)))))


def test_it_lowers_the_loss_on_text_that_was_not_read():
    body, tokenizer = make_body()
    read, held_out = [*TEXTS[::3], *TEXTS[1::3]], TEXTS[2::3]
    before = held_out_loss(body, tokenizer, held_out)
    warm_up(body, tokenizer, read, replace(BACKBONE, warmup_epochs=20), seed=0)
    assert held_out_loss(body, tokenizer, held_out) < before - 1.0


def test_the_seed_decides():
    states = []
    for seed in (3, 3, 4):
        body, tokenizer = make_body()
        torch.manual_seed(len(states))  # whatever was drawn before
        warm_up(body, tokenizer, TEXTS[:60], replace(BACKBONE, warmup_epochs=1), seed)
        states.append(body.state_dict())
    first, again, other = states
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_a_catalogue_without_text_leaves_it_as_it_was():
    body, tokenizer = make_body()
    before = {name: value.clone() for name, value in body.state_dict().items()}
    warm_up(body, tokenizer, [], BACKBONE, seed=0)
    assert all(torch.equal(before[name], value) for name, value in body.state_dict().items())


def test_every_token_is_predicted_and_none_is_padding():
    _, tokenizer = make_body()
    texts = TEXTS[:25]
    expected = [i for t in texts for i in [*tokenizer(t + "\n")["input_ids"], tokenizer.eos_token_id]]
    rows = packed_rows(encoded_lines(tokenizer, texts), torch.arange(len(texts)))
    assert rows.shape[1] == 129 and rows[0].tolist() == expected[:129] and rows[-1].tolist() == expected[-129:]
    assert rows[1, 0] == rows[0, -1]
    short = packed_rows(encoded_lines(tokenizer, texts[:1]), torch.arange(1))
    assert short.tolist() == [expected[: short.shape[1]]]


@pytest.mark.parametrize("epochs", [0, 2])
def test_training_goes_on_from_it_and_resumes_bit_for_bit(split, tmp_path, epochs):
    config = TrainingConfig(
        instruction="Next:",
        window=10,
        window_step=5,
        backbone=replace(BACKBONE, warmup_epochs=epochs),
        stages=(Stage("S1", ("text",), 2, 5e-3),),
        batch_size=64,
    )
    unbroken = train(split, config, tmp_path / "a")
    resumed = resumed_after(1, split, config, tmp_path / "b")
    state = resumed.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in unbroken.model.state_dict().items())
    log = [json.loads(line) for line in (tmp_path / "a.log.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < log[0]["loss"]
