"""Which samples come when, and batches made of them.

The frames of a batch follow from the stage, the seed and the step, so a stopped training goes on with exactly the samples
that it would have seen, and the next stage sees others.
"""

import logging
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int64

from mose_ros.modeling.batch import Batch, Choices
from mose_ros.training.config import Data
from mose_ros.training.index import Index
from mose_ros.training.samples import NO_TOKEN, CorruptSample, Key, Samples

_LOG = logging.getLogger(__name__)
SPARES = 3  # other samples that may take the place of one that can't be read
AHEAD = 2  # batches made before they are asked for
# number of the way in which numbers follow from a seed: with another, the same command would go on with other samples
DRAWS = 2
FETCH_AHEAD = 100  # batches whose shards are fetched before they are made


class Order:
    """The keys of each batch from a step on: the same after a stop as without one."""

    def __init__(
        self,
        index: Index,
        config: Data,
        *,
        stage: str,
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
        # of a batch, a sample or an epoch: those of one seed are as many as there are stages
        self._stream = (seed, zlib.crc32(stage.encode()))
        self._window = None
        if config.shards_at_once:
            shards = _shards_of(index, self._frames, config.shards_at_once)
            if len(np.unique(shards)) > config.shards_at_once:
                self._window = Window(chances, shards, config.shards_at_once, batch, self._stream)
        self._config, self._batch = config, batch
        self._start, self._stop = start, stop

    def __len__(self) -> int:
        return self._stop - self._start

    def __iter__(self) -> Iterator[list[Key]]:
        fixed = len(self._config.fixed_views)
        for step in range(self._start, self._stop):
            random = np.random.default_rng([*self._stream, step])
            alone = random.random() < self._config.fixed_alone
            views = fixed if alone else fixed + self._config.top_k
            draws = random.random((1 + SPARES, self._batch))
            if self._window is None:
                places = np.searchsorted(self._edges, draws * self._edges[-1])
            else:
                places = self._window.places(step, draws)
            frames = self._frames[places].T
            yield [
                Key(
                    frame=int(frame),
                    views=views,
                    # from 1 on: zeros at the end of a seed are of no account, and those of the batch are without
                    numbers=(*self._stream, step, 1 + slot),
                    spares=tuple(map(int, spares)),
                    draws=self._draws and not alone,
                )
                for slot, (frame, *spares) in enumerate(frames)
            ]


def _shards_of(
    index: Index, frames: Int64[np.ndarray, 'M'], at_once: int
) -> Int64[np.ndarray, 'M']:
    """Return the shard of each frame, all the same where the data is not packed; ValueError for one at a time."""
    if at_once < 2:
        raise ValueError(
            f'data.shards_at_once is 0 (all) or at least 2, not {at_once}: nothing would stand in for a broken shard'
        )
    if not index.shard:
        _LOG.warning('data.shards_at_once is of no account: %s is not packed', index.root)
        return np.zeros(len(frames), np.int64)
    return np.asarray(index.shard)[index.clip[frames]]


class Window:
    """The few shards that samples are drawn from at a time, moving on; in the long run a frame comes as often as from all.

    In each epoch the shards lie on a line in an order of its own, each as long as the chances of its frames. As many heads as there
    are shards at a time stand on it at equal distances, and each moves on until it reaches where the next one began. A draw takes
    any head alike, and a frame of the shard there by its chance. An epoch is as many draws as there are frames, so a shard is
    fetched about once in it.
    """

    def __init__(
        self,
        chances: Float[np.ndarray, 'M'],
        shards: Int64[np.ndarray, 'M'],
        heads: int,
        batch: int,
        stream: tuple[int, ...],
    ):
        self._order = np.argsort(shards, kind='stable')  # the frames of a shard side by side
        self._edges = np.concatenate([[0.0], np.cumsum(chances[self._order])])
        self._shards, self._first = np.unique(shards[self._order], return_index=True)
        self._last = np.append(self._first[1:], len(shards)) - 1
        self._heads, self._stream = heads, stream
        self._steps = max(1, round(len(shards) / batch))  # of an epoch

    def shards(self, step: int) -> list[int]:
        """Return the shards that a step draws from."""
        return self._shards[np.unique(self._under_heads(step))].tolist()

    def places(self, step: int, draws: Float[np.ndarray, 'S B']) -> Int64[np.ndarray, 'S B']:
        """Return which of the M frames are meant by numbers from 0 to 1; in a column, as far as may be, of different shards."""
        heads, within = np.divmod(draws * self._heads, 1.0)
        heads = (heads[0].astype(int) + np.arange(len(draws))[:, None]) % self._heads
        shards = self._under_heads(step)[heads]
        first, last = self._first[shards], self._last[shards]
        start, end = self._edges[first], self._edges[last + 1]
        found = np.searchsorted(self._edges, start + within * (end - start), side='right') - 1
        return self._order[np.clip(found, first, last)]

    def _under_heads(self, step: int) -> Int64[np.ndarray, 'K']:
        """Return for each head the place of its shard among all."""
        epoch, done = divmod(step, self._steps)
        random = np.random.default_rng([*self._stream, epoch, 0, 1])  # of no step and no sample
        order = random.permutation(len(self._shards))
        lengths = self._edges[self._last + 1] - self._edges[self._first]
        ends = np.cumsum(lengths[order])
        moved = (done + random.random()) / self._steps
        heads = (np.arange(self._heads) + moved) / self._heads * ends[-1]
        return order[np.minimum(np.searchsorted(ends, heads, side='right'), len(order) - 1)]


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

    What lies in shards elsewhere is fetched while earlier batches are made. Threads, because decoding and the arithmetic of pictures leave Python's lock: nothing is copied between processes.
    Samples that can't be read are in the log; a spare takes their place, or none where a key has none. ValueError when
    the spares can't be read either.
    """

    told: set[str] = set()

    def make(keys: Sequence[Key]) -> Loaded | None:
        corrupt: list[str] = []
        found = [_make(samples, key, corrupt, told) for key in keys]
        whole = [sample for sample in found if sample is not None]
        return Loaded(batch=collate(whole), corrupt=tuple(corrupt)) if whole else None

    batches = _fetched(samples, batches)
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


def _fetched(samples: Samples, batches: Iterable[Sequence[Key]]) -> Iterator[Sequence[Key]]:
    """Yield the batches, each some time after its shards were asked for; at once where there are none."""
    waiting: deque[Sequence[Key]] = deque()
    for keys in batches:
        if samples.fetch_ahead(keys):
            waiting.append(keys)
            if len(waiting) > FETCH_AHEAD:
                yield waiting.popleft()
        else:
            yield keys
    yield from waiting


def _make(
    samples: Samples, key: Key, corrupt: list[str], told: set[str]
) -> dict[str, np.ndarray] | None:
    """Return the sample of a key or of its first whole spare; None where there are none.

    told: names that are in the log already; a broken shard is met many times.
    """
    for frame in (key.frame, *key.spares):
        try:
            return samples[replace(key, frame=frame)]
        except CorruptSample as error:
            corrupt.append(error.name)
            if error.name not in told:
                told.add(error.name)
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
