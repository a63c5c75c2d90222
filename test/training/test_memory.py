"""What a training step keeps in memory, and that keeping less changes no number."""

import json
import weakref
from dataclasses import replace

import pytest

pytest.importorskip('torch', reason='training is an extra: pip install mose_ros[train]')

import torch  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from mose_ros.modeling.batch import LossWeights  # noqa: E402
from mose_ros.training import journal, learner, loop, stages  # noqa: E402

EVERYTHING = LossWeights(text=1.0, routers=0.5, flow=1.0, action_router=1.0, view_router=1.0)


class Held(TorchDispatchMode):
    """Counts the bytes of tensors that live, and the most that lived at once."""

    def __init__(self):
        super().__init__()
        self.bytes, self.most, self._known = 0, 0, set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        """Count what a function makes until nobody holds it any more."""
        made = function(*arguments, **(keywords or {}))
        for one in tree_leaves(made):
            storage = one.untyped_storage() if isinstance(one, torch.Tensor) else None
            if storage is not None and storage._cdata not in self._known:
                self._known.add(storage._cdata)
                self.bytes += storage.nbytes()
                self.most = max(self.most, self.bytes)
                weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
        return made

    def _forget(self, storage: int, size: int) -> None:
        self._known.discard(storage)
        self.bytes -= size


@pytest.fixture
def deep(drawn):
    """Return a nano run with many layers and its data."""
    training, data = drawn
    model = training.model
    model = replace(
        model,
        vision=replace(model.vision, depth=6),
        decoder=replace(model.decoder, layers=12),
    )
    stage = replace(training.router, losses=EVERYTHING, steps=2, batch_size=8, validate_every=9)
    return replace(training, model=model, router=stage), data


def test_checkpointing_changes_memory_and_no_number(deep, tmp_path, monkeypatch):
    training, data = deep
    learn, held = learner.Learner.learn, {}

    def watched(self, *arguments):
        with Held() as bytes_held:
            output = learn(self, *arguments)
        held.setdefault(name, []).append(bytes_held.most)
        return output

    monkeypatch.setattr(learner.Learner, 'learn', watched)
    for name in ('kept', 'again'):
        stage = replace(training.router, gradient_checkpointing=name == 'again')
        run = replace(training, router=stage)
        stages.train('router', run, data, tmp_path / name, limits=loop.Limits(bar=False))
    assert told(tmp_path / 'again') == told(tmp_path / 'kept')
    assert len(set(told(tmp_path / 'kept'))) == 2, 'the losses move, or equality would say nothing'
    assert max(held['again']) < 0.5 * max(held['kept'])


def told(folder):
    lines = (folder / journal.METRICS).read_text(encoding='utf-8').splitlines()
    return [one['train']['loss'] for one in map(json.loads, lines) if 'train' in one]
