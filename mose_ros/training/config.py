"""Typed settings of collecting and of samples, and how the command line changes settings of any kind.

Free of torch, so that the processes that record start fast; whole runs are in `presets`.
"""

import dataclasses
import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, get_type_hints

import yaml

from mose_ros.core.types import FAMILIES

FLOW_STEPS = 3  # where a trajectory is drawn to be judged, and in a bundle
EVALUATION_SEEDS = 20000  # from here on a seed is for judging and never trained on


@dataclass(frozen=True, kw_only=True)
class Collect:
    """How driving is recorded: which episodes, how the car is disturbed, what is stored."""

    families: tuple[str, ...] = FAMILIES
    seeds: str = '0-399'  # see `seeds_of`; all below EVALUATION_SEEDS
    processes: int = 2
    stride: int = 2  # every n-th step of 0.1 s is stored
    max_seconds: float = 90.0  # of driving; an episode that takes longer is cut
    software_share: float = 0.25  # of episodes drawn by the software rasteriser
    disturbed_share: float = 0.8  # of episodes in which the car is pushed off its plan
    disturb_every: float = 5.0  # s between the ends of bursts, on average
    disturb_seconds: float = 0.9  # length of a burst, on average
    disturb_lateral: float = 1.0  # m/s^2 across, standard deviation of what a burst adds
    disturb_lengthwise: float = 1.2  # m/s^2 along
    semantics_every: int = (
        0  # every n-th stored frame has class pictures, for the auxiliary loss; 0: none
    )
    policy: str = ''  # a bundle that drives (DAgger); labels stay the expert's
    round: int = 0  # DAgger round, part of the clip's name
    expert_share: float = 0.3  # of the time the expert drives although a policy is given
    jpeg_quality: int = 90


@dataclass(frozen=True, kw_only=True)
class Data:
    """How samples are made of recorded frames."""

    fixed_views: tuple[str, ...] = ('front',)  # looked at always; the first is the anchor
    top_k: int = 1  # views that are looked at beside them
    frame_gap: float = 0.4  # s between the frames of a view
    history: str = 'all'  # views that show the frame before: 'all', 'fixed' (DriveMoE), 'none'; others show now twice
    future: str = (
        'expert'  # 'expert': the trajectory is its plan; 'driven': what was driven afterwards
    )
    standing_weight: float = 0.3  # of frames at rest for longer than 4 s whose plan stays there
    validation_share: float = 0.04  # of clips
    share: float = (
        1.0  # of the other clips that is trained on; a smaller share lies within a larger one
    )
    seed: int = 0
    workers: int = 2  # threads that decode beside the training; 0 decodes in between
    other_view: float = (
        0.10  # probability that a view beside the fixed ones is not the labelled one
    )
    fixed_alone: float = 0.06  # of batches that look at the fixed views alone
    cameras_missing: float = (
        0.3  # of those: that all other cameras are missing, as with a single camera's video
    )
    still: float = 0.05  # that the older frame equals the newer, as at the start of an episode
    photometric: float = 0.5  # that a picture is changed in brightness, contrast, noise, sharpness
    balance: float = (
        0.5  # 0 = as recorded, 1 = every (family, planning skill, motion) equally often
    )
    max_weight: float = 6.0  # a rare class is drawn at most that many times as often as it occurs
    shards_at_once: int = 0  # of packed data: shards that samples are drawn from at a time; 0: all


def override(config: Any, settings: Sequence[str]) -> Any:
    """Return the config with each `path.to.field=value` applied; ValueError names the nearest fields otherwise."""
    for setting in settings:
        path, separator, text = setting.partition('=')
        if not separator:
            raise ValueError(f'{setting!r}: expected stage.field=value')
        config = _replace(config, path.strip().split('.'), text.strip(), setting)
    return config


