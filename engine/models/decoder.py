"""The inference decoder: Llama, Mistral, Qwen2 or Qwen3 (`families.py`), one transformer that knows no cache.

`forward` hands every layer's raw q, k, v to `attend`, which norms, rotates, stores and attends as it sees fit: the
default is plain causal attention over one sequence, the engine's is paged. transformers is the judge of its numbers.
"""

from collections.abc import Callable
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from speeder_engine.config import EXACT_LEN_ENDS, DecoderConfig
from speeder_engine.errors import ConfigError
from speeder_engine.models.families import decoder_config, fuse_weights, rotary_frequencies
from speeder_engine.models.linear import W8Linear, linear_part, quantize_linears
from speeder_engine.models.norm import RMSNorm
from speeder_engine.models.residual import ResidualStream
from speeder_engine.models.shapes import ShapesOnly
from speeder_engine.triton_kernels.few_rows import suits
from speeder_engine.triton_kernels.fused_qkv import fits
from speeder_engine.triton_kernels.qk_norm_rope_store import rotate
from speeder_engine.triton_kernels.quantize_rows import Kind


class Attend(Protocol):
    def __call__(self, layer: "DecoderLayer", q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None) -> Tensor:
        """q [R, H, D] for the rows named in `rows` (None: all N), k and v [N, H_kv, D] -> [R, H, D].

        All as the layer's projection gives them: `layer.norm_q` and `layer.norm_k` (the identity where the family has
        none) come first, then the rotation. `layer.index` says which layer's keys and values these are.
        """
        ...


@runtime_checkable
class FusedAttend(Protocol):
    """An `Attend` that can project too."""

    def project(self, layer: "DecoderLayer", hidden: Tensor, counters: Tensor) -> Tensor:
        """hidden [N, d] before the layer's input norm -> what `__call__` gives of all rows; `counters` as of
        `fused_linear`."""
        ...


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

    @property
    def head_norms(self) -> tuple[Tensor | None, Tensor | None]:
        """The weights of `norm_q` and `norm_k`, where the family has such norms."""
        return getattr(self.norm_q, "weight", None), getattr(self.norm_k, "weight", None)

    def forward(self, stream: ResidualStream, attend: Attend, rows: Tensor | None) -> None:
        """Adds this layer to the stream; to `rows` of it [R] alone where only those are read afterwards. Keys and
        values are of all rows all the same, since later steps read them from the cache."""
        stream.add(self.out, self._mixed(stream, attend, rows).flatten(1))
        stream.add(self.down, stream.read(self.post_norm, self.gate_up, gated=True))

    def _mixed(self, stream: ResidualStream, attend: Attend, rows: Tensor | None) -> Tensor:
        """What attention makes of the stream [R, H, D], of which only `rows` are left."""
        if rows is not None:
            q, k, v = self.project(stream.normed(self.input_norm), rows)
            stream.select(rows)
        elif stream.counters is not None and isinstance(attend, FusedAttend) and fits(self.head_dim):
            return attend.project(self, stream.hidden, stream.counters)
        else:
            q, k, v = self.heads_of(stream.read(self.input_norm, self.qkv))
        return attend(self, q, k, v, rows)

    def project(self, normed: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """normed [..., d] -> q [..., H, D] and k, v [..., H_kv, D]; of flat rows [N, d], q for `rows` [R] alone."""
        if rows is None:
            return self.heads_of(self.qkv(normed))
        q = linear_part(self.qkv, normed[rows], slice(None, self.q_size))
        kv = linear_part(self.qkv, normed, slice(self.q_size, None))
        return self._heads(q, kv)

    def heads_of(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[..., q_size + 2 kv_size] -> q [..., H, D] and k, v [..., H_kv, D]."""
        return self._heads(*torch.split(qkv, [self.q_size, 2 * self.kv_size], dim=-1))

    def _heads(self, q: Tensor, kv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        k, v = kv.chunk(2, dim=-1)
        return (
            torch.unflatten(q, -1, (self.heads, self.head_dim)),
            torch.unflatten(k, -1, (self.kv_heads, self.head_dim)),
            torch.unflatten(v, -1, (self.kv_heads, self.head_dim)),
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
        self,
        hidden: Tensor,
        positions: Tensor,
        attend: Attend | None = None,
        read_rows: Tensor | None = None,
        normed: Tensor | None = None,
        counters: Tensor | None = None,
    ) -> Tensor:
        """hidden [N, d], positions [N] -> [N, d], or [R, d] for `read_rows` [R].

        Without `attend` the rows are one sequence under causal attention. `normed` is hidden under the first layer's
        `input_norm`, where the caller has it. `counters` are `fused_linear`'s; without them few rows on a GPU are not
        fused either. The last layer computes only the rows that are read; of few rows all: they cost no more, and to
        pick them out would.
        """
        if attend is None:
            self._check_length(positions)
            attend = CausalAttend(*self.rotary(positions))
        few = counters is not None and suits(hidden)
        stream = ResidualStream(hidden, normed, counters if few else None)
        early, late = (None, read_rows) if few else (read_rows, None)
        for layer in self.layers:
            layer(stream, attend, early if layer is self.layers[-1] else None)
        return stream.normed(self.norm, late)

    @property
    def weight_kind(self) -> Kind | None:
        """What the linear layers were quantized to; None for weights as they were trained."""
        return next((module.weight.kind for module in self.modules() if isinstance(module, W8Linear)), None)

    def quantize(self, kind: Kind, device: torch.device, with_rows: bool = False) -> None:
        """The linear layers in 8 bits from now on, on `device`; their weights as they were are let go. `with_rows`: fp8
        rows are rounded too where the device multiplies them, before every layer, in a launch of their own."""
        quantize_linears(self.layers, kind, device, with_rows)

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
        with ShapesOnly():
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
