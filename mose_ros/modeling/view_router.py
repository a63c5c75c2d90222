"""The view router: a small CNN glances at every camera and scores which is worth a full look (DriveMoE 1.2)."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import nn

from mose_ros.modeling.config import GlanceConfig
from mose_ros.modeling.layers import exact

Tensor = torch.Tensor


def draw_view(scores: Float[Tensor, 'B K'], noise: Float[Tensor, 'B K']) -> Float[Tensor, 'B K']:
    """Return 1 at the view that each row draws by its scores (Gumbel), else 0; the gradient is the softmax's (DriveMoE 1.2).

    noise: uniform random numbers.
    """
    gumbel = -(-noise.clamp(1e-6, 1 - 1e-6).log()).log()
    soft = (scores.float() + gumbel).softmax(-1)
    hard = F.one_hot(soft.argmax(-1), soft.shape[-1]).to(soft.dtype)
    return hard + soft - soft.detach()


class ViewRouter(nn.Module):
    """One CNN for all cameras; a camera's score comes from its own glance, what all show together, and the goal."""

    def __init__(self, config: GlanceConfig, cameras: int, proprio: int):
        super().__init__()
        channels = [3, *config.channels]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(low, high, 3, stride=2, padding=1)
            for low, high in zip(channels, channels[1:], strict=False)
        )
        shrink = 2 ** len(config.channels)
        cells = -(-config.height // shrink) * -(-config.width // shrink)
        self.glance = config.glance
        self.squeeze = nn.Linear(channels[-1] * cells, config.hidden)
        self.camera = nn.Parameter(0.1 * torch.randn(cameras, config.hidden))
        self.goal = nn.Linear(proprio, config.hidden)
        self.head = nn.Sequential(
            nn.Linear(3 * config.hidden, config.hidden), nn.GELU(), nn.Linear(config.hidden, 1)
        )

    def forward(
        self,
        thumbnails: Float[Tensor, 'B C 3 h w'],
        present: Float[Tensor, 'B C'],
        proprio: Float[Tensor, 'B P'],
    ) -> Float[Tensor, 'B C']:
        """Return the score (logit) of every camera, in float32; what an absent one would show counts for nothing."""
        with exact(thumbnails):  # a router; and a CPU's convolutions are slow in bfloat16
            return self._score(thumbnails.float(), present, proprio.float())

    def _score(self, thumbnails, present, proprio):
        batch, cameras = present.shape
        if self.glance == 'front':
            present = present * (torch.arange(cameras, device=present.device) == 0)
        x = thumbnails.flatten(0, 1)
        for convolution in self.convolutions:
            x = F.relu(convolution(x))
        seen = self.squeeze(x.flatten(1)).view(batch, cameras, -1)
        own = F.gelu(seen + self.camera) * present[..., None]
        together = own.sum(1, keepdim=True) / present.sum(1)[:, None, None].clamp(min=1)
        together = together + F.gelu(self.goal(proprio))[:, None]
        parts = [own, together.expand_as(own), self.camera.expand_as(own)]
        return self.head(torch.cat(parts, -1))[..., 0]
