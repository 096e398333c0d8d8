"""A subject's decoder as a GGUF file: what llama.cpp reads."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from baselines.base import Unavailable
from hf_weights import unfused
from subject import Subject
from torch import Tensor

from speeder_engine.config import DecoderConfig

VOCABULARY = 32  # words that are never read: rows go in as embeddings
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(subject: Subject, path: Path) -> None:
    """As a Qwen2, with zeros for biases that aren't there; matrices in the subject's dtype, vectors in fp32. Raises
    Unavailable for a decoder that is no Qwen2 or Llama."""
    import gguf

    shape = subject.config.decoder
    if shape.qk_norm or shape.out_bias or shape.mlp_bias or shape.attention_scaling != 1:
        raise Unavailable("llama_cpp is measured with decoders of Qwen2's or Llama's kind")
    writer = gguf.GGUFWriter(path, "qwen2")
    _describe(writer, shape, _rope_theta(subject.weights["decoder.inv_freq"]))
    kinds = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    kind = gguf.GGMLQuantizationType[kinds[subject.dtype]]
    for name, tensor in _tensors(shape, subject.weights):
        values = tensor.float().numpy()
        if values.ndim == 1 or kind == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _describe(writer: Any, shape: DecoderConfig, theta: float) -> None:
    writer.add_context_length(32_768)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_block_count(shape.num_layers)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_heads)
    writer.add_head_count_kv(shape.num_kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_layer_norm_rms_eps(shape.rms_norm_eps)
    writer.add_rope_freq_base(theta)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("none")


def _tensors(shape: DecoderConfig, weights: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
    state = unfused(shape, weights)
    found = [("token_embd.weight", torch.zeros(VOCABULARY, shape.hidden_size))]
    found.append(("output_norm.weight", state["model.norm.weight"]))
    for index in range(shape.num_layers):
        for theirs, name in NAMES.items():
            weight = state[f"model.layers.{index}.{theirs}.weight"]
            found.append((f"blk.{index}.{name}.weight", weight))
            if theirs[-6:] in ("q_proj", "k_proj", "v_proj"):
                bias = state.get(f"model.layers.{index}.{theirs}.bias")
                zeros = weight.new_zeros(weight.shape[0])
                found.append((f"blk.{index}.{name}.bias", zeros if bias is None else bias))
    return found


def _rope_theta(frequencies: Tensor) -> float:
    """The base of frequencies theta ** (-2 i / D). Raises Unavailable for any others."""
    exponents = np.arange(len(frequencies)) / len(frequencies)
    values = frequencies.double().numpy()
    theta = float(values[-1] ** (-1 / exponents[-1]))
    if not np.allclose(values, theta**-exponents, rtol=1e-4):
        raise Unavailable("llama_cpp is measured with plain rotary frequencies")
    return theta
