"""MoSE on Qwen2-VL: in chosen decoder layers the FFN becomes a shared expert and one of several skill experts.

A level's router reads the mean of the PROMPT's tokens that enter the level's first mixture and chooses one expert for
the whole sample: once at prefill, kept while the answer is decoded. In training the answer's tokens take the prompt's
decision too, so that training and inference are one function. With expert groups a skill is two experts, one for the
tokens of images and one for those of text. The names of weights are Hugging Face's, so that an ordinary Qwen2-VL's FFNs
are the shared experts.

The baselines are the same network with another `routing`: a mixture in which each token chooses, or plain FFNs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64, UInt8
from torch import nn
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.modeling_qwen2_vl import (
    Qwen2VLDecoderLayer,
)
from transformers.vision_utils import get_vision_position_ids

from mose_ros.core.vision import CLIP_MEAN, CLIP_STD
from mose_ros.modeling.layers import Norm, TextAttention, ViewAttention, hide, signed
from mose_ros.modeling.mixture import SkillMixture, SkillRouter, TokenMixture

Tensor = torch.Tensor


class DecoderLayer(Qwen2VLDecoderLayer):
    """A decoder layer; its FFN is what is given, or a plain one."""

    def __init__(self, config, layer_idx: int, mixture: SkillMixture | None):
        super().__init__(config, layer_idx)
        self.self_attn = TextAttention(config, layer_idx)
        self.input_layernorm = Norm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Norm(config.hidden_size, eps=config.rms_norm_eps)
        if mixture is not None:
            self.mlp = mixture

    def forward(self, hidden, angles, past, bias, chosen, is_image, newest=False):
        """Return the layer's output, its keys and values, and the probabilities of a token mixture, else None.

        chosen: (B, 1), only where it is a skill mixture.
        newest: only the last token has an output; keys and values are of all.
        """
        seen, k, v = self.self_attn(self.input_layernorm(hidden), angles, past, bias, newest)
        if newest:
            hidden = hidden[:, -1:]
            is_image = None if is_image is None else is_image[:, -1:]
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

    hidden: Float[Tensor, 'B #T D']  # after the last norm, before the head; or of the newest token
    keys: Sequence[Float[Tensor, 'B G T d']]  # of each layer, of these tokens only
    values: Sequence[Float[Tensor, 'B G T d']]
    skills: Int64[
        Tensor, 'B R'
    ]  # what each router chose; R = S with router_scope 'level'; no routers: S zeros
    scores: Sequence[Float[Tensor, 'B E_r']]  # of each router; empty when skills were given
    gates: Sequence[
        Float[Tensor, 'B #T E']
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
        newest: bool = False,
    ) -> Decoded:
        """Run the decoder over texts with their views, from the beginning; see `forward`."""
        return self(
            self.embed(input_ids, embeds),
            position_ids,
            prompt_mask,
            is_image=self.is_image(input_ids),
            forced=forced,
            newest=newest,
        )

    def angles(self, position_ids: Int64[Tensor, '3 B T']) -> tuple[Tensor, Tensor]:
        """Return Hugging Face's angles of positions in time, height and width as `rotate` takes them (B, 1, T, d).

        The position of each frequency is chosen first, so all that follows is done once and for one tensor.
        """
        rotary = self.model.language_model.rotary_emb
        sections = enumerate(rotary.mrope_section)
        which = [section % 3 for section, count in sections for _ in range(count)]
        place = torch.tensor(which * 2, device=position_ids.device)
        # the sine takes the sign of the half that it moves, the cosine has none
        frequencies = torch.cat([-rotary.inv_freq, rotary.inv_freq]).float()
        turns = (
            position_ids.float().permute(1, 2, 0)[:, None].index_select(-1, place) * frequencies
        )
        return turns.cos() * rotary.attention_scaling, turns.sin() * rotary.attention_scaling

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
        newest: bool = False,
    ) -> Decoded:
        """Run the decoder over embedded tokens.

        At prefill the routers read the tokens of `prompt_mask`; `forced` overrides them where it is not -1. Behind a
        `past` (keys and values of each layer) come one token and the `skills` that were chosen for it. Expert groups need
        `is_image` at prefill; what is decoded is text. `newest`: only the last token's hidden state is asked for, so of
        the others the last layer computes keys and values alone.
        """
        decoder = self.model.language_model
        if self.grouped and past is None and is_image is None:
            raise ValueError('expert groups need is_image; call `read`, or pass it')
        angles = self.angles(position_ids)
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
            ends = newest and index == len(decoder.layers) - 1
            hidden, k, v, gate = layer(hidden, angles, own_past, hides, chosen, is_image, ends)
            keys.append(k)
            values.append(v)
            if gate is not None:
                gates.append(gate)
        general = torch.zeros(len(hidden), self.levels, dtype=torch.long, device=hidden.device)
        skills = torch.cat(decided, 1) if decided else general
        return Decoded(decoder.norm(hidden), keys, values, skills, scores, gates)
