"""What the ground looks like: the static part of a scenario, made by the world, drawn by the renderer. World frame, metres."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from mose_ros.core.types import Actor


@dataclass(frozen=True, kw_only=True)
class Surface:
    """A strip of ground between two polylines of equally many points."""

    left: Float[np.ndarray, 'N 2']
    right: Float[np.ndarray, 'N 2']
    kind: str = 'road'  # 'road' | 'sidewalk' | 'parking'


@dataclass(frozen=True, kw_only=True)
class Paint:
    """A painted line along a polyline: lane lines, stop lines, the stripes of a crosswalk."""

    points: Float[np.ndarray, 'N 2']
    color: str = 'white'  # 'white' | 'yellow'
    broken: bool = False
    width: float = 0.15


@dataclass(frozen=True, kw_only=True)
class RoadMap:
    """All that stands still and is drawn once per scenario. Lights and signs are actors, since their state changes."""

    surfaces: Sequence[Surface]
    paint: Sequence[Paint]
    scenery: Sequence[Actor]  # kind 'static': static.building, static.tree, static.lamp
    seed: int = 0  # of the colours and the light
