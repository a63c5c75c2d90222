"""The action expert: flow matching over the trajectory, looking into the language model's keys and values layer by layer.

Tokens: proprioception, one query, then the noisy points. Proprioception sees the prompt and itself; the query sees
these too, but no points, so what the action router reads from it is one decision per trajectory, the same at every
noise and step (DriveMoE routes anew at each step). With routing 'token' each token decides for itself, and the points do
so anew at each step. The points of one trajectory see everything but other draws.
Flow: t = 0 noise, t = 1 action (DriveMoE 1.4).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import nn

from mose_ros.modeling.config import ActionConfig, DecoderConfig
from mose_ros.modeling.layers import (
    Norm,
    attend,
    attend_in_products,
    exact,
    hide,
    linear_at_once,
    to_heads,
)
from mose_ros.modeling.mixture import SkillMixture

Tensor = torch.Tensor


@dataclass(frozen=True)
class Velocity:
    """What the action expert answers for R noisy versions of each trajectory."""

    velocity: Float[Tensor, 'B R H 2']
    scores: Float[Tensor, 'B A']  # of each action skill; without mixtures A = 1
    skill: Int64[Tensor, 'B']  # the best of them, or the forced one


class JointLayer(nn.Module):
    """Attention over the prompt's keys and values of one decoder layer and over its own tokens; then an FFN."""

    def __init__(self, config: ActionConfig, decoder: DecoderConfig, num_experts: int):
        super().__init__()
        self.head_dim = decoder.head_dim
        self.heads, self.kv_heads = decoder.heads, decoder.kv_heads
        width, inner, own = config.width, self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.norm1 = Norm(width, eps=1e-6)
        self.norm2 = Norm(width, eps=1e-6)
        self.q_proj = nn.Linear(width, inner)
        self.kv_proj = nn.Linear(width, 2 * own)
        self.o_proj = nn.Linear(inner, width, bias=False)
        self.mlp = SkillMixture(width, config.ffn, num_experts, config.expert_weight)

    def forward(
        self,
        x: Float[Tensor, 'B T W'],
        prompt: tuple[Float[Tensor, 'B G P d'], Float[Tensor, 'B G P d']],
        mask: Tensor,
        chosen: Int64[Tensor, 'B *T K'] | None,
        weights: Float[Tensor, 'B *T K'] | None,
    ) -> Float[Tensor, 'B T W']:
        """Return the layer's output; `chosen` and their weights only where the FFN is a mixture.

        mask: (B, 1, T, P+T) of who sees whom; in an export `mose.hide` of it.
        """
        exporting = torch.compiler.is_exporting()
        inner = self.norm1(x)
        if exporting:
            qkv = to_heads(linear_at_once(inner, (self.q_proj, self.kv_proj)), self.head_dim)
            q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], 1)
        else:
            q, kv = (to_heads(one(inner), self.head_dim) for one in (self.q_proj, self.kv_proj))
            k, v = kv.chunk(2, 1)
        k, v = (
            torch.cat([past.to(own.dtype), own], 2)
            for past, own in zip(prompt, (k, v), strict=True)
        )
        x = x + self.o_proj((attend_in_products if exporting else attend)(q, k, v, mask))
        return x + self.mlp(self.norm2(x), chosen, weights)


