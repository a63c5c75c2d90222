"""What moves in a stage: the network's weights with their optimizer, and the average of them that is exported.

It knows how processes hold them and how a checkpoint keeps them; not what they learn. Here every process holds all of them;
`sharding.py` is the same with a piece in each. A checkpoint does not say which of the two wrote it.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from mose_ros.modeling.batch import Batch, LossWeights
from mose_ros.modeling.driver import MoseDriver, Output
from mose_ros.training import validation
from mose_ros.training.presets import Stage

WEIGHTS, OPTIMIZER, AVERAGE = 'model.safetensors', 'optimizer.bin', 'average.safetensors'
Pieces = dict[str, torch.Tensor]  # by the names of parameters: what of them lies in this process


class Learner:
    """The network of a stage under way, whole in every process."""

    judges_together = False  # whether a validation needs all processes at once

    def __init__(self, driver: MoseDriver, stage: Stage, accelerator: Accelerator):
        self.driver, self._stage, self._accelerator = driver, stage, accelerator
        driver.train_only(stage.trainable)
        if stage.gradient_checkpointing:  # of ViT and decoder; the action expert is narrow
            driver.vlm.activation_checkpointing_enable({'use_reentrant': False})
        self.model = self._spread()
        self._layout = dict(driver.named_parameters())
        self._moving = {n: p for n, p in self._layout.items() if p.requires_grad}
        self._pieces = {n: self._piece(p) for n, p in self._moving.items()}
        groups = [[n for n, p in self._moving.items() if (p.ndim < 2) == flat] for flat in (0, 1)]
        self._order = [*groups[0], *groups[1]]  # of the optimizer
        decays, plain = ([self._pieces[n] for n in names] for names in groups)
        self.optimizer = torch.optim.AdamW(
            [{'params': decays}, {'params': plain, 'weight_decay': 0.0}],
            lr=stage.learning_rate,
            betas=(0.9, stage.beta2),
            weight_decay=stage.weight_decay,
            fused=True,
        )
        self._average = {n: p.detach().clone() for n, p in self._pieces.items()}

    def learn(self, batch: Batch, losses: LossWeights, teacher_forcing: float) -> Output:
        """Add the gradients of a batch, one of `Stage.accumulate`."""
        with self._accelerator.accumulate(self.model):
            output = self.model(batch, losses, teacher_forcing)
            self._accelerator.backward(output.loss)
        return output

    def move(self, rate: float, step: int) -> float:
        """Take a step along the gradients and return their norm; where that is not finite nothing moves."""
        norm = self._norm(self._gradients())
        if not torch.isfinite(norm):
            return norm.item()
        torch.nn.utils.clip_grads_with_norm_(self._pieces.values(), self._stage.clip, norm)
        for group in self.optimizer.param_groups:
            group['lr'] = rate
        self.optimizer.step()
        self._forget_gradients()
        decay = min(self._stage.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_([*self._average.values()], [*self._pieces.values()], 1 - decay)
        return norm.item()

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Give the network the averaged weights, those that are exported, for a while."""
        self._exchange()
        self.driver.eval()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for n, piece in self._pieces.items():
            own = piece.clone()
            piece.copy_(self._average[n])
            self._average[n].copy_(own)

    def judge(self, batch: Batch, losses: LossWeights) -> validation.Judged:
        """Return what the network makes of a batch by itself, in full precision."""
        return validation.judge(self.driver, batch, losses)

    def save(self, folder: Path) -> None:
        """Write all of it into a folder that is there; the leader does, and all processes call it."""
        weights = self._whole({n: self._piece(p) for n, p in self._layout.items()})
        average, state = self._whole(self._average), self.optimizer.state_dict()
        for number, name in enumerate(self._order):
            known = state['state'].get(number, {})  # empty where it never had a gradient
            flat = {key: value for key, value in known.items() if not value.ndim}
            moments = {key: value for key, value in known.items() if value.ndim}
            whole = {key: self._whole({name: value}) for key, value in moments.items()}
            if known:
                state['state'][number] = flat | {key: one.get(name) for key, one in whole.items()}
        if self._accelerator.is_main_process:
            save_file(weights, folder / WEIGHTS)
            save_file(average, folder / AVERAGE)
            torch.save(state, folder / OPTIMIZER)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Undo `save`."""
        everything = {n: self._piece(p) for n, p in self._layout.items()}
        for path, pieces in {WEIGHTS: everything, AVERAGE: self._average}.items():
            with safe_open(folder / path, 'pt') as file:
                for n, piece in pieces.items():
                    piece.copy_(file.get_slice(n)[self._span(n)])
        state = torch.load(folder / OPTIMIZER, 'cpu', weights_only=True, mmap=True)
        for number, known in state['state'].items():
            span = self._span(self._order[number])
            state['state'][number] = {
                key: value[span].clone() if value.ndim else value for key, value in known.items()
            }
        self.optimizer.load_state_dict(state)

    def write(self, folder: Path) -> None:
        """Write the model with the averaged weights."""
        if self._accelerator.is_main_process:
            with self.averaged():
                self.driver.save(folder)

    # How the weights are spread over the processes.

    def _spread(self) -> nn.Module:
        """Bring the network to the device and return what a training step calls."""
        self.driver.to(self._accelerator.device)
        return self._accelerator.prepare(self.driver)

    def _piece(self, parameter: torch.Tensor) -> torch.Tensor:
        """Return what of a parameter lies in this process, to be changed in place."""
        return parameter

    def _span(self, name: str) -> slice:
        """Return which rows of a parameter that is."""
        return slice(0, len(self._layout[name]))

    def _whole(self, pieces: Mapping[str, torch.Tensor]) -> Pieces:
        """Return the whole tensors on the leader, nothing on the others."""
        return {n: piece.detach() for n, piece in pieces.items()}

    def _gradients(self) -> Iterable[torch.Tensor]:
        """Return the gradients of the pieces, as they lie in `grad`; a parameter that no process used has none."""
        return [piece.grad for piece in self._pieces.values() if piece.grad is not None]

    def _norm(self, gradients: Iterable[torch.Tensor]) -> torch.Tensor:
        return torch.nn.utils.get_total_norm(gradients)

    def _forget_gradients(self) -> None:
        self.optimizer.zero_grad()
