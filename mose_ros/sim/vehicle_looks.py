"""How vehicles look: bodies of boxes and lofts, with lamps larger than life, since a network sees them in a few pixels.

A look takes the size (length, width, height), the actor's state and a generator for what is left to chance.
"""

import numpy as np

from mose_ros.sim import meshes
from mose_ros.sim.materials import BUMPER, GLASS, RED, WHITE, mix, pick
from mose_ros.sim.meshes import Color, Mesh, Size

_RUBBER = (0.07, 0.07, 0.08)
_SHADOW = (0.13, 0.13, 0.14)
_CAR_PAINTS = (
    (0.90, 0.90, 0.91),
    (0.70, 0.72, 0.75),
    (0.40, 0.42, 0.45),
    (0.16, 0.17, 0.20),
    (0.13, 0.25, 0.55),
    (0.25, 0.48, 0.74),
    (0.50, 0.09, 0.12),
    (0.12, 0.38, 0.30),
    (0.76, 0.66, 0.48),
    (0.85, 0.52, 0.14),
)
_CARGO_PAINTS = ((0.86, 0.86, 0.84), (0.88, 0.78, 0.50), (0.42, 0.56, 0.70), (0.52, 0.62, 0.48))


def _shadow(length, width):
    ring = meshes.rectangle(-length / 2 - 0.1, length / 2 + 0.1, -width / 2, width / 2, 0.01)
    return meshes.polygons(ring[None], _SHADOW, glow=True)


def _wheels(length, width, radius):
    """Return four dark discs, a little proud of the body's sides."""
    parts = []
    for x in (-0.30 * length, 0.31 * length):
        angle = np.arange(8) * (np.pi / 4)
        ring = np.stack(
            [x + radius * np.cos(angle), 0 * angle, radius + radius * np.sin(angle)], 1
        )
        for side in (-1, 1):
            disc = ring + (0, side * (width / 2 + 0.02), 0)
            parts.append(meshes.polygons((disc if side < 0 else disc[::-1])[None], _RUBBER))
    return parts


def _rear_lamps(length, width, z, state, *, size=(0.40, 0.20)):
    """Return the tail lights: dull when cruising, large and glaring when braking."""
    braking = state == 'braking'
    wide, high = (size[0] * 1.25, size[1] * 1.5) if braking else size
    color = (1.0, 0.06, 0.04) if braking else (0.50, 0.03, 0.04)
    x = -length / 2 - 0.03
    return [
        meshes.upright(
            meshes.panel(y - wide / 2, y + wide / 2, z - high / 2, z + high / 2),
            x,
            color,
            glow=braking,
        )
        for y in (-width / 2 + wide / 2, width / 2 - wide / 2)
    ]


def _front_lamps(length, width, z):
    x = length / 2 + 0.03
    return [
        meshes.upright(
            meshes.panel(y - 0.2, y + 0.2, z - 0.11, z + 0.11),
            x,
            (1.0, 1.0, 0.90),
            glow=True,
            facing=1,
        )
        for y in (-width / 2 + 0.24, width / 2 - 0.24)
    ]


def car(size: Size, state: str, rng: np.random.Generator, paint: Color | None = None) -> Mesh:
    """Return a car: body, glass, lamps, and a plate behind."""
    length, width, height = size
    paint = paint or pick(rng, _CAR_PAINTS)
    half, side = length / 2, width / 2
    waist, eaves = 0.60 * height, 0.94 * height
    body = meshes.loft(
        [
            meshes.rectangle(-half * 0.97, half * 0.97, -side * 0.95, side * 0.95, 0.15 * height),
            meshes.rectangle(-half, half, -side, side, 0.34 * height),
            meshes.rectangle(-half, half * 0.99, -side, side, 0.50 * height),
            meshes.rectangle(-half * 0.97, half * 0.93, -side * 0.95, side * 0.95, waist),
        ],
        paint,
    )
    foot = meshes.rectangle(-0.40 * length, 0.25 * length, -side * 0.93, side * 0.93, waist)
    top = meshes.rectangle(-0.29 * length, 0.10 * length, -side * 0.74, side * 0.74, eaves)
    roof = top + (0, 0, height - eaves)
    parts = [
        _shadow(length, width),
        body,
        meshes.loft([foot, top], GLASS),
        meshes.loft([top * (1.02, 1.02, 1), roof], paint),
        *_wheels(length, width, 0.33),
        *_rear_lamps(length, width, 0.44 * height, state),
        *_front_lamps(length, width, 0.43 * height),
        meshes.upright(
            meshes.panel(-side * 0.9, side * 0.9, 0.16 * height, 0.29 * height),
            -half - 0.02,
            BUMPER,
        ),
        meshes.upright(
            meshes.panel(-0.26, 0.26, 0.31 * height, 0.39 * height), -half - 0.03, WHITE
        ),
        meshes.upright(
            meshes.panel(-side * 0.62, side * 0.62, 0.20 * height, 0.38 * height),
            half + 0.02,
            BUMPER,
            facing=1,
        ),
    ]
    if state == 'braking':  # the third brake light, on the rear window's lower edge
        ring = meshes.panel(-0.35, 0.35, waist + 0.02, waist + 0.16)
        parts.append(meshes.upright(ring, -0.405 * length, (1.0, 0.06, 0.04), glow=True))
    return meshes.join(parts)


