"""What each of several processes does in test_sharding.py: stages of nano whose weights lie in pieces.

python -m torch.distributed.run ... in_pieces.py DATA FOLDER
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from mose_ros.modeling.batch import LossWeights
from mose_ros.training import loop, presets, sharding, stages
from mose_ros.training.presets import Training

EVERYTHING = LossWeights(text=1.0, routers=0.5, flow=1.0, action_router=1.0, view_router=1.0)


def run(**settings) -> Training:
    """Return a nano run whose first stage learns everything at once, in three steps."""
    training = presets.preset('nano')
    stage = replace(
        training.router,
        losses=EVERYTHING,
        steps=3,
        batch_size=8,
        validate_every=9,
        checkpoint_every=9,
    )
    return replace(training, router=replace(stage, **settings))


def mixed() -> Training:
    """Return a run with what sharding could get wrong: two precisions, accumulation, checkpointing, experts by token."""
    training = run(
        bfloat16=True,
        gradient_checkpointing=True,
        accumulate=2,
        steps=2,
        trainable='mose,action_expert',
        text_every=2,
    )
    mose = replace(training.model.mose, routing='token')
    return replace(training, model=replace(training.model, mose=mose))


def main(data: Path, folder: Path) -> None:
    """Train in several processes what the test trains in one."""
    quiet = loop.Limits(bar=False)
    held = {}
    write = sharding.ShardedLearner.write

    def look(learner, path):
        held['here'] = sum(piece.numel() for piece in learner._pieces.values())
        held['whole'] = sum(p.numel() for p in learner._moving.values())
        write(learner, path)

    sharding.ShardedLearner.write = look
    stages.train('router', run(), data, folder / 'straight', limits=quiet)
    stages.train('router', run(seed=1, steps=1), data, folder / 'other', limits=quiet)
    stages.train('router', mixed(), data, folder / 'mixed', limits=quiet)
    # one process has begun this one
    try:
        stages.train('router', run(), data, folder / 'left', limits=replace(quiet, stop_at=2))
    except loop.Stopped:
        held['stopped'] = True
    rank = torch.distributed.get_rank()
    (folder / f'held-{rank}.json').write_text(json.dumps(held), encoding='utf-8')


if __name__ == '__main__':
    main(*map(Path, sys.argv[1:]))
