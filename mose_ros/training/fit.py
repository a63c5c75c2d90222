"""What a network was fitted to, beside its weights: text, scales and views. It lies in every checkpoint, so that one can be exported alone.

A checkpoint is the folder of `MoseDriver.save` with `fit.json` and, unless the language model came without one, `tokenizer.json`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from mose_ros.core import action
from mose_ros.core.action import Normalizer
from mose_ros.core.bundle import TOKENIZER
from mose_ros.core.files import write_json
from mose_ros.modeling.config import ActionConfig
from mose_ros.training import annotate
from mose_ros.training.config import Data, differences, resolve
from mose_ros.training.presets import Training

FIT = 'fit.json'
VIEWS = ('fixed_views', 'top_k', 'frame_gap', 'history')  # of Data: what the network looks at
REACH = (15.0, 3.0)  # m/s ahead and across: scales of an action that no data has shown
RANGES = {  # SI: likewise of proprioception; commands are 0 or 1
    'speed': (0.0, 15.0),
    'acceleration': (-4.0, 4.0),
    'yaw_rate': (-0.6, 0.6),
    'since_stop': (0.0, action.SINCE_STOP_MAX_M),
    'near_x': (0.0, 10.0),
    'near_y': (-10.0, 10.0),
    'far_x': (0.0, 25.0),
    'far_y': (-25.0, 25.0),
}
UNFITTED = 'defaults, as no data has trained this action expert: up to 15 m/s ahead, 3 m/s across'


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What fit.json says."""

    action_low: Sequence[Sequence[float]]  # (H, 2), m
    action_high: Sequence[Sequence[float]]
    proprio_low: Sequence[float]  # (P), SI
    proprio_high: Sequence[float]
    fixed_views: Sequence[str]
    top_k: int
    frame_gap: float  # s
    history: str
    training: Mapping[str, Any] = field(default_factory=dict)  # the resolved settings of the run
    data: Mapping[str, Any] = field(default_factory=dict)  # what it was trained on, in numbers

    @property
    def action(self) -> Normalizer:
        """Return the scales of the trajectory."""
        return Normalizer(_f32(self.action_low), _f32(self.action_high))

    @property
    def proprio(self) -> Normalizer:
        """Return the scales of the proprioception."""
        return Normalizer(_f32(self.proprio_low), _f32(self.proprio_high))

    @classmethod
    def to_data(cls, root: Path, training: Training) -> 'Fit':
        """Return the fit of what is trained on annotated clips; ValueError when the folder is none."""
        path = root / annotate.DATASET
        if not path.is_file():
            raise ValueError(
                f'{path} is missing; annotate the clips, or name their folder by --data'
            )
        known = json.loads(path.read_text(encoding='utf-8'))
        return cls(
            **{name: known[name] for name in _SCALES},
            **{name: resolve(training.data)[name] for name in VIEWS},
            training=resolve(training),
            data={name: known[name] for name in ('clips', 'frames', 'counts')},
        )

    @classmethod
    def to_nothing(cls, config: ActionConfig) -> 'Fit':
        """Return the fit of an action expert that no data has trained: plain scales that fit a car in town."""
        times = config.dt * np.arange(1, config.horizon + 1)[:, None]
        ranges = [RANGES.get(name, (0.0, 1.0)) for name in action.PROPRIO]
        ahead, across = REACH
        return cls(
            action_low=(times * [-0.1 * ahead, -across]).round(6).tolist(),
            action_high=(times * [ahead, across]).round(6).tolist(),
            proprio_low=[low for low, _ in ranges],
            proprio_high=[high for _, high in ranges],
            **{name: resolve(Data())[name] for name in VIEWS},
            data={'scales': UNFITTED},
        )

    @classmethod
    def load(cls, checkpoint: str | Path) -> 'Fit':
        """Read the fit of a checkpoint; ValueError names the file and what is wrong with it."""
        path = Path(checkpoint) / FIT
        try:
            data = json.loads(path.read_text(encoding='utf-8'))
            if lost := [one.name for one in fields(cls) if one.name not in data]:
                raise ValueError(f'it lacks {", ".join(lost)}')
            return cls(**data)
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f'{path} cannot be read: {error}') from None

    def differences(self, data: Data) -> list[str]:
        """Return in words which views of other settings are not the fit's."""
        there = {name: resolve(data)[name] for name in VIEWS}
        own = {name: resolve(self)[name] for name in VIEWS}
        return list(differences(own, there, 'data'))

    def seen_by(self, data: Data) -> Data:
        """Return settings of samples with the views that the network looks at."""
        views = {name: getattr(self, name) for name in VIEWS}
        return replace(data, **{**views, 'fixed_views': tuple(self.fixed_views)})

    def save(self, checkpoint: str | Path, tokenizer: Path | None) -> None:
        """Write the fit into a checkpoint's folder, and the tokenizer, if there is one, beside it."""
        if tokenizer is not None:
            (Path(checkpoint) / TOKENIZER).write_bytes(tokenizer.read_bytes())
        write_json(Path(checkpoint) / FIT, asdict(self))


_SCALES = ('action_low', 'action_high', 'proprio_low', 'proprio_high')


def _f32(values: Sequence) -> np.ndarray:
    return np.asarray(values, np.float32)
