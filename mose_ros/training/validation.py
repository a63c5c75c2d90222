"""How good a network is: its losses on clips that it has not learned from, and its trajectories in metres."""

import math
from collections.abc import Callable, Iterable

import numpy as np
import torch

from mose_ros.core.action import flow
from mose_ros.modeling.batch import Batch, LossWeights
from mose_ros.modeling.driver import MoseDriver
from mose_ros.modeling.mose import Decoded
from mose_ros.training.config import FLOW_STEPS
from mose_ros.training.samples import Samples

Judged = tuple[dict[str, torch.Tensor], torch.Tensor | None]


def judge(driver: MoseDriver, batch: Batch, losses: LossWeights) -> Judged:
    """Return losses and accuracies without any teacher, and the trajectories (B, H, 2) drawn where the stage learns them."""
    output = MoseDriver.forward(driver, batch, losses, 0.0)  # without Accelerate's autocast
    values = {'loss': output.loss, **output.parts, **output.metrics}
    return values, draw_actions(driver, batch) if losses.flow else None


def evaluate(
    judged: Callable[[Batch], Judged], samples: Samples, batches: Iterable[Batch]
) -> dict[str, float]:
    """Return the means of what is judged over batches, and the error of the trajectories in metres."""
    torch.manual_seed(0)
    totals: dict[str, list[float]] = {}

    def add(name: str, value: float, weight: int) -> None:
        if math.isfinite(value):
            total = totals.setdefault(name, [0.0, 0.0])
            total[0] += weight * value
            total[1] += weight

    for batch in batches:
        values, actions = judged(batch)
        for name, value in values.items():
            add(name, value.item(), len(batch))
        if actions is not None:
            error = samples.metres(actions) - samples.metres(batch.action)
            distance = np.hypot(error[..., 0], error[..., 1])
            add('ade_m', float(distance.mean()), len(batch))
            add('fde_m', float(distance[:, -1].mean()), len(batch))
    return {name: round(total / weight, 5) for name, (total, weight) in totals.items()}


def draw_actions(driver: MoseDriver, batch: Batch, num_steps: int = FLOW_STEPS) -> torch.Tensor:
    """Return the normalised trajectories (B, H, 2) that the network draws, from no noise, with its own skills."""
    _, cache, mask = read_prompt(driver, batch)

    def velocity(x, t):
        time = torch.full((len(batch), 1), float(t), device=mask.device)
        return driver.action_expert(x[:, None], time, batch.proprio, cache, mask).velocity[:, 0]

    return flow(velocity, torch.zeros_like(batch.action), num_steps)


def read_prompt(
    driver: MoseDriver, batch: Batch
) -> tuple[Decoded, list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
    """Read the prompts of a batch with the network's own skills; return that, and what the action expert sees of it."""
    _, embeds = driver.vlm.see(batch.patches.flatten(0, 1))
    end = int(batch.prompt_lengths.max())
    mask = torch.arange(end, device=embeds.device) < batch.prompt_lengths[:, None]
    embeds = embeds.unflatten(0, batch.patches.shape[:2])
    read = driver.vlm.read(
        batch.input_ids[:, :end], embeds, batch.position_ids[..., :end], mask.float()
    )
    return read, list(zip(read.keys, read.values, strict=True)), mask
