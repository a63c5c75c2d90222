"""Which samples come when, and batches made of them.

The frames of a batch follow from the seed and the step, so a stopped training goes on with exactly the samples that it
would have seen.
"""

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch

from mose_ros.modeling.batch import Batch, Choices
from mose_ros.training.config import Data
from mose_ros.training.index import Index
from mose_ros.training.samples import NO_TOKEN, CorruptSample, Key, Samples

_LOG = logging.getLogger(__name__)
SPARES = 3  # other samples that may take the place of one that can't be read
AHEAD = 2  # batches made before they are asked for


class Order:
    """The keys of each batch from a step on: the same after a stop as without one."""

    def __init__(
        self,
        index: Index,
        config: Data,
        *,
        seed: int,
        batch: int,
        start: int,
        stop: int,
        skill_labels: int = 0,
        view_choice: str = 'label',
    ):
        if view_choice not in ('label', 'router'):
            raise ValueError(f"view_choice is 'label' or 'router', not {view_choice!r}")
        if view_choice == 'router' and config.top_k != 1:
            raise ValueError(
                f"view_choice 'router' draws one view, so data.top_k is 1, not {config.top_k}"
            )
        self._draws = view_choice == 'router'
        self._frames, chances = index.drawn(config, skill_labels, seed)
        self._edges = np.cumsum(chances)
        self._config, self._seed, self._batch = config, seed, batch
        self._start, self._stop = start, stop

    def __len__(self) -> int:
        return self._stop - self._start

    def __iter__(self) -> Iterator[list[Key]]:
        fixed = len(self._config.fixed_views)
        for step in range(self._start, self._stop):
            random = np.random.default_rng([self._seed, step])
            alone = random.random() < self._config.fixed_alone
            views = fixed if alone else fixed + self._config.top_k
            draws = random.random((1 + SPARES, self._batch)) * self._edges[-1]
            frames = self._frames[np.searchsorted(self._edges, draws)].T
            yield [
                Key(
                    frame=int(frame),
                    views=views,
                    numbers=(self._seed, step, slot),
                    spares=tuple(map(int, spares)),
                    draws=self._draws and not alone,
                )
                for slot, (frame, *spares) in enumerate(frames)
            ]


def validation_keys(index: Index, config: Data, count: int, batch: int) -> list[list[Key]]:
    """Return batches of evenly spaced, unchanged frames of the validation clips."""
    frames = index.split(validation=True, config=config)
    if not len(frames):
        return []
    chosen = frames[np.unique(np.linspace(0, len(frames) - 1, count).round().astype(int))]
    views = len(config.fixed_views) + config.top_k
    keys = [Key(frame=int(frame), views=views, numbers=None) for frame in chosen]
    return [keys[start : start + batch] for start in range(0, len(keys), batch)]


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A batch, and the names of what could not be read when it was made."""

    batch: Batch
    corrupt: tuple[str, ...]


def load(samples: Samples, batches: Iterable[Sequence[Key]], workers: int) -> Iterator[Loaded]:
    """Yield the batches, in order; made ahead by as many threads, or in between where there are none.

    Threads, because decoding and the arithmetic of pictures leave Python's lock: nothing is copied between processes.
    Samples that can't be read are in the log; a spare takes their place, or none where a key has none. ValueError when
    the spares can't be read either.
    """

    def make(keys: Sequence[Key]) -> Loaded | None:
        corrupt: list[str] = []
        found = [_make(samples, key, corrupt) for key in keys]
        whole = [sample for sample in found if sample is not None]
        return Loaded(batch=collate(whole), corrupt=tuple(corrupt)) if whole else None

    if workers <= 0:
        yield from filter(None, map(make, batches))
        return
    ahead: deque[Future] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for keys in batches:
                ahead.append(pool.submit(make, keys))
                if len(ahead) > workers + AHEAD:
                    yield from filter(None, [ahead.popleft().result()])
            while ahead:
                yield from filter(None, [ahead.popleft().result()])
        finally:
            for one in ahead:
                one.cancel()


def _make(samples: Samples, key: Key, corrupt: list[str]) -> dict[str, np.ndarray] | None:
    """Return the sample of a key or of its first whole spare; None where there are none."""
    for frame in (key.frame, *key.spares):
        try:
            return samples[replace(key, frame=frame)]
        except CorruptSample as error:
            corrupt.append(error.name)
            _LOG.warning('skipped a sample: %s', error)
            last = error
    if key.spares:
        raise ValueError(
            f'{1 + len(key.spares)} samples in a row cannot be read, the last: {last}'
        )
    return None


def collate(samples: Sequence[dict[str, np.ndarray]]) -> Batch:
    """Join samples of equally many views into a batch; texts are padded on the right."""
    texts = _collate_texts(samples)
    apart = {*texts, 'choices'}
    stacked = {name: _stack(samples, name) for name in samples[0] if name not in apart}
    if 'choices' in samples[0]:
        stacked['choices'] = _collate_choices([one['choices'] for one in samples])
    return Batch(**texts, **stacked)


def _collate_choices(choices: Sequence[dict]) -> Choices:
    texts = _collate_texts([text for one in choices for text in one['texts']])
    shape = (len(choices), len(choices[0]['texts']))
    split = {name: value.unflatten(max(0, value.ndim - 2), shape) for name, value in texts.items()}
    return Choices(
        patches=_stack(choices, 'patches'),
        noise=_stack(choices, 'noise'),
        places=torch.from_numpy(choices[0]['places']),
        **split,
    )


def _stack(samples: Sequence[dict[str, np.ndarray]], name: str) -> torch.Tensor:
    return torch.from_numpy(np.stack([one[name] for one in samples]))


def _collate_texts(samples: Sequence[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    """Return the fields of Batch that are texts, padded on the right."""
    lengths = [len(one['input_ids']) for one in samples]
    total = max(lengths)

    def padded(name: str, value: int) -> torch.Tensor:
        rows = [
            np.pad(
                one[name],
                [*[(0, 0)] * (one[name].ndim - 1), (0, total - length)],
                constant_values=value,
            )
            for one, length in zip(samples, lengths, strict=True)
        ]
        return torch.from_numpy(np.stack(rows, axis=-2).astype(np.int64))

    mask = torch.arange(total) < torch.tensor(lengths)[:, None]
    return {
        'input_ids': padded('input_ids', 0),
        'labels': padded('labels', NO_TOKEN),
        'position_ids': padded('position_ids', 0),
        'attention_mask': mask.long(),
        'prompt_lengths': _stack(samples, 'prompt_lengths'),
    }
