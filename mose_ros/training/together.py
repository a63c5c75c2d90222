"""Accelerate as the stages use it: one process, or several that train one network, and what they tell one another.

Several are started by `accelerate launch` (config/accelerate) or by torchrun. A batch is cut into parts, one for each process and
each accumulation; a step is the same step whatever the cut, because each part counts by how much of the batch it knows.
"""

import logging
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    ProjectConfiguration,
    patch_environment,
)

from mose_ros.modeling.batch import Batch, LossWeights

_LOG = logging.getLogger(__name__)
DEEPSPEED, FSDP = 'ACCELERATE_USE_DEEPSPEED', 'ACCELERATE_USE_FSDP'  # set by the launcher
TINY = 1e-30


def join(folder: Path, *, device: str, bfloat16: bool, accumulate: int) -> Accelerator:
    """Meet the processes that the launcher started, or be alone; logs for TensorBoard go into the folder.

    device: as cpu, cuda or, of a process that is alone, cuda:1. ValueError where it is not there, and where the launcher asks for
    DeepSpeed.
    """
    if os.environ.get(DEEPSPEED, '').lower() == 'true':
        raise ValueError(
            'DeepSpeed is not supported by the stages (docs/method.md says why); for weights in pieces launch with '
            '--config_file config/accelerate/fsdp.yaml'
        )
    asked = _device(device)
    # each stage has its own precision; Accelerate remembers that of the last one, for good
    AcceleratorState._reset_state(reset_partial_state=True)
    waits = 'MASTER_PORT' in os.environ and 'RANK' not in os.environ
    if waits and os.environ.get('ACCELERATE_MIXED_PRECISION'):
        _LOG.warning(
            'this is one process: `accelerate launch --num_processes N` starts several only where there are GPUs; '
            'on a CPU add --config_file config/accelerate/cpu.yaml'
        )
    # Accelerate has no setting yet for what replaces it
    warnings.filterwarnings('ignore', '.broadcast_buffers', FutureWarning)
    # experts that no sample of the batch chose have no gradient, here or anywhere
    reduction = DistributedDataParallelKwargs(
        find_unused_parameters=True,
        gradient_as_bucket_view=True,
        broadcast_buffers=False,
    )
    with patch_environment(**{FSDP: 'false'}):  # `sharding.py` does what the launcher asks for
        accelerator = Accelerator(
            cpu=asked.type == 'cpu',
            mixed_precision='bf16' if bfloat16 else 'no',
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=accumulate, sync_with_dataloader=False
            ),
            kwargs_handlers=[reduction],
            log_with='tensorboard',
            project_config=ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder)),
        )
    if accelerator.device.type != asked.type:
        raise ValueError(
            f'--device {device}: this machine has {accelerator.device.type} only, or torch cannot use more'
        )
    return accelerator


def _device(name: str) -> torch.device:
    """Return a device, and make it the one that `cuda` alone means where it has a number; ValueError where it can't be had."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f'--device {name!r}: expected cpu, cuda or cuda:N') from None
    if device.type != 'cuda' or device.index is None:
        return device
    if int(os.environ.get('WORLD_SIZE', '1')) > 1:
        raise ValueError(
            f'--device {name}: of several processes each takes a GPU of its own; say --device cuda'
        )
    if device.index >= (count := torch.cuda.device_count()):
        raise ValueError(f'--device {name}: torch sees {count} GPUs, counted from 0')
    torch.cuda.set_device(device)
    return device


def deal(batches: Iterable[Sequence], parts: int, rank: int = 0, size: int = 1) -> Iterator[list]:
    """Yield the parts of each batch that are for process `rank` of `size`; ValueError when one would be empty."""
    for batch in batches:
        if len(batch) < parts:
            raise ValueError(
                f'a batch of {len(batch)} does not divide among {parts} parts '
                '(processes and accumulations); raise batch_size'
            )
        for part in range(rank, parts, size):
            yield list(batch[part::parts])


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """What all processes know of a step before it begins."""

    shares: Sequence[
        Mapping[str, float]
    ]  # of each part of this process: how much each loss counts
    seconds: float  # the leader's clock
    leaving: bool  # whether a process was told to stop


def agree(
    accelerator: Accelerator, parts: Sequence[Batch], seconds: float = 0.0, leaving: bool = False
) -> Agreement:
    """Tell the others what these parts know, and learn what all know.

    A loss is a mean over what is known in its part; weighed by the shares, the mean over all parts is that over the batch.
    """
    counts = [_known(part) for part in parts]
    totals = {name: sum(one[name] for one in counts) for name in counts[0]}
    if accelerator.num_processes > 1:
        clock = seconds if accelerator.is_main_process else 0.0
        told = torch.tensor([clock, float(leaving), *totals.values()], device=accelerator.device)
        seconds, leavers, *sums = accelerator.reduce(told, 'sum').tolist()
        totals, leaving = dict(zip(totals, sums, strict=True)), leavers > 0
    number = len(parts) * accelerator.num_processes

    def share(name: str, count: float) -> float:
        # of what a part doesn't know it learns nothing, but a weight of 0 would leave out blocks that others gather
        return max(number * count / totals[name], TINY) if totals[name] else 0.0

    shares = [{name: share(name, count) for name, count in one.items()} for one in counts]
    return Agreement(shares=shares, seconds=seconds, leaving=leaving)


def anyone(accelerator: Accelerator, here: bool) -> bool:
    """Return whether it is so in any process; all of them ask."""
    told = torch.tensor(float(here), device=accelerator.device)
    return accelerator.reduce(told, 'sum').item() > 0


def weigh(losses: LossWeights, share: Mapping[str, float]) -> LossWeights:
    """Return the loss weights of a part."""
    return replace(losses, **{name: getattr(losses, name) * one for name, one in share.items()})


def _known(batch: Batch) -> dict[str, float]:
    """Return over how many things each loss is a mean; of a loss that is not named, all parts count alike."""
    counts = {
        'text': (batch.labels[:, 1:] >= 0).sum(),
        'routers': (batch.skills >= 0).sum(),
        'flow': torch.tensor(len(batch)),
        'action_router': (batch.action_skill >= 0).sum(),
        'view_router': (batch.camera >= 0).sum(),
    }
    if batch.semantics is not None:
        counts['semantics'] = batch.semantics.sum(-1).clamp(max=1).sum()
    return {name: float(count) for name, count in counts.items()}
