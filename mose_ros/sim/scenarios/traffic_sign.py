"""Lights and stop signs at crossings."""

import numpy as np

from mose_ros.sim.scenarios.base import BACK, Crossing, Episode, Maker
from mose_ros.sim.town import LEFT, RIGHT, STRAIGHT, Path
from mose_ros.sim.traffic import Light

LINE_BEFORE_M = 2.0  # of the stop line before the junction
YELLOW_S = 3.0
LIGHT_SIZE, SIGN_SIZE = (0.35, 0.35, 3.3), (0.1, 0.75, 2.3)


def make(maker: Maker) -> Episode:
    """Draw an episode."""
    with_light = maker.chance(0.55)
    missing = maker.pick(None, None, RIGHT, STRAIGHT, LEFT)
    turn = maker.pick(*[t for t in (RIGHT, STRAIGHT, LEFT) if t != missing])
    lanes, first = 1 if turn == LEFT else maker.pick(1, 1, 2), maker.uniform(60, 95)
    arms = {arm: maker.uniform(70, 110) for arm in (RIGHT, STRAIGHT, LEFT)}
    crossing = maker.crossing(lanes, first, arms, missing)
    episode = maker.episode(crossing.town, crossing.out_node(turn), lanes - 1)
    if with_light:
        _add_lights(maker, episode, crossing, turn)
    else:
        _add_stop_sign(maker, episode, crossing, turn)
    maker.walkers(episode, first)
    return episode


def _entry(episode: Episode) -> float:
    return float(episode.route.junctions[0][0])


def place_post(crossing: Crossing, path: Path, line: float, beyond: float) -> tuple[float, float]:
    """Return where, so far beyond the line and to the right of it, a post stands clear of all lanes."""
    centres = np.concatenate([p for road in crossing.town.roads.values() for p in road.center])
    half = next(iter(crossing.town.roads.values())).width / 2
    x, y, yaw = path.pose(line)
    x, y = x + beyond * np.cos(yaw), y + beyond * np.sin(yaw)
    for d in np.arange(half + 0.6, 12.0, 0.2):
        post = float(x + d * np.sin(yaw)), float(y - d * np.cos(yaw))
        if np.hypot(*(centres - post).T).min() > half + 0.6:
            return post
    raise ValueError(f'no place for a post {beyond} m beyond the line of {path}')


def _post(
    maker: Maker, crossing: Crossing, path: Path, line: float, beyond: float, type_id: str, **more
) -> Light:
    x, y = place_post(crossing, path, line, beyond)
    sign = type_id == 'traffic.stop'
    return Light(
        maker.name('sign' if sign else 'light'),
        'traffic_sign' if sign else 'traffic_light',
        type_id,
        SIGN_SIZE if sign else LIGHT_SIZE,
        x,
        y,
        path.pose(line)[2],
        path=path,
        line=line,
        **more,
    )


def _paint_line(crossing: Crossing, path: Path, line: float, lanes: int) -> None:
    road = next(iter(crossing.town.roads.values()))
    half = road.width / 2
    crossing.town.add_stop_line(path, line + 0.2, -half, half + (lanes - 1) * road.width)


def _add_lights(maker: Maker, episode: Episode, crossing: Crossing, turn: int) -> None:
    route, entry = episode.route, _entry(episode)
    lanes = len(crossing.town.roads['>', '>>'].center)
    green, red = maker.uniform(7, 12), maker.uniform(8, 14)
    cycle = green + YELLOW_S + red
    line = entry - LINE_BEFORE_M
    arrival = (line - episode.start_s) / (0.75 * maker.limit)
    # Where in its phases the light is when the ego comes: mostly about to change, or red.
    phase = (
        maker.uniform(green - 2.5, cycle - 2)
        if maker.chance(0.85)
        else maker.uniform(0, green - 4)
    )
    offset = (phase - arrival) % cycle
    own = [('green', green), ('yellow', YELLOW_S), ('red', red)]
    # The cross traffic has the time of our red, less a second of red for all at either end.
    cross = [
        ('red', green + YELLOW_S + 1),
        ('green', red - 2 - YELLOW_S),
        ('yellow', YELLOW_S),
        ('red', 1.0),
    ]
    beyond = maker.uniform(6.5, 8.5)
    light = _post(
        maker, crossing, route, line, beyond, 'traffic.traffic_light', phases=own, offset=offset
    )
    episode.lights.append(light)
    _paint_line(crossing, route, line, lanes)
    for arm, length in crossing.lengths.items():
        across = {RIGHT: LEFT, LEFT: RIGHT, STRAIGHT: BACK}[arm]
        if across not in (*crossing.lengths, BACK):
            continue
        path = crossing.path(arm, across)
        phases = own if arm == STRAIGHT else cross
        other = _post(
            maker,
            crossing,
            path,
            length - LINE_BEFORE_M,
            beyond,
            'traffic.traffic_light',
            phases=phases,
            offset=offset,
            for_ego=False,
        )
        episode.lights.append(other)
        _paint_line(crossing, path, other.line, lanes)
        if arm == STRAIGHT and turn == LEFT:
            continue  # nobody comes towards an ego that turns left
        count, s = maker.pick(0, 1, 2), length - maker.uniform(12, 45)
        for _ in range(count):
            if s > 4:
                speed = maker.uniform(6.5, 8)
                episode.movers.append(maker.car(path, s, speed, lights=[other]))
            s -= maker.uniform(14, 25)
    if maker.chance(0.35):
        s = episode.start_s + maker.uniform(14, 22)
        speed = maker.uniform(0.75, 0.95) * maker.limit
        lead = maker.car(route, s, episode.start_speed, 'car', cruise=speed, lights=[light])
        if s < line - 20:
            episode.movers.append(lead)


def _add_stop_sign(maker: Maker, episode: Episode, crossing: Crossing, turn: int) -> None:
    route, entry = episode.route, _entry(episode)
    line = entry - LINE_BEFORE_M
    episode.lights.append(
        _post(maker, crossing, route, line, maker.uniform(1.8, 2.6), 'traffic.stop')
    )
    _paint_line(crossing, route, line, len(crossing.town.roads['>', '>>'].center))
    if maker.chance(0.35) and {RIGHT, LEFT} <= set(crossing.lengths):
        come = LEFT if turn == RIGHT else maker.pick(LEFT, RIGHT)
        path = crossing.path(come, {LEFT: RIGHT, RIGHT: LEFT}[come])
        arrival = (line - episode.start_s) / (0.7 * maker.limit)
        episode.movers += maker.arrivals(
            path, crossing.lengths[come], arrival + maker.uniform(-2, 3), maker.pick(1, 2), (2, 3)
        )
