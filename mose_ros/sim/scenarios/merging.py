"""Into another lane with traffic in it: the own one is closed, the route needs the next one, or a stream is joined."""

import numpy as np

from mose_ros.core.types import Command
from mose_ros.sim.scenarios.base import BACK, Episode, Maker, change_lane
from mose_ros.sim.town import LEFT, RIGHT, STRAIGHT, Path


def make(maker: Maker) -> Episode:
    """Draw an episode."""
    return maker.pick(_closed_lane, _lane_for_turn, _join_stream)(maker)


def _closed_lane(maker: Maker) -> Episode:
    lanes = maker.pick(2, 2, 3)
    town, end = maker.road(lanes, (165, 190))
    lane = maker.pick(*range(lanes))
    target = maker.pick(*[other for other in (lane - 1, lane + 1) if 0 <= other < lanes])
    start = maker.uniform(35, 42)
    episode = maker.episode(town, end, target, start_s=start, start_speed=maker.uniform(3, 7))
    width = float(episode.route.width[0])
    episode.start_d = (target - lane) * width
    closed, length = start + maker.uniform(60, 85), maker.uniform(15, 30)
    change_lane(episode, Command.LANE_LEFT if target < lane else Command.LANE_RIGHT, closed)
    _close(maker, episode, closed, length, episode.start_d)
    _fill_lane(maker, episode, town.path('>', end, target))
    maker.walkers(episode, 140, 0.4)
    return episode


def _close(maker: Maker, episode: Episode, s: float, length: float, d: float) -> None:
    """Close a lane beside the route with a taper of cones, barriers, and cones along the stretch."""
    route, width = episode.route, float(episode.route.width[0])
    away = float(np.sign(d))
    for step in range(4):
        across = d + away * width * (0.4 - 0.7 * step / 3)
        episode.statics.append(maker.thing('static.cone', route, s - 9 + 3 * step, across))
    for along in (1.0, length):
        episode.statics.append(maker.thing('static.barrier', route, s + along, d))
    for along in np.arange(4, length, 4):
        across = d - away * width * 0.3
        episode.statics.append(maker.thing('static.cone', route, s + float(along), across))
    part = route.span(s - 2, s + length + 2)
    for room, there in ((route.left, d > 0), (route.right, d < 0)):
        if there:
            room[part] = np.minimum(room[part], width / 2)
    route.own_left[part] = np.minimum(route.own_left[part], route.left[part])


def _fill_lane(maker: Maker, episode: Episode, path: Path) -> None:
    """Put a short column into the lane that the ego wants, around the ego's place."""
    speed = maker.limit * maker.uniform(0.65, 0.95)
    s = episode.start_s + maker.uniform(15, 40)
    while s > max(4.0, episode.start_s - 32):
        if abs(s - episode.start_s) > 2:
            v = min(speed, episode.start_speed + 2)
            episode.movers.append(maker.car(path, s, v, cruise=speed))
        s -= maker.uniform(13, 26)


def _lane_for_turn(maker: Maker) -> Episode:
    lanes, turn = maker.pick(2, 2, 3), maker.pick(LEFT, RIGHT)
    crossing = maker.crossing(lanes, maker.uniform(125, 145), {STRAIGHT: 80.0, turn: 75.0})
    target = 0 if turn == LEFT else lanes - 1
    lane = 1 if turn == LEFT else lanes - 2
    start = maker.uniform(35, 42)
    episode = maker.episode(
        crossing.town,
        crossing.out_node(turn),
        target,
        start_s=start,
        start_speed=maker.uniform(3, 7),
    )
    route = episode.route
    episode.start_d = (target - lane) * float(route.width[0])
    entry = route.junctions[0][0]
    change_lane(episode, Command.LANE_LEFT if turn == LEFT else Command.LANE_RIGHT, entry)
    # On the last metres the turn is what counts.
    route.set_command(entry - 12, entry, Command.LEFT if turn == LEFT else Command.RIGHT)
    _fill_lane(maker, episode, crossing.path(BACK, maker.pick(turn, STRAIGHT), target))
    return episode


def _join_stream(maker: Maker) -> Episode:
    lanes, missing = maker.pick(1, 1, 2), maker.pick(None, STRAIGHT)
    crossing = maker.crossing(lanes, maker.uniform(45, 70), {RIGHT: 130.0, LEFT: 190.0}, missing)
    episode = maker.episode(crossing.town, crossing.out_node(RIGHT), lanes - 1)
    route = episode.route
    path = crossing.path(LEFT, RIGHT, lanes - 1)
    first = float((route.junctions[0][0] - episode.start_s) / (0.8 * maker.limit))
    first += maker.uniform(-3, 1.5)
    episode.movers += maker.arrivals(
        path, crossing.lengths[LEFT], first, maker.pick(2, 3, 4, 5), (2.2, 5.0)
    )
    return episode
