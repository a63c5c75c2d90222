"""PyTorch as `bench` compares it: the same network, weights, pictures and flow steps, planned in plain PyTorch, in a process of its own.

`python -m mose_ros.training.opponent eager|compile --bundle DIR --checkpoint DIR --threads N` speaks the protocol of `engine.opponents`. The view
router's part is the engine's with PyTorch behind it; from the chosen views on it is what parity holds bundles to: Hugging
Face's forward with our mixtures, then the loop of the flow.

`compile` is torch.compile with static shapes and weights frozen into the code; it is ready once everything that it met is compiled.
"""

import argparse
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from mose_ros.core import action
from mose_ros.core.provenance import versions
from mose_ros.engine.bundle import Bundle
from mose_ros.engine.contestants import Looking
from mose_ros.engine.opponents import serve
from mose_ros.engine.scenery import Scenery
from mose_ros.engine.turns import Turn
from mose_ros.engine.view_router import MODES
from mose_ros.modeling.driver import MoseDriver
from mose_ros.training.graphs import PARTS
from mose_ros.training.parity import Reference
from mose_ros.training.weights import rounded

KINDS = ('eager', 'compile')
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TorchBundle(Bundle):
    """A bundle whose graphs are run by the network that they were made of."""

    driver: MoseDriver

    def session(self, graph: str, **options) -> 'TorchSession':
        """Return a graph as a function of PyTorch."""
        return TorchSession(self.driver, graph)


class TorchSession:
    """A part of the network with the surface of a session."""

    def __init__(self, driver: MoseDriver, graph: str):
        self._part = PARTS[graph](driver).eval()

    def run(self, inputs: Mapping[str, Any], keep: Sequence[str] = ()) -> dict[str, Any]:
        """Return all outputs."""
        with torch.inference_mode():
            answer = self._part(*(torch.from_numpy(inputs[name]) for name in inputs))
        answer = answer if isinstance(answer, tuple) else (answer,)
        named = zip(self._part.outputs(), answer, strict=True)
        return {name: value.numpy() for name, value in named}


class Torch:
    """A policy in PyTorch: from the cameras' pictures to the trajectory."""

    def __init__(self, driver: MoseDriver, bundle: Bundle, scenery: Scenery, looking: Looking):
        own = {**vars(bundle), 'driver': driver}
        self._manifest, self._scenery = bundle.manifest, scenery
        self._router = looking.router(TorchBundle(**own))
        self._reference = Reference(driver, bundle.manifest, bundle.tokenizer())

    def plan(self, index: int) -> Turn:
        """Answer the observation of this number."""
        m, seen = self._manifest, self._scenery(index)
        start = perf_counter()
        with torch.inference_mode():
            views = self._router.select(seen.time, seen.images, seen.ego, seen.guidance)
            flowed = self._reference.plan(views, seen).action.numpy()
        trajectory = action.to_trajectory(flowed, m.action_normalizer(), seen.time, m.dt)
        ms = (perf_counter() - start) * 1e3
        return Turn(ms=ms, xy=trajectory.xy, views=views.names)


def start(options) -> tuple[Mapping[str, Any], Callable[[int], Turn]]:
    """Load, compile if asked for; return what is to be known of it, and the function that plans."""
    torch.set_num_threads(options.threads)
    bundle = Bundle.open(options.bundle, backend='onnxruntime', threads=options.threads)
    m = bundle.manifest
    driver = MoseDriver.load(options.checkpoint).eval().requires_grad_(False)
    if m.storage != m.precision:
        driver = rounded(driver)
    if options.kind == 'compile':
        compiled(driver)
    scenery = Scenery(m, clip=options.clip)
    looking = Looking(views=options.views, mode=options.mode, force_view=options.view)
    policy = Torch(driver, bundle, scenery, looking)
    begin = perf_counter()
    practice = [policy.plan(index).ms for index in range(len(scenery) + 4)]
    facts = {
        'kind': options.kind,
        'versions': versions(),
        'threads': torch.get_num_threads(),
        'first_ms': practice[0],
    }
    if options.kind == 'compile':
        facts['compile_s'] = perf_counter() - begin
    return facts, policy.plan


def compiled(driver: MoseDriver) -> MoseDriver:
    """Have the driver's three large parts compiled when they are first called."""
    import torch._dynamo
    import torch._inductor.config

    torch._inductor.config.freezing = True  # weights are packed for the CPU's kernels
    torch._dynamo.config.recompile_limit = 64  # each expert is code of its own
    for part, name in (
        (driver.vlm, 'see'),
        (driver.vlm, 'read'),
        (driver.action_expert, 'forward'),
    ):
        setattr(part, name, torch.compile(getattr(part, name), dynamic=False))
    return driver


def main(arguments: Sequence[str] | None = None) -> int:
    """Be a compared program."""
    parser = argparse.ArgumentParser(
        prog='python -m mose_ros.training.opponent', description=__doc__.splitlines()[0]
    )
    parser.add_argument('kind', choices=KINDS)
    parser.add_argument('--bundle', type=Path, required=True)
    parser.add_argument('--checkpoint', type=Path, required=True, help='of the same weights')
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--clip', default='', help='folder of a recorded clip (default: noise)')
    parser.add_argument('--views', type=int, default=0, help='how many (default: the manifest)')
    parser.add_argument('--mode', choices=MODES, default='learned', help='of choosing views')
    parser.add_argument('--view', default='', help='a view to look at whatever its score')
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    return serve(lambda: start(options))


if __name__ == '__main__':
    sys.exit(main())
