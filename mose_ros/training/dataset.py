"""From annotated clips to batches: the index over frames, the sample of one frame, and the order in which they come.

Everything about a sample is decided by the seed, the step and the place in the batch, so a stopped training goes on with
exactly the samples that it would have seen. Pictures go through `core.vision` and prompts through `core.prompt`, as on the vehicle.
"""

import json
import logging
import sys
import zlib
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8

from mose_ros.core import action, prompt, vision
from mose_ros.core.prompt import IM_END, Tokenizer
from mose_ros.core.types import COMMANDS, EgoState, Guidance
from mose_ros.modeling.batch import Batch, Choices
from mose_ros.modeling.config import DriverConfig
from mose_ros.training import annotate, collect
from mose_ros.training.config import Data

_LOG = logging.getLogger(__name__)
SPARES = 3  # other samples that may take the place of one that can't be read
ENDS = {'.jpg': b'\xff\xd9', '.png': b'IEND\xaeB`\x82'}  # of a whole picture
UNKNOWN = -1  # a label that no loss looks at
AHEAD = 2  # batches made before they are asked for
NO_TOKEN = -100  # a token that no loss looks at
STANDS = 0.3  # m/s; a slower car is at rest
BRAKES = 0.6  # a plan that gets less far than this share of going on at the speed of now


class CorruptSample(ValueError):
    """A recorded sample that can't be read."""

    def __init__(self, name: str, reason: str):
        super().__init__(f'{name}: {reason}; record or fetch the clip again')
        self.name = name


