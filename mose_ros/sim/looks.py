"""How things look: the mesh of every kind of actor and scenery, and the light of a map. Knows no renderer.

A mesh stands at the origin, looks along +x and fits the actor's size. Lights and signs are larger than life, and so are
lamps of vehicles: a network sees them in a few pixels. Traffic lights and signs show their face to -x, to the drivers
who travel along their yaw.
"""

import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8

from mose_ros.core.types import Actor
from mose_ros.sim import meshes
from mose_ros.sim.meshes import Color, Mesh

CLASSES = (
    'sky',
    'ground',
    'road',
    'sidewalk',
    'parking',
    'line',
    'vehicle',
    'walker',
    'traffic_light',
    'traffic_sign',
    'obstacle',
    'building',
    'vegetation',
    'pole',
)  # a pixel of Renderer.semantics is an index into this

PAINT: dict[str, Color] = {'white': (0.96, 0.96, 0.94), 'yellow': (0.98, 0.77, 0.10)}
LAMPS: dict[str, Color] = {
    'red': (1.0, 0.08, 0.05),
    'yellow': (1.0, 0.80, 0.05),
    'green': (0.05, 0.95, 0.35),
}  # top to bottom

_GLASS = (0.10, 0.13, 0.17)
_RUBBER = (0.07, 0.07, 0.08)
_BUMPER = (0.20, 0.20, 0.22)
_METAL = (0.42, 0.43, 0.45)
_SHADOW = (0.13, 0.13, 0.14)
_WHITE = (0.95, 0.95, 0.95)
_RED = (0.82, 0.07, 0.07)
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
_SHIRTS = (
    (0.93, 0.22, 0.18),
    (0.98, 0.80, 0.12),
    (0.15, 0.50, 0.95),
    (0.95, 0.95, 0.95),
    (0.98, 0.48, 0.10),
    (0.85, 0.25, 0.70),
    (0.20, 0.75, 0.70),
)
_TROUSERS = ((0.12, 0.14, 0.25), (0.15, 0.15, 0.16), (0.35, 0.28, 0.20), (0.30, 0.34, 0.42))
_SKINS = ((0.93, 0.74, 0.60), (0.76, 0.55, 0.40), (0.48, 0.32, 0.23))
_WALLS = (
    (0.76, 0.70, 0.60),
    (0.62, 0.36, 0.28),
    (0.70, 0.71, 0.72),
    (0.80, 0.77, 0.70),
    (0.50, 0.55, 0.60),
    (0.72, 0.56, 0.42),
)


@dataclass(frozen=True, kw_only=True)
class Light:
    """The light and the tints of one map, all from its seed."""

    sun: tuple[float, float, float]  # unit vector to the sun
    brightness: float
    zenith: Color
    horizon: Color
    grass: Color
    asphalt: Color
    pavement: Color

    @classmethod
    def of(cls, seed: int) -> 'Light':
        """Return the light of that seed: mild changes, the same on every machine."""
        rng = np.random.default_rng(zlib.crc32(f'light:{seed}'.encode()))
        azimuth, height = rng.uniform(0, 2 * np.pi), np.deg2rad(rng.uniform(30, 65))
        cloud = rng.uniform(0, 1)  # 0 = blue sky, 1 = pale
        tint = rng.uniform(-1, 1, 3)
        grey = rng.uniform(0.25, 0.33)
        return cls(
            sun=(
                float(np.cos(azimuth) * np.cos(height)),
                float(np.sin(azimuth) * np.cos(height)),
                float(np.sin(height)),
            ),
            brightness=float(rng.uniform(0.90, 1.06)),
            zenith=_mix((0.30, 0.52, 0.86), (0.62, 0.68, 0.76), cloud),
            horizon=_mix((0.78, 0.87, 0.95), (0.84, 0.85, 0.86), cloud),
            grass=(0.31 + 0.05 * tint[0], 0.47 + 0.04 * tint[1], 0.20 + 0.04 * tint[2]),
            asphalt=(grey, grey, grey + 0.015),
            pavement=_mix((0.60, 0.58, 0.54), (0.68, 0.66, 0.64), rng.uniform(0, 1)),
        )

    def shade(self, mesh: Mesh, *, turns: bool = False) -> UInt8[np.ndarray, 'N 3']:
        """Return the lit colours; what `turns` is lit from its own front-left above, whatever its yaw."""
        sun = np.array((0.42, 0.30, 0.85) if turns else self.sun)
        fall = np.maximum(0, mesh.normals @ (sun / np.linalg.norm(sun)))
        sky = 0.5 + 0.5 * mesh.normals[:, 2]
        # Road users get the softer light: their colours must be told from any side.
        base, sunny = (0.64, 0.28) if turns else (0.50, 0.42)
        level = self.brightness * (base + 0.14 * sky + sunny * fall)
        level = np.where(mesh.glow, 1.0, level)
        return np.rint(255 * np.clip(mesh.colors * level[:, None], 0, 1)).astype(np.uint8)


