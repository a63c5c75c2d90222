"""What one training step takes: a batch of moments as tensors, and how much each of its losses counts."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Float, Int64


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What B moments would be with each of K candidate views as their last: for a network that chooses that view itself.

    Fields as in Batch, with K behind B. All texts of a moment end in the same answer.

    places: of the candidates among the cameras. noise: uniform random numbers that the choice is drawn by.
    """

    patches: Float[torch.Tensor, 'B K N D']
    input_ids: Int64[torch.Tensor, 'B K T']
    attention_mask: Int64[torch.Tensor, 'B K T']
    labels: Int64[torch.Tensor, 'B K T']
    position_ids: Int64[torch.Tensor, '3 B K T']
    prompt_lengths: Int64[torch.Tensor, 'B K']
    places: Int64[torch.Tensor, 'K']
    noise: Float[torch.Tensor, 'B K']

    def to(self, *args, **kwargs) -> 'Choices':
        """Return the choices on another device; takes what `torch.Tensor.to` takes."""
        return _moved(self, *args, **kwargs)

    def text(self, chosen: Int64[torch.Tensor, 'B']) -> dict[str, torch.Tensor]:
        """Return the fields of Batch that depend on the view, for the chosen candidates."""
        rows = torch.arange(len(chosen), device=chosen.device)
        names = ('input_ids', 'attention_mask', 'labels', 'prompt_lengths')
        found = {name: getattr(self, name)[rows, chosen] for name in names}
        return found | {'position_ids': self.position_ids[:, rows, chosen]}


@dataclass(frozen=True, kw_only=True)
class Batch:
    """B moments. V views of F frames, N patches a view (n = N / merge^2 tokens), T tokens, S skill levels, C cameras.

    A text is the prompt, then the answer, then padding on the right. Everything float is float32.

    patches: `vision.patchify` of each view; D = 3 * F * patch^2. The views stand in the prompt in this order.
    input_ids: image tokens as `Tokenizer.encode_prompt` writes them, V * n in each row; padding may be any token.
    attention_mask: 1 where there is a token, 0 on padding.
    labels: the token itself on the answer (its end token included), -100 on prompt and padding; NOT shifted.
    position_ids: `prompt.rope_positions` for the prompt, counting on from its largest value on all axes behind it.
    prompt_lengths: how many tokens of the row are the prompt; the routers and the action expert see only these.
    proprio: `action.proprio` through the normaliser; action: the trajectory through its normaliser.
    skills: index of the expert on each level, -1 where unknown; action_skill likewise.
    thumbnails, present: `vision.glance`; camera: index of the candidate camera that is worth a look, -1 unknown.
    semantics: share of each class in each patch (rows sum to 1; a row of zeros is ignored), in the order of patches.
    coin, moments, noise: the random numbers of a training step, so that a sample learns the same in whichever batch or
    process it stands: whether it is taught its skills (uniform), R times (uniform) and R noises (normal) of the flow;
    drawn in the step where they are None.
    choices: where the view router is to choose the last view (DriveMoE's second stage); None: it is as it is.
    """

    patches: Float[torch.Tensor, 'B V N D']
    input_ids: Int64[torch.Tensor, 'B T']
    attention_mask: Int64[torch.Tensor, 'B T']
    labels: Int64[torch.Tensor, 'B T']
    position_ids: Int64[torch.Tensor, '3 B T']
    prompt_lengths: Int64[torch.Tensor, 'B']
    proprio: Float[torch.Tensor, 'B P']
    action: Float[torch.Tensor, 'B H 2']
    skills: Int64[torch.Tensor, 'B S']
    action_skill: Int64[torch.Tensor, 'B']
    thumbnails: Float[torch.Tensor, 'B C 3 h w']
    present: Float[torch.Tensor, 'B C']
    camera: Int64[torch.Tensor, 'B']
    semantics: Float[torch.Tensor, 'B V N classes'] | None = None
    coin: Float[torch.Tensor, 'B'] | None = None
    moments: Float[torch.Tensor, 'B R'] | None = None
    noise: Float[torch.Tensor, 'B R H 2'] | None = None
    choices: Choices | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    def to(self, *args, **kwargs) -> 'Batch':
        """Return the batch on another device; takes what `torch.Tensor.to` takes."""
        return _moved(self, *args, **kwargs)


def _moved(tensors, *args, **kwargs):
    values = {one.name: getattr(tensors, one.name) for one in fields(tensors)}
    moved = {
        name: value.to(*args, **kwargs) for name, value in values.items() if value is not None
    }
    return replace(tensors, **moved)


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """How much each loss counts; 0 leaves its part of the network out of the step altogether.

    The counts are how often each class stands in the training data: alpha of the focal losses is their inverse, scaled
    to a mean of 1 over the data. Empty: all classes count alike.
    """

    text: float = 1.0  # cross-entropy of the answer's tokens
    routers: float = 0.5  # cross-entropy of the skill routers, mean over levels
    flow: float = 1.0  # squared error of the action expert's velocity
    action_router: float = 0.1  # focal loss of the action router
    view_router: float = 1.0  # focal loss of the view router
    semantics: float = 0.0  # cross-entropy of the patches' classes
    balance: float = (
        0.01  # of token mixtures: how unevenly tokens are spread over experts, mean over layers
    )
    gamma: float = 2.0  # of both focal losses
    camera_counts: Sequence[int] = ()
    action_skill_counts: Sequence[int] = ()
