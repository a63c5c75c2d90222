"""Rolling out: every way across the road, driven along in every manner, from now on for some seconds.

Car following after Treiber et al. 2000 (IDM).
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from mose_ros.sim.frenet import PathTable
from mose_ros.sim.situation import HARD_BRAKE, STEPS, Situation

ACCELERATION, COMFORT_BRAKE = 1.8, 1.8  # m/s^2
LATERAL_ACCELERATION = 2.2  # m/s^2, below the 2.5 promised: planning noise comes on top
HEADWAY, LEAD_GAP = 1.2, 2.5  # s and m behind a lead
STATIC_GAP = 8.0  # m to leave for steering round something static
SWING_SPEED = 2.0  # m/s in a tight turn

DRIVES = (  # ways along: name, share of the allowed speed, whether to yield, fixed braking in m/s^2
    ('cruise', 1.0, False, 0.0),
    ('slower', 0.7, False, 0.0),
    ('slow', 0.4, False, 0.0),
    ('yield', 1.0, True, 0.0),
    ('brake', 1.0, False, 2.5),
    ('brake_hard', 1.0, False, 4.5),
    ('brake_full', 1.0, False, HARD_BRAKE),
)


@dataclass(frozen=True, kw_only=True)
class Rollouts:
    """What comes of each candidate: a way with a drive. J ways, C = J len(DRIVES) candidates way by way, T as TIMES."""

    way: Int[np.ndarray, 'C']  # index of the candidate's way
    arc: Float[np.ndarray, 'C T']  # m along its way
    speed: Float[np.ndarray, 'C T']
    lead: Int[np.ndarray, 'C _']  # the actor that is followed, -1 for none
    on_way: Bool[np.ndarray, 'J T+1 A']  # who is on each way, now and then


def roll_out(now: Situation, paths: PathTable) -> Rollouts:
    """Drive along each way in each manner of DRIVES."""
    others, count = now.others, len(paths.s)
    caps = _speed_caps(now, paths)
    way = np.repeat(np.arange(count), len(DRIVES))
    _, share, yields, braking = (np.array(column) for column in zip(*DRIVES, strict=True))
    share, braking = np.tile(share, count), np.tile(braking, count)
    yields = np.tile(yields, count)
    # where everyone is on each way: (J, T, A)
    arc = paths.arc_of(others.s)
    beside = np.abs(others.d - paths.offset_at(others.s))
    on_way = beside < others.half_d + now.half_width + np.where(others.fixed, 0.3, 0.35)
    on_way &= (arc > 0.0) & (others.s < paths.s[:, -1, None, None])
    rear = arc - others.half_s - now.half_length
    speed_along = others.speed * others.along
    crawling = np.array([now.crawls(index) for index in range(len(others.actors))], bool)
    against = (others.along[0] < 0.5) & (others.size[:, 0] > 2.0)
    keep = np.where(others.fixed | crawling | against, STATIC_GAP, LEAD_GAP)
    yield_at = _conflicts(now, on_way, rear)
    walls = _way_walls(now, paths)
    stop_at = np.where(yields, np.minimum(yield_at[way], walls[way]), walls[way])

    n = len(way)
    position, speed = np.zeros(n), np.full(n, now.speed)
    arcs, speeds, leads = [], [], []
    for t, dt in enumerate(STEPS):
        index = np.clip((position + 0.4 * speed) / paths.STEP, 0, caps.shape[1] - 1).astype(int)
        allowed = caps[way, index] * share
        accel = np.clip((allowed - speed) / 0.7, -3.5, ACCELERATION)
        if others.actors:
            gap = np.where(
                on_way[way, t] & (arc[way, t] > position[:, None]),
                rear[way, t] - position[:, None],
                np.inf,
            )
            lead = np.argmin(gap, axis=1)
            rows = np.arange(n)
            follow = _idm(gap[rows, lead], speed, speed_along[t, lead], keep[lead], allowed)
            leads.append(np.where(np.isfinite(gap[rows, lead]) & (follow < accel - 0.1), lead, -1))
            accel = np.minimum(accel, follow)
        accel = np.minimum(accel, _stop(stop_at - position, speed))
        accel = np.where(braking > 0, -braking, np.clip(accel, -HARD_BRAKE, None))
        after = np.maximum(speed + accel * dt, 0.0)
        position = position + 0.5 * (speed + after) * dt
        speed = after
        arcs.append(position)
        speeds.append(speed)
    return Rollouts(
        way=way,
        arc=np.stack(arcs, axis=1),
        speed=np.stack(speeds, axis=1),
        lead=np.stack(leads, axis=1) if leads else np.full((n, 1), -1),
        on_way=on_way,
    )


def _speed_caps(now: Situation, paths: PathTable):
    """Return the speed that limit and curves allow at each place, so that nobody must brake above comfort."""
    limit = np.interp(paths.s, now.road.s, now.road.speed_limit)
    bend = np.sqrt(LATERAL_ACCELERATION / np.maximum(np.abs(paths.curvature), 1e-3))
    cap = np.minimum(limit, bend)
    tight = paths.swings[:, None] & (np.abs(paths.curvature) > 0.1)
    cap = np.where(tight, np.minimum(cap, SWING_SPEED), cap)
    if now.siren is not None:
        cap = np.minimum(cap, 2.5)
    energy = cap**2 + 2 * COMFORT_BRAKE * paths.grid
    lowest = np.minimum.accumulate(energy[:, ::-1], axis=1)[:, ::-1]
    return np.sqrt(np.maximum(lowest - 2 * COMFORT_BRAKE * paths.grid, 0.0))


def _way_walls(now: Situation, paths: PathTable):
    """Return where each way must be stopped on: at a line, or where it is still outside the lane it must be in. (J,)"""
    wall = min([w.distance for w in now.walls], default=np.inf)
    if np.isinf(now.due):
        return np.full(len(paths.s), wall)
    outside = np.abs(paths.d) > 0.4 * float(now.road.at(now.s, now.road.lane_width))
    late = (outside & (paths.s > now.due + 6.0)).any(axis=1)
    # where it waits there must be room left to swing across
    stand = max(now.due - 10.0 - now.s, 0.3)
    return np.minimum(np.where(late, stand, np.inf), wall)


def _conflicts(now: Situation, on_way, rear):
    """Return for each way where to stand so that those who will come onto it have passed. (J,)"""
    others = now.others
    if not others.actors:
        return np.full(len(on_way), np.inf)
    entering = on_way.any(axis=1) & ~(on_way[:, 0] & (others.along[0] > 0.7))  # (J, A)
    entering &= ~others.fixed
    place = np.where(on_way, rear, np.inf).min(axis=1)
    place = np.where(entering, place - 1.5, np.inf)
    return place.min(axis=1)


def _idm(gap, speed, lead_speed, keep, allowed):
    """Return the acceleration behind a lead; gap between the bumpers (Treiber et al. 2000, eq. 2 and 3)."""
    closing = speed * (speed - lead_speed) / (2 * np.sqrt(ACCELERATION * 2.5))
    wanted = keep + np.maximum(HEADWAY * speed + closing, 0.0)
    free = 1.0 - (speed / np.maximum(allowed, 0.5)) ** 4
    accel = ACCELERATION * (np.minimum(free, 1.0) - (wanted / np.maximum(gap, 0.3)) ** 2)
    return np.where(gap <= keep * 0.5, -HARD_BRAKE * (speed > 0), accel)


def _stop(distance, speed):
    """Return the acceleration that ends at `distance`, or lets it run while braking needn't begin yet."""
    needed = speed**2 / (2 * np.maximum(distance, 0.05))
    allowed = np.sqrt(2 * COMFORT_BRAKE * np.maximum(distance - 0.2 * speed, 0.0))
    return np.where(
        needed > COMFORT_BRAKE, -needed, np.minimum((allowed - speed) / 0.5, ACCELERATION)
    )
