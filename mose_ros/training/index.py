"""The index over all annotated frames of a data set: their labels as arrays, which of them are trained on, and how often.

It knows nothing of pictures and of batches: `samples` and `batches` do.
"""

import logging
import sys
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int64

from mose_ros.core import action
from mose_ros.data import storage
from mose_ros.data.storage import Anywhere
from mose_ros.modeling.config import DriverConfig
from mose_ros.training import annotate, collect
from mose_ros.training.config import Data

_LOG = logging.getLogger(__name__)
UNKNOWN = -1  # a label that no loss looks at
STANDS = 0.3  # m/s; a slower car is at rest
BRAKES = 0.6  # a plan that gets less far than this share of going on at the speed of now


@dataclass(frozen=True, kw_only=True)
class Index:
    """All annotated frames of a data set, as arrays; frame i of N."""

    root: Anywhere
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
    shard: tuple[int, ...] = ()  # that each clip lies in, of a packed data set

    def __len__(self) -> int:
        return len(self.clip)

    @classmethod
    def load(cls, root: str | Anywhere, model: DriverConfig, rounds: int = 0) -> 'Index':
        """Read the labels of all annotated clips up to a DAgger round; ValueError when none are there or they fit another model."""
        root = storage.place(root)
        names = annotate.labelled(root)
        names = tuple(name for name in names if collect.round_of(name) <= rounds)
        if not names:
            raise ValueError(
                f'{root} holds no annotated clip; run `python -m mose_ros.training annotate` first'
            )
        records, clip, broken = [], [], []
        for index, name in enumerate(names):
            found, lost = annotate.read_labels(root, name)
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
        skills, acting = _experts(column['skills'], model)
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
            skills=skills,
            action_skill=acting,
            weight=np.asarray(column['weight'], np.float32),
            family=tuple(map(sys.intern, column['family'])),
            seconds=model.action.horizon * model.action.dt,
            broken=tuple(broken),
            shard=storage.shards_of(root, names),
        )

    def only(
        self, labels: Mapping[tuple[str, int], Mapping[str, str]], model: DriverConfig
    ) -> 'Index':
        """Return the frames that have skill labels, by clip and frame, with these; ValueError where none is here.

        The clips stay, so each is on the side of the split where it was.
        """
        names = [
            (self.clips[clip], int(frame))
            for clip, frame in zip(self.clip, self.frame, strict=True)
        ]
        kept = np.array([place for place, name in enumerate(names) if name in labels], int)
        if not len(kept):
            raise ValueError(
                f'none of {len(labels)} skill labels is of a frame of {self.root}, as {next(iter(labels), None)}; '
                'name the labels of this data'
            )
        if len(kept) < len(labels):
            _LOG.warning(
                '%d of %d skill labels are of no annotated frame of %s',
                len(labels) - len(kept),
                len(labels),
                self.root,
            )
        skills, acting = _experts([labels[names[place]] for place in kept], model)
        rows = {
            one: getattr(self, one)[kept]
            for one in ('clip', 'frame', 'older', 'proprio', 'action', 'weight')
        }
        words = {
            one: tuple(getattr(self, one)[place] for place in kept)
            for one in ('camera', 'answer', 'family')
        }
        return replace(self, **rows, **words, skills=skills, action_skill=acting)

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
        places = np.array([place_in_split(name, config.seed) for name in self.clips])
        order = np.argsort(places)
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
        if not len(frames):
            raise ValueError(
                f'{self.root}: none of the {len(self)} frames is of a clip for training'
            )
        if not skill_labels:
            return frames, self.chances(frames, config)
        frames = self.labelled(frames, skill_labels, seed)
        return frames, np.full(len(frames), 1 / len(frames))


def _experts(
    skills: Sequence[Mapping[str, str]], model: DriverConfig
) -> tuple[Int64[np.ndarray, 'N S'], Int64[np.ndarray, 'N']]:
    """Return the experts of skills by level, and the action experts of the last level's."""
    levels = model.mose.levels
    places = [[place_of(one[level], levels[level]) for level in levels] for one in skills]
    acting = [place_of(one[list(levels)[-1]], model.action.skills) for one in skills]
    return np.asarray(places), np.asarray(acting)


def place_in_split(clip: str, seed: int) -> float:
    """Return from 0 to 1 where a clip stands: those for validation come first, then those of a smaller share.

    By a hash of the name, so more clips, in any order, never move one to the other side.
    """
    return zlib.crc32(f'{seed}:{clip}'.encode()) / 2**32


def place_of(name: str, names: Sequence[str]) -> int:
    """Return where a name stands, or UNKNOWN."""
    return list(names).index(name) if name in names else UNKNOWN