def _mix(a, b, share):
    return tuple(float(u + (v - u) * share) for u, v in zip(a, b, strict=True))


def class_of(actor: Actor) -> str:
    """Return the name of the actor's class, one of CLASSES."""
    if actor.kind == 'static':
        return {
            'static.building': 'building',
            'static.tree': 'vegetation',
            'static.lamp': 'pole',
        }.get(actor.type_id, 'obstacle')
    return actor.kind


def mesh_of(actor: Actor, seed: int = 0) -> Mesh:
    """Return the actor's mesh in its own frame; its colours come from its id and the seed."""
    choice = zlib.crc32(f'{seed}:{actor.id}'.encode())
    size = tuple(round(float(side), 2) for side in actor.size)
    walks = actor.kind == 'walker' and np.hypot(*actor.velocity) > 0.2
    state = 'walking' if walks else actor.state
    return _mesh(actor.kind, actor.type_id, size, state, choice)


@functools.lru_cache(maxsize=256)
def _mesh(kind, type_id, size, state, choice) -> Mesh:
    look = _LOOKS.get(type_id) or _LOOKS.get(kind)
    if look is None:
        raise ValueError(
            f'nothing to draw for kind {kind!r}, type_id {type_id!r}; known: {", ".join(_LOOKS)}'
        )
    if min(size) <= 0:
        raise ValueError(f'{type_id}: every side of size {size} must be above 0')
    return look(size, state, np.random.default_rng(choice))


# ---- vehicles ----


def _pick(rng, colors):
    return colors[int(rng.integers(len(colors)))]


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


def _car(size, state, rng, paint=None):
    length, width, height = size
    paint = paint or _pick(rng, _CAR_PAINTS)
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
        meshes.loft([foot, top], _GLASS),
        meshes.loft([top * (1.02, 1.02, 1), roof], paint),
        *_wheels(length, width, 0.33),
        *_rear_lamps(length, width, 0.44 * height, state),
        *_front_lamps(length, width, 0.43 * height),
        meshes.upright(
            meshes.panel(-side * 0.9, side * 0.9, 0.16 * height, 0.29 * height),
            -half - 0.02,
            _BUMPER,
        ),
        meshes.upright(
            meshes.panel(-0.26, 0.26, 0.31 * height, 0.39 * height), -half - 0.03, _WHITE
        ),
        meshes.upright(
            meshes.panel(-side * 0.62, side * 0.62, 0.20 * height, 0.38 * height),
            half + 0.02,
            _BUMPER,
            facing=1,
        ),
    ]
    if state == 'braking':  # the third brake light, on the rear window's lower edge
        ring = meshes.panel(-0.35, 0.35, waist + 0.02, waist + 0.16)
        parts.append(meshes.upright(ring, -0.405 * length, (1.0, 0.06, 0.04), glow=True))
    return meshes.join(parts)


