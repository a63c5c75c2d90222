"""How all else looks that stands or walks beside the road: people, lights and signs, roadworks, houses, trees.

A look takes the size (length, width, height), the actor's state and a generator for what is left to chance. Lights and signs
are larger than life and show their face to -x, to the drivers who travel along their yaw.
"""

import numpy as np

from mose_ros.sim import meshes
from mose_ros.sim.materials import BUMPER, GLASS, METAL, RED, WHITE, mix, pick
from mose_ros.sim.meshes import Color, Mesh, Size

LAMPS: dict[str, Color] = {
    'red': (1.0, 0.08, 0.05),
    'yellow': (1.0, 0.80, 0.05),
    'green': (0.05, 0.95, 0.35),
}  # top to bottom
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


def walker(size: Size, state: str, rng: np.random.Generator) -> Mesh:
    """Return a person, with legs and arms apart when walking."""
    height = size[2]
    shirt, trousers, skin = pick(rng, _SHIRTS), pick(rng, _TROUSERS), pick(rng, _SKINS)
    hair = pick(rng, ((0.10, 0.08, 0.07), (0.35, 0.22, 0.12), (0.75, 0.62, 0.35)))
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


def _pole(height, radius=0.07, color=METAL):
    return meshes.loft([meshes.circle(radius, 0, 6), meshes.circle(radius, height, 6)], color)


def traffic_light(size: Size, state: str, rng: np.random.Generator) -> Mesh:
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
            meshes.upright(ring, -0.33, color if lit else mix(board, color, 0.10), glow=True)
        )
    return meshes.join(parts)


_LETTERS = {
    'S': ('###', '#..', '###', '..#', '###'),
    'T': ('###', '.#.', '.#.', '.#.', '.#.'),
    'O': ('###', '#.#', '#.#', '#.#', '###'),
    'P': ('###', '#.#', '###', '#..', '#..'),
}


def stop_sign(size: Size, state: str, rng: np.random.Generator) -> Mesh:
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
            meshes.upright(meshes.disc(0, z, radius), -0.08, WHITE, glow=True),
            meshes.upright(meshes.disc(0, z, radius), -0.07, METAL, facing=1),
            meshes.upright(meshes.disc(0, z, radius * 0.88), -0.10, (0.85, 0.04, 0.06), glow=True),
            *(meshes.upright(pixel, -0.12, WHITE, glow=True) for pixel in pixels),
        ]
    )


# ---- things that stand ----


def cone(size: Size, state: str, rng: np.random.Generator) -> Mesh:
    """Return a traffic cone with a white band."""
    height = size[2]
    radius = 0.5 * min(size[0], size[1])
    orange = (1.0, 0.42, 0.05)

    def ring(level):
        return meshes.circle(radius * (0.80 - 0.62 * level), level * height, 8)

    foot = meshes.box(-radius, radius, -radius, radius, 0, 0.07 * height, (0.85, 0.33, 0.05))
    bands = ((0.07, 0.38, orange), (0.38, 0.66, WHITE), (0.66, 1.0, orange))
    return meshes.join([foot] + [meshes.loft([ring(a), ring(b)], c) for a, b, c in bands])


def barrier(size: Size, state: str, rng: np.random.Generator) -> Mesh:
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
        part(a, b, thin / 4, 0.30 * height, height, RED if index % 2 == 0 else WHITE)
    for a in (-long / 2 + 0.05, long / 2 - 0.25):
        part(a, a + 0.2, thin / 2, 0, 0.30 * height, BUMPER)
    return meshes.join(parts)


def building(size: Size, state: str, rng: np.random.Generator) -> Mesh:
    """Return a block with rows of windows on its four walls."""
    length, width, height = size
    wall = mix(pick(rng, _WALLS), tuple(rng.uniform(0.3, 0.9, 3)), 0.15)
    window = mix(GLASS, (0.35, 0.45, 0.55), float(rng.uniform(0, 0.8)))
    half, side = length / 2, width / 2
    roof = (half * 1.02, side * 1.02)
    parts = [
        meshes.box(-half, half, -side, side, 0, height, wall),
        meshes.box(
            -roof[0], roof[0], -roof[1], roof[1], height, height + 0.4, mix(wall, (0, 0, 0), 0.35)
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


def tree(size: Size, state: str, rng: np.random.Generator) -> Mesh:
    """Return a tree, round or a conifer."""
    height = size[2]
    spread = 0.5 * max(size[0], size[1])
    leaf = mix((0.13, 0.34, 0.12), (0.36, 0.50, 0.14), float(rng.uniform(0, 1)))
    trunk = meshes.loft(
        [meshes.circle(0.06 * spread + 0.10, 0, 5), meshes.circle(0.12, 0.45 * height, 5)],
        (0.33, 0.23, 0.15),
    )
    if rng.uniform() < 0.35:  # a conifer
        cone = [meshes.circle(0.75 * spread, 0.18 * height, 7), meshes.circle(0.02, height, 7)]
        return meshes.join([trunk, meshes.loft(cone, mix(leaf, (0.05, 0.2, 0.12), 0.5))])
    crown = meshes.ball((spread, 0.33 * height), 0.67 * height, leaf)
    light = mix(leaf, (0.6, 0.7, 0.3), 0.25)
    tuft = meshes.ball((0.6 * spread, 0.22 * height), 0.78 * height, light, x=0.35 * spread)
    return meshes.join([trunk, crown, tuft])


def lamp(size: Size, state: str, rng: np.random.Generator) -> Mesh:
    """Return a street lamp whose arm reaches along +x."""
    height = size[2]
    arm = meshes.box(0, 1.6, -0.05, 0.05, height - 0.12, height, METAL)
    head = meshes.box(1.1, 1.8, -0.15, 0.15, height - 0.28, height - 0.12, (0.85, 0.85, 0.80))
    return meshes.join([_pole(height, 0.09), arm, head])
