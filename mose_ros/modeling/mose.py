"""MoSE on Qwen2-VL: in chosen decoder layers the FFN becomes a shared expert and one of several skill experts.

A level's router reads the mean of the PROMPT's tokens that enter the level's first mixture and chooses one expert for
the whole sample: once at prefill, kept while the answer is decoded. In training the answer's tokens take the prompt's
decision too, so that training and inference are one function. With expert groups a skill is two experts, one for the
tokens of images and one for those of text. The names of weights are Hugging Face's, so that an ordinary Qwen2-VL's FFNs
are the shared experts.

The baselines are the same network with another `routing`: a mixture in which each token chooses, or plain FFNs.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64, UInt8
from torch import nn
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.modeling_qwen2_vl import (
    Qwen2MLP,
    Qwen2VLAttention,
    Qwen2VLDecoderLayer,
    Qwen2VLRMSNorm,
    VisionAttention,
)
from transformers.vision_utils import get_vision_position_ids

from mose_ros.core.vision import CLIP_MEAN, CLIP_STD

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
    return seen.transpose(1, 2).flatten(2)


def attend_in_products(
    q: Float[Tensor, 'B H T d'],
    k: Float[Tensor, 'B G S d'],
    v: Float[Tensor, 'B G S d'],
    bias: Float[Tensor, '#B 1 T*H/G S'] | None = None,
) -> Float[Tensor, 'B T H*d']:
    """Return the same as plain products: what is exported.

    The queries of one key stand below one another, so that no key is copied. In float16 logits and softmax are float32.
    """
    q, shape = q * q.shape[-1] ** -0.5, q.shape
    if shape[1] != k.shape[1]:
        q = q.reshape(shape[0], k.shape[1], -1, shape[3])
    scores = q @ k.transpose(2, 3)
    scores = scores.float() if scores.dtype == torch.float16 else scores
    scores = scores if bias is None else scores + bias
    seen = scores.softmax(-1).to(v.dtype) @ v
    if shape[1] != k.shape[1]:
        seen = seen.reshape(shape[0], shape[1], -1, shape[3])
    return seen.transpose(1, 2).flatten(2)


def hide(
    mask: Bool[Tensor, '#B 1 T S'], sharing: int, kind: torch.dtype
) -> Float[Tensor, '#B 1 T*sharing S']:
    """Return what `attend_in_products` adds to logits where `sharing` queries look at each key."""
    bias = torch.zeros(mask.shape, dtype=kind, device=mask.device).masked_fill(~mask, -1e9)
    return bias.repeat(1, 1, sharing, 1)


class SkillMixture(Qwen2MLP):
    """An FFN that is always on (its weights keep their names) and experts of which each sample takes one or some.

    grouped: each skill has a second expert, for the tokens of images (MoSE, "Scaling-Up"); `experts` are then for text.
    """

    def __init__(
        self, width: int, ffn: int, num_experts: int, expert_weight: float, grouped: bool = False
    ):
        shape = SimpleNamespace(hidden_size=width, intermediate_size=ffn, hidden_act='silu')
        super().__init__(shape)
        self.experts = nn.ModuleList(Qwen2MLP(shape) for _ in range(num_experts))
        self.image_experts = nn.ModuleList(Qwen2MLP(shape) for _ in range(num_experts * grouped))
        self.expert_weight = expert_weight

    @torch.no_grad()
    def copy_shared(self) -> None:
        """Make every expert a copy of the shared one."""
        own = self.state_dict()
        for expert in [*self.experts, *self.image_experts]:
            expert.load_state_dict({name: own[name] for name in expert.state_dict()})

    def forward(
        self,
        x: Float[Tensor, 'B T D'],
        chosen: Int64[Tensor, 'B *T K'] | None,
        weights: Float[Tensor, 'B *T K'] | None = None,
        is_image: Bool[Tensor, 'B T'] | None = None,
    ) -> Float[Tensor, 'B T D']:
        """Answer (1 - w) shared + w * chosen experts, for K > 1 their weighted sum; without `chosen` the shared alone.

        chosen: by each sample, or by each token.
        is_image: which tokens go to the image experts; none where it is not given.
        """
        shared = super().forward(x)
        if chosen is None:
            return shared
        pick = pick_by_branch if torch.compiler.is_exporting() else pick_by_group
        pick = pick_by_token if chosen.ndim == 3 else pick
        mixed = 0
        for k in range(chosen.shape[-1]):
            one = chosen[..., k]
            if self.image_experts and is_image is not None:
                groups = (self.experts, self.image_experts)
                picked = pick_by_modality(groups, one, x, is_image)
            else:
                picked = pick(self.experts, one, x)
            if weights is None:
                mixed = picked
            else:
                mixed = mixed + weights[..., k].view(len(x), -1, 1) * picked
        return torch.lerp(shared, mixed.to(shared.dtype), self.expert_weight)


class TokenMixture(SkillMixture):
    """An FFN that is always on and experts of which each token takes one, by a softmax router in float32.

    As in the Switch Transformer (2101.03961, eq. 2) the router learns by the probability p of its choice: the answer is
    (1 - w p) shared + w p chosen, so experts that are copies change nothing, and one that is certain weighs as in MoSE.
    """

    def __init__(self, width: int, ffn: int, num_experts: int, expert_weight: float):
        super().__init__(width, ffn, num_experts, expert_weight)
        self.router = nn.Linear(width, num_experts, bias=False)

    def forward(
        self, x: Float[Tensor, 'B T D']
    ) -> tuple[Float[Tensor, 'B T D'], Float[Tensor, 'B T E']]:
        """Return the answer and the probability of each expert for each token."""
        with exact(x):
            gates = self.router(x.float()).softmax(-1)
        best, chosen = gates.max(-1)
        shared = super().forward(x, None)
        picked = self.pick(chosen, x)
        weight = (self.expert_weight * best[..., None]).to(shared.dtype)
        return shared + weight * (picked - shared), gates

    def pick(
        self, chosen: Int64[Tensor, 'B T'], x: Float[Tensor, 'B T D']
    ) -> Float[Tensor, 'B T D']:
        """Give each token to its expert."""
        return pick_by_token(self.experts, chosen, x)


def pick_by_group(
    experts: Sequence[Callable], chosen: Int64[Tensor, 'B'], x: Float[Tensor, 'B ...']
) -> Float[Tensor, 'B ...']:
    """Give each sample to its expert: samples sorted by expert, each expert called once with all of its own."""
    counts = torch.bincount(chosen, minlength=len(experts)).tolist()
    if len(x) in counts:
        return experts[counts.index(len(x))](x)
    order = chosen.argsort(stable=True)
    pieces = x.index_select(0, order).split(counts)
    done = [expert(piece) for expert, piece in zip(experts, pieces, strict=True) if len(piece)]
    return torch.cat(done).index_select(0, order.argsort())


def pick_by_branch(
    experts: Sequence[Callable], chosen: Int64[Tensor, '1'], x: Float[Tensor, '1 ...']
) -> Float[Tensor, '1 ...']:
    """Do the same for one sample as a tree of conditions, which ONNX keeps as `If`: only one expert is computed."""
    if len(experts) == 1:
        return experts[0](x)
    half = len(experts) // 2
    return torch.cond(
        chosen[0] < half,
        lambda index, x: pick_by_branch(experts[:half], index, x),
        lambda index, x: pick_by_branch(experts[half:], index - half, x),
        (chosen, x),
    )


def pick_by_token(
    experts: Sequence[Callable], chosen: Int64[Tensor, 'B T'], x: Float[Tensor, 'B T D']
) -> Float[Tensor, 'B T D']:
    """Give each token to its expert; exported, all experts read all tokens: no shapes that depend on the data."""
    if torch.compiler.is_exporting():
        done = torch.stack([expert(x) for expert in experts], -1)
        place = chosen[..., None, None].expand(*x.shape, 1)
        return done.gather(-1, place)[..., 0]
    return pick_by_group(experts, chosen.flatten(), x.flatten(0, 1)).view(x.shape)


def pick_by_modality(
    groups: tuple[Sequence[Callable], Sequence[Callable]],
    chosen: Int64[Tensor, 'B'],
    x: Float[Tensor, 'B T D'],
    is_image: Bool[Tensor, 'B T'],
) -> Float[Tensor, 'B T D']:
    """Give each token to the expert of its sample in its group, (text, image); exported, both read all tokens."""
    if torch.compiler.is_exporting():  # no shapes that depend on the data
        text, image = (pick_by_branch(group, chosen, x) for group in groups)
        return torch.where(is_image[..., None], image, text)
    own = chosen[:, None].expand(is_image.shape)
    members = (~is_image, is_image)
    done = [
        pick_by_group(group, own[member], x[member])
        for group, member in zip(groups, members, strict=True)
    ]
    place = torch.cat([member.flatten().nonzero()[:, 0] for member in members])
    return torch.cat(done).index_select(0, place.argsort()).view(x.shape)


class SkillRouter(nn.Linear):
    """A linear head in float32 on the mean of the tokens, scaled to length sqrt(D) (the stream's own scale drifts)."""

    def forward(
        self, tokens: Float[Tensor, 'B T D'], mask: Float[Tensor, 'B T']
    ) -> Float[Tensor, 'B E']:
        """Return the score of each skill; only tokens with mask 1 are read."""
        with exact(tokens):
            share = (mask / mask.sum(1, keepdim=True))[:, None]
            mean = (share @ tokens.float())[:, 0]
            return super().forward(F.rms_norm(mean, mean.shape[-1:], eps=1e-6))


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
        return self.proj(way(q, k, v[0]))


class TextAttention(Qwen2VLAttention):
    """Causal attention that hands its keys and values out, for the cache and for the action expert."""

    def forward(
        self,
        hidden: Float[Tensor, 'B T D'],
        angles: tuple[Tensor, Tensor],
        past: tuple[Tensor, Tensor] | None,
        bias: Float[Tensor, '1 1 T*H/G T'] | None,
    ) -> tuple[Float[Tensor, 'B T D'], Float[Tensor, 'B G T d'], Float[Tensor, 'B G T d']]:
        """Return the attended tokens and their own keys and values; with a past, hidden is ONE token behind it.

        bias: what hides the future where this is exported.
        """
        exporting = torch.compiler.is_exporting()
        q, k, v = (self.project_at_once if exporting else self.project)(hidden, angles)
        all_k, all_v = (
            (k, v)
            if past is None
            else (torch.cat(pair, 2) for pair in zip(past, (k, v), strict=True))
        )
        if exporting:
            return self.o_proj(attend_in_products(q, all_k, all_v, bias)), k, v
        return self.o_proj(attend(q, all_k, all_v, causal=past is None)), k, v

    def project(self, hidden, angles) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values (B, heads, T, d)."""
        q, k, v = (
            project(hidden).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        return rotate(q, *angles), rotate(k, *angles), v

    def project_at_once(self, hidden, angles) -> tuple[Tensor, Tensor, Tensor]:
        """Return the same by one product."""
        parts = (self.q_proj, self.k_proj, self.v_proj)
        qkv = linear_at_once(hidden, parts).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
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


class DecoderLayer(Qwen2VLDecoderLayer):
    """A decoder layer; its FFN is what is given, or a plain one."""

    def __init__(self, config, layer_idx: int, mixture: SkillMixture | None):
        super().__init__(config, layer_idx)
        self.self_attn = TextAttention(config, layer_idx)
        self.input_layernorm = Norm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Norm(config.hidden_size, eps=config.rms_norm_eps)
        if mixture is not None:
            self.mlp = mixture

    def forward(self, hidden, angles, past, bias, chosen, is_image):
        """Return the layer's output, its keys and values, and the probabilities of a token mixture, else None.

        chosen: (B, 1), only where it is a skill mixture.
        """
        seen, k, v = self.self_attn(self.input_layernorm(hidden), angles, past, bias)
        hidden = hidden + seen
        inner = self.post_attention_layernorm(hidden)
        if chosen is not None:
            return hidden + self.mlp(inner, chosen, is_image=is_image), k, v, None
        if isinstance(self.mlp, TokenMixture):
            answer, gates = self.mlp(inner)
            return hidden + answer, k, v, gates
        return hidden + self.mlp(inner), k, v, None


@dataclass(frozen=True)
class Decoded:
    """What the decoder gives for B texts of T tokens: L layers, G key/value heads of width d, S levels."""

    hidden: Float[Tensor, 'B T D']  # after the last norm, before the head
    keys: Sequence[Float[Tensor, 'B G T d']]  # of each layer, of these tokens only
    values: Sequence[Float[Tensor, 'B G T d']]
    skills: Int64[
        Tensor, 'B R'
    ]  # what each router chose; R = S with router_scope 'level'; no routers: S zeros
    scores: Sequence[Float[Tensor, 'B E_r']]  # of each router; empty when skills were given
    gates: Sequence[
        Float[Tensor, 'B T E']
    ]  # of each token mixture: the probability of each expert


class MoseQwen2VL(Qwen2VLForConditionalGeneration):
    """Qwen2-VL with skill mixtures and views of one size; `config.mose` is a `MoseConfig` (see `qwen2vl.hf_config`)."""

    _keep_in_fp32_modules_strict = ['routers', 'mlp.router']  # in bfloat16 scores tie

    def __init__(self, config: Qwen2VLConfig):
        super().__init__(config)
        mose, text = config.mose, config.text_config
        self.grouped = mose.get('expert_groups', False)  # the first checkpoints do not say
        routing = mose.get('routing', 'skill')
        sizes = (text.hidden_size, text.intermediate_size)
        skills = [len(names) for _, names in mose['levels']]
        level_of = {
            layer: level for level, layers in enumerate(mose['layers']) for layer in layers
        }
        decoder = self.model.language_model
        for layer in range(text.num_hidden_layers):
            mixture = None
            if layer in level_of and routing == 'skill':
                experts = skills[level_of[layer]]
                mixture = SkillMixture(*sizes, experts, mose['expert_weight'], self.grouped)
            elif layer in level_of and routing == 'token':
                mixture = TokenMixture(*sizes, mose['token_experts'], mose['expert_weight'])
            decoder.layers[layer] = DecoderLayer(text, layer, mixture)
        decoder.norm = Norm(text.hidden_size, eps=text.rms_norm_eps)
        for block in self.model.visual.blocks:
            block.attn = ViewAttention(config.vision_config)
        self.levels, self.mose_layers = len(skills), sorted(level_of)
        if routing != 'skill':  # there is nothing for a router of skills to choose
            skills, level_of = [], {}
        per_layer = mose['router_scope'] == 'layer'
        self.routed = {  # layer -> its router; the first layer of a router is where it decides
            layer: index if per_layer else level
            for index, (layer, level) in enumerate(sorted(level_of.items()))
        }
        self.router_levels = [*level_of.values()] if per_layer else [*range(len(skills))]
        self.routers = nn.ModuleList(
            SkillRouter(text.hidden_size, skills[level]) for level in self.router_levels
        )
        self.post_init()

    def copy_shared(self) -> None:
        """Make the experts of every layer copies of its shared one: how a MoSE begins."""
        for module in self.modules():
            if isinstance(module, SkillMixture):
                module.copy_shared()

    def see(
        self, patches: Float[Tensor, 'M N P']
    ) -> tuple[Float[Tensor, 'M N W'], Float[Tensor, 'M n D']]:
        """Return the features of each patch of M views and, merged, the tokens that the decoder reads."""
        # patches do not overlap: their convolution is a matrix product
        return self._see(patches, self.model.visual.patch_embed.proj.weight)

    def see_pictures(self, pictures: UInt8[Tensor, 'M F H W 3']) -> Float[Tensor, 'M n D']:
        """Return the tokens of M views as cameras give them. What is exported."""
        weight = self.model.visual.patch_embed.proj.weight
        return self._see(self.cut(pictures), weight.permute(0, 2, 3, 4, 1))[1]

    def cut(self, pictures: UInt8[Tensor, 'M F H W 3']) -> Float[Tensor, 'M N P']:
        """Return `vision.normalize` and `vision.patchify` of views, but with the colours last in a patch.

        So rows of a picture stay in one piece, and it is the weights that are turned round, once and for all.
        """
        vision = self.config.vision_config
        frames, height, width = pictures.shape[1:4]
        patch, merge = vision.patch_size, vision.spatial_merge_size
        rows, columns = height // (patch * merge), width // (patch * merge)
        std = torch.tensor(CLIP_STD)
        scale, offset = 1 / (255 * std), torch.tensor(CLIP_MEAN) / std
        grid = (-1, frames, rows, merge, patch, columns, merge, 3 * patch)
        cells = pictures.float().reshape(grid).permute(0, 2, 5, 3, 6, 1, 4, 7)
        patches = cells.reshape(-1, rows * columns * merge**2, 3 * frames * patch**2)
        return patches * scale.repeat(frames * patch**2) - offset.repeat(frames * patch**2)

    def _see(self, patches, weight) -> tuple[Tensor, Tensor]:
        visual = self.model.visual
        vision = self.config.vision_config
        width, height = self.config.mose['view']
        grid = torch.tensor([[1, height // vision.patch_size, width // vision.patch_size]])
        places = get_vision_position_ids(grid, visual.spatial_merge_size).to(patches.device)
        angles = signed(*visual.rotary_pos_emb(patches, places))
        hidden = F.linear(patches.to(weight.dtype), weight.flatten(1))
        for block in visual.blocks:
            hidden = block(hidden, cu_seqlens=None, position_embeddings=angles)
        return hidden, visual.merger(hidden).view(len(patches), -1, vision.hidden_size)

    def embed(
        self, input_ids: Int64[Tensor, 'B T'], embeds: Float[Tensor, 'B V n D']
    ) -> Float[Tensor, 'B T D']:
        """Return the embedded text with the views' tokens, in order, where the image tokens stand."""
        text = self.model.language_model.embed_tokens(input_ids)
        is_image = self.is_image(input_ids)
        seen = embeds.flatten(1, 2)
        # how many stand before: a CumSum of integers is in no list of what TensorRT's parser takes
        index = torch.arange(input_ids.shape[1], device=input_ids.device)
        count = (is_image[:, None] & (index <= index[:, None])).float().sum(-1)
        place = (count - 1).clamp(0, seen.shape[1] - 1).long()
        seen = seen.gather(1, place[..., None].expand(-1, -1, seen.shape[-1]))
        return torch.where(is_image[..., None], seen.to(text.dtype), text)

    def is_image(self, input_ids: Int64[Tensor, 'B T']) -> Bool[Tensor, 'B T']:
        """Return where the views' tokens stand."""
        return input_ids == self.config.image_token_id

    def read(
        self,
        input_ids: Int64[Tensor, 'B T'],
        embeds: Float[Tensor, 'B V n D'],
        position_ids: Int64[Tensor, '3 B T'],
        prompt_mask: Float[Tensor, 'B T'],
        *,
        forced: Int64[Tensor, 'B S'] | None = None,
    ) -> Decoded:
        """Run the decoder over texts with their views, from the beginning; see `forward`."""
        return self(
            self.embed(input_ids, embeds),
            position_ids,
            prompt_mask,
            is_image=self.is_image(input_ids),
            forced=forced,
        )

    def forward(
        self,
        hidden: Float[Tensor, 'B T D'],
        position_ids: Int64[Tensor, '3 B T'],
        prompt_mask: Float[Tensor, 'B T'] | None = None,
        *,
        is_image: Bool[Tensor, 'B T'] | None = None,
        forced: Int64[Tensor, 'B S'] | None = None,
        skills: Int64[Tensor, 'B R'] | None = None,
        past: Sequence[tuple[Tensor, Tensor]] | None = None,
    ) -> Decoded:
        """Run the decoder over embedded tokens.

        At prefill the routers read the tokens of `prompt_mask`; `forced` overrides them where it is not -1. Behind a
        `past` (keys and values of each layer) come one token and the `skills` that were chosen for it. Expert groups need
        `is_image` at prefill; what is decoded is text.
        """
        decoder = self.model.language_model
        if self.grouped and past is None and is_image is None:
            raise ValueError('expert groups need is_image; call `read`, or pass it')
        angles = signed(*(one[:, None] for one in decoder.rotary_emb(hidden, position_ids)))
        hides = None
        if past is None and torch.compiler.is_exporting():
            index = torch.arange(hidden.shape[1])
            text = self.config.text_config
            sharing = text.num_attention_heads // text.num_key_value_heads
            hides = hide((index <= index[:, None])[None, None], sharing, torch.float32)
        decided = [] if skills is None else list(skills.split(1, dim=1))
        scores, keys, values, gates = [], [], [], []
        for index, layer in enumerate(decoder.layers):
            router = self.routed.get(index)
            if router is not None and router == len(decided):
                scores.append(self.routers[router](hidden, prompt_mask))
                own = scores[-1].argmax(-1, keepdim=True)
                if forced is not None:
                    level = self.router_levels[router]
                    wish = forced[:, level : level + 1]
                    own = torch.where(wish >= 0, wish, own)
                decided.append(own)
            chosen = None if router is None else decided[router]
            own_past = None if past is None else past[index]
            hidden, k, v, gate = layer(hidden, angles, own_past, hides, chosen, is_image)
            keys.append(k)
            values.append(v)
            if gate is not None:
                gates.append(gate)
        general = torch.zeros(len(hidden), self.levels, dtype=torch.long, device=hidden.device)
        skills = torch.cat(decided, 1) if decided else general
        return Decoded(decoder.norm(hidden), keys, values, skills, scores, gates)
