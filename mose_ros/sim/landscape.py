"""How a map looks: its light and tints, the ground with its lines, grass, hills and sky; all from the map and its seed."""

import zlib
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8

from mose_ros.sim import meshes
from mose_ros.sim.materials import mix
from mose_ros.sim.meshes import Color, Mesh

PAINT: dict[str, Color] = {'white': (0.96, 0.96, 0.94), 'yellow': (0.98, 0.77, 0.10)}


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
            zenith=mix((0.30, 0.52, 0.86), (0.62, 0.68, 0.76), cloud),
            horizon=mix((0.78, 0.87, 0.95), (0.84, 0.85, 0.86), cloud),
            grass=(0.31 + 0.05 * tint[0], 0.47 + 0.04 * tint[1], 0.20 + 0.04 * tint[2]),
            asphalt=(grey, grey, grey + 0.015),
            pavement=mix((0.60, 0.58, 0.54), (0.68, 0.66, 0.64), rng.uniform(0, 1)),
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


def ground_layers(surfaces, paint, light: Light) -> list[tuple[str, Mesh]]:
    """Return the level meshes of a map with the class of each, in the order in which they cover one another."""
    colors = {'sidewalk': light.pavement, 'road': light.asphalt}
    colors['parking'] = mix(light.asphalt, (0.42, 0.40, 0.46), 0.75)
    strips: dict[str, list[Mesh]] = {'sidewalk': [], 'parking': [], 'road': []}
    kerb = mix(light.pavement, (1, 1, 1), 0.45)
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
        quads, mix(light.horizon, mix(light.grass, (0.25, 0.38, 0.42), 0.6), 0.5), glow=True
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
