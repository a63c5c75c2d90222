"""Losses that torch does not bring. All are means over what is known; without anything known they are 0."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64

Tensor = torch.Tensor


def focal(
    logits: Float[Tensor, 'B K'],
    target: Int64[Tensor, 'B'],
    gamma: float = 2.0,
    counts: Sequence[int] = (),
) -> Float[Tensor, '']:
    """Return the focal loss with inverse-frequency alpha (DriveMoE 1.2, 1.3); target -1 = unknown.

    alpha of a class is total / (classes * count), which has a mean of 1 over the data; without counts it is 1.
    """
    logs = logits.float().log_softmax(-1)
    known = target >= 0
    log = logs.gather(1, target.clamp(min=0)[:, None])[:, 0]
    weight = known * (1 - log.exp()).pow(gamma)
    if len(counts):
        count = torch.tensor(counts, dtype=torch.float32, device=logits.device).clamp(min=1)
        if count.shape != logits.shape[1:]:
            raise ValueError(f'{len(counts)} counts for {logits.shape[1]} classes')
        alpha = count.sum() / (len(count) * count)
        weight = weight * alpha[target.clamp(min=0)]
    return -(weight * log).sum() / known.sum().clamp(min=1)


def load_balance(
    gates: Float[Tensor, 'B T E'], attention_mask: Int64[Tensor, 'B T']
) -> Float[Tensor, '']:
    """Return E * sum_i f_i P_i of a token mixture (Switch Transformer, 2101.03961, eq. 4 to 6).

    f: the share of tokens that choose expert i; P: its mean probability. 1 when all experts get alike, E when one gets all.
    """
    kept = gates.float()[attention_mask.bool()]
    share = F.one_hot(kept.argmax(-1), kept.shape[-1]).float().mean(0)
    return kept.shape[-1] * (share * kept.mean(0)).sum()


def soft_cross_entropy(
    logits: Float[Tensor, '*B K'], shares: Float[Tensor, '*B K']
) -> Float[Tensor, '']:
    """Return the cross-entropy against shares of classes; a row of zeros is unknown."""
    known = shares.sum(-1).clamp(max=1).sum().clamp(min=1)
    return -(shares * logits.float().log_softmax(-1)).sum() / known


def accuracy(scores: Float[Tensor, 'B K'], target: Int64[Tensor, 'B']) -> Float[Tensor, '']:
    """Return the share of known targets (not -1) with the highest score; nan when none is known."""
    known = target >= 0
    return ((scores.argmax(-1) == target) & known).sum() / known.sum()