def _replace(config: Any, path: list[str], text: str, setting: str) -> Any:
    name, *rest = path
    names = [one.name for one in fields(config)]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names
        raise ValueError(f'{setting!r}: no field {name!r}; did you mean {", ".join(near)}?')
    current = getattr(config, name)
    if is_dataclass(current):
        if not rest:
            inner = ', '.join(one.name for one in fields(current))
            raise ValueError(f'{setting!r}: {name} has fields of its own: {inner}')
        return replace(config, **{name: _replace(current, rest, text, setting)})
    if rest:
        raise ValueError(f'{setting!r}: {name} has no field {rest[0]!r}')
    is_float = get_type_hints(type(config))[name] is float  # a preset may say 0 for 0.0
    return replace(
        config, **{name: _parse(text, float(current) if is_float else current, setting)}
    )


def _parse(text: str, current: Any, setting: str) -> Any:
    if isinstance(current, str):
        return text
    if isinstance(current, float):
        try:
            return float(text)
        except ValueError:
            raise ValueError(f'{setting!r}: {text!r} is no number') from None
    value = _tuples(yaml.safe_load(text))
    if isinstance(current, tuple) and isinstance(value, str):
        value = tuple(part.strip() for part in value.split(','))
    if current is not None and not isinstance(value, type(current)):
        raise ValueError(
            f'{setting!r}: expected {type(current).__name__}, as {current!r}, got {text!r}'
        )
    return value


def _tuples(value: Any) -> Any:
    return tuple(_tuples(one) for one in value) if isinstance(value, list) else value


def resolve(config: Any) -> Any:
    """Return the config as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def differences(old: Any, new: Any, path: str = '') -> Iterator[str]:
    """Yield `field: old -> new` for each difference of two resolved configs."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in dict.fromkeys([*old, *new]):
            yield from differences(
                old.get(key), new.get(key), f'{path}.{key}' if path else str(key)
            )
    elif old != new:
        yield f'{path}: {old} -> {new}'


def filled(old: Any, defaults: Any) -> Any:
    """Return a resolved config with the fields that it lacks, at any depth, taken from the defaults."""
    if not (isinstance(old, Mapping) and isinstance(defaults, Mapping)):
        return old
    known = {key: filled(value, defaults.get(key)) for key, value in old.items()}
    return {**{key: value for key, value in defaults.items() if key not in old}, **known}


def digest(config: Any) -> str:
    """Return a short hash of a resolved config."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]


def parse_seeds(text: str) -> tuple[int, ...]:
    """Return the seeds of `0-399`, `7` or `0-9,20-29`; ValueError for anything else and for evaluation's seeds."""
    seeds: dict[int, None] = {}
    for part in text.split(','):
        match = re.fullmatch(r'(\d+)(?:-(\d+))?', part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first:
            raise ValueError(f'seeds {text!r}: expected `0-399`, `7` or `0-9,20-29`')
        seeds.update(dict.fromkeys(range(first, last + 1)))
    if max(seeds) >= EVALUATION_SEEDS:
        raise ValueError(
            f'seeds {text!r}: from {EVALUATION_SEEDS} on they are kept for evaluation; take lower ones'
        )
    return tuple(seeds)


def seeds_of(text: str, family: str) -> tuple[int, ...]:
    """Return a family's seeds of `0-99;parking_exit:0-299`: its own, or those that name no family; none where there are none.

    ValueError as of `parse_seeds`, and for a family that is not known or named twice.
    """
    named: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(';'))):
        name, colon, seeds = part.rpartition(':')
        name = name.strip()
        if name in named or (colon and name not in FAMILIES):
            raise ValueError(f'seeds {text!r}: {name or "all"!r} is named twice or unknown')
        named[name] = seeds
    if not named:
        raise ValueError(f'seeds {text!r}: none are named; as `0-99` or `0-99;normal:0-29`')
    found = {name: parse_seeds(seeds) for name, seeds in named.items()}
    return found.get(family, found.get('', ()))
