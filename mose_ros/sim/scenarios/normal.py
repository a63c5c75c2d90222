"""Lane following, curves, turns by command, roundabouts; light traffic that is in nobody's way."""

import numpy as np

from mose_ros.sim.scenarios.base import BACK, Episode, Maker
from mose_ros.sim.town import LEFT, RIGHT, STRAIGHT, Block


def make(maker: Maker) -> Episode:
    """Draw an episode."""
    return maker.pick(_curves, _crossing, _crossing, _tee, _roundabout)(maker)


def _curves(maker: Maker) -> Episode:
    lanes, first = maker.pick(1, 2, 3), maker.uniform(50, 80)
    blocks, end = [maker.curve((30, 80), (15, 30))], '2S0_0_'
    if maker.chance(0.6):
        blocks.append(maker.curve((25, 60), (20, 30)))
        end = '2C0_1_'
    else:
        blocks.append(Block(letter='S', config={'length': maker.uniform(30, 60)}))
    lane = maker.pick(*range(lanes))
    episode = maker.episode(maker.town(blocks, lanes, first), end, lane)
    _add_traffic(maker, episode, lanes, lane)
    _add_oncoming(maker, episode, end, lanes)
    _add_parked(maker, episode, first, lanes - 1 - lane)
    maker.walkers(episode, first)
    return episode


def _tee(maker: Maker) -> Episode:
    return _crossing(maker, missing=maker.pick(RIGHT, STRAIGHT, LEFT))


def _crossing(maker: Maker, missing: int | None = None) -> Episode:
    lanes, first = maker.pick(1, 2, 2, 3), maker.uniform(55, 90)
    turn = maker.pick(*[t for t in (RIGHT, STRAIGHT, LEFT) if t != missing])
    crossing = maker.crossing(
        lanes, first, {arm: maker.uniform(60, 95) for arm in (RIGHT, STRAIGHT, LEFT)}, missing
    )
    lane = {RIGHT: lanes - 1, LEFT: 0}.get(turn, maker.pick(*range(lanes)))
    end = crossing.out_node(turn)
    episode = maker.episode(crossing.town, end, lane)
    _add_traffic(maker, episode, lanes, lane)
    if turn == STRAIGHT:
        _add_oncoming(maker, episode, end, lanes)
    for arm, length in crossing.lengths.items():
        opposite = {RIGHT: LEFT, STRAIGHT: BACK, LEFT: RIGHT}[arm]
        in_way = arm == turn or (arm == STRAIGHT and turn == LEFT)
        if opposite in (*crossing.lengths, BACK) and not in_way and maker.chance(0.5):
            # It waits at the line for as long as the episode lasts.
            path = crossing.path(arm, opposite)
            episode.movers.append(maker.car(path, length - maker.uniform(4.5, 6), 0.0))
    _add_parked(maker, episode, first - 15, lanes - 1 - lane)
    maker.walkers(episode, first)
    return episode


def _roundabout(maker: Maker) -> Episode:
    lanes, first = maker.pick(1, 1, 2), maker.uniform(45, 60)
    turn = maker.pick(RIGHT, STRAIGHT, LEFT)
    ring = {'exit_radius': maker.uniform(9, 13), 'inner_radius': maker.uniform(15, 22)}
    blocks = [
        Block(letter='O', config=ring),
        Block(letter='S', socket=turn, config={'length': maker.uniform(15, 30)}),
    ]
    lane = lanes - 1 if turn == RIGHT else maker.pick(*range(lanes))
    episode = maker.episode(maker.town(blocks, lanes, first), '2S0_0_', lane)
    _add_traffic(maker, episode, lanes, lane)
    maker.walkers(episode, first)
    return episode


def _add_traffic(maker: Maker, episode: Episode, lanes: int, lane: int) -> None:
    """Put a car ahead, and some in the lanes beside where no turn lets ways cross."""
    route = episode.route
    if maker.chance(0.6):
        speed = maker.limit * maker.uniform(0.7, 1.0)
        v = max(3.0, min(speed, episode.start_speed + 2))
        s = episode.start_s + maker.uniform(18, 45)
        episode.movers.append(maker.car(route, s, v, cruise=speed))
    for other in range(lanes):
        if other != lane and maker.chance(0.5) and not route.junctions:
            path = episode.town.path(route.lanes[0][0], route.lanes[-1][1], other)
            s = max(3.0, episode.start_s + maker.uniform(-8, 50))
            episode.movers.append(maker.car(path, s, maker.limit * maker.uniform(0.6, 0.95)))


def _add_oncoming(maker: Maker, episode: Episode, end: str, lanes: int) -> None:
    path = episode.town.path(f'-{end}', '->', maker.pick(*range(lanes)))
    for s in np.arange(maker.uniform(0, 30), path.length - 40, 22):
        if maker.chance(0.35):
            speed = maker.limit * maker.uniform(0.75, 0.95)
            episode.movers.append(maker.car(path, float(s), speed))


def _add_parked(maker: Maker, episode: Episode, stop: float, lanes_between: int) -> None:
    """Let cars be parked beside the first straight, out of everybody's way."""
    if lanes_between == 0 and maker.chance(0.35):
        begin = maker.uniform(20, 30)
        maker.parking(episode, begin, stop - 3)
        maker.parked_row(episode, begin + 3, stop - 6)
