"""transformers' configs and weights of the served families, as the decoder takes them; the rest is refused by name.

Llama, Mistral, Qwen2 and Qwen3 differ in where biases stand, in Qwen3's norms of single heads, and in sliding windows.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from speeder_engine.config import DecoderConfig
from speeder_engine.errors import ConfigError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
ROPE_TYPES = ("default", "linear", "llama3", "yarn", "dynamic", "longrope")
# a decoder layer's module: the modules of a transformers layer that it holds, one under the other
MODULES = {
    "input_norm": ("input_layernorm",),
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "norm_q": ("self_attn.q_norm",),
    "norm_k": ("self_attn.k_norm",),
    "out": ("self_attn.o_proj",),
    "post_norm": ("post_attention_layernorm",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


def decoder_config(hf: Any) -> DecoderConfig:
    """The shape of a transformers model out of its config. Raises ConfigError for what can't be computed here."""
    _check(hf)
    family = hf.model_type
    # Qwen2 always has biases on q, k and v alone; Mistral has none, whatever its config says
    attention_bias = family in ("llama", "qwen3") and bool(hf.attention_bias)
    heads, hidden = int(hf.num_attention_heads), int(hf.hidden_size)
    return DecoderConfig(
        vocab_size=int(hf.vocab_size),
        hidden_size=hidden,
        num_layers=int(hf.num_hidden_layers),
        num_heads=heads,
        num_kv_heads=int(hf.num_key_value_heads or heads),
        head_dim=int(getattr(hf, "head_dim", None) or hidden // heads),
        intermediate_size=int(hf.intermediate_size),
        rms_norm_eps=float(hf.rms_norm_eps),
        attention_scaling=rotary_frequencies(hf)[1],
        qkv_bias=attention_bias or family == "qwen2",
        out_bias=attention_bias,
        mlp_bias=family == "llama" and bool(hf.mlp_bias),
        qk_norm=family == "qwen3",
        max_positions=int(hf.max_position_embeddings),
        exact_len=_exact_len(hf),
    )


def _check(hf: Any) -> None:
    family = getattr(hf, "model_type", "?")
    if family not in FAMILIES:
        raise ConfigError(f"backbone of type {family!r} can't be served; supported: {', '.join(FAMILIES)}")
    if hf.hidden_act not in ("silu", "swish"):
        raise ConfigError(f"backbone with hidden_act {hf.hidden_act!r} can't be served; supported: silu")
    rope = hf.rope_parameters
    rope_type = rope.get("rope_type")
    if rope_type not in ROPE_TYPES:
        raise ConfigError(f"backbone with rope_type {rope_type!r} can't be served; supported: {', '.join(ROPE_TYPES)}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        factor = rope["partial_rotary_factor"]
        raise ConfigError(f"backbone with partial_rotary_factor {factor} can't be served; supported: 1 (whole heads)")


def _exact_len(hf: Any) -> int | None:
    """The longest prompt over which no attention window slides and the rotary frequencies are those of short prompts.

    transformers lets `dynamic` frequencies grow past the trained length and `longrope` change its factors past the
    original one; both would turn keys anew that a cache already holds.
    """
    rope, ends = hf.rope_parameters, []
    if rope["rope_type"] == "dynamic":
        ends.append(int(hf.max_position_embeddings))
    if rope["rope_type"] == "longrope":
        ends.append(int(rope["original_max_position_embeddings"]))
    slides = hf.model_type == "mistral" or (
        hf.model_type in ("qwen2", "qwen3") and "sliding_attention" in hf.layer_types[: hf.num_hidden_layers]
    )
    if slides and hf.sliding_window is not None:
        ends.append(int(hf.sliding_window))
    return min(ends, default=None)


def rotary_frequencies(hf: Any) -> tuple[Tensor, float]:
    """(inverse frequencies [D / 2] in fp32, the factor on cos and sin), as transformers computes them for all families.

    Made anew: those of a loaded model may have been rounded with its weights or stretched by a long prompt.
    """
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    with torch.device("cpu"):
        made = LlamaRotaryEmbedding(hf)
    # cloned: transformers marks its own as a buffer that is not saved
    return made.inv_freq.clone(), float(made.attention_scaling)


def fuse_weights(state: Mapping[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """A copy of a transformers body's state dict under this decoder's names, q/k/v and gate/up concatenated."""
    fused = {"norm.weight": state["norm.weight"].clone()}
    for index in range(num_layers):
        layer = f"layers.{index}."
        for ours, theirs in MODULES.items():
            for kind in ("weight", "bias"):
                if f"{layer}{theirs[0]}.{kind}" in state:
                    fused[f"{layer}{ours}.{kind}"] = torch.cat([state[f"{layer}{name}.{kind}"] for name in theirs])
    return fused
