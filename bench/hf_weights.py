"""The engine's decoder as a transformers causal LM: fused matrices are cut into views, nothing is copied."""

from typing import Any

import torch
from torch import Tensor

from speeder_engine.config import DecoderConfig
from speeder_engine.models.families import MODULES

SPREAD = 0.02  # of a vocabulary that is made here


def make_causal_lm(shape: DecoderConfig, weights: dict[str, Tensor], device: torch.device, seed: int) -> Any:
    """`weights`: the state dict of a `ServingModel`. The vocabulary is the model's own or, where it has none, random
    and tied; in eval mode, no parameter asks for a gradient."""
    from transformers import AutoModelForCausalLM

    state = unfused(shape, weights)
    dtype = state["model.norm.weight"].dtype
    state["model.embed_tokens.weight"] = _embedding(shape, weights, dtype, device, seed)
    head = weights.get("vocabulary.head")
    state["lm_head.weight"] = state["model.embed_tokens.weight"] if head is None else head
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(causal_lm_config(shape, tied=head is None), dtype=dtype)
    model.load_state_dict(state, assign=True)
    # rotary frequencies are no part of a state dict, and exact whatever the dtype
    rotary, frequencies = model.model.rotary_emb, weights["decoder.inv_freq"].float()
    rotary.inv_freq, rotary.original_inv_freq = frequencies, frequencies
    rotary.attention_scaling = shape.attention_scaling
    return model.requires_grad_(False).eval()


def causal_lm_config(shape: DecoderConfig, tied: bool = True) -> Any:
    """The transformers config of this shape: of Qwen3 with head norms, of Qwen2 with biases on q, k and v alone, else
    of Llama."""
    from transformers import AutoConfig

    common: dict[str, Any] = {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.intermediate_size,
        "rms_norm_eps": shape.rms_norm_eps,
        "max_position_embeddings": 32_768,
        "tie_word_embeddings": tied,
        "attn_implementation": "sdpa",
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if shape.qk_norm:
        return AutoConfig.for_model("qwen3", **common, attention_bias=shape.qkv_bias)
    if shape.qkv_bias and not shape.out_bias:
        return AutoConfig.for_model("qwen2", **common)
    return AutoConfig.for_model("llama", **common, attention_bias=shape.qkv_bias, mlp_bias=shape.mlp_bias)


def unfused(shape: DecoderConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The decoder's tensors under transformers' names, as views."""
    q, kv, ffn = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim, shape.intermediate_size
    sizes = {"qkv": [q, kv, kv], "gate_up": [ffn, ffn]}
    state = {"model.norm.weight": weights["decoder.norm.weight"]}
    for index in range(shape.num_layers):
        for ours, theirs in MODULES.items():
            for kind in ("weight", "bias"):
                whole = weights.get(f"decoder.layers.{index}.{ours}.{kind}")
                if whole is not None:
                    parts = whole.split(sizes[ours]) if ours in sizes else [whole]
                    names = [f"model.layers.{index}.{name}.{kind}" for name in theirs]
                    state |= dict(zip(names, parts, strict=True))
    return state


def _embedding(
    shape: DecoderConfig, weights: dict[str, Tensor], dtype: torch.dtype, device: torch.device, seed: int
) -> Tensor:
    if "vocabulary.embedding" in weights:
        return weights["vocabulary.embedding"]
    generator = torch.Generator(device).manual_seed(seed)
    rows = torch.empty(shape.vocab_size, shape.hidden_size, dtype=dtype, device=device)
    return rows.normal_(0, SPREAD, generator=generator)
