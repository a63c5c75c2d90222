"""From annotated clips to batches: the index over frames, the sample of one frame, and the order in which they come.

Everything about a sample is decided by the seed, the step and the place in the batch, so a stopped training goes on with
exactly the samples that it would have seen. Pictures go through `core.vision` and prompts through `core.prompt`, as on the vehicle.
"""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int64

from mose_ros.training import annotate
from mose_ros.training.config import Data

IGNORED = -100  # a target that no loss looks at


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

    def __len__(self) -> int:
        return len(self.clip)

    @classmethod
    def load(cls, root: str | Path, model: Any) -> 'Index':
        """Read the labels of all annotated clips; ValueError when there are none or they belong to another model."""
        root = Path(root)
        names = tuple(sorted(path.parent.name for path in root.glob(f'*/{annotate.LABELS}')))
        if not names:
            raise ValueError(
                f'{root} holds no annotated clip; run `python -m mose_ros.training annotate` first'
            )
        rows: dict[str, list] = {key: [] for key in _KEYS}
        clip, shared = [], {}
        for index, name in enumerate(names):
            for line in (root / name / annotate.LABELS).read_text(encoding='utf-8').splitlines():
                record = json.loads(line)
                clip.append(index)
                for key in _KEYS:
                    value = record[key]
                    rows[key].append(
                        shared.setdefault(value, value) if isinstance(value, str) else value
                    )
        levels = model.levels
        acting = list(model.action_skills)
        try:
            skills = [
                [list(levels[level]).index(one[level]) for level in levels]
                for one in rows['skills']
            ]
            action_skill = [
                acting.index(one[list(levels)[-1]]) if one[list(levels)[-1]] in acting else IGNORED
                for one in rows['skills']
            ]
        except (KeyError, ValueError) as error:
            raise ValueError(
                f'{root}: the labels name skills that the model does not have ({error}); annotate again'
            ) from None
        trajectories = np.asarray(rows['action'], np.float32)
        if trajectories.shape[1:] != (model.horizon, 2):
            raise ValueError(
                f'{root}: trajectories of {trajectories.shape[1]} points, the model plans {model.horizon}; annotate again'
            )
        return cls(
            root=root,
            clips=names,
            clip=np.asarray(clip),
            frame=np.asarray(rows['frame']),
            older=np.asarray(rows['older']),
            camera=tuple(rows['camera']),
            answer=tuple(rows['answer']),
            proprio=np.asarray(rows['proprio'], np.float32),
            action=trajectories,
            skills=np.asarray(skills),
            action_skill=np.asarray(action_skill),
            weight=np.asarray(rows['weight'], np.float32),
            family=tuple(rows['family']),
        )

    def split(self, validation: bool, config: Data) -> Int64[np.ndarray, 'M']:
        """Return the frames of the training or of the validation clips; a clip is wholly on one side."""
        order = np.random.default_rng(config.seed).permutation(len(self.clips))
        count = max(1, round(config.validation_share * len(order))) if len(order) > 1 else 0
        held = np.isin(self.clip, order[:count])
        return np.flatnonzero(held if validation else ~held)

    def chances(
        self, frames: Int64[np.ndarray, 'M'], config: Data, levels: int
    ) -> Float[np.ndarray, 'M']:
        """Return the probability of each frame to be drawn, balanced over (family, planning skill)."""
        classes = [(self.family[i], int(self.skills[i, levels - 1])) for i in frames]
        counts = Counter(classes)
        weights = np.asarray([counts[one] ** -config.balance for one in classes])
        weights = np.minimum(weights / weights.mean(), config.max_weight) * self.weight[frames]
        return weights / weights.sum()


_KEYS = (
    'frame',
    'older',
    'camera',
    'answer',
    'proprio',
    'action',
    'skills',
    'weight',
    'family',
)