def _truck(size, state, rng):
    length, width, height = size
    half, side = length / 2, width / 2
    paint, cargo = _pick(rng, _CAR_PAINTS), _pick(rng, _CARGO_PAINTS)
    nose = half - max(1.6, 0.22 * length)  # x where the cabin ends
    cabin_top = 0.82 * height
    foot = meshes.rectangle(nose + 0.1, half, -side * 0.97, side * 0.97, 0.45)
    waist = meshes.rectangle(nose + 0.1, half, -side * 0.97, side * 0.97, 0.50 * height)
    brow = meshes.rectangle(nose + 0.1, half * 0.95, -side * 0.92, side * 0.92, cabin_top - 0.15)
    return meshes.join(
        [
            _shadow(length, width),
            meshes.box(-half, half, -side * 0.9, side * 0.9, 0.40, 0.75, _BUMPER),
            meshes.box(-half, nose, -side, side, 0.75, height, cargo),
            meshes.loft([foot, waist], paint),
            meshes.loft([waist, brow], _GLASS),
            meshes.loft([brow, brow + (0, 0, 0.15)], paint),
            *_wheels(length, width, 0.48),
            *_rear_lamps(length, width, 0.62, state, size=(0.48, 0.26)),
            *_front_lamps(length, width, 0.72),
            meshes.upright(
                meshes.panel(-side * 0.9, side * 0.9, 0.85, height - 0.12),
                -half - 0.02,
                _mix(cargo, (0, 0, 0), 0.25),
            ),  # the doors, darker than the walls
            meshes.upright(meshes.panel(-0.03, 0.03, 0.85, height - 0.12), -half - 0.04, _BUMPER),
            meshes.upright(
                meshes.panel(-side * 0.7, side * 0.7, 0.5, 0.33 * height),
                half + 0.02,
                _BUMPER,
                facing=1,
            ),
        ]
    )


def _emergency(size, state, rng):
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
        _WHITE,
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
        meshes.loft(glass, _GLASS),
        meshes.loft([rear, rear_top], _WHITE),
        meshes.box(
            -half, half - 1.1 * hood, -side * 0.95, side * 0.95, 0.90 * height, height, _WHITE
        ),
        meshes.box(
            -half - 0.02,
            half + 0.02,
            -side - 0.02,
            side + 0.02,
            0.36 * height,
            0.52 * height,
            _RED,
        ),
        *_wheels(length, width + 0.06, 0.36),
        *_rear_lamps(length + 0.04, width, 0.27 * height, state),
        *_front_lamps(length + 0.04, width, 0.27 * height),
        meshes.upright(
            meshes.panel(-side * 0.6, side * 0.6, 0.60 * height, 0.84 * height),
            -half - 0.03,
            _GLASS,
        ),
    ]
    for x in (-half + 0.25, half - 1.5 * hood):
        for y in (-side * 0.55, side * 0.55):
            ring = (x - 0.18, x + 0.18, y - 0.30, y + 0.30, height, height + 0.32)
            parts.append(meshes.box(*ring, beacon, glow=state == 'siren'))
    return meshes.join(parts)


# ---- walkers, lights, signs ----


def _walker(size, state, rng):
    height = size[2]
    shirt, trousers, skin = _pick(rng, _SHIRTS), _pick(rng, _TROUSERS), _pick(rng, _SKINS)
    hair = _pick(rng, ((0.10, 0.08, 0.07), (0.35, 0.22, 0.12), (0.75, 0.62, 0.35)))
    hip, neck = 0.46 * height, 0.82 * height
    stride = 0.28 if state == 'walking' else 0.03
    parts = []
    for side in (-1, 1):
        foot = meshes.rectangle(-0.09, 0.13, side * 0.12 - 0.09, side * 0.12 + 0.09, 0.0)
        top = meshes.rectangle(-0.12, 0.12, side * 0.12 - 0.11, side * 0.12 + 0.11, hip)
        parts.append(meshes.loft([foot + (side * stride, 0, 0), top], trousers))
        hand = meshes.rectangle(-0.07, 0.07, side * 0.32 - 0.07, side * 0.32 + 0.07, 0.48 * height)
        shoulder = meshes.rectangle(
            -0.09, 0.09, side * 0.30 - 0.08, side * 0.30 + 0.08, neck - 0.02
        )
        parts.append(meshes.loft([hand - (side * stride, 0, 0), shoulder], shirt))
    waist = meshes.rectangle(-0.16, 0.16, -0.21, 0.21, hip)
    chest = meshes.rectangle(-0.18, 0.18, -0.27, 0.27, 0.72 * height)
    collar = meshes.rectangle(-0.11, 0.11, -0.20, 0.20, neck)
    parts.append(meshes.loft([waist, chest, collar], shirt))
    parts.append(meshes.ball((0.15, 0.09 * height), 0.91 * height, skin))
    parts.append(meshes.ball((0.155, 0.05 * height), 0.965 * height, hair, x=-0.03))
    return meshes.join(parts)


def _pole(height, radius=0.07, color=_METAL):
    return meshes.loft([meshes.circle(radius, 0, 6), meshes.circle(radius, height, 6)], color)


