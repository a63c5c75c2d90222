"""Mixtures of experts in place of an FFN, and the routers of skills: who computes for whom."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import nn
from transformers.models.qwen2_vl.modeling_qwen2_vl import (
    Qwen2MLP,
)

from mose_ros.modeling.layers import exact

Tensor = torch.Tensor


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
        # not lerp, which an export spells out in six operators; scales are part of a product
        return (1 - self.expert_weight) * shared + self.expert_weight * mixed.to(shared.dtype)


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

    def pick(first: int, end: int, number: Tensor, x: Tensor) -> Tensor:
        if end - first == 1:
            return experts[first](x)
        half = (first + end) // 2
        return torch.cond(
            number < half,
            lambda number, x: pick(first, half, number, x),
            lambda number, x: pick(half, end, number, x),
            (number, x),
        )

    return pick(0, len(experts), chosen[0], x)  # a level asks one operator: the number is a scalar


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
