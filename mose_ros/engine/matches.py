"""Who is compared with our engine: how each comes to be, and what is said of it beside its times."""

import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mose_ros.engine import counting, turns, twins
from mose_ros.engine.bundle import Bundle
from mose_ros.engine.contestants import LARGE, Engine, Graph, Looking
from mose_ros.engine.opponents import Opponent
from mose_ros.engine.scenery import Scenery
from mose_ros.engine.turns import Contestant, Turn

OPPONENT = 'mose_ros.training.opponent'


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a comparison is made from."""

    bundle: Bundle  # ours
    scenery: Scenery
    looking: Looking  # of all
    tokens: int  # of our prompt
    clip: str
    made: Path  # where twins are kept
    checkpoint: Path | None  # of the bundle, for PyTorch; None: a twin of random weights
    int8: Path | None  # bundle of the same network


@dataclass(frozen=True, kw_only=True)
class Match:
    """Two that are compared, and what is said of them beside their times."""

    name: str
    field: Mapping[str, Contestant]  # who joins the turns
    theirs: str
    ours: str = 'ours'
    flops: int | None = None  # of their plan; None: as many as ours
    same_weights: bool = False  # then their answers are held against ours, else:
    parity: Mapping[str, Any] = field(default_factory=dict)  # of their bundle with its network
    facts: Mapping[str, Any] = field(default_factory=dict)
    block: bool = False  # one mixture alone was measured too

    def row(self, took: Mapping[str, Sequence[Turn]], flops: int) -> dict[str, Any]:
        """Return the comparison, speed beside parity; flops: of our plan."""
        ours, theirs = took[self.ours], took[self.theirs]
        found = turns.versus(ours, theirs, LARGE)
        # a bundle of a test may have no products at all
        found['flops_ratio'] = 1.0 if self.flops in (None, flops) else self.flops / flops
        found['parity'] = turns.apart(ours, theirs) if self.same_weights else dict(self.parity)
        if self.block:
            blocks = [[one.ms for one in took[name]] for name in ('block ours', 'block theirs')]
            found['block'] = {
                **turns.ratio(*blocks),
                'ours': turns.row(blocks[0]),
                'theirs': turns.row(blocks[1]),
            }
        return found | dict(self.facts)


def join(name: str, setting: Setting, stack: contextlib.ExitStack) -> Match:
    """Return one of COMPARED, ready to take turns; what it started ends with the stack.

    ValueError, or OpponentError for a program, says why it cannot be.
    """
    return _JOIN[name](name, setting, stack)


def _torch(name, setting, stack) -> Match:
    """Return PyTorch beside our engine; without a checkpoint both run a twin, so that they have the same weights."""
    bundle, field_, ours = setting.bundle, {}, 'ours'
    checkpoint = setting.checkpoint
    if checkpoint is None:
        twin = twins.made(bundle, setting.made)
        bundle, ours = twins.opened(bundle, setting.made), f'{name} ours'
        checkpoint, field_ = twin / 'checkpoint', {ours: _engine(bundle, setting)}
    command = [sys.executable, '-m', OPPONENT, name.removeprefix('torch_')]
    command += ['--bundle', str(bundle.folder), '--checkpoint', str(checkpoint)]
    command += ['--threads', str(bundle.threads), '--clip', setting.clip]
    looking = setting.looking
    command += ['--views', str(looking.views), '--mode', looking.mode]
    command += ['--view', looking.force_view]
    opponent = stack.enter_context(contextlib.closing(Opponent(name, command)))
    return Match(
        name=name,
        field=field_ | {name: opponent},
        theirs=name,
        ours=ours,
        same_weights=True,
        facts={'opponent': dict(opponent.facts), 'weights': str(setting.checkpoint or 'a twin')},
    )


def _twin(name, setting, stack) -> Match:
    """Return a network with another mixture on our engine."""
    changes = {'dense': twins.DENSE, 'token_moe': twins.TOKEN}[name]
    bundle = twins.opened(setting.bundle, setting.made, changes)
    return _bundle_match(name, bundle, setting, **_blocks(name, setting, changes))


def _blocks(name, setting, changes) -> dict[str, Any]:
    if name != 'token_moe':
        return {}
    folder, threads = twins.made(setting.bundle, setting.made, changes), setting.bundle.threads
    return {
        'block': {
            f'block {side}': Graph(
                folder / f'{file}.onnx', threads, twins.TOKENS, tokens=setting.tokens, repeats=5
            )
            for side, file in (('ours', 'block_skill'), ('theirs', 'block_token'))
        }
    }


def _int8(name, setting, stack) -> Match:
    """Return the same network in whole numbers."""
    own = setting.bundle
    bundle = Bundle.open(
        setting.int8,
        backend=own.backend,
        threads=own.threads,
        engines=own.engines,
        workspace=own.workspace,
    )
    return _bundle_match(name, bundle, setting, same_weights=True)


def _engine(bundle, setting) -> Engine:
    return Engine(bundle, setting.scenery, setting.looking)


def _bundle_match(name, bundle, setting, *, block=None, same_weights=False) -> Match:
    engine = _engine(bundle, setting)
    flops = counting.plan_flops(counting.stage_costs(bundle, counting.watch(engine)))
    return Match(
        name=name,
        field={name: engine, **(block or {})},
        theirs=name,
        flops=flops,
        same_weights=same_weights,
        parity=bundle.manifest.parity,
        facts={'bundle': bundle.manifest.name},
        block=block is not None,
    )


_JOIN: dict[str, Callable[[str, Setting, contextlib.ExitStack], Match]] = {
    'torch_eager': _torch,
    'torch_compile': _torch,
    'token_moe': _twin,
    'dense': _twin,
    'int8': _int8,
}
COMPARED = tuple(_JOIN)
