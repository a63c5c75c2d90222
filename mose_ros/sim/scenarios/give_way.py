"""Others go first: unprotected left turns, crossing traffic with right of way, an emergency vehicle from behind."""

import numpy as np

from mose_ros.sim.roads import Paint
from mose_ros.sim.scenarios.base import BACK, Crossing, Episode, Maker
from mose_ros.sim.town import LEFT, RIGHT, STRAIGHT
from mose_ros.sim.traffic import Moment, Mover

SIREN_SIZE = (5.6, 2.0, 2.5)


def make(maker: Maker) -> Episode:
    """Draw an episode."""
    return maker.pick(_left_turn, _cross_traffic, _emergency_vehicle)(maker)


def _arrival(maker: Maker, episode: Episode) -> float:
    """Return about when the ego comes to the junction."""
    return float((episode.route.junctions[0][0] - episode.start_s) / (0.8 * maker.limit))


def _left_turn(maker: Maker) -> Episode:
    lanes, missing = maker.pick(1, 1, 2), maker.pick(None, None, RIGHT)
    crossing = maker.crossing(lanes, maker.uniform(50, 75), {STRAIGHT: 190.0, LEFT: 75.0}, missing)
    episode = maker.episode(crossing.town, crossing.out_node(LEFT), 0)
    path = crossing.path(STRAIGHT, BACK, maker.pick(*range(lanes)))
    first = _arrival(maker, episode) + maker.uniform(-2.5, 2.0)
    count = maker.pick(1, 2, 3, 4)
    episode.movers += maker.arrivals(path, crossing.lengths[STRAIGHT], first, count, (2.0, 3.5))
    return episode


def _cross_traffic(maker: Maker) -> Episode:
    lanes, missing = maker.pick(1, 1, 2), maker.pick(None, STRAIGHT)
    turn = maker.pick(*[t for t in (RIGHT, STRAIGHT, LEFT) if t != missing])
    crossing = maker.crossing(lanes, maker.uniform(50, 75), {RIGHT: 170.0, LEFT: 170.0}, missing)
    lane = 0 if turn == LEFT else lanes - 1
    episode = maker.episode(crossing.town, crossing.out_node(turn), lane)
    route = episode.route
    if turn != STRAIGHT:
        episode.goal_s = min(episode.goal_s, route.junctions[0][1] + maker.uniform(60, 80))
    _paint_give_way(crossing, episode, lanes)
    for come, go in ((LEFT, RIGHT), (RIGHT, LEFT)):
        if (turn == RIGHT and come == RIGHT) or (come == RIGHT and maker.chance(0.4)):
            continue
        path = crossing.path(come, go, maker.pick(*range(lanes)))
        first = _arrival(maker, episode) + maker.uniform(-2.5, 2.5)
        cars = maker.arrivals(path, crossing.lengths[come], first, maker.pick(1, 2, 3), (2.0, 3.5))
        episode.movers += cars
    return episode


def _paint_give_way(crossing: Crossing, episode: Episode, lanes: int) -> None:
    """Paint the broken line of who must wait."""
    route = episode.route
    s, half = route.junctions[0][0] - 0.8, float(route.width[0]) / 2
    right, left = -route.right[0], -route.right[0] + 2 * half * lanes
    d = right + 0.3
    while d < left - 0.5:
        ends = [route.pose(s, d)[:2], route.pose(s, d + 0.5)[:2]]
        crossing.town.extra_paint.append(Paint(points=np.array(ends), width=0.4))
        d += 0.9


def _emergency_vehicle(maker: Maker) -> Episode:
    lanes = maker.pick(1, 1, 2)
    town, end = maker.road(lanes, (190, 215))
    lane = lanes - 1
    start = maker.uniform(46, 55)
    episode = maker.episode(town, end, lane, start_s=start, start_speed=maker.uniform(4, 7))
    episode.may_use_opposing = True
    siren = Mover(
        id='siren1',
        kind='vehicle',
        type_id='vehicle.emergency',
        size=SIREN_SIZE,
        state='siren',
        path=episode.route,
        s=start - maker.uniform(28, 42),
        v=10.0,
        cruise=maker.uniform(11.5, 13.5),
        side_speed=1.6,
    )

    def script(van: Mover, moment: Moment) -> None:
        behind = moment.ego_s - van.s
        gives_way = moment.ego.speed < 4.5 or moment.ego_d < -0.4
        beside_or_past = -14 < behind < 7
        if 0 < behind < 24 and gives_way:
            van.goal_d = max(0.0, moment.ego_d) + 2.9 + min(0.0, moment.ego_d)
        elif not beside_or_past:
            van.goal_d = 0.0

    siren.script = script
    episode.movers.append(siren)
    episode.siren = siren
    if maker.chance(0.3):
        lead = maker.car(episode.route, start + 75, 7.0, 'car', cruise=maker.limit)
        lead.d = lead.goal_d = -0.5
        episode.movers.append(lead)
    maker.walkers(episode, 150)
    return episode
