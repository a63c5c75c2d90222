"""How good a network is: its losses on clips that it has not learned from, and its trajectories in metres."""

import math
from collections.abc import Iterable

import numpy as np
import torch

from mose_ros.core.action import flow
from mose_ros.modeling.batch import Batch, LossWeights
from mose_ros.modeling.driver import MoseDriver
from mose_ros.modeling.mose import Decoded
from mose_ros.training.samples import Samples

FLOW_STEPS = 5  # of Euler, where a trajectory is drawn to be judged


def evaluate(
    driver: MoseDriver, samples: Samples, batches: Iterable[Batch], losses: LossWeights, device
) -> dict[str, float]:
    """Return the losses without any teacher, and the error of sampled trajectories, over batches."""
    torch.manual_seed(0)
    totals: dict[str, list[float]] = {}

    def add(name: str, value: float, weight: int) -> None:
        if math.isfinite(value):
            total = totals.setdefault(name, [0.0, 0.0])
            total[0] += weight * value
            total[1] += weight

    for batch in batches:
        batch = batch.to(device)
        output = MoseDriver.forward(driver, batch, losses, 0.0)  # without Accelerate's autocast
        for name, value in {'loss': output.loss, **output.parts, **output.metrics}.items():
            add(name, value.item(), len(batch))
        if losses.flow:
            error = samples.metres(draw_actions(driver, batch)) - samples.metres(batch.action)
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
