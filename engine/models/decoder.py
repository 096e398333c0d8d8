"""The inference decoder: Llama, Mistral, Qwen2 or Qwen3 (`families.py`), one transformer that knows no cache.

`forward` hands every layer's raw q, k, v to `attend`, which norms, rotates, stores and attends as it sees fit, in one
kernel if it can: the default is plain causal attention over one sequence, the engine's is paged. transformers is the
judge of its numbers.
"""

from collections.abc import Callable
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from speeder_engine.config import EXACT_LEN_ENDS, DecoderConfig
from speeder_engine.errors import ConfigError
from speeder_engine.models.families import decoder_config, fuse_weights, rotary_frequencies


class Attend(Protocol):
    def __call__(self, layer: "DecoderLayer", q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None) -> Tensor:
        """q [R, H, D] for the rows named in `rows` (None: all N), k and v [N, H_kv, D] -> [R, H, D].

        All as the layer's projection gives them: `layer.norm_q` and `layer.norm_k` (the identity where the family has
        none) come first, then the rotation. `layer.index` says which layer's keys and values these are.
        """
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
        self.config = config
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.q_size, self.kv_size = self.heads * self.head_dim, self.kv_heads * self.head_dim
        hidden = config.hidden_size
        self.input_norm = RMSNorm(hidden, config.rms_norm_eps)
        self.qkv = nn.Linear(hidden, self.q_size + 2 * self.kv_size, bias=config.qkv_bias)
        self.norm_q = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.norm_k = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.out = nn.Linear(self.q_size, hidden, bias=config.out_bias)
        self.post_norm = RMSNorm(hidden, config.rms_norm_eps)
        self.gate_up = nn.Linear(hidden, 2 * config.intermediate_size, bias=config.mlp_bias)
        self.down = nn.Linear(config.intermediate_size, hidden, bias=config.mlp_bias)

    def forward(self, hidden: Tensor, attend: Attend, rows: Tensor | None) -> Tensor:
        """hidden [N, d] -> [N, d], or [R, d] where only `rows` are read afterwards: keys and values for all all the
        same, since later steps read them from the cache."""
        q, k, v = self.project(self.input_norm(hidden), rows)
        return self.finish(hidden if rows is None else hidden[rows], attend(self, q, k, v, rows))

    def finish(self, hidden: Tensor, mixed: Tensor) -> Tensor:
        """hidden [..., d] and what attention made of these rows [..., H, D] -> [..., d]."""
        hidden = hidden + self.out(mixed.flatten(-2))
        gate, up = self.gate_up(self.post_norm(hidden)).chunk(2, dim=-1)
        out: Tensor = hidden + self.down(F.silu(gate) * up)
        return out

    def project(self, normed: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """normed [..., d] -> q [..., H, D] and k, v [..., H_kv, D]; of flat rows [N, d], q for `rows` [R] alone."""
        if rows is None:
            q, kv = self.qkv(normed).split([self.q_size, 2 * self.kv_size], dim=-1)
        else:
            q = self._part(normed[rows], slice(None, self.q_size))
            kv = self._part(normed, slice(self.q_size, None))
        k, v = kv.chunk(2, dim=-1)
        return (
            q.unflatten(-1, (self.heads, self.head_dim)),
            k.unflatten(-1, (self.kv_heads, self.head_dim)),
            v.unflatten(-1, (self.kv_heads, self.head_dim)),
        )

    def _part(self, normed: Tensor, part: slice) -> Tensor:
        """Some of the fused projection's outputs."""
        bias = self.qkv.bias[part] if self.config.qkv_bias else None
        return F.linear(normed, self.qkv.weight[part], bias)


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
        if attend is None:
            self._check_length(positions)
            attend = CausalAttend(*self.rotary(positions))
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

    def _check_length(self, positions: Tensor) -> None:
        most = self.config.exact_len
        if most is None:
            return
        reached = max([len(positions), *(positions + 1).tolist()])
        if reached > most:
            raise ConfigError(f"{reached} positions, but beyond {most} this backbone's {EXACT_LEN_ENDS}; send fewer")

    @classmethod
    def from_transformers(cls, model: nn.Module) -> "Decoder":
        """A decoder with a copy of a loaded transformers model's weights, the vocabulary's aside: the body alone or
        under a language-model head, tied or untied. Adapters must have been merged."""
        body: Any = getattr(model, "model", model)
        with torch.device("meta"):
            decoder = cls(decoder_config(body.config))
        weights = fuse_weights(body.state_dict(), decoder.config.num_layers)
        weights["inv_freq"] = rotary_frequencies(body.config)[0].to(body.device)
        decoder.load_state_dict(weights, assign=True)
        return decoder.to(body.dtype).eval()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Keeps the rotary frequencies in fp32 whatever the weights become: bf16 angles are wrong by whole turns."""
        exact = self.inv_freq
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.inv_freq = exact.to(self.inv_freq.device)
        return self


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: x [..., H, D], cos and sin [..., D], arithmetic in x's dtype as transformers does it."""
    cos, sin = cos.to(x.dtype).unsqueeze(-2), sin.to(x.dtype).unsqueeze(-2)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class CausalAttend:
    """Plain causal attention over one sequence of N rows: for tests, export and single prompts."""

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        self.cos, self.sin = cos, sin

    def __call__(self, layer: DecoderLayer, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None) -> Tensor:
        num_rows = k.shape[0]
        read = torch.arange(num_rows, device=k.device) if rows is None else rows
        q = rotate(layer.norm_q(q), self.cos[read], self.sin[read]).transpose(0, 1)
        k = rotate(layer.norm_k(k), self.cos, self.sin).transpose(0, 1)
        visible = torch.arange(num_rows, device=k.device) <= read.unsqueeze(1)
        out = F.scaled_dot_product_attention(
            q.unsqueeze(0), k.unsqueeze(0), v.transpose(0, 1).unsqueeze(0), attn_mask=visible, enable_gqa=True
        )
        return out.squeeze(0).transpose(0, 1)
