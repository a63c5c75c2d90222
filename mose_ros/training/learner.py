"""What moves in a stage: the network's weights with their optimizer, and the average of them that is exported.

It knows how processes hold them and how a checkpoint keeps them; not what they learn.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from mose_ros.modeling.driver import MoseDriver
from mose_ros.training.presets import Stage

AVERAGE = 'average.safetensors'


class Learner:
    """The network of a stage under way; `model` is what a training step calls."""

    def __init__(self, driver: MoseDriver, stage: Stage, accelerator: Accelerator):
        self.driver, self._stage, self._accelerator = driver, stage, accelerator
        driver.train_only(stage.trainable)
        driver.to(accelerator.device)
        self.moving = {n: p for n, p in driver.named_parameters() if p.requires_grad}
        decays = [p for p in self.moving.values() if p.ndim >= 2]
        plain = [p for p in self.moving.values() if p.ndim < 2]
        optimizer = torch.optim.AdamW(
            [{'params': decays}, {'params': plain, 'weight_decay': 0.0}],
            lr=stage.learning_rate,
            betas=(0.9, stage.beta2),
            weight_decay=stage.weight_decay,
            fused=True,
        )
        self.model, self.optimizer = accelerator.prepare(driver, optimizer)
        # a checkpoint is the same from however many processes
        accelerator.register_save_state_pre_hook(self._save_plain)
        accelerator.register_load_state_pre_hook(self._load_plain)
        self.average = {n: p.detach().clone() for n, p in self.moving.items()}

    def _save_plain(self, models: list, weights: list, folder: str) -> None:
        weights[:] = [{n: p.detach() for n, p in self.driver.named_parameters()}]

    def _load_plain(self, models: list, folder: str) -> None:
        models[:] = [self.driver]

    def move(self, rate: float, step: int) -> float:
        """Take a step along the gradients and return their norm; where that is not finite nothing moves."""
        moving = list(self.moving.values())
        norm = self._accelerator.clip_grad_norm_(moving, self._stage.clip)
        if not torch.isfinite(norm):
            return norm.item()
        for group in self.optimizer.param_groups:
            group['lr'] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        decay = min(self._stage.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.values()), moving, 1 - decay)
        return norm.item()

    @contextlib.contextmanager
    def averaged(self) -> Iterator[MoseDriver]:
        """Lend the network with the averaged weights, those that are exported."""
        own = {n: p.data for n, p in self.moving.items()}
        for n, p in self.moving.items():
            p.data = self.average[n]
        self.driver.eval()
        try:
            yield self.driver
        finally:
            for n, p in self.moving.items():
                p.data = own[n]

    def save(self, folder: Path) -> None:
        """Write all of it into a folder that is there."""
        self._accelerator.save_state(str(folder))
        if self._accelerator.is_main_process:
            save_file(self.average, folder / AVERAGE)

    def load(self, folder: Path) -> None:
        """Undo `save`."""
        self._accelerator.load_state(str(folder))
        average = load_file(folder / AVERAGE)
        with torch.no_grad():
            for n, value in self.average.items():
                value.copy_(average[n])