class ActionExpert(nn.Module):
    """See the module's docstring."""

    def __init__(self, config: ActionConfig, decoder: DecoderConfig, proprio: int):
        super().__init__()
        width, skills = config.width, len(config.skills)
        self.config = config
        self.first_moe = decoder.layers - config.moe_layers
        self.sharing = decoder.heads // decoder.kv_heads  # queries of one key
        self.proprio = nn.Linear(proprio, width * config.proprio_tokens)
        self.query = nn.Parameter(torch.randn(1, 1, width))
        self.point = nn.Parameter(torch.randn(config.horizon, width))
        self.point_in = nn.Linear(2, width)
        self.time_mix = nn.Sequential(
            nn.Linear(2 * width, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.layers = nn.ModuleList(
            JointLayer(config, decoder, skills if layer >= self.first_moe else 0)
            for layer in range(decoder.layers)
        )
        self.norm = Norm(width, eps=1e-6)
        self.point_out = nn.Linear(width, 2)
        if config.moe_layers:
            self.router = nn.Linear(width, skills)  # used in float32 only

    def forward(
        self,
        noisy: Float[Tensor, 'B R H 2'],
        t: Float[Tensor, 'B R'],
        proprio: Float[Tensor, 'B P'],
        prompt: Sequence[tuple[Float[Tensor, 'B G T d'], Float[Tensor, 'B G T d']]],
        prompt_mask: Bool[Tensor, 'B T'] | None,
        forced: Int64[Tensor, 'B'] | None = None,
    ) -> Velocity:
        """Return the velocity of R noisy versions of each trajectory; `forced` skills where not -1.

        prompt_mask: which tokens of the prompt there are; None, as it must be in an export: all.
        """
        batch, draws, horizon, _ = noisy.shape
        x = torch.cat([self.read_state(proprio), self.read_points(noisy, t)], 1)
        if torch.compiler.is_exporting():
            if prompt_mask is not None:
                raise ValueError('an export has no padding; leave prompt_mask None')
            mask = self.bias(prompt[0][0].shape[2], draws)
        else:
            mask = self.mask(prompt[0][0], prompt_mask, draws)
        scores = x.new_zeros(batch, 1)  # nothing to choose from
        skill = scores[:, 0].long()
        chosen, weights = None, None
        for index, layer in enumerate(self.layers):
            if index == self.first_moe:
                if self.config.routing == 'token':
                    every = self.route(x)
                    chosen, weights = self.choose(every, forced)
                    scores = every[:, -draws * horizon :].mean(1)
                    skill = self.choose(scores, forced)[0][:, 0]
                else:
                    scores = self.route(x[:, self.config.proprio_tokens])
                    chosen, weights = self.choose(scores, forced)
                    skill = chosen[:, 0]
            x = layer(x, prompt[index], mask, chosen, weights)
        points = self.norm(x[:, -draws * horizon :])
        velocity = self.point_out(points).view(batch, draws, horizon, 2)
        return Velocity(velocity, scores, skill)

    def read_state(self, proprio: Float[Tensor, 'B P']) -> Float[Tensor, 'B S W']:
        """Return the tokens of the proprioception and the query."""
        state = self.proprio(proprio).unflatten(-1, (self.config.proprio_tokens, -1))
        return torch.cat([state, self.query.expand(len(state), -1, -1).to(state.dtype)], 1)

    def read_points(
        self, noisy: Float[Tensor, 'B R H 2'], t: Float[Tensor, 'B R']
    ) -> Float[Tensor, 'B R*H W']:
        """Return the tokens of the noisy points, which know their time and their place in the trajectory."""
        points = self.point_in(noisy) + self.point
        half = self.config.width // 2
        frequency = torch.logspace(0, 2.5, half, device=t.device)
        angle = t[..., None, None] * frequency
        time = torch.cat([angle.sin(), angle.cos()], -1).expand(*points.shape[:-1], -1)
        return self.time_mix(torch.cat([points, time.to(points.dtype)], -1)).flatten(1, 2)

    def mask(
        self, keys: Float[Tensor, 'B G P d'], prompt_mask: Bool[Tensor, 'B P'] | None, draws: int
    ) -> Bool[Tensor, 'B 1 S P+S']:
        """Return who sees whom of the prompt and of its own tokens."""
        own = self.own_mask(draws).to(keys.device)
        if prompt_mask is None:
            prompt_mask = keys.new_ones(len(keys), keys.shape[2], dtype=torch.bool)
        prompt = prompt_mask[:, None, None, :].expand(-1, 1, len(own), -1)
        return torch.cat([prompt, own.expand(len(keys), 1, *own.shape)], -1)

    def bias(self, tokens: int, draws: int) -> Float[Tensor, '1 1 S*H/G P+S']:
        """Return the same as `attend_in_products` adds it, with a prompt all of whose tokens are there."""
        own = hide(self.own_mask(draws)[None, None], self.sharing, torch.float32)
        return torch.cat([own.new_zeros(*own.shape[:3], tokens), own], -1)

    def own_mask(self, draws: int) -> Bool[Tensor, 'S S']:
        """Return who sees whom among the own tokens: blocks in order, and each draw only itself beside the state."""
        draw = [2 + index for index in range(draws) for _ in range(self.config.horizon)]
        block = torch.tensor([0] * self.config.proprio_tokens + [1] + draw)
        earlier = (block[None, :] < 2) & (block[None, :] <= block[:, None])
        return earlier | (block[None, :] == block[:, None])

    def route(self, query: Float[Tensor, 'B *T W']) -> Float[Tensor, 'B *T A']:
        """Return the score of each action skill, in float32."""
        with exact(query):
            return self.router(F.rms_norm(query.float(), query.shape[-1:], eps=1e-6))

    def choose(
        self, scores: Float[Tensor, 'B *T A'], forced: Int64[Tensor, 'B'] | None
    ) -> tuple[Int64[Tensor, 'B *T K'], Float[Tensor, 'B *T K'] | None]:
        """Return the experts and, for more than one, their weights (softmax over the chosen); a forced one is alone."""
        if self.config.top_k == 1:
            chosen, weights = scores.argmax(-1, keepdim=True), None
        else:
            best, chosen = scores.topk(self.config.top_k, dim=-1)
            weights = best.softmax(-1)
        if forced is None:
            return chosen, weights
        forced = forced.view(-1, *[1] * (scores.ndim - 1)).expand(*scores.shape[:-1], 1)
        wish = forced >= 0
        first = torch.where(wish, forced, chosen[..., :1])
        chosen = torch.cat([first, chosen[..., 1:]], -1)
        if weights is not None:
            alone = F.one_hot(torch.zeros_like(chosen[..., 0]), chosen.shape[-1])
            weights = torch.where(wish, alone.to(weights.dtype), weights)
        return chosen, weights

    def draw(
        self,
        action: Float[Tensor, 'B H 2'],
        moments: Float[Tensor, 'B R'] | None = None,
        noise: Float[Tensor, 'B R H 2'] | None = None,
    ) -> tuple[Float[Tensor, 'B R H 2'], Float[Tensor, 'B R'], Float[Tensor, 'B R H 2']]:
        """Return noisy actions, their times and the velocities to learn: times lean towards the noise, (1-s)(1-z).

        moments: uniform random numbers, one for each time; noise: normal ones; both drawn here where they are None.
        """
        sigma, draws = self.config.sigma, self.config.flow_samples
        if moments is None:
            moments = torch.rand(len(action), draws, device=action.device)
        if noise is None:
            noise = torch.randn(len(action), draws, *action.shape[1:], device=action.device)
        # z ~ Beta(b, 1), whose distribution function is z^b
        z = moments.pow(1 / self.config.time_beta)
        t = (1 - sigma) * (1 - z)
        action = action[:, None]
        there = t[..., None, None]
        noisy = (1 - (1 - sigma) * there) * noise + there * action
        return noisy, t, action - (1 - sigma) * noise
