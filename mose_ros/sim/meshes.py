"""Flat-coloured meshes in plain numpy: the few shapes of which the simulator's pictures are made. Metres; knows no renderer."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

Color = tuple[float, float, float]  # RGB, 0..1
Size = tuple[float, float, float]  # m: length, width, height


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """Triangles with a colour and a normal per corner; faces share no corners, so shading is flat."""

    points: Float[np.ndarray, 'N 3']
    normals: Float[np.ndarray, 'N 3']  # unit length
    colors: Float[np.ndarray, 'N 3']
    glow: Bool[np.ndarray, 'N']  # shines by itself: no light falls on it
    triangles: Int[np.ndarray, 'M 3']  # counter-clockwise seen from outside

    def moved(self, x: float, y: float, yaw: float) -> 'Mesh':
        """Return the mesh turned about z and then shifted."""
        c, s = np.cos(yaw), np.sin(yaw)
        world_from_local = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
        return Mesh(
            points=self.points @ world_from_local.T + (x, y, 0),
            normals=self.normals @ world_from_local.T,
            colors=self.colors,
            glow=self.glow,
            triangles=self.triangles,
        )

    def split(self, cell: float) -> list['Mesh']:
        """Return the mesh cut into square cells of that size, triangle by triangle, so that cells out of view cost nothing."""
        if len(self.triangles) == 0:
            return []
        centres = self.points[self.triangles].mean(1)[:, :2]
        _, groups = np.unique(np.floor(centres / cell), axis=0, return_inverse=True)
        parts = []
        for group in range(groups.max() + 1):
            used, triangles = np.unique(
                self.triangles[groups.ravel() == group], return_inverse=True
            )
            parts.append(
                Mesh(
                    points=self.points[used],
                    normals=self.normals[used],
                    colors=self.colors[used],
                    glow=self.glow[used],
                    triangles=triangles.reshape(-1, 3),
                )
            )
        return parts


def join(meshes: Iterable[Mesh]) -> Mesh:
    """Return all the meshes as one."""
    meshes = [_EMPTY, *meshes]
    starts = np.cumsum([0] + [len(mesh.points) for mesh in meshes])
    return Mesh(
        points=np.concatenate([mesh.points for mesh in meshes]),
        normals=np.concatenate([mesh.normals for mesh in meshes]),
        colors=np.concatenate([mesh.colors for mesh in meshes]),
        glow=np.concatenate([mesh.glow for mesh in meshes]),
        triangles=np.concatenate(
            [mesh.triangles + start for mesh, start in zip(meshes, starts, strict=False)]
        ),
    )


_EMPTY = Mesh(
    points=np.zeros((0, 3)),
    normals=np.zeros((0, 3)),
    colors=np.zeros((0, 3)),
    glow=np.zeros(0, bool),
    triangles=np.zeros((0, 3), int),
)


def polygons(corners: Float[np.ndarray, 'F K 3'], color: Color, *, glow: bool = False) -> Mesh:
    """Return F flat convex polygons of K corners each, counter-clockwise seen from the side that shows."""
    corners = np.asarray(corners, float)
    faces, count, _ = corners.shape
    normals = np.cross(corners, np.roll(corners, -1, axis=1)).sum(
        1
    )  # Newell: also right when corners coincide
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-9)
    fan = np.stack([np.zeros(count - 2, int), np.arange(1, count - 1), np.arange(2, count)], 1)
    return Mesh(
        points=corners.reshape(-1, 3),
        normals=np.repeat(normals, count, 0),
        colors=np.tile(np.asarray(color, float), (faces * count, 1)),
        glow=np.full(faces * count, glow),
        triangles=(fan + (np.arange(faces) * count)[:, None, None]).reshape(-1, 3),
    )


def rectangle(x0: float, x1: float, y0: float, y1: float, z: float) -> Float[np.ndarray, '4 3']:
    """Return a level rectangle as a ring for `loft`."""
    return np.array([(x0, y0, z), (x1, y0, z), (x1, y1, z), (x0, y1, z)], float)


def circle(
    radius: float, z: float, sides: int = 8, x: float = 0.0, y: float = 0.0
) -> Float[np.ndarray, 'K 3']:
    """Return a level polygon of that many sides as a ring for `loft`."""
    angle = (np.arange(sides) + 0.5) * (2 * np.pi / sides)
    return np.stack([x + radius * np.cos(angle), y + radius * np.sin(angle), np.full(sides, z)], 1)


def loft(rings: Sequence[Float[np.ndarray, 'K 3']], color: Color, *, glow: bool = False) -> Mesh:
    """Return the solid through those rings, from bottom to top, each counter-clockwise seen from above.

    What stands on the ground has no underside: nobody sees it.
    """
    rings = np.asarray(rings, float)
    lower, upper = rings[:-1], rings[1:]
    sides = np.stack(
        [lower, np.roll(lower, -1, axis=1), np.roll(upper, -1, axis=1), upper], 2
    ).reshape(-1, 4, 3)
    caps = rings[-1:] if rings[0, 0, 2] == 0 else np.stack([rings[0][::-1], rings[-1]])
    return join([polygons(sides, color, glow=glow), polygons(caps, color, glow=glow)])


def box(
    x0: float,
    x1: float,
    y0: float,
    y1: float,
    z0: float,
    z1: float,
    color: Color,
    *,
    glow: bool = False,
) -> Mesh:
    """Return an axis-aligned box."""
    return loft([rectangle(x0, x1, y0, y1, z0), rectangle(x0, x1, y0, y1, z1)], color, glow=glow)


def ball(
    radius: tuple[float, float], z: float, color: Color, *, sides: int = 7, x: float = 0.0
) -> Mesh:
    """Return a round body of that horizontal and vertical radius about (x, 0, z)."""
    return loft(
        [
            circle(max(1e-3, radius[0] * np.cos(tilt)), z + radius[1] * np.sin(tilt), sides, x)
            for tilt in np.linspace(-np.pi / 2, np.pi / 2, 5)
        ],
        color,
    )


def upright(
    ring: Float[np.ndarray, 'K 2'], x: float, color: Color, *, glow: bool = False, facing: int = -1
) -> Mesh:
    """Return a flat shape that stands across x; ring holds (y, z), counter-clockwise seen from +x; facing is the sign of its normal."""
    corners = np.column_stack([np.full(len(ring), x), ring])
    return polygons(corners[None] if facing > 0 else corners[None, ::-1], color, glow=glow)


def panel(y0: float, y1: float, z0: float, z1: float) -> Float[np.ndarray, '4 2']:
    """Return a rectangle as a ring for `upright`."""
    return np.array([(y0, z0), (y1, z0), (y1, z1), (y0, z1)], float)


def disc(y: float, z: float, radius: float, sides: int = 8) -> Float[np.ndarray, 'K 2']:
    """Return a regular polygon, flat side down, as a ring for `upright`."""
    angle = (np.arange(sides) + 0.5) * (2 * np.pi / sides)
    return np.stack([y + radius * np.cos(angle), z + radius * np.sin(angle)], 1)


# ---- what lies on the ground ----


def strip(left: Float[np.ndarray, 'N 2'], right: Float[np.ndarray, 'N 2'], color: Color) -> Mesh:
    """Return the level ground between two polylines of equally many points; either side may be the left."""
    left, right = np.asarray(left, float), np.asarray(right, float)
    if left.shape != right.shape or left.ndim != 2 or left.shape[1] != 2 or len(left) < 2:
        raise ValueError(
            f'a strip needs two (N, 2) polylines, N > 1 the same for both; got {left.shape}, {right.shape}'
        )
    sides = np.stack([right[:-1], right[1:], left[1:], left[:-1]], 1)
    corners = np.concatenate([sides, np.zeros((*sides.shape[:2], 1))], 2)
    return _facing_up(polygons(corners, color))


def _facing_up(mesh: Mesh) -> Mesh:
    a, b, c = (mesh.points[mesh.triangles[:, i], :2] for i in range(3))
    down = (b - a)[:, 0] * (c - a)[:, 1] < (b - a)[:, 1] * (c - a)[:, 0]
    triangles = mesh.triangles.copy()
    triangles[down] = triangles[down, ::-1]
    return Mesh(
        points=mesh.points,
        normals=np.tile((0.0, 0.0, 1.0), (len(mesh.points), 1)),
        colors=mesh.colors,
        glow=mesh.glow,
        triangles=triangles,
    )


def line(points: Float[np.ndarray, 'N 2'], width: float, color: Color) -> Mesh:
    """Return a painted line of that width along a polyline."""
    points = _distinct(points)
    if len(points) < 2:
        return _EMPTY
    across = _across(points) * (width / 2)
    return strip(points + across, points - across, color)


def dashes(
    points: Float[np.ndarray, 'N 2'], length: float = 3.0, gap: float = 3.0
) -> list[Float[np.ndarray, 'K 2']]:
    """Return the polyline cut into dashes, the first half a gap after its beginning."""
    points = _distinct(points)
    if len(points) < 2:
        return []
    along = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(points, axis=0).T))])
    pieces = []
    for start in np.arange(gap / 2, along[-1], length + gap):
        stop = min(start + length, along[-1])
        inside = along[(along > start) & (along < stop)]
        stations = np.concatenate([[start], inside, [stop]])
        pieces.append(np.stack([np.interp(stations, along, points[:, i]) for i in (0, 1)], 1))
    return pieces


def _distinct(points):
    points = np.asarray(points, float)
    keep = np.concatenate([[True], np.hypot(*np.diff(points, axis=0).T) > 1e-6])
    return points[keep]


def _across(points):
    """Unit vectors to the left of a polyline; in a bend lengthened so that the strip keeps its width."""
    steps = np.diff(points, axis=0)
    left = np.stack([-steps[:, 1], steps[:, 0]], 1) / np.hypot(*steps.T)[:, None]
    before, after = np.vstack([left[:1], left]), np.vstack([left, left[-1:]])
    middle = before + after
    return middle / np.maximum(0.5, 1 + (before * after).sum(1))[:, None]
