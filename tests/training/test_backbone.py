"""A decoder from scratch: how large it may be, and dropout of what blocks add to their rows, which Llama has not. A
pretrained one: read whole, as this package attends, or refused by name before anything is made."""

import json
import logging
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_training import pretrained

from speeder_engine.checkpoint import load_backbone
from speeder_engine.errors import ConfigError
from speeder_engine.training import backbone, fit
from speeder_engine.training.backbone import drop_residuals, load_pretrained, small_llama, train_tokenizer
from speeder_engine.training.config import BackboneConfig
from speeder_engine.training.fit import train

CONFIG = BackboneConfig(vocab_size=260, hidden_size=32, num_heads=2, intermediate_size=48, dropout=0.0)


@pytest.mark.parametrize("huge", [{"hidden_size": 2_000_000}, {"num_layers": 10**9}, {"intermediate_size": 2**31 - 1}])
def test_one_beyond_the_machines_memory_is_refused_before_it_is_made(huge):
    with pytest.raises(ConfigError, match=r"backbone: [\d,]+ parameters take [\d,]+ bytes in training, there are"):
        small_llama(replace(CONFIG, **huge), 260)


def test_its_size_is_counted_before_it_is_made(monkeypatch):
    made = sum(weight.numel() for weight in small_llama(CONFIG, 260).parameters())
    norms = (2 * CONFIG.num_layers + 1) * CONFIG.hidden_size
    monkeypatch.setattr(backbone, "host_memory", lambda: (made - norms) * backbone.BYTES_A_PARAMETER)
    small_llama(CONFIG, 260)
    with pytest.raises(ConfigError, match="make it smaller"):
        small_llama(CONFIG, 261)


def outputs(body, rows):
    with torch.no_grad():
        return body(inputs_embeds=rows).last_hidden_state


def bodies():
    torch.manual_seed(0)
    plain = small_llama(CONFIG, 260)
    dropping = small_llama(CONFIG, 260)
    dropping.load_state_dict(plain.state_dict())
    return plain.train(), dropping.train(), torch.randn(3, 7, 32)


def test_rows_alone_are_left_where_everything_added_is_dropped():
    _, dropping, rows = bodies()
    with torch.no_grad(), drop_residuals(dropping, 1.0):
        assert torch.equal(outputs(dropping, rows), dropping.norm(rows))


def test_answers_are_not_touched():
    plain, dropping, rows = bodies()
    with drop_residuals(dropping, 0.5):
        assert not torch.equal(outputs(plain, rows), outputs(dropping, rows))
        assert torch.equal(outputs(plain.eval(), rows), outputs(dropping.eval(), rows))


def test_nothing_is_dropped_any_more_once_it_is_trained():
    plain, dropping, rows = bodies()
    with drop_residuals(dropping, 0.5):
        pass
    assert torch.equal(outputs(plain, rows), outputs(dropping, rows))


def test_what_is_added_keeps_its_mean():
    """Of one block's attention: its perceptron adds nothing, and the last norm's scale is taken out."""
    plain, dropping, rows = bodies()
    for body in (plain, dropping):
        body.layers = body.layers[:1]
        body.norm = torch.nn.Identity()
        torch.nn.init.zeros_(body.layers[0].mlp.down_proj.weight)
        body.layers[0].self_attn.o_proj.weight.data.mul_(50)
    with drop_residuals(dropping, 0.3):
        found = torch.stack([outputs(dropping, rows) for _ in range(3000)]).mean(0)
    assert (found - rows).abs().max() > 0.5  # something is added
    torch.testing.assert_close(found - rows, outputs(plain, rows) - rows, rtol=0.1, atol=0.05)


def test_a_pretrained_backbone_has_adapters_for_it():
    with pytest.raises(ConfigError, match=r"residual_dropout is of a decoder from scratch; .* use lora_dropout"):
        BackboneConfig(source="somewhere", residual_dropout=0.1)