def _traffic_light(size, state, rng):
    """Return pole, board and three lamps, the lit one by state.

    Its size is fixed: read at 35 m by its large lamps, and hung low to stay in the picture at 5 m.
    """
    if state not in LAMPS:
        raise ValueError(f'a traffic light is red, yellow or green, not {state!r}')
    board = (0.05, 0.05, 0.06)
    parts = [_pole(3.5, 0.10), meshes.box(-0.30, -0.10, -0.48, 0.48, 1.58, 3.52, board)]
    for (name, color), z in zip(LAMPS.items(), (3.16, 2.55, 1.94), strict=True):
        lit = name == state
        ring = meshes.disc(0, z, 0.31 if lit else 0.24, 10)
        parts.append(
            meshes.upright(ring, -0.33, color if lit else _mix(board, color, 0.10), glow=True)
        )
    return meshes.join(parts)


_LETTERS = {
    'S': ('###', '#..', '###', '..#', '###'),
    'T': ('###', '.#.', '.#.', '.#.', '.#.'),
    'O': ('###', '#.#', '#.#', '#.#', '###'),
    'P': ('###', '#.#', '###', '#..', '#..'),
}


def _stop_sign(size, state, rng):
    """Return a pole with the red octagon; its size is fixed, 1.04 m across."""
    z, radius, cell = 2.2, 0.52, 0.056
    pixels = []
    for place, letter in enumerate('STOP'):
        for row, cells in enumerate(_LETTERS[letter]):
            for column in (i for i, mark in enumerate(cells) if mark == '#'):
                y = (7.5 - 4 * place - column) * cell  # the reader's left is +y
                pixels.append(
                    meshes.panel(y - cell, y, z + (1.5 - row) * cell, z + (2.5 - row) * cell)
                )
    return meshes.join(
        [
            _pole(2.2, 0.05),
            meshes.upright(meshes.disc(0, z, radius), -0.08, _WHITE, glow=True),
            meshes.upright(meshes.disc(0, z, radius), -0.07, _METAL, facing=1),
            meshes.upright(meshes.disc(0, z, radius * 0.88), -0.10, (0.85, 0.04, 0.06), glow=True),
            *(meshes.upright(pixel, -0.12, _WHITE, glow=True) for pixel in pixels),
        ]
    )


# ---- things that stand ----


def _cone(size, state, rng):
    height = size[2]
    radius = 0.5 * min(size[0], size[1])
    orange = (1.0, 0.42, 0.05)

    def ring(level):
        return meshes.circle(radius * (0.80 - 0.62 * level), level * height, 8)

    foot = meshes.box(-radius, radius, -radius, radius, 0, 0.07 * height, (0.85, 0.33, 0.05))
    bands = ((0.07, 0.38, orange), (0.38, 0.66, _WHITE), (0.66, 1.0, orange))
    return meshes.join([foot] + [meshes.loft([ring(a), ring(b)], c) for a, b, c in bands])


def _barrier(size, state, rng):
    """Return a board with red and white stripes along its longer side, on two feet."""
    length, width, height = size
    along = 0 if length >= width else 1
    long, thin = max(length, width), min(length, width)
    count = max(3, 2 * round(long / 0.8) + 1)
    edges = np.linspace(-long / 2, long / 2, count + 1)
    parts = []

    def part(a, b, half, z0, z1, color):
        flat = (a, b, -half, half) if along == 0 else (-half, half, a, b)
        parts.append(meshes.box(*flat, z0, z1, color))

    for index, (a, b) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        part(a, b, thin / 4, 0.30 * height, height, _RED if index % 2 == 0 else _WHITE)
    for a in (-long / 2 + 0.05, long / 2 - 0.25):
        part(a, a + 0.2, thin / 2, 0, 0.30 * height, _BUMPER)
    return meshes.join(parts)