@dataclass(frozen=True, kw_only=True)
class Index:
    """All annotated frames of a data set, as arrays; frame i of N."""

    root: Path
    clips: tuple[str, ...]
    clip: Int64[np.ndarray, 'N']  # index into clips
    frame: Int64[np.ndarray, 'N']
    older: Int64[np.ndarray, 'N']  # the frame `frame_gap` earlier, or the frame itself
    camera: tuple[str, ...]
    answer: tuple[str, ...]
    proprio: Float[np.ndarray, 'N P']  # SI units
    action: Float[np.ndarray, 'N H 2']  # m
    skills: Int64[np.ndarray, 'N S']  # expert of each level
    action_skill: Int64[np.ndarray, 'N']
    weight: Float[np.ndarray, 'N']
    family: tuple[str, ...]
    seconds: float  # from now to the last point of a trajectory
    broken: tuple[str, ...] = ()  # names of lines of labels that could not be read

    def __len__(self) -> int:
        return len(self.clip)

    @classmethod
    def load(cls, root: str | Path, model: DriverConfig, rounds: int = 0) -> 'Index':
        """Read the labels of all annotated clips up to a DAgger round; ValueError when none are there or they fit another model."""
        root = Path(root)
        names = sorted(path.parent.name for path in root.glob(f'*/{annotate.LABELS}'))
        names = tuple(name for name in names if collect.round_of(name) <= rounds)
        if not names:
            raise ValueError(
                f'{root} holds no annotated clip; run `python -m mose_ros.training annotate` first'
            )
        records, clip, broken = [], [], []
        for index, name in enumerate(names):
            found, lost = annotate.read_labels(root / name)
            records += found
            broken += lost
            clip += [index] * len(found)
        column = {key: [one[key] for one in records] for key in annotate.FIELDS}
        trajectories = np.asarray(column['action'], np.float32)
        if trajectories.shape[1:] != (model.action.horizon, 2):
            raise ValueError(
                f'{root}: trajectories of {trajectories.shape[1]} points, the model plans '
                f'{model.action.horizon}; annotate again'
            )
        levels = model.mose.levels
        skills = [
            [place_of(one[level], levels[level]) for level in levels] for one in column['skills']
        ]
        acting = [place_of(one[list(levels)[-1]], model.action.skills) for one in column['skills']]
        return cls(
            root=root,
            clips=names,
            clip=np.asarray(clip),
            frame=np.asarray(column['frame']),
            older=np.asarray(column['older']),
            camera=tuple(map(sys.intern, column['camera'])),
            answer=tuple(map(sys.intern, column['answer'])),
            proprio=np.asarray(column['proprio'], np.float32),
            action=trajectories,
            skills=np.asarray(skills),
            action_skill=np.asarray(acting),
            weight=np.asarray(column['weight'], np.float32),
            family=tuple(map(sys.intern, column['family'])),
            seconds=model.action.horizon * model.action.dt,
            broken=tuple(broken),
        )

    def camera_places(self, cameras: Sequence[str]) -> Int64[np.ndarray, 'N']:
        """Return where each frame's labelled camera stands among these."""
        known = {name: place for place, name in enumerate(cameras)}
        return np.array([known.get(name, UNKNOWN) for name in self.camera])

    def motions(self) -> list[str]:
        """Return what each frame's plan does: goes, brakes, stands, or starts from rest, which is rare and decides much."""
        speed = self.proprio[:, action.PROPRIO.index('speed')]
        reach = np.hypot(*self.action[:, -1].T)
        rests = np.where(reach > annotate.GOES_M, 'starts', 'stands')
        moves = np.where(reach < BRAKES * speed * self.seconds, 'brakes', 'goes')
        return np.where(speed < STANDS, rests, moves).tolist()

    def split(self, validation: bool, config: Data) -> Int64[np.ndarray, 'M']:
        """Return the frames of the training or of the validation clips; a clip is wholly on one side."""
        if not 0 < config.share <= 1:
            raise ValueError(f'data.share is above 0 and at most 1, not {config.share}')
        # by a hash of the name: more clips, in any order, never move one to the other side
        hashes = [zlib.crc32(f'{config.seed}:{name}'.encode()) / 2**32 for name in self.clips]
        places, order = np.array(hashes), np.argsort(hashes)
        held = places < config.validation_share
        used = places < config.validation_share + config.share * (1 - config.validation_share)
        if (
            len(order) > 1 and config.validation_share
        ):  # both sides have a clip, however few there are
            held[order[0]], held[order[-1]] = True, False
        used[order[held.sum() :][:1]] = True
        side = held if validation else used & ~held
        return np.flatnonzero(side[self.clip])

    def chances(self, frames: Int64[np.ndarray, 'M'], config: Data) -> Float[np.ndarray, 'M']:
        """Return the probability of each frame to be drawn, balanced over (family, planning skill, motion)."""
        motions = self.motions()
        classes = [(self.family[i], int(self.skills[i, -1]), motions[i]) for i in frames]
        counts = Counter(classes)
        weights = np.asarray([counts[one] ** -config.balance for one in classes])
        weights = np.minimum(weights / weights.mean(), config.max_weight) * self.weight[frames]
        return weights / weights.sum()

    def labelled(
        self, frames: Int64[np.ndarray, 'M'], count: int, seed: int
    ) -> Int64[np.ndarray, 'm']:
        """Return at most `count` of the frames, drawn by seed, every skill of each level as often as the others can be.

        It is what a router is pre-trained on (MoSE, "Data Size for Skill Annotation"). Skills take turns, the one seen least
        first; a larger set of the same seed holds the smaller ones.
        """
        if len(frames) <= count:
            return frames
        drawn = np.random.default_rng(seed).permutation(frames)
        labels = self.skills[drawn]
        waiting = {
            (level, skill): iter(np.flatnonzero(labels[:, level] == skill).tolist())
            for level in range(labels.shape[1])
            for skill in np.unique(labels[:, level]).tolist()
            if skill != UNKNOWN
        }
        seen, taken = Counter(dict.fromkeys(waiting, 0)), []
        free = np.ones(len(drawn), bool)
        while waiting and len(taken) < count:
            rarest = min(waiting, key=seen.__getitem__)
            place = next((i for i in waiting[rarest] if free[i]), None)
            if place is None:  # all that have this skill are taken
                del waiting[rarest]
                continue
            free[place] = False
            taken.append(drawn[place])
            seen.update(enumerate(labels[place].tolist()))
        return np.sort(np.asarray(taken, np.int64))

    def drawn(
        self, config: Data, skill_labels: int = 0, seed: int = 0
    ) -> tuple[Int64[np.ndarray, 'M'], Float[np.ndarray, 'M']]:
        """Return the frames of the training clips and the probability of each; of a limited set all are alike."""
        frames = self.split(validation=False, config=config)
        if not skill_labels:
            return frames, self.chances(frames, config)
        frames = self.labelled(frames, skill_labels, seed)
        return frames, np.full(len(frames), 1 / len(frames))