def truck(size: Size, state: str, rng: np.random.Generator) -> Mesh:
    """Return a truck: a cabin, and a box with doors behind."""
    length, width, height = size
    half, side = length / 2, width / 2
    paint, cargo = pick(rng, _CAR_PAINTS), pick(rng, _CARGO_PAINTS)
    nose = half - max(1.6, 0.22 * length)  # x where the cabin ends
    cabin_top = 0.82 * height
    foot = meshes.rectangle(nose + 0.1, half, -side * 0.97, side * 0.97, 0.45)
    waist = meshes.rectangle(nose + 0.1, half, -side * 0.97, side * 0.97, 0.50 * height)
    brow = meshes.rectangle(nose + 0.1, half * 0.95, -side * 0.92, side * 0.92, cabin_top - 0.15)
    return meshes.join(
        [
            _shadow(length, width),
            meshes.box(-half, half, -side * 0.9, side * 0.9, 0.40, 0.75, BUMPER),
            meshes.box(-half, nose, -side, side, 0.75, height, cargo),
            meshes.loft([foot, waist], paint),
            meshes.loft([waist, brow], GLASS),
            meshes.loft([brow, brow + (0, 0, 0.15)], paint),
            *_wheels(length, width, 0.48),
            *_rear_lamps(length, width, 0.62, state, size=(0.48, 0.26)),
            *_front_lamps(length, width, 0.72),
            meshes.upright(
                meshes.panel(-side * 0.9, side * 0.9, 0.85, height - 0.12),
                -half - 0.02,
                mix(cargo, (0, 0, 0), 0.25),
            ),  # the doors, darker than the walls
            meshes.upright(meshes.panel(-0.03, 0.03, 0.85, height - 0.12), -half - 0.04, BUMPER),
            meshes.upright(
                meshes.panel(-side * 0.7, side * 0.7, 0.5, 0.33 * height),
                half + 0.02,
                BUMPER,
                facing=1,
            ),
        ]
    )


def emergency(size: Size, state: str, rng: np.random.Generator) -> Mesh:
    """Return an ambulance: white van, red bands, blue beacons that stand above the box of its size."""
    length, width, height = size
    half, side = length / 2, width / 2
    beacon = (0.10, 0.35, 1.0) if state == 'siren' else (0.10, 0.16, 0.45)
    waist, hood = 0.52 * height, 0.16 * length
    body = meshes.loft(
        [
            meshes.rectangle(-half, half, -side, side, 0.16 * height),
            meshes.rectangle(-half, half, -side, side, waist),
        ],
        WHITE,
    )
    glass = [
        meshes.rectangle(-half, half - 0.35 * hood, -side, side, waist),
        meshes.rectangle(-half, half - hood, -side * 0.94, side * 0.94, 0.90 * height),
    ]
    rear = meshes.rectangle(-half - 0.01, hood, -side - 0.01, side + 0.01, waist)
    rear_top = meshes.rectangle(-half - 0.01, hood, -side - 0.01, side + 0.01, 0.92 * height)
    parts = [
        _shadow(length, width),
        body,
        meshes.loft(glass, GLASS),
        meshes.loft([rear, rear_top], WHITE),
        meshes.box(
            -half, half - 1.1 * hood, -side * 0.95, side * 0.95, 0.90 * height, height, WHITE
        ),
        meshes.box(
            -half - 0.02,
            half + 0.02,
            -side - 0.02,
            side + 0.02,
            0.36 * height,
            0.52 * height,
            RED,
        ),
        *_wheels(length, width + 0.06, 0.36),
        *_rear_lamps(length + 0.04, width, 0.27 * height, state),
        *_front_lamps(length + 0.04, width, 0.27 * height),
        meshes.upright(
            meshes.panel(-side * 0.6, side * 0.6, 0.60 * height, 0.84 * height),
            -half - 0.03,
            GLASS,
        ),
    ]
    for x in (-half + 0.25, half - 1.5 * hood):
        for y in (-side * 0.55, side * 0.55):
            ring = (x - 0.18, x + 0.18, y - 0.30, y + 0.30, height, height + 0.32)
            parts.append(meshes.box(*ring, beacon, glow=state == 'siren'))
    return meshes.join(parts)
