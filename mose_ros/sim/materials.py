"""Colours that several looks share, and how to mix and to choose them."""

from collections.abc import Sequence

import numpy as np

from mose_ros.sim.meshes import Color

GLASS = (0.10, 0.13, 0.17)
BUMPER = (0.20, 0.20, 0.22)
METAL = (0.42, 0.43, 0.45)
WHITE = (0.95, 0.95, 0.95)
RED = (0.82, 0.07, 0.07)


def mix(a: Color, b: Color, share: float) -> Color:
    """Return the colour that lies that share of the way from a to b."""
    return tuple(float(u + (v - u) * share) for u, v in zip(a, b, strict=True))


def pick(rng: np.random.Generator, colors: Sequence[Color]) -> Color:
    """Return one of the colours."""
    return colors[int(rng.integers(len(colors)))]
