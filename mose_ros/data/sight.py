"""What of a scene can be seen from the ego vehicle, and where it is relative to the way: the geometry under the rules.

Everything here follows from the scene's boxes alone; scenery that is no actor hides nobody.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from mose_ros.core.rig import RIG
from mose_ros.core.types import Actor, Corridor, Scene

IMAGE_WIDTH = 256  # px of the pictures that the limits below are meant for
MIN_PX = 5.0  # of the larger of height and width
RANGES = {  # m from the ego; further away nobody is looked at
    'walker': 40.0,
    'vehicle': 60.0,
    'traffic_light': 45.0,
    'traffic_sign': 45.0,
    'static': 45.0,
}
COVERED = 0.6  # share of its height from which something counts as hidden
BESIDE = 12.0  # m within which nothing is lost: in a row of cones each covers the next, and the cameras leave gaps
SCENERY = ('static.building', 'static.tree', 'static.lamp')


class Road:
    """The corridor as coordinates: s metres along its centre line, d metres to the left of it."""

    def __init__(self, corridor: Corridor):
        self.corridor = corridor
        self._xy = np.asarray(corridor.xy, float)
        steps = np.diff(self._xy, axis=0)
        self._length = np.maximum(np.hypot(*steps.T), 1e-9)
        self._direction = steps / self._length[:, None]
        self.s = np.concatenate([[0.0], np.cumsum(self._length)])
        self._heading = np.unwrap(np.arctan2(steps[:, 1], steps[:, 0]))

    def project(self, points: Float[np.ndarray, 'M 2']) -> tuple[np.ndarray, np.ndarray]:
        """Return s and d of points; the line goes straight on behind its ends."""
        away = points[:, None] - self._xy[:-1]
        along = np.einsum('mnk,nk->mn', away, self._direction)
        inside = np.clip(along, 0.0, self._length)
        foot = away - inside[..., None] * self._direction
        best = np.argmin(np.einsum('mnk,mnk->mn', foot, foot), axis=1)
        rows = np.arange(len(points))
        along, last = along[rows, best], len(self._length) - 1
        free = ((best == 0) & (along < 0)) | ((best == last) & (along > self._length[last]))
        along = np.where(free, along, inside[rows, best])
        direction, away = self._direction[best], away[rows, best]
        return self.s[best] + along, direction[:, 0] * away[:, 1] - direction[:, 1] * away[:, 0]

    def heading(self, s):
        """Return the direction of the line at s."""
        middles = (self.s[1:] + self.s[:-1]) / 2
        return np.interp(s, middles, self._heading)

    def at(self, s: float, values) -> float:
        """Return one of the corridor's arrays at s."""
        return float(np.interp(s, self.s, values))


@dataclass(frozen=True, kw_only=True)
class Sighting:
    """An actor as seen from the ego vehicle and as it lies to the way."""

    actor: Actor
    x: float  # ego frame, m
    y: float
    distance: float
    s: float  # m along the way from the ego's centre to its centre
    d: float  # m to the left of the way's centre line
    half_s: float  # half its extent along the way
    half_d: float  # and across
    v_s: float  # m/s along the way
    v_d: float
    aligned: float  # cosine between its direction and that of the way
    parallel: float  # cosine between its direction and that of the ego
    cameras: tuple[str, ...]  # that see it, the largest picture first

    @property
    def gap(self) -> float:
        """Return how far its near end lies ahead of the ego's centre along the way."""
        return self.s - self.half_s


def look(scene: Scene, road: Road) -> list[Sighting]:
    """Return the actors that can be seen, the nearest first."""
    ego, found = scene.ego, []
    cos, sin = math.cos(ego.yaw), math.sin(ego.yaw)
    near = []
    for actor in scene.actors:
        dx, dy = actor.x - ego.x, actor.y - ego.y
        distance = math.hypot(dx, dy)
        if distance <= RANGES.get(actor.kind, 0.0) and actor.type_id not in SCENERY:
            near.append((distance, actor, cos * dx + sin * dy, cos * dy - sin * dx))
    near.sort(key=lambda one: one[0])
    seen = [one for index, one in enumerate(near) if not _is_hidden(one, near[:index], ego.yaw)]
    if not seen:
        return []
    s, d = road.project(np.array([(one[1].x, one[1].y) for one in seen], float))
    headings = road.heading(s)
    for (distance, actor, x, y), along, across, heading in zip(seen, s, d, headings, strict=True):
        cameras = cameras_that_see(x, y, actor)
        if not cameras and distance > BESIDE:
            continue
        turn = actor.yaw - heading
        c, n = math.cos(heading), math.sin(heading)
        (vx, vy), (length, width, _) = actor.velocity, actor.size
        a, b = abs(math.cos(turn)), abs(math.sin(turn))
        found.append(
            Sighting(
                actor=actor,
                x=x,
                y=y,
                distance=distance,
                s=float(along) - scene.progress,
                d=float(across),
                half_s=(a * length + b * width) / 2,
                half_d=(b * length + a * width) / 2,
                v_s=c * vx + n * vy,
                v_d=c * vy - n * vx,
                aligned=math.cos(turn),
                parallel=math.cos(actor.yaw - ego.yaw),
                cameras=cameras,
            )
        )
    return found


def cameras_that_see(x: float, y: float, actor: Actor) -> tuple[str, ...]:
    """Return the cameras in whose picture an actor at (x, y) of the ego frame is large enough, the largest first."""
    found = []
    radius = max(actor.size[0], actor.size[1]) / 2
    extent = max(actor.size[1], actor.size[2])
    for camera in RIG:
        dx, dy = x - camera.x, y - camera.y
        distance = math.hypot(dx, dy)
        off = abs((math.atan2(dy, dx) - camera.yaw + math.pi) % (2 * math.pi) - math.pi)
        # its middle is in the picture, or a good part of something near and large
        slack = 0.5 * math.atan2(radius, max(distance, 0.1))
        if off > camera.fov / 2 + slack:
            continue
        depth = max(distance * math.cos(min(off, camera.fov / 2)), 0.5)
        pixels = camera.focal_px(IMAGE_WIDTH) * extent / depth
        if pixels >= MIN_PX:
            inside = off <= camera.fov / 2
            found.append((not inside, -pixels, camera.name))
    return tuple(name for _, _, name in sorted(found))


def _is_hidden(one, nearer, ego_yaw: float) -> bool:
    """Say whether those that are nearer cover the middle and both flanks of an actor, and most of its height."""
    distance, actor, x, y = one
    if not nearer or distance < BESIDE:
        return False
    bearing = math.atan2(y, x)
    flank = 0.35 * _half_angle(actor, distance, bearing, ego_yaw)
    eye = 1.6  # m, where the cameras are
    level = (COVERED * actor.size[2] - eye) / max(distance, 1.0)
    open_rays = [bearing - flank, bearing, bearing + flank]
    for near, other, other_x, other_y in nearer:
        if near > distance - 1.0 or (other.size[2] - eye) / max(near, 1.0) < level:
            continue
        middle = math.atan2(other_y, other_x)
        half = _half_angle(other, near, middle, ego_yaw)
        open_rays = [
            ray
            for ray in open_rays
            if abs((ray - middle + math.pi) % (2 * math.pi) - math.pi) > half
        ]
        if not open_rays:
            return True
    return False


def _half_angle(actor: Actor, distance: float, bearing: float, ego_yaw: float) -> float:
    turn = actor.yaw - ego_yaw - bearing
    across = abs(math.sin(turn)) * actor.size[0] + abs(math.cos(turn)) * actor.size[1]
    return math.atan2(across / 2, max(distance, 0.5))
