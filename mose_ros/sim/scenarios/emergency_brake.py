"""Sudden dangers: a pedestrian steps out, the car ahead brakes hard, a car cuts in close ahead."""

import numpy as np

from mose_ros.sim.scenarios.base import Episode, Maker
from mose_ros.sim.town import Path
from mose_ros.sim.traffic import Moment, Mover

REACTION_S, HARD = 0.5, 5.0  # what is expected of the ego: s, m/s^2


def make(maker: Maker) -> Episode:
    """Draw an episode."""
    return maker.pick(_pedestrian, _braking_lead, _cut_in)(maker)


def stopping_distance(speed: float) -> float:
    """Return the metres that a sensible driver needs to stop."""
    return REACTION_S * speed + speed * speed / (2 * HARD)


def _pedestrian(maker: Maker) -> Episode:
    lanes = maker.pick(1, 1, 2)
    town, end = maker.road(lanes, (100, 125))
    lane = lanes - 1
    episode = maker.episode(town, end, lane)
    route = episode.route
    for _ in range(maker.pick(1, 1, 2)):
        where = episode.start_s + maker.uniform(38, 75)
        if all(abs(where - other.path.where) > 12 for other in episode.movers):
            episode.movers.append(_crossing_walker(maker, episode, where))
    if maker.chance(0.5):
        town.add_crosswalk(route, episode.movers[0].path.where, -route.right[0], route.left[0])
    maker.walkers(episode, 80, 0.4)
    return episode


def _crossing_walker(maker: Maker, episode: Episode, where: float) -> Mover:
    """Make someone who waits at the kerb in plain view and steps out when the ego is near enough to matter."""
    route = episode.route
    right, left = -(route.right[0] + 0.9), route.left[0] + 0.9
    from_right = maker.chance(0.65)
    ends = (right, left) if from_right else (left, right)
    path = Path(np.array([route.pose(where, d)[:2] for d in (*ends, ends[1] * 1.4)]))
    path.where = where
    walking, extra = maker.uniform(1.1, 1.8), maker.uniform(0.5, 6.0)
    to_lane = (abs(ends[0]) - 1.6) / walking + 0.4  # s until the ego's way is blocked

    def script(walker: Mover, moment: Moment) -> None:
        speed = abs(moment.ego.speed)
        distance = where - moment.ego_front
        needed = max(stopping_distance(speed) + 3.0 + extra, speed * to_lane - extra / 2)
        if walker.cruise == 0 and walker.s < 0.5 and -1 < distance < max(needed, 9.0):
            walker.cruise = walking
        if walker.s > 0.5:
            # Nobody walks into the side of a car that stands in the way.
            d = right + walker.s if from_right else left - walker.s
            ahead = (moment.ego_d - d) * (1 if from_right else -1)
            beside = -moment.ego.size[0] - 0.6 < distance < 0.6
            walker.cruise = 0.0 if beside and 0 < ahead < 2.2 else walking
        if walker.s > abs(ends[0]) + abs(ends[1]):
            walker.cruise, walker.script = 0.0, None

    return maker.walker(path, 0.0, 0.0, script=script)


def _braking_lead(maker: Maker) -> Episode:
    lanes = maker.pick(1, 2)
    town, end = maker.road(lanes, (110, 140))
    lane = maker.pick(*range(lanes))
    episode = maker.episode(town, end, lane, start_speed=maker.uniform(4, 7))
    speed = maker.limit * maker.uniform(0.75, 0.95)
    lead = maker.car(
        episode.route,
        episode.start_s + maker.uniform(16, 24),
        episode.start_speed + 0.5,
        cruise=speed,
    )
    hard, wait = maker.uniform(4.5, 6.5), maker.uniform(2, 4)
    at = sorted(episode.start_s + maker.uniform(35, 90) for _ in range(maker.pick(1, 1, 2)))

    def script(car: Mover, moment: Moment) -> None:
        if not at or car.s < at[0] or car.pace:
            return
        gap = car.s - car.size[0] / 2 - moment.ego_front
        own = abs(moment.ego.speed)
        if gap > stopping_distance(own) - car.v**2 / (2 * hard) + 2.5:
            car.pace = [(car.v / hard + 0.1, -hard), (wait, 0.0)]
            at.pop(0)

    lead.script = script
    episode.movers.append(lead)
    if maker.chance(0.5):
        path = town.path(f'-{end}', '->', maker.pick(*range(lanes)))
        episode.movers += maker.arrivals(path, path.length, 14, 3, (2, 5))
    maker.walkers(episode, 90)
    return episode


def _cut_in(maker: Maker) -> Episode:
    lanes = maker.pick(2, 2, 3)
    town, end = maker.road(lanes, (120, 150))
    lane = maker.pick(*range(lanes))
    episode = maker.episode(town, end, lane, start_speed=maker.uniform(4.5, 7))
    width = float(episode.route.width[0])
    beside = maker.pick(*[other for other in (lane - 1, lane + 1) if 0 <= other < lanes])
    side = (lane - beside) * width  # d of its lane as seen from the route
    begin = episode.start_s + maker.uniform(25, 60)
    ahead, slow = maker.uniform(3.5, 8.0), maker.uniform(0.45, 0.7)
    car = maker.car(
        episode.route,
        episode.start_s + maker.uniform(6, 12),
        episode.start_speed + 1,
        'car',
        d=side,
        cruise=maker.limit,
        side_speed=maker.uniform(1.2, 1.9),
        blind_to=frozenset(['ego']),
    )

    def script(cutter: Mover, moment: Moment) -> None:
        gap = cutter.s - cutter.size[0] / 2 - moment.ego_front
        if cutter.goal_d == 0:
            return
        # Keep abreast until the place has come, then go in: late enough to matter, early enough to brake.
        cutter.cruise = max(1.0, abs(moment.ego.speed) + 0.8 * (ahead + 1.5 - gap))
        closing = max(0.0, abs(moment.ego.speed) - cutter.v)
        if cutter.s > begin and gap > ahead + closing * REACTION_S:
            cutter.goal_d = 0.0
            cutter.cruise = slow * maker.limit
            cutter.script = None

    car.script = script
    episode.movers.append(car)
    maker.walkers(episode, 90)
    return episode
