"""The path that a clip's ego vehicle drove, as a corridor; and places along a polyline."""

import math

import numpy as np
from jaxtyping import Float

from mose_ros.core.types import Command, Corridor

LANE_WIDTH = 3.5  # m, of genuine Bench2Drive clips, which do not tell


def driven_corridor(
    track: Float[np.ndarray, 'N 2'], commands: list[Command], index: int, speed_limit: float = 14.0
) -> tuple[Corridor, float]:
    """Make a corridor around frame `index` from the path that was driven, and return where the ego is on it.

    `track` is the ego at each frame of the clip. Behind its ends the corridor goes straight on. One lane of 3.5 m; the
    curved parts where a turn was commanded count as junctions.
    """
    fresh = np.concatenate([[True], np.hypot(*np.diff(track, axis=0).T) > 0.02])
    along = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(track, axis=0).T))])
    s, points, which = along[fresh], track[fresh], np.flatnonzero(fresh)
    if len(points) < 2:
        raise ValueError('the ego vehicle never moves in this clip, so it has no driven path')
    first, last = _unit(points[:2]), _unit(points[-2:])
    stations = np.arange(along[index] - 10.0, along[index] + 81.0)
    xy = np.stack([np.interp(stations, s, points[:, axis]) for axis in (0, 1)], axis=1)
    xy += np.minimum(stations - s[0], 0.0)[:, None] * first
    xy += np.maximum(stations - s[-1], 0.0)[:, None] * last
    frames = which[np.clip(np.searchsorted(s, stations), 0, len(s) - 1)]
    asked = tuple(commands[frame] for frame in frames)
    heading = np.unwrap(np.arctan2(*np.gradient(xy, axis=0).T[::-1]))
    turning = np.abs(np.gradient(heading)) > 0.02
    turn = np.array([one in (Command.LEFT, Command.RIGHT) for one in asked])
    half = np.full(len(xy), LANE_WIDTH / 2)
    corridor = Corridor(
        xy=xy,
        left=half,
        right=half,
        own_left=half,
        lane_width=2 * half,
        junction=turning & turn,
        speed_limit=np.full(len(xy), speed_limit),
        commands=asked,
    )
    return corridor, 10.0


def _unit(segment: Float[np.ndarray, '2 2']) -> Float[np.ndarray, '2']:
    step = segment[1] - segment[0]
    return step / np.hypot(*step)


def point_at(xy: Float[np.ndarray, 'N 2'], s: float) -> tuple[float, float, float]:
    """Return x, y and heading at s metres along a polyline, straight on behind its ends."""
    steps = np.diff(xy, axis=0)
    along = np.concatenate([[0.0], np.cumsum(np.hypot(*steps.T))])
    index = int(np.clip(np.searchsorted(along, s, side='right') - 1, 0, len(steps) - 1))
    heading = math.atan2(steps[index, 1], steps[index, 0])
    rest = s - along[index]
    x, y = xy[index]
    return float(x + rest * math.cos(heading)), float(y + rest * math.sin(heading)), heading


def distance_along(xy: Float[np.ndarray, 'N 2'], x: float, y: float) -> float:
    """Return how far along a polyline the point of it lies that is nearest to (x, y)."""
    steps = np.diff(xy, axis=0)
    length = np.maximum(np.hypot(*steps.T), 1e-9)
    rest = np.clip(np.einsum('nk,nk->n', (x, y) - xy[:-1], steps) / length, 0.0, length)
    foot = xy[:-1] + steps * (rest / length)[:, None]
    best = int(np.argmin(np.hypot(*(foot - (x, y)).T)))
    return float(length[:best].sum() + rest[best])