def place_of(name: str, names: Sequence[str]) -> int:
    """Return where a name stands, or UNKNOWN."""
    return list(names).index(name) if name in names else UNKNOWN


@dataclass(frozen=True, kw_only=True)
class Key:
    """Which sample: everything random about it follows from the numbers."""

    frame: int  # of the index
    views: int  # how many are looked at
    numbers: tuple[int, ...] | None  # seed of its random choices; None: nothing is changed
    spares: tuple[int, ...] = ()  # frames that are taken, in turn, where this one can't be read
    draws: bool = (
        False  # whether the view router is to draw the last view: all candidates come along
    )


class Samples:
    """Makes the sample of a key."""

    def __init__(self, index: Index, model: DriverConfig, config: Data):
        if config.history not in vision.HISTORIES:
            raise ValueError(
                f'data.history is one of {", ".join(vision.HISTORIES)}, not {config.history!r}'
            )
        self._index, self._model, self._config = index, model, config
        self._tokenizer = Tokenizer.load(index.root / annotate.TOKENIZER)
        known = json.loads((index.root / annotate.DATASET).read_text(encoding='utf-8'))
        self._actions = annotate.normalizer(known, 'action')
        self._states = annotate.normalizer(known, 'proprio')
        self._patch_of = _patch_numbers(model) * model.semantic_classes
        self._candidates = [name for name in model.cameras if name not in config.fixed_views]

    def __getitem__(self, key: Key) -> dict[str, np.ndarray]:
        """Return the arrays of one sample, named as the fields of Batch; of its `choices`, see `_choices`."""
        index, model, i = self._index, self._model, key.frame
        random = None if key.numbers is None else np.random.default_rng(key.numbers)
        alive = self._alive(key.views, random)
        names = self._choose_views(i, key.views, alive, random)
        newest, older = index.frame[i], index.older[i]
        if random is not None and random.random() < self._config.still:
            older = newest
        look = Look.draw(random, self._config.photometric)
        whole = {name: self._picture(i, newest, name) for name in names}
        views = [self._frames(i, older, name, whole[name]) for name in names]
        glance = model.glance
        # cameras that are only glanced at are decoded at half size
        now = {name: whole.get(name) for name in alive}
        now = {
            n: self._picture(i, newest, n, half=True) if p is None else p for n, p in now.items()
        }
        thumbnails, present = vision.glance(now, model.cameras, glance.width, glance.height)
        thumbnails[present > 0] = look.recolour(thumbnails[present > 0])
        camera = index.camera[i] if index.camera[i] in alive else ''
        sample = {
            'patches': np.stack([self._patches(view, look, random) for view in views]),
            'proprio': self._states.encode(index.proprio[i]),
            'action': self._actions.encode(index.action[i]),
            'skills': index.skills[i],
            'action_skill': index.action_skill[i],
            'thumbnails': thumbnails,
            'present': present,
            'camera': np.int64(place_of(camera, model.cameras)),
            **self._text(i, names),
        }
        chance = np.random.default_rng(i) if random is None else random
        draws = model.action.flow_samples
        sample['coin'] = np.float32(chance.random())
        sample['moments'] = chance.random(draws, dtype=np.float32)
        shape = (draws, *index.action.shape[1:])
        sample['noise'] = chance.standard_normal(shape, dtype=np.float32)
        if model.semantic_classes:
            sample['semantics'] = np.stack([self._classes(i, name) for name in names])
        if key.draws:
            sample['choices'] = self._choices(i, older, look, random)
            sample['choices']['noise'] = chance.random(len(self._candidates), dtype=np.float32)
        return sample

    def _choices(self, i: int, older: int, look: 'Look', random) -> dict:
        """Return patches and texts of all candidates, and where they stand among the cameras."""
        newest, patches, texts = self._index.frame[i], [], []
        for name in self._candidates:
            frames = self._frames(i, older, name, self._picture(i, newest, name))
            patches.append(self._patches(frames, look, random))
            texts.append(self._text(i, [*self._config.fixed_views, name]))
        places = [self._model.cameras.index(name) for name in self._candidates]
        return {'patches': np.stack(patches), 'texts': texts, 'places': np.asarray(places)}

    def metres(self, actions: torch.Tensor) -> Float[np.ndarray, 'B H 2']:
        """Return normalised trajectories in metres."""
        return self._actions.decode(actions.float().cpu().numpy())

    def _alive(self, views: int, random) -> list[str]:
        fixed = self._config.fixed_views
        alone = views == len(fixed) and random is not None
        if alone and random.random() < self._config.cameras_missing:
            return list(fixed)
        return list(self._model.cameras)

    def _choose_views(self, i: int, views: int, alive, random) -> list[str]:
        """Return the fixed views and the labelled one, or now and then others in its place."""
        fixed, label = self._config.fixed_views, self._index.camera[i]
        others = [name for name in self._candidates if name != label and name in alive]
        chosen = [label] if label in self._candidates and label in alive else []
        if random is not None:
            others = [others[j] for j in random.permutation(len(others))]
            if random.random() < self._config.other_view:
                chosen = []
        return [*fixed, *(chosen + others)[: views - len(fixed)]]

    def _frames(self, i: int, older: int, name: str, now: np.ndarray) -> list[np.ndarray]:
        """Return a view's older and newest frame; the newest twice where it shows no past."""
        config = self._config
        moves = vision.shows_past(name, config.history, config.fixed_views)
        if older == self._index.frame[i] or not moves:
            return [now, now]
        return [self._picture(i, older, name), now]

    def _picture(
        self, i: int, frame: int, camera: str, half: bool = False
    ) -> UInt8[np.ndarray, 'H W 3']:
        """Return a camera's picture at view size, or small enough for a glance."""
        index, view = self._index, self._model.vision
        folder = index.root / index.clips[index.clip[i]] / 'camera' / f'rgb_{camera}'
        path = folder / f'{frame:05d}.jpg'
        if half:
            image = self._read(path, cv2.IMREAD_REDUCED_COLOR_2)
            return np.ascontiguousarray(image[:, :, ::-1])
        image = self._read(path, cv2.IMREAD_COLOR_RGB)
        return vision.resize(image, view.view_width, view.view_height)

    def _patches(self, view: Sequence[np.ndarray], look: 'Look', random):
        """Return `patchify(normalize(...))` of a changed view; the colours last, where they are quick."""
        config = self._model.vision
        frames = np.stack(look.blur(view)).astype(np.float32)
        patches = vision.patchify(frames, config.patch, config.merge)
        span = config.frames * config.patch**2  # numbers of a colour in a patch
        std = np.asarray(vision.CLIP_STD, np.float32)
        offset = look.offset - look.gain * np.asarray(vision.CLIP_MEAN, np.float32) / std
        patches *= np.repeat(look.gain / (255 * std), span)
        patches += np.repeat(offset, span)
        if look.noise:
            patches += look.noise * random.standard_normal(patches.shape, dtype=np.float32)
        return patches

    def _classes(self, i: int, camera: str) -> Float[np.ndarray, 'N K']:
        """Return the share of each class in each patch; zeros where no class picture was recorded."""
        index, view, count = self._index, self._model.vision, self._model.semantic_classes
        folder = index.root / index.clips[index.clip[i]] / 'camera' / f'semantic_{camera}'
        path = folder / f'{index.frame[i]:05d}.png'
        if not path.is_file():
            return np.zeros((view.patches, count), np.float32)
        image = self._read(path, cv2.IMREAD_GRAYSCALE)
        size = (view.view_width, view.view_height)
        image = cv2.resize(image, size, interpolation=cv2.INTER_NEAREST)
        places = np.bincount((self._patch_of + image).ravel(), minlength=view.patches * count)
        return (places / view.patch**2).astype(np.float32).reshape(view.patches, count)

    def _read(self, path: Path, mode: int) -> np.ndarray:
        name = str(path.relative_to(self._index.root))
        try:
            data = path.read_bytes()
        except OSError as error:
            raise CorruptSample(name, error.strerror or 'it cannot be opened') from None
        # the decoder fills what is missing with grey and says nothing
        if not data.rstrip(b'\0').endswith(ENDS[path.suffix]):
            raise CorruptSample(name, 'it is cut off')
        image = cv2.imdecode(np.frombuffer(data, np.uint8), mode)
        if image is None:
            raise CorruptSample(name, 'it is no picture')
        return image

    def _text(self, i: int, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Return the tokens of question and answer, not padded yet."""
        tokenizer, view = self._tokenizer, self._model.vision
        grid = (view.grid[0] // view.merge, view.grid[1] // view.merge)
        text = prompt.question(names, *_moment(self._index.proprio[i]))
        question = tokenizer.encode_prompt(text, grid[0] * grid[1])
        answer = np.asarray(tokenizer.encode(self._index.answer[i] + IM_END), np.int64)
        places = prompt.rope_positions(question, tokenizer.image_id, grid)
        following = places.max() + 1 + np.arange(len(answer))
        return {
            'input_ids': np.concatenate([question, answer]),
            'labels': np.concatenate([np.full(len(question), NO_TOKEN), answer]),
            'position_ids': np.concatenate([places, np.tile(following, (3, 1))], axis=1),
            'prompt_lengths': np.int64(len(question)),
        }


def _patch_numbers(model: DriverConfig) -> Int64[np.ndarray, 'H W']:
    """Return for each pixel of a view which patch it lies in, in the order of `vision.patchify`."""
    view = model.vision
    (rows, columns), merge = view.grid, view.merge
    order = np.arange(rows * columns).reshape(rows // merge, columns // merge, merge, merge)
    grid = order.transpose(0, 2, 1, 3).reshape(rows, columns)
    return np.kron(grid, np.ones((view.patch, view.patch), np.int64))


def _moment(state: Float[np.ndarray, 'P']) -> tuple[EgoState, Guidance]:
    """Return what a prompt says of the ego, from its proprioception."""
    at = {name: float(value) for name, value in zip(action.PROPRIO, state, strict=True)}
    command = next(one for one in COMMANDS if at[f'command_{one.value}'])
    near, far = (np.array([at[f'{name}_x'], at[f'{name}_y']]) for name in ('near', 'far'))
    ego = EgoState(x=0.0, y=0.0, yaw=0.0, speed=at['speed'])
    return ego, Guidance(near=near, far=far, command=command)


@dataclass(frozen=True, kw_only=True)
class Look:
    """A mild change of a moment's pictures that moves nothing."""

    gain: np.ndarray  # (3,) of the normalised colours
    offset: np.ndarray  # (3,)
    noise: float = 0.0  # standard deviation
    sigma: float = 0.0  # of the blur, pixels

    @classmethod
    def draw(cls, random: np.random.Generator | None, probability: float) -> 'Look':
        """Draw a change, or none with 1 - probability."""
        if random is None or random.random() >= probability:
            return cls(gain=np.ones(3, np.float32), offset=np.zeros(3, np.float32))
        gain = random.uniform(0.85, 1.18) * random.uniform(0.97, 1.03, 3)
        offset = random.uniform(-0.25, 0.25) + random.uniform(-0.05, 0.05, 3)
        return cls(
            gain=gain.astype(np.float32),
            offset=offset.astype(np.float32),
            noise=random.uniform(0.0, 0.08) if random.random() < 0.4 else 0.0,
            sigma=random.uniform(0.4, 0.9) if random.random() < 0.3 else 0.0,
        )

    def blur(self, frames: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        """Return the frames less sharp."""
        if not self.sigma:
            return frames
        return [cv2.GaussianBlur(frame, (3, 3), self.sigma) for frame in frames]

    def recolour(self, thumbnails: Float[np.ndarray, 'C 3 h w']) -> Float[np.ndarray, 'C 3 h w']:
        """Return normalised pictures brighter or darker, with more or less contrast."""
        return thumbnails * self.gain[:, None, None] + self.offset[:, None, None]


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