def _building(size, state, rng):
    """Return a block with rows of windows on its four walls."""
    length, width, height = size
    wall = _mix(_pick(rng, _WALLS), tuple(rng.uniform(0.3, 0.9, 3)), 0.15)
    window = _mix(_GLASS, (0.35, 0.45, 0.55), float(rng.uniform(0, 0.8)))
    half, side = length / 2, width / 2
    roof = (half * 1.02, side * 1.02)
    parts = [
        meshes.box(-half, half, -side, side, 0, height, wall),
        meshes.box(
            -roof[0], roof[0], -roof[1], roof[1], height, height + 0.4, _mix(wall, (0, 0, 0), 0.35)
        ),
    ]
    floors = int(np.clip(height // 3.2, 1, 5))
    storey = height / floors
    for turn, (span, out) in enumerate(
        ((width, half), (length, side), (width, half), (length, side))
    ):
        columns = int(np.clip(span // 3.8, 1, 5))
        pitch = span / columns
        y, z = np.meshgrid(
            (np.arange(columns) + 0.5) * pitch - span / 2, (np.arange(floors) + 0.5) * storey
        )
        centres = np.stack([np.full(y.size, out + 0.06), y.ravel(), z.ravel()], 1)
        corner = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * (0.28 * pitch, 0.27 * storey)
        quads = centres[:, None] + np.column_stack([np.zeros(4), corner])
        parts.append(meshes.polygons(quads, window).moved(0, 0, turn * np.pi / 2))
    return meshes.join(parts)


def _tree(size, state, rng):
    height = size[2]
    spread = 0.5 * max(size[0], size[1])
    leaf = _mix((0.13, 0.34, 0.12), (0.36, 0.50, 0.14), float(rng.uniform(0, 1)))
    trunk = meshes.loft(
        [meshes.circle(0.06 * spread + 0.10, 0, 5), meshes.circle(0.12, 0.45 * height, 5)],
        (0.33, 0.23, 0.15),
    )
    if rng.uniform() < 0.35:  # a conifer
        cone = [meshes.circle(0.75 * spread, 0.18 * height, 7), meshes.circle(0.02, height, 7)]
        return meshes.join([trunk, meshes.loft(cone, _mix(leaf, (0.05, 0.2, 0.12), 0.5))])
    crown = meshes.ball((spread, 0.33 * height), 0.67 * height, leaf)
    light = _mix(leaf, (0.6, 0.7, 0.3), 0.25)
    tuft = meshes.ball((0.6 * spread, 0.22 * height), 0.78 * height, light, x=0.35 * spread)
    return meshes.join([trunk, crown, tuft])


def _lamp(size, state, rng):
    """Return a street lamp whose arm reaches along +x."""
    height = size[2]
    arm = meshes.box(0, 1.6, -0.05, 0.05, height - 0.12, height, _METAL)
    head = meshes.box(1.1, 1.8, -0.15, 0.15, height - 0.28, height - 0.12, (0.85, 0.85, 0.80))
    return meshes.join([_pole(height, 0.09), arm, head])


_LOOKS: dict[str, Callable[..., Mesh]] = {
    'vehicle': _car,  # any vehicle without a look of its own, parked ones too
    'vehicle.truck': _truck,
    'vehicle.emergency': _emergency,
    'vehicle.ego': functools.partial(_car, paint=(0.05, 0.62, 0.62)),
    'walker': _walker,
    'traffic_light': _traffic_light,
    'traffic.stop': _stop_sign,
    'static.cone': _cone,
    'static.barrier': _barrier,
    'static.building': _building,
    'static.tree': _tree,
    'static.lamp': _lamp,
}


# ---- the ground and the sky ----


def ground_layers(surfaces, paint, light: Light) -> list[tuple[str, Mesh]]:
    """Return the level meshes of a map with the class of each, in the order in which they cover one another."""
    colors = {'sidewalk': light.pavement, 'road': light.asphalt}
    colors['parking'] = _mix(light.asphalt, (0.42, 0.40, 0.46), 0.75)
    strips: dict[str, list[Mesh]] = {'sidewalk': [], 'parking': [], 'road': []}
    kerb = _mix(light.pavement, (1, 1, 1), 0.45)
    for surface in surfaces:
        if surface.kind not in strips:
            raise ValueError(f'surface kind {surface.kind!r}; known: {", ".join(strips)}')
        strips[surface.kind].append(
            meshes.strip(surface.left, surface.right, colors[surface.kind])
        )
        if surface.kind == 'sidewalk':
            strips['sidewalk'] += [
                meshes.line(edge, 0.25, kerb) for edge in (surface.left, surface.right)
            ]
    lines = []
    for one in paint:
        if one.color not in PAINT:
            raise ValueError(f'paint colour {one.color!r}; known: {", ".join(PAINT)}')
        pieces = meshes.dashes(one.points) if one.broken else [one.points]
        # A third wider than in life, or at 256 pixels a lane line is gone after 15 m.
        lines += [meshes.line(piece, one.width * 1.35, PAINT[one.color]) for piece in pieces]
    layers = [(kind, meshes.join(parts)) for kind, parts in strips.items()]
    return [*layers, ('line', meshes.join(lines))]


def sky(light: Light, radius: float = 380.0) -> Mesh:
    """Return the inside of a drum with the sky's gradient; it travels with the ego vehicle."""
    levels = ((-20, 0.0), (0, 0.0), (30, 0.25), (90, 0.6), (240, 1.0), (320, 1.0))
    rings = [
        meshes.circle(radius if z < 300 else 1.0, z, 24)[::-1] for z, _ in levels
    ]  # clockwise: seen from inside
    drum = meshes.loft(rings, (0, 0, 0), glow=True)
    share = np.interp(drum.points[:, 2], *zip(*levels, strict=True))[:, None]
    colors = np.array(light.horizon) * (1 - share) + np.array(light.zenith) * share
    return Mesh(**{**vars(drum), 'colors': colors})


def hills(light: Light, seed: int, radius: float = 370.0) -> Mesh:
    """Return the hazy hills at the horizon; they travel with the ego vehicle."""
    rng = np.random.default_rng(zlib.crc32(f'hills:{seed}'.encode()))
    angle = np.linspace(0, 2 * np.pi, 65)[:-1]
    waves = sum(
        rng.uniform(0.3, 1) / k * np.sin(k * angle + rng.uniform(0, 2 * np.pi))
        for k in (2, 3, 7, 13)
    )
    height = np.clip(9 + 9 * waves, 2, 30)
    foot = np.stack([radius * np.cos(angle), radius * np.sin(angle), 0 * angle - 2], 1)
    ridge = foot + np.stack([0 * angle, 0 * angle, height + 2], 1)
    quads = np.stack([np.roll(foot, -1, 0), foot, ridge, np.roll(ridge, -1, 0)], 1)
    return meshes.polygons(
        quads, _mix(light.horizon, _mix(light.grass, (0.25, 0.38, 0.42), 0.6), 0.5), glow=True
    )


def plain(light: Light, radius: float = 380.0) -> Mesh:
    """Return the grass to the horizon, fading into its haze; it travels with the ego vehicle."""
    reach: Float[np.ndarray, 'R'] = np.array([0.1, 40, 120, 220, radius])
    rings = np.stack([meshes.circle(r, 0, 24) for r in reach])
    inner, outer = rings[:-1], rings[1:]
    quads = np.stack([inner, outer, np.roll(outer, -1, axis=1), np.roll(inner, -1, axis=1)], 2)
    mesh = meshes.polygons(quads.reshape(-1, 4, 3), light.grass, glow=True)
    far = np.interp(np.hypot(mesh.points[:, 0], mesh.points[:, 1]), reach, (0, 0, 0.15, 0.4, 0.85))
    lit = np.array(light.grass) * light.brightness
    colors = lit + (np.array(light.horizon) - lit) * far[:, None]
    return Mesh(**{**vars(mesh), 'colors': colors})


def meadow(surfaces, light: Light, seed: int) -> Mesh:
    """Return patches in the grass around the roads: they stay in the world, so that motion can be seen."""
    if not surfaces:
        return meshes.join([])
    edges = np.concatenate([side for one in surfaces for side in (one.left, one.right)])
    low, high = edges.min(0) - 60, edges.max(0) + 60
    rng = np.random.default_rng(zlib.crc32(f'meadow:{seed}'.encode()))
    count = int(np.clip(np.prod(high - low) / 300, 1, 350))
    centres = rng.uniform(low, high, (count, 2))
    reach = rng.uniform(0.8, 3.5, (count, 1)) * rng.uniform(0.8, 1.25, (count, 6))
    angle = np.arange(6) * (np.pi / 3) + rng.uniform(0, 1, (count, 1))
    xy = centres[:, None] + np.stack([reach * np.cos(angle), reach * np.sin(angle)], 2)
    mesh = meshes.polygons(
        np.concatenate([xy, np.zeros((count, 6, 1))], 2), light.grass, glow=True
    )
    shade = np.repeat(rng.uniform(0.84, 1.08, count), 6)[:, None]
    return Mesh(**{**vars(mesh), 'colors': mesh.colors * shade * light.brightness})