@pytest.fixture
def base(tmp_path):
    """A tiny Llama's folder, and a recipe that tunes it."""
    return tmp_path / "base", pretrained("llama", tmp_path / "base")


def reconfigured(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("wanted", ["eager", "flash_attention_2"])
def test_a_config_that_asks_for_another_attention_shows_no_row_what_comes_later(base, wanted):
    folder, config = base
    reconfigured(folder, attn_implementation=wanted)
    body = load_pretrained(config.backbone).body.eval()
    rows, mask = torch.randn(1, 6, 36), torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    later = rows + torch.tensor([0, 0, 0, 0, 1, 1])[:, None]
    with torch.no_grad():
        first, second = (
            body(inputs_embeds=each, attention_mask=mask, use_cache=False).last_hidden_state for each in (rows, later)
        )
    assert torch.equal(first[:, :4], second[:, :4])


def test_weights_that_were_read_lie_as_those_of_a_new_model(base, tmp_path):
    """Else products of them may round in another way, and a resumed run would drift."""
    small_llama(CONFIG, 260).save_pretrained(tmp_path / "saved")
    for body in (load_backbone(tmp_path / "saved"), load_pretrained(base[1].backbone).body):
        assert all(parameter.data_ptr() % 64 == 0 for parameter in body.parameters())


def without(name):
    def change(folder):
        weights = load_file(folder / "model.safetensors")
        save_file({n: w for n, w in weights.items() if n != name}, folder / "model.safetensors", {"format": "pt"})

    return change


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


REFUSED = {
    "a layer that isn't there": (
        lambda folder: reconfigured(folder, num_hidden_layers=3),
        r"layers\.2\.\S+ is missing; give another folder",
    ),
    "a weight that isn't there": (without("norm.weight"), r"norm\.weight is missing; give another folder"),
    "another shape": (
        lambda folder: reconfigured(folder, intermediate_size=40),
        r"layers\.0\.mlp\.\S+ has another shape than config\.json says; give another folder",
    ),
    "a file cut short": (cut, "can't be loaded .*; give another folder"),
    "quantized": (
        lambda folder: reconfigured(folder, quantization_config={"quant_method": "awq", "bits": 4}),
        r"its config says quantization_config \(awq\), .* give a folder with those",
    ),
    "another family": (lambda folder: reconfigured(folder, hidden_act="gelu"), "hidden_act 'gelu' can't be served"),
    "prompts too long": (
        lambda folder: reconfigured(folder, max_position_embeddings=8),
        "but the backbone was made for 8; shorten the window or the instruction",
    ),
    "words without an embedding": (
        lambda folder: train_tokenizer(["Next: Next: Next:"], 270).save_pretrained(folder),
        r"its tokenizer writes instruction with token \d+, its vocabulary ends at 259",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_tuned_and_served_is_refused_before_features_are_made(split, base, tmp_path, monkeypatch, case):
    folder, config = base
    change, message = REFUSED[case]
    monkeypatch.setattr(fit, "make_features", lambda *_: pytest.fail("features were made"))
    if case == "words without an embedding":
        shape = {"vocab_size": 260, "hidden_size": 32, "num_layers": 1, "num_heads": 2, "intermediate_size": 32}
        small_llama(BackboneConfig(**shape), 260).save_pretrained(folder)
    change(folder)
    with pytest.raises(ConfigError, match=message):
        train(split, config, tmp_path / "c")


def test_a_base_with_a_head_is_read_without_a_report(base, caplog):
    from transformers import LlamaConfig, LlamaForCausalLM

    folder, config = base
    LlamaForCausalLM(LlamaConfig.from_pretrained(folder)).save_pretrained(folder)
    transformers = logging.getLogger("transformers")
    transformers.addHandler(caplog.handler)
    try:
        load_pretrained(config.backbone)
    finally:
        transformers.removeHandler(caplog.handler)
    assert not caplog.records
