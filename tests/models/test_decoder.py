"""The decoder against transformers, on random small shapes."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, Qwen2Config, Qwen2Model

from speeder_engine.errors import ConfigError
from speeder_engine.models.decoder import Decoder

SHAPES = [
    {"num_attention_heads": 4, "num_key_value_heads": 4},
    {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10},
    {"num_attention_heads": 5, "num_key_value_heads": 1, "hidden_size": 40, "intermediate_size": 72},
    {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0},
        "max_position_embeddings": 64,
    },
]


def llama(shape, **more) -> LlamaModel:
    torch.manual_seed(0)
    config = {"vocab_size": 50, "hidden_size": 48, "num_hidden_layers": 3, "intermediate_size": 80} | shape | more
    model = LlamaModel(LlamaConfig(**config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.2) if "norm" not in name else parameter.uniform_(0.5, 1.5)
    return model


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("length", [1, 7, 37])
def test_hidden_states_equal_transformers(shape, length):
    model = llama(shape)
    hidden = torch.randn(length, model.config.hidden_size)
    with torch.no_grad():
        expected = model(inputs_embeds=hidden[None]).last_hidden_state[0]
    found = Decoder.from_transformers(model)(hidden, torch.arange(length))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_positions_need_not_start_at_nought():
    model = llama(SHAPES[1])
    hidden, positions = torch.randn(9, 48), torch.arange(5, 14)
    with torch.no_grad():
        expected = model(inputs_embeds=hidden[None], position_ids=positions[None]).last_hidden_state[0]
    torch.testing.assert_close(Decoder.from_transformers(model)(hidden, positions), expected, atol=1e-5, rtol=1e-5)


def test_reading_few_rows_changes_none_of_them():
    decoder = Decoder.from_transformers(llama(SHAPES[1]))
    hidden, rows = torch.randn(20, 48), torch.tensor([19, 0, 7])
    whole = decoder(hidden, torch.arange(20))
    torch.testing.assert_close(decoder(hidden, torch.arange(20), read_rows=rows), whole[rows], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_as_near_as_torchs_own(dtype):
    model = llama(SHAPES[3])
    hidden = torch.randn(33, 48)
    with torch.no_grad():
        exact = model.double()(inputs_embeds=hidden.double()[None]).last_hidden_state[0]
        theirs = model.to(dtype)(inputs_embeds=hidden.to(dtype)[None]).last_hidden_state[0].double()
    ours = Decoder.from_transformers(model)(hidden.to(dtype), torch.arange(33)).double()
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max() + 1e-3


def test_a_language_models_body_is_found():
    model = LlamaForCausalLM(llama(SHAPES[0]).config).eval()
    hidden = torch.randn(5, 48)
    with torch.no_grad():
        expected = model.model(inputs_embeds=hidden[None]).last_hidden_state[0]
    torch.testing.assert_close(
        Decoder.from_transformers(model)(hidden, torch.arange(5)), expected, atol=1e-5, rtol=1e-5
    )


def test_rotary_frequencies_stay_exact_in_low_precision():
    decoder = Decoder.from_transformers(llama(SHAPES[0]))
    exact = decoder.inv_freq.clone()
    assert torch.equal(decoder.to(torch.bfloat16).inv_freq, exact)
    assert decoder.layers[0].qkv.weight.dtype == torch.bfloat16


def test_other_families_are_refused():
    model = Qwen2Model(Qwen2Config(vocab_size=20, hidden_size=64, num_hidden_layers=1, intermediate_size=16))
    with pytest.raises(ConfigError, match=r"backbone of type 'qwen2' can't be served yet; supported: llama"):
        Decoder.from_transformers(model)
    with pytest.raises(ConfigError, match="biases"):
        Decoder.from_transformers(llama(SHAPES[0], attention_bias=True))
