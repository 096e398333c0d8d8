"""The decoder against transformers: every family, on random small shapes."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GemmaConfig, GemmaModel

from speeder_engine.errors import ConfigError
from speeder_engine.models.decoder import Decoder
from speeder_engine.models.families import FAMILIES, decoder_config, rotary_frequencies

SHAPE = {
    "vocab_size": 50,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "intermediate_size": 37,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
ROPES = {
    "default": {},
    "linear": {"factor": 2.5},
    "llama3": LLAMA3,
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "dynamic": {"factor": 2.0},
    "longrope": {"factor": 2.0, "original_max_position_embeddings": 64},
}
LOW = [torch.bfloat16, torch.float16]


def rope(rope_type: str, theta: float, head_dim: int) -> dict:
    made = {"rope_type": rope_type, "rope_theta": theta, **ROPES[rope_type]}
    if rope_type == "longrope":
        made["short_factor"] = [1.0 + i / 10 for i in range(head_dim // 2)]
        made["long_factor"] = [3.0] * (head_dim // 2)
    return made


def make(family: str, auto=AutoModel, **more):
    """A model of random weights, large enough for every term to matter, as its folder would be loaded."""
    model = auto.from_config(AutoConfig.for_model(family, **(SHAPE | more))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.uniform_(0.5, 1.5) if "norm" in name else parameter.normal_(std=0.2)
    return model


def random_shape(family: str, seed: int) -> dict:
    """Odd sizes on purpose: three query heads on one key head, heads of six, an MLP of 37."""
    rng = random.Random(seed)
    kv_heads, head_dim = rng.choice([1, 2, 3]), rng.choice([6, 10, 16, 20])
    heads = kv_heads * rng.choice([1, 2, 3])
    shape = {
        "num_key_value_heads": kv_heads,
        "num_attention_heads": heads,
        "head_dim": head_dim,
        "hidden_size": heads * rng.choice([4, 7, 12]),
        "intermediate_size": rng.choice([5, 37, 80]),
        "num_hidden_layers": rng.randint(1, 4),
        "rms_norm_eps": rng.choice([1e-6, 1e-5, 1e-3]),
        "rope_parameters": rope(rng.choice(list(ROPES)), rng.choice([100.0, 1e4, 1e6]), head_dim),
        "max_position_embeddings": 128,
    }
    biases = {"llama": ("attention_bias", "mlp_bias"), "qwen3": ("attention_bias",)}
    return shape | {name: rng.random() < 0.5 for name in biases.get(family, ())}


@torch.no_grad()
def reference(model, hidden, positions) -> torch.Tensor:
    body = getattr(model, "model", model)
    return body(inputs_embeds=hidden[None], position_ids=positions[None]).last_hidden_state[0]


@settings(deadline=None, max_examples=100)
@given(st.sampled_from(FAMILIES), st.integers(0, 2**20), st.integers(1, 33), st.integers(0, 30))
def test_hidden_states_equal_transformers(family, seed, length, start):
    torch.manual_seed(seed)
    model = make(family, **random_shape(family, seed))
    hidden, positions = torch.randn(length, model.config.hidden_size), torch.arange(start, start + length)
    expected = reference(model, hidden, positions)
    decoder = Decoder.from_transformers(model)
    torch.testing.assert_close(decoder(hidden, positions), expected, atol=1e-5, rtol=1e-5)
    rows = torch.randperm(length)[: 1 + seed % length]
    found = decoder(hidden, positions, read_rows=rows)
    torch.testing.assert_close(found, expected[rows], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("family", FAMILIES)
def test_low_precision_is_as_near_as_torchs_own(family, dtype, tmp_path):
    for seed in range(6):
        torch.manual_seed(seed)
        model = make(family, **random_shape(family, seed))
        model.save_pretrained(tmp_path / str(seed))
        loaded = AutoModel.from_pretrained(tmp_path / str(seed), dtype=dtype)
        hidden, positions = torch.randn(33, model.config.hidden_size), torch.arange(33)
        exact = reference(model, hidden, positions)
        theirs = reference(loaded, hidden.to(dtype), positions).float() - exact
        ours = Decoder.from_transformers(loaded)(hidden.to(dtype), positions).float() - exact
        assert ours.norm() <= 2 * theirs.norm() + 1e-5
        assert ours.abs().max() <= 2 * theirs.abs().max() + 1e-5


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_language_models_are_read_from_their_folders(family, tied, tmp_path):
    torch.manual_seed(1)
    model = make(family, AutoModelForCausalLM, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    hidden, positions = torch.randn(9, 48), torch.arange(9)
    expected = reference(model, hidden, positions)
    for auto in (AutoModel, AutoModelForCausalLM):
        decoder = Decoder.from_transformers(auto.from_pretrained(tmp_path))
        torch.testing.assert_close(decoder(hidden, positions), expected, atol=1e-5, rtol=1e-5)
        # a vocabulary matrix would be the only one with a row a token
        assert all(parameter.shape[0] != 50 for parameter in decoder.parameters())


def test_a_decoder_keeps_its_weights_when_the_model_is_trained_on():
    model = make("qwen3")
    decoder, hidden = Decoder.from_transformers(model), torch.randn(5, 48)
    before = decoder(hidden, torch.arange(5))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert torch.equal(decoder(hidden, torch.arange(5)), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_reading_few_rows_changes_none_of_them(family):
    """Bitwise in bf16; in fp32 the products of fewer rows may be summed in another order."""
    torch.manual_seed(2)
    decoder, positions = Decoder.from_transformers(make(family)), torch.arange(32)
    hidden, rows = torch.randn(32, 48), torch.randperm(32)[:16]
    found, whole = decoder(hidden, positions, read_rows=rows), decoder(hidden, positions)
    torch.testing.assert_close(found, whole[rows], atol=2e-6, rtol=1e-5)
    low = decoder.to(torch.bfloat16)
    assert torch.equal(low(hidden.bfloat16(), positions, read_rows=rows), low(hidden.bfloat16(), positions)[rows])


@pytest.mark.parametrize("rope_type", ROPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_rotary_frequencies_are_the_models(family, rope_type):
    model = make(family, rope_parameters=rope(rope_type, 1e4, 10), max_position_embeddings=128)
    frequencies, scaling = rotary_frequencies(model.config)
    assert torch.equal(frequencies, model.rotary_emb.inv_freq)
    assert scaling == model.rotary_emb.attention_scaling == decoder_config(model.config).attention_scaling


def test_rotary_frequencies_stay_exact_in_low_precision():
    model = make("llama")
    exact = model.rotary_emb.inv_freq.clone()
    decoder = Decoder.from_transformers(model)
    assert torch.equal(decoder.to(torch.bfloat16).inv_freq, exact)
    assert decoder.layers[0].qkv.weight.dtype == torch.bfloat16
    # a model that was cast as a whole has rounded its own
    assert torch.equal(Decoder.from_transformers(model.to(torch.bfloat16)).inv_freq, exact)


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_frequencies_are_those_of_short_prompts_after_a_long_one(rope_type):
    """transformers changes them in the model itself; the decoder serves short prompts and refuses long ones."""
    model = make("llama", rope_parameters=rope(rope_type, 1e4, 10), max_position_embeddings=64)
    hidden = torch.randn(70, 48)
    expected = reference(model, hidden[:64], torch.arange(64))
    reference(model, hidden, torch.arange(70))
    decoder = Decoder.from_transformers(model)
    torch.testing.assert_close(decoder(hidden[:64], torch.arange(64)), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ConfigError, match=r"70 positions, but beyond 64 .* rotary frequencies change"):
        decoder(hidden, torch.arange(70))


SLIDING = {
    "mistral": {"sliding_window": 8},
    "qwen2": {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 2},
    "qwen3": {
        "sliding_window": 8,
        "use_sliding_window": True,
        "layer_types": ["full_attention"] * 2 + ["sliding_attention"],
    },
}


@pytest.mark.parametrize("family", SLIDING)
def test_prompts_within_a_sliding_window_are_served_and_longer_ones_refused(family):
    model = make(family, **SLIDING[family])
    decoder, hidden = Decoder.from_transformers(model), torch.randn(9, 48)
    expected = reference(model, hidden[:8], torch.arange(8))
    torch.testing.assert_close(decoder(hidden[:8], torch.arange(8)), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ConfigError, match="9 positions, but beyond 8 this backbone's attention window slides"):
        decoder(hidden, torch.arange(9))


def test_windows_that_no_layer_uses_do_not_count():
    assert decoder_config(make("qwen2", sliding_window=8).config).exact_len is None
    unused = make("qwen3", sliding_window=8, use_sliding_window=True, max_window_layers=3)
    assert decoder_config(unused.config).exact_len is None
    assert decoder_config(make("mistral", sliding_window=None).config).exact_len is None


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' can't be served; supported: silu"),
        ({"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}}, "rope_type 'proportional' can't be"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor 0.5 can't be served",
        ),
    ],
)
def test_what_is_computed_otherwise_is_refused(more, message):
    with pytest.raises(ConfigError, match=message):
        decoder_config(AutoConfig.for_model("llama", **(SHAPE | more)))


def test_other_families_are_refused():
    model = GemmaModel(GemmaConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, intermediate_size=16))
    supported = "supported: llama, mistral, qwen2, qwen3"
    with pytest.raises(ConfigError, match=f"backbone of type 'gemma' can't be served; {supported}"):
        Decoder.from_transformers(model)
