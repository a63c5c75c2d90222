"""What the layers of ViT and decoder are built of: norm, rotation by position, attention.

Where this is exported, the same is written in products that runtimes know and compute in one piece.
"""

import contextlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import nn
from transformers.models.qwen2_vl.modeling_qwen2_vl import (
    Qwen2VLAttention,
    Qwen2VLRMSNorm,
    VisionAttention,
)

Tensor = torch.Tensor


def exact(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Return a context in which autocast is off: routers decide in float32, where ties are rare (method.md 1.9)."""
    if torch.compiler.is_exporting():  # nothing to switch off, and the graph stays plain
        return contextlib.nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)


class Norm(Qwen2VLRMSNorm):
    """Hugging Face's, handing on what autocast computes in, so that it is cast once and not by each projection."""

    def forward(self, x: Float[Tensor, '... D']) -> Float[Tensor, '... D']:
        """Return x scaled to unit mean square, times the weight."""
        wide = x.float()
        power = wide.square().mean(-1, keepdim=True) + self.variance_epsilon
        # a division is what ONNX Runtime knows as a norm, and computes in one piece
        exporting = torch.compiler.is_exporting()
        wide = wide / power.sqrt() if exporting else wide * torch.rsqrt(power)
        return cast(self.weight * wide.to(x.dtype))


def cast(x: Tensor) -> Tensor:
    """Return x in the type that autocast computes in; as it is where autocast is off."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def to_heads(x: Float[Tensor, 'B T H*d'], width: int) -> Float[Tensor, 'B H T d']:
    """Return tokens as heads of one width; for one token that is a matter of shape, nothing moves."""
    if x.shape[1] == 1:
        return x.view(len(x), -1, 1, width)
    return x.unflatten(-1, (-1, width)).transpose(1, 2)


def from_heads(x: Float[Tensor, 'B H T d']) -> Float[Tensor, 'B T H*d']:
    """Undo `to_heads`."""
    if x.shape[2] == 1:
        return x.reshape(len(x), 1, -1)
    return x.transpose(1, 2).flatten(2)


def attend(
    q: Float[Tensor, 'B H T d'],
    k: Float[Tensor, 'B G S d'],
    v: Float[Tensor, 'B G S d'],
    mask: Bool[Tensor, '#B 1 T S'] | None = None,
    *,
    causal: bool = False,
) -> Float[Tensor, 'B T H*d']:
    """Return attention with H / G queries to each key; where the mask is False nothing is seen.

    PyTorch's own kernel, but in bfloat16 on a CPU, where that is four times as slow as plain matrix products.
    """
    if q.device.type == 'cpu' and q.dtype == torch.bfloat16:
        if causal:
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()[None, None]
        sharing = q.shape[1] // k.shape[1]
        bias = None if mask is None else hide(mask, sharing, q.dtype)
        return attend_in_products(q, k, v, bias)
    seen = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
    )
    return from_heads(seen)


def attend_in_products(
    q: Float[Tensor, 'B H T d'],
    k: Float[Tensor, 'B G S d'],
    v: Float[Tensor, 'B G S d'],
    bias: Float[Tensor, '#B 1 T*H/G S'] | None = None,
) -> Float[Tensor, 'B T H*d']:
    """Return the same as plain products: what is exported.

    The queries of one key stand below one another, so that no key is copied. In float16 logits and softmax are float32.
    """
    shape = q.shape
    if shape[1] != k.shape[1]:
        q = q.reshape(shape[0], k.shape[1], -1, shape[3])
    # right before the product, where ONNX Runtime takes a factor into it
    scores = (q * shape[3] ** -0.5) @ k.transpose(2, 3)
    scores = scores.float() if scores.dtype == torch.float16 else scores
    scores = scores if bias is None else scores + bias
    seen = scores.softmax(-1).to(v.dtype) @ v
    if shape[1] != k.shape[1]:
        seen = seen.reshape(shape[0], shape[1], -1, shape[3])
    return from_heads(seen)


def hide(
    mask: Bool[Tensor, '#B 1 T S'], sharing: int, kind: torch.dtype
) -> Float[Tensor, '#B 1 T*sharing S']:
    """Return what `attend_in_products` adds to logits where `sharing` queries look at each key."""
    bias = torch.zeros(mask.shape, dtype=kind, device=mask.device).masked_fill(~mask, -1e9)
    return bias.repeat(1, 1, sharing, 1)


def signed(cos: Float[Tensor, '... d'], sin: Float[Tensor, '... d']) -> tuple[Tensor, Tensor]:
    """Return Hugging Face's angles as `rotate` takes them: the sine with the sign of the half that it moves."""
    first, second = sin.chunk(2, -1)
    return cos, torch.cat([-first, second], -1)


def rotate(x: Float[Tensor, '... d'], cos: Tensor, sin: Tensor) -> Float[Tensor, '... d']:
    """Return x turned by its position's angles, as Hugging Face's rotary embedding does, in any layout."""
    first, second = x.chunk(2, -1)
    return x * cos.to(x.dtype) + torch.cat([second, first], -1) * sin.to(x.dtype)


class ViewAttention(VisionAttention):
    """Attention within each view. All views have one size, so it is plain and batched; equal to cu_seqlens, exportable."""

    def forward(
        self, hidden: Float[Tensor, 'M N D'], position_embeddings: tuple[Tensor, Tensor], **_
    ) -> Float[Tensor, 'M N D']:
        """Return the attended tokens of M views."""
        patches, width = hidden.shape[1:]
        shape = (-1, patches, 3, self.num_heads, width // self.num_heads)
        qkv = self.qkv(hidden).reshape(shape).permute(2, 0, 3, 1, 4)
        qk, v = qkv.split([2, 1])
        q, k = rotate(qk, *position_embeddings)
        way = attend_in_products if torch.compiler.is_exporting() else attend
        return self.proj(way(q, k, v.squeeze(0)))  # an index would copy


class TextAttention(Qwen2VLAttention):
    """Causal attention that hands its keys and values out, for the cache and for the action expert."""

    def forward(
        self,
        hidden: Float[Tensor, 'B T D'],
        angles: tuple[Tensor, Tensor],
        past: tuple[Tensor, Tensor] | None,
        bias: Float[Tensor, '1 1 T*H/G T'] | None,
        newest: bool = False,
    ) -> tuple[Float[Tensor, 'B #T D'], Float[Tensor, 'B G T d'], Float[Tensor, 'B G T d']]:
        """Return the attended tokens and their own keys and values; with a past, hidden is ONE token behind it.

        bias: what hides the future where this is exported.
        newest: attend for the last token alone, which sees all.
        """
        exporting = torch.compiler.is_exporting()
        q, k, v = (self.project_at_once if exporting else self.project)(hidden, angles)
        if newest:
            q, bias = q[:, :, -1:], None
        all_k, all_v = (
            (k, v)
            if past is None
            else (torch.cat(pair, 2) for pair in zip(past, (k, v), strict=True))
        )
        if exporting:
            return self.o_proj(attend_in_products(q, all_k, all_v, bias)), k, v
        return self.o_proj(attend(q, all_k, all_v, causal=past is None and not newest)), k, v

    def project(self, hidden, angles) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values (B, heads, T, d)."""
        q, k, v = (
            to_heads(project(hidden), self.head_dim)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        return rotate(q, *angles), rotate(k, *angles), v

    def project_at_once(self, hidden, angles) -> tuple[Tensor, Tensor, Tensor]:
        """Return the same by one product."""
        parts = (self.q_proj, self.k_proj, self.v_proj)
        qkv = to_heads(linear_at_once(hidden, parts), self.head_dim)
        queries, keys, values = (part.out_features // self.head_dim for part in parts)
        qk, v = qkv.split([queries + keys, values], 1)
        q, k = rotate(qk, *angles).split([queries, keys], 1)
        return q, k, v


def linear_at_once(
    x: Float[Tensor, '... D'], parts: Sequence[nn.Linear]
) -> Float[Tensor, '... sum']:
    """Return what linear layers say of the same x, side by side, by one product; an export joins their weights once."""
    weight, offset = (
        torch.cat([getattr(one, name) for one in parts]) for name in ('weight', 'bias')
    )
    return F.linear(x.to(weight.dtype), weight, offset)
