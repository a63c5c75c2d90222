"""Several processes that train one network: each reads its share of every batch, and all take the mean of their gradients.

Started by `torchrun --nproc-per-node N -m mose_ros.training ...`, which says by environment variables who is who.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as distributed


@dataclass(frozen=True)
class Team:
    """The processes of a run; alone, it does nothing."""

    rank: int = 0
    size: int = 1

    @classmethod
    def join(cls) -> 'Team':
        """Meet the others that the launcher started; a team of one where there is no launcher."""
        size = int(os.environ.get('WORLD_SIZE', '1'))
        if size == 1:
            return cls()
        if not distributed.is_initialized():
            distributed.init_process_group('nccl' if torch.cuda.is_available() else 'gloo')
        return cls(rank=distributed.get_rank(), size=size)

    @property
    def leads(self) -> bool:
        """Return whether this process writes, logs and validates."""
        return self.rank == 0

    def share(self, keys: Sequence) -> list:
        """Return this process's part of a batch; ValueError when the batch does not divide evenly."""
        if len(keys) % self.size:
            raise ValueError(f'a batch of {len(keys)} does not divide among {self.size} processes')
        return list(keys[self.rank :: self.size])

    def mean_gradients(self, parameters: Sequence[torch.nn.Parameter], seconds: float) -> float:
        """Replace every gradient by the mean over the processes; return the leader's clock for all.

        A parameter that no process used keeps no gradient; one that only some used counts as 0 at the others.
        """
        if self.size == 1:
            return seconds
        device = parameters[0].device
        used = torch.tensor([p.grad is not None for p in parameters], device=device).float()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        clock = torch.tensor([seconds if self.leads else 0.0], device=device)
        flat = torch.cat([clock, used, *(grad.flatten() for grad in grads)])
        distributed.all_reduce(flat)
        clock, used, flat = flat.split([1, len(used), len(flat) - 1 - len(used)])
        parts = flat.div_(self.size).split([p.numel() for p in parameters])
        for parameter, part, users in zip(parameters, parts, used.tolist(), strict=True):
            parameter.grad = part.view_as(parameter) if users else None
        return float(clock)

    def wait(self) -> None:
        """Let all come to the same point."""
        if self.size > 1:
            distributed.barrier()
