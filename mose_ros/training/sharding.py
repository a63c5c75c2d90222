"""Weights in pieces: each process holds a share of every weight, of its average and of its optimizer (PyTorch's FSDP2).

`accelerate launch --config_file config/accelerate/fsdp.yaml` asks for it. The pieces of a block come together when it is
called and are dropped behind it, so that a process needs room for its share, for one block and for what lies between blocks
(embeddings, heads, routers). The sharding is PyTorch's own, not Accelerate's, which knows it on accelerators alone.
"""

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from mose_ros.modeling.batch import Batch, LossWeights
from mose_ros.modeling.driver import MoseDriver, Output
from mose_ros.modeling.mixture import TokenMixture
from mose_ros.modeling.mose import MoseQwen2VL
from mose_ros.training import validation
from mose_ros.training.learner import Learner, Pieces
from mose_ros.training.presets import Stage
from mose_ros.training.together import FSDP

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """What the launcher asks for."""

    blocks: Sequence[str]  # classes whose weights come together at once
    reshard: bool = (
        True  # drop a block's weights behind its forward, and gather them again for its backward
    )

    @classmethod
    def asked(cls) -> 'Sharding | None':
        """Return what the launcher asks for, if it does; ValueError when that is something else than FSDP2 as it is here."""
        if os.environ.get(FSDP, '').lower() != 'true':
            return None
        plugin = FullyShardedDataParallelPlugin()
        wrong = {
            f'fsdp_version {plugin.fsdp_version}; it is 2': plugin.fsdp_version != 2,
            'fsdp_offload_params; use more processes': os.environ.get('FSDP_OFFLOAD_PARAMS')
            == 'true',
            'fsdp_activation_checkpointing; use --set STAGE.gradient_checkpointing=true': (
                plugin.activation_checkpointing
            ),
            'an fsdp_auto_wrap_policy without fsdp_transformer_layer_cls_to_wrap': (
                not plugin.transformer_cls_names_to_wrap
            ),
        }
        for what, found in wrong.items():
            if found:
                raise ValueError(f'the stages do not support {what} (config/accelerate/fsdp.yaml)')
        blocks = tuple(name.strip() for name in plugin.transformer_cls_names_to_wrap)
        return cls(blocks=blocks, reshard=plugin.reshard_after_forward)


def learner(driver: MoseDriver, stage: Stage, accelerator: Accelerator) -> Learner:
    """Return a learner as the launcher asks for it."""
    sharding = Sharding.asked()
    if sharding is None:
        return Learner(driver, stage, accelerator)
    if accelerator.num_processes == 1:
        _LOG.warning('this is one process, so its weights stay whole; launch several for FSDP')
        return Learner(driver, stage, accelerator)
    return ShardedLearner(driver, stage, accelerator, sharding)


class _Root(nn.Module):
    """Where the weights between the blocks come together: around any function of the network."""

    def __init__(self, driver: MoseDriver):
        super().__init__()
        self.driver = driver

    def forward(self, function: Callable, *arguments):
        return function(self.driver, *arguments)


