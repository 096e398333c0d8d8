"""The inference decoder: a Llama-family transformer that knows no cache.

`forward` hands every layer's raw q, k, v to `attend`, which rotates, stores and attends as it sees fit: the default is
plain causal attention over one sequence, the engine's is paged. transformers is the judge of its numbers.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from speeder_engine.config import DecoderConfig
from speeder_engine.errors import ConfigError

FAMILIES = ("llama",)


class Attend(Protocol):
    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None) -> Tensor:
        """q [R, H, D] for the rows named in `rows` (None: all N), k and v [N, H_kv, D], unrotated -> [R, H, D]."""
        ...


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


class DecoderLayer(nn.Module):
    """Pre-norm attention and SwiGLU, with q, k, v in one matrix and gate, up in another."""

    def __init__(self, index: int, config: DecoderConfig) -> None:
        super().__init__()
        self.index = index
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.q_size, self.kv_size = self.heads * self.head_dim, self.kv_heads * self.head_dim
        hidden = config.hidden_size
        self.input_norm = RMSNorm(hidden, config.rms_norm_eps)
        self.qkv = nn.Linear(hidden, self.q_size + 2 * self.kv_size, bias=False)
        self.out = nn.Linear(self.q_size, hidden, bias=False)
        self.post_norm = RMSNorm(hidden, config.rms_norm_eps)
        self.gate_up = nn.Linear(hidden, 2 * config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, hidden, bias=False)

    def forward(self, hidden: Tensor, attend: Attend, rows: Tensor | None) -> Tensor:
        """hidden [N, d] -> [N, d], or [R, d] where only `rows` are read afterwards: keys and values for all all the
        same, since later steps read them from the cache."""
        q, k, v = self._project(self.input_norm(hidden), rows)
        mixed = attend(self.index, q, k, v, rows)
        hidden = (hidden if rows is None else hidden[rows]) + self.out(mixed.flatten(1))
        gate, up = self.gate_up(self.post_norm(hidden)).chunk(2, dim=-1)
        out: Tensor = hidden + self.down(F.silu(gate) * up)
        return out

    def _project(self, normed: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        if rows is None:
            q, kv = self.qkv(normed).split([self.q_size, 2 * self.kv_size], dim=-1)
        else:
            q = F.linear(normed[rows], self.qkv.weight[: self.q_size])
            kv = F.linear(normed, self.qkv.weight[self.q_size :])
        k, v = kv.chunk(2, dim=-1)
        return (
            q.unflatten(-1, (self.heads, self.head_dim)),
            k.unflatten(-1, (self.kv_heads, self.head_dim)),
            v.unflatten(-1, (self.kv_heads, self.head_dim)),
        )


class Decoder(nn.Module):
    """Final (normed) hidden states of flat rows [N, d]; which rows see which is `attend`'s affair."""

    inv_freq: Tensor

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(DecoderLayer(index, config) for index in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.register_buffer("inv_freq", torch.ones(config.head_dim // 2, dtype=torch.float32))

    @torch.inference_mode()
    def forward(
        self, hidden: Tensor, positions: Tensor, attend: Attend | None = None, read_rows: Tensor | None = None
    ) -> Tensor:
        """hidden [N, d], positions [N] -> [N, d], or [R, d] for `read_rows` [R] (the last layer computes only those).

        Without `attend` the rows are one sequence under causal attention.
        """
        attend = attend or CausalAttend(*self.rotary(positions))
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden, attend, read_rows if index == last else None)
        normed: Tensor = self.norm(hidden)
        return normed

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [N, D] in fp32, scaled as the backbone's rope type wants."""
        angles = positions.float().unsqueeze(-1) * self.inv_freq.float()
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos() * self.config.attention_scaling, angles.sin() * self.config.attention_scaling

    @classmethod
    def from_transformers(cls, model: nn.Module) -> "Decoder":
        """A decoder with the weights of a loaded transformers model (with or without its language-model head)."""
        body: Any = getattr(model, "model", model)
        decoder = cls(decoder_config(body.config, float(body.rotary_emb.attention_scaling)))
        with torch.no_grad():
            decoder.inv_freq.copy_(body.rotary_emb.inv_freq)
        decoder.load_state_dict(fuse_weights(body.state_dict(), decoder.config) | {"inv_freq": decoder.inv_freq})
        return decoder.to(next(body.parameters()).dtype).eval()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Keeps the rotary frequencies in fp32 whatever the weights become: bf16 angles are wrong by whole turns."""
        exact = self.inv_freq
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.inv_freq = exact.to(self.inv_freq.device)
        return self


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: x [N, H, D], cos and sin [N, D], arithmetic in x's dtype as transformers does it."""
    cos, sin = cos.to(x.dtype).unsqueeze(1), sin.to(x.dtype).unsqueeze(1)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class CausalAttend:
    """Plain causal attention over one sequence of N rows: for tests, export and single prompts."""

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        self.cos, self.sin = cos, sin

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None) -> Tensor:
        num_rows = k.shape[0]
        read = torch.arange(num_rows, device=k.device) if rows is None else rows
        q = rotate(q, self.cos[read], self.sin[read]).transpose(0, 1)
        k = rotate(k, self.cos, self.sin).transpose(0, 1)
        visible = torch.arange(num_rows, device=k.device) <= read.unsqueeze(1)
        out = F.scaled_dot_product_attention(
            q.unsqueeze(0), k.unsqueeze(0), v.transpose(0, 1).unsqueeze(0), attn_mask=visible, enable_gqa=True
        )
        return out.squeeze(0).transpose(0, 1)


def decoder_config(hf: object, attention_scaling: float = 1.0) -> DecoderConfig:
    """The shape of a transformers model out of its config; refuses families this decoder doesn't compute."""
    family = getattr(hf, "model_type", "?")
    if family not in FAMILIES:
        raise ConfigError(f"backbone of type {family!r} can't be served yet; supported: {', '.join(FAMILIES)}")
    if getattr(hf, "attention_bias", False) or getattr(hf, "mlp_bias", False):
        raise ConfigError("backbone with biases in its linear layers can't be served; choose one without")
    heads, hidden = int(hf.num_attention_heads), int(hf.hidden_size)  # type: ignore[attr-defined]
    return DecoderConfig(
        vocab_size=int(hf.vocab_size),  # type: ignore[attr-defined]
        hidden_size=hidden,
        num_layers=int(hf.num_hidden_layers),  # type: ignore[attr-defined]
        num_heads=heads,
        num_kv_heads=int(getattr(hf, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(hf, "head_dim", None) or hidden // heads),
        intermediate_size=int(hf.intermediate_size),  # type: ignore[attr-defined]
        rms_norm_eps=float(hf.rms_norm_eps),  # type: ignore[attr-defined]
        attention_scaling=attention_scaling,
    )


def fuse_weights(state: Mapping[str, Tensor], config: DecoderConfig) -> dict[str, Tensor]:
    """A transformers Llama body's state dict under this decoder's names, q/k/v and gate/up concatenated."""
    fused = {"norm.weight": state["norm.weight"]}
    for index in range(config.num_layers):
        theirs, ours = f"layers.{index}.", f"layers.{index}."
        attention = [state[f"{theirs}self_attn.{name}_proj.weight"] for name in ("q", "k", "v")]
        fused[f"{ours}input_norm.weight"] = state[f"{theirs}input_layernorm.weight"]
        fused[f"{ours}qkv.weight"] = torch.cat(attention)
        fused[f"{ours}out.weight"] = state[f"{theirs}self_attn.o_proj.weight"]
        fused[f"{ours}post_norm.weight"] = state[f"{theirs}post_attention_layernorm.weight"]
        fused[f"{ours}gate_up.weight"] = torch.cat(
            [state[f"{theirs}mlp.{name}_proj.weight"] for name in ("gate", "up")]
        )
        fused[f"{ours}down.weight"] = state[f"{theirs}mlp.down_proj.weight"]
    return fused
