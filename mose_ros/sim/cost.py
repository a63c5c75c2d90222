"""What the expert minds, as one number for each rollout: delay, discomfort, the wrong place, and above all others' room."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from mose_ros.sim.frenet import PathTable
from mose_ros.sim.rollout import Rollouts
from mose_ros.sim.situation import LINE_GAP, STEPS, TIMES, Situation
from mose_ros.sim.ways import Way


def cost_of(
    now: Situation, paths: PathTable, roll: Rollouts, ways: Sequence[Way]
) -> Float[np.ndarray, 'C']:
    """Return what each rollout costs."""
    way, arc, speed = roll.way, roll.arc, roll.speed
    state = paths.look_up(way[:, None], arc)  # (C, T, 5)
    accel = np.diff(speed, axis=1, prepend=np.full((len(way), 1), now.speed)) / STEPS
    weight = STEPS / STEPS.sum()
    index = np.clip(arc / paths.STEP, 0, len(paths.grid) - 1).astype(int)
    bend = paths.curvature[way[:, None], index]
    cruise = float(now.road.at(now.s, now.road.speed_limit))
    lane = float(now.road.at(now.s, now.road.lane_width))
    d, s = state[..., 3], state[..., 4]

    cost = 1.0 * ((cruise - np.minimum(speed, cruise)) / cruise) @ weight
    cost += 0.02 * np.square(np.maximum(np.abs(accel) - 0.8, 0.0)) @ weight
    cost += 0.15 * np.maximum(np.max(-accel, axis=1) - 2.7, 0.0)
    cost += 0.02 * np.square(speed**2 * bend) @ weight
    aim = 0.0 if now.siren is None else now.edge()
    cost += (0.06 if np.isinf(now.due) else 0.14) * np.abs(d - aim) @ weight
    cost += (
        0.10 * (d - now.half_width > np.interp(s, now.road.s, now.road.own_left) - 1.0) @ weight
    )
    left = d + now.half_width + 0.25 - np.interp(s, now.road.s, now.road.left)
    right = -d + now.half_width + 0.25 - np.interp(s, now.road.s, now.road.right)
    # who is lost already may leave the road on the way back rather than stand for ever
    price = 6.0 if abs(now.slope) < 0.35 and abs(now.d) < 0.5 * lane else 2.0
    outside = np.maximum(np.maximum(left, right), 0.0)
    cost += (price if now.speed > 0.5 or price > 2.0 else 0.3) * outside @ weight
    cost += np.array([w.bias for w in ways])[way]
    wall = min([w.distance for w in now.walls], default=np.inf)
    over = np.clip(arc[:, -1] - wall - LINE_GAP / 2, 0.0, 1.0)
    cost += 5.0 * over
    if now.others.actors:
        cost += _collision_cost(now, state, speed)
    return cost


def _collision_cost(now: Situation, state, speed):
    """Judge all candidates against all actors: discs along the ego vehicle against oriented boxes."""
    others = now.others
    x, y, heading = (state[..., k, None] for k in range(3))
    reach = np.linspace(-1, 1, 4) * (now.half_length - now.half_width)
    px = (x + reach * np.cos(heading))[:, :, None, :]  # (C, T, 1, 4)
    py = (y + reach * np.sin(heading))[:, :, None, :]
    cos, sin = np.cos(others.yaw[1:])[None, ..., None], np.sin(others.yaw[1:])[None, ..., None]
    dx = px - others.xy[None, 1:, :, 0, None]
    dy = py - others.xy[None, 1:, :, 1, None]
    ahead, side = dx * cos + dy * sin, np.abs(dy * cos - dx * sin)
    half = others.size[:, :, None] / 2
    out_side = np.maximum(side - half[:, 1], 0.0)
    out = np.maximum(np.abs(ahead) - half[:, 0], 0.0)
    clear = np.sqrt((out**2 + out_side**2).min(axis=-1)) - now.half_width  # (C, T, A)
    # time gaps: one that moves takes up the road before and behind it as well
    moving = others.speed[1:] > 0.5
    foreign = moving & ~((others.along[1:] > 0.7) & (np.abs(others.d[0] - now.d) < 1.2))
    before = np.where(foreign, 1.3, 0.0) * others.speed[1:]
    after = np.where(foreign, 0.5, 0.0) * others.speed[1:]
    stretch = np.where(ahead > 0, before[None, ..., None], after[None, ..., None])
    out = np.maximum(np.abs(ahead) - half[:, 0] - stretch, 0.0)
    gap = np.sqrt((out**2 + out_side**2).min(axis=-1)) - now.half_width

    behind = others.s[0] + others.half_s[0] < now.s - now.half_length + 0.5
    followers = behind & (others.along[0] > 0.5) & (np.abs(others.d[0] - now.d) < 1.5)
    walkers = np.array([a.kind == 'walker' for a in others.actors])
    margin = 0.2 + np.where(others.fixed, 0.0, 0.04 * TIMES[:, None])
    margin = np.where(walkers, margin + 0.2, margin)
    # who is that near already need not stand for ever: it must only not come nearer
    margin = np.minimum(margin, _clear_now(now) - 0.03)
    hit = np.where(followers, 0.0, np.maximum(margin - clear, 0.0))
    touched = hit > 0
    weight = STEPS / STEPS.sum()
    # the sooner and the faster the worse
    severe = touched * (1.0 + np.minimum(hit, 1.0)) * (0.3 + 0.1 * speed[..., None])
    cost = 12.0 * np.max(severe * np.exp(-TIMES / 6.0)[:, None], axis=(1, 2))
    cost += 8.0 * (severe.max(axis=2) @ weight)
    soft = np.where(walkers, 1.0, 0.6)
    near = (
        np.where(followers, 0.0, np.maximum(soft - clear, 0.0) / soft)
        * np.minimum(speed / 4.0, 1.0)[..., None]
    )
    cost += 0.5 * (near.max(axis=2) ** 2) @ weight
    cut = np.where(followers, 0.0, gap < 0.3) * np.minimum(0.3 + speed / 3.0, 1.0)[..., None]
    cost += 1.2 * cut.max(axis=(1, 2)) + 1.5 * (cut.max(axis=2) @ weight)
    return cost


def _clear_now(now: Situation):
    """Return the room to each actor as the ego vehicle stands. (A,)"""
    others = now.others
    reach = np.linspace(-1, 1, 4) * (now.half_length - now.half_width)
    dx = now.ego.x + reach * np.cos(now.ego.yaw) - others.xy[0, :, 0, None]
    dy = now.ego.y + reach * np.sin(now.ego.yaw) - others.xy[0, :, 1, None]
    cos, sin = np.cos(others.yaw[0])[:, None], np.sin(others.yaw[0])[:, None]
    out = np.maximum(np.abs(dx * cos + dy * sin) - others.size[:, :1] / 2, 0.0)
    out_side = np.maximum(np.abs(dy * cos - dx * sin) - others.size[:, 1:] / 2, 0.0)
    return np.sqrt((out**2 + out_side**2).min(axis=-1)) - now.half_width