class ShardedLearner(Learner):
    """A learner of which each process holds a piece."""

    judges_together = True

    def __init__(
        self, driver: MoseDriver, stage: Stage, accelerator: Accelerator, sharding: Sharding
    ):
        self._sharding = sharding
        self._used: set[str] = set()  # parameters with a gradient in this process
        super().__init__(driver, stage, accelerator)

    def _spread(self) -> nn.Module:
        accelerator, driver, sharding = self._accelerator, self.driver, self._sharding
        mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        known = {type(module).__name__ for module in driver.modules()}
        if strangers := set(sharding.blocks) - known:
            raise ValueError(
                f'fsdp_transformer_layer_cls_to_wrap names {sorted(strangers)}, not in the network'
            )
        exact = MixedPrecisionPolicy(cast_forward_inputs=False)
        mixed = exact
        if self._stage.bfloat16:  # gathered in what autocast computes in; the pieces stay float32
            mixed = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
            )
        for module in driver.modules():
            if isinstance(module, TokenMixture):
                fully_shard(module.router, mesh=mesh, mp_policy=exact)
        for module in list(driver.modules()):
            if type(module).__name__ in sharding.blocks:
                fully_shard(
                    module, mesh=mesh, mp_policy=mixed, reshard_after_forward=sharding.reshard
                )
        root = fully_shard(_Root(driver), mesh=mesh, mp_policy=exact)
        # a sample uses one expert of a mixture, so processes differ in which gradients there are
        root.set_reduce_scatter_unused_params(True)
        for name, module in root.named_modules():
            if isinstance(module, FSDPModule):
                module.register_forward_pre_hook(self._watch(name))
        return root

    def _watch(self, prefix: str) -> Callable:
        """Return a hook that notes which weights of a block get gradients, from its first forward on."""
        watched = set()

        def watch(module: nn.Module, _) -> None:
            for name, p in module.named_parameters(prefix):
                if p.requires_grad and not isinstance(p, DTensor) and p not in watched:
                    watched.add(p)
                    name = name.removeprefix('driver.')
                    p.register_post_accumulate_grad_hook(lambda _, n=name: self._used.add(n))

        return watch

    @property
    def _groups(self) -> list[FSDPModule]:
        return [module for module in self.model.modules() if isinstance(module, FSDPModule)]

    def learn(self, batch: Batch, losses: LossWeights, teacher_forcing: float) -> Output:
        with self._accelerator.autocast():
            loss, parts, metrics = self.model(_losses, batch, losses, teacher_forcing)
        (loss / self._stage.accumulate).backward()
        return Output(loss=loss, parts=parts, metrics=metrics)

    def judge(self, batch: Batch, losses: LossWeights) -> validation.Judged:
        """Return what the network makes of a batch by itself, in the stage's precision."""
        with self._accelerator.autocast():
            return self.model(validation.judge, batch, losses)

    def _exchange(self) -> None:
        self._reshard()
        super()._exchange()

    def _reshard(self) -> None:
        """Drop what a validation has left gathered: it would be taken for the weights of now."""
        for group in self._groups:
            group.reshard()

    def write(self, folder: Path) -> None:
        with self.averaged():
            weights = self._whole({n: self._piece(p) for n, p in self._layout.items()})
        if self._accelerator.is_main_process:
            with torch.device('meta'):
                plain = MoseDriver(self.driver.config, MoseQwen2VL(self.driver.vlm.config))
            missing, foreign = plain.load_state_dict(weights, strict=False, assign=True)
            plain.vlm.tie_weights()
            assert not foreign and not any(p.is_meta for p in plain.parameters()), missing
            plain.save(folder)

    @torch.no_grad()
    def _piece(self, parameter: torch.Tensor) -> torch.Tensor:
        return parameter.to_local()

    def _span(self, name: str) -> slice:
        rows = len(self._layout[name])
        share = -(-rows // self._accelerator.num_processes)
        start = min(rows, share * self._accelerator.process_index)
        return slice(start, min(rows, start + share))

    @torch.no_grad()
    def _whole(self, pieces: Mapping[str, torch.Tensor]) -> Pieces:
        found = {}
        for name, piece in pieces.items():
            like = self._layout[name]
            shape = {'shape': like.shape, 'stride': like.stride()}
            spread = DTensor.from_local(piece, like.device_mesh, like.placements, **shape)
            whole = spread.full_tensor()
            if self._accelerator.is_main_process:
                found[name] = whole.cpu()
        return found

    def _gradients(self) -> Iterable[torch.Tensor]:
        here = torch.tensor([float(name in self._used) for name in self._moving])
        used = self._accelerator.reduce(here.to(self._accelerator.device), 'sum').tolist()
        self._used.clear()
        for (name, parameter), one in zip(self._moving.items(), used, strict=True):
            # where no process had a gradient there is one of zeros, which Adam would take for one
            self._pieces[name].grad = parameter.grad.to_local() if one else None
        return super()._gradients()

    def _norm(self, gradients: Iterable[torch.Tensor]) -> torch.Tensor:
        own = super()._norm(gradients).to(self._accelerator.device)
        return self._accelerator.reduce(own.square(), 'sum').sqrt()

    def _forget_gradients(self) -> None:
        super()._forget_gradients()
        for parameter in self._moving.values():
            parameter.grad = None


def _losses(driver: MoseDriver, *arguments) -> tuple[torch.Tensor, dict, dict]:
    """Return what a training step needs as tensors and dictionaries, in which FSDP finds what goes backwards."""
    output = MoseDriver.forward(driver, *arguments)
    return output.loss, dict(output.parts), dict(output.metrics)
