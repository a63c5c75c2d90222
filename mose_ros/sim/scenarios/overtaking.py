"""Something is in the way: a parked or broken-down car, roadworks, or someone slow; past it on another lane."""

import numpy as np

from mose_ros.sim.scenarios.base import Episode, Maker
from mose_ros.sim.traffic import Mover


def make(maker: Maker) -> Episode:
    """Draw an episode."""
    lanes = maker.pick(1, 1, 2, 3)
    town, end = maker.road(lanes, (175, 200))
    lane = lanes - 1
    episode = maker.episode(town, end, lane)
    obstacle_from, obstacle_to = maker.pick(_parked, _roadworks, _slow)(maker, episode)
    if lanes == 1:
        # Past it on the lane of those who come towards: its line may be crossed.
        episode.may_use_opposing = True
        town.broken_center |= set(town.roads)
        _add_oncoming(maker, episode, end, obstacle_from, obstacle_to)
    else:
        _add_beside(maker, episode, end, lane)
    maker.walkers(episode, 150, 0.4)
    return episode


def _parked(maker: Maker, episode: Episode) -> tuple[float, float]:
    """Put one or two cars that stand, in the middle of the lane or half off it."""
    s = episode.start_s + maker.uniform(50, 80)
    d = maker.pick(0.0, maker.uniform(-0.9, 0.2))
    car = maker.parked(episode.route, s, d, maker.pick('car', 'car', 'van', 'truck'))
    episode.statics.append(car)
    last = s + car.size[0] / 2
    if maker.chance(0.35):
        second = maker.parked(episode.route, last + maker.uniform(4, 6), d, 'car')
        episode.statics.append(second)
        last += 8.5
    elif maker.chance(0.4):
        behind = s - car.size[0] / 2 - maker.uniform(5, 8)
        episode.statics.append(maker.thing('static.cone', episode.route, behind, d))
    return s - car.size[0] / 2, last


def _roadworks(maker: Maker, episode: Episode) -> tuple[float, float]:
    """Close the lane for a stretch: a taper of cones, a barrier, cones along it."""
    route, half = episode.route, float(episode.route.width[0]) / 2
    s, length = episode.start_s + maker.uniform(50, 80), maker.uniform(8, 20)
    reach = half - maker.uniform(0.3, 0.6)  # to the left
    for step in range(4):
        d = -half + 0.4 + (reach + half - 0.4) * step / 3
        episode.statics.append(maker.thing('static.cone', route, s - 8 + 2.5 * step, d))
    episode.statics.append(maker.thing('static.barrier', route, s + 1, 0.0))
    for along in np.arange(3, length, 3.5):
        episode.statics.append(maker.thing('static.cone', route, s + float(along), reach))
    if length > 12:
        episode.statics.append(maker.parked(route, s + length / 2 + 1, -0.3, 'van'))
    return s - 8, s + length


def _slow(maker: Maker, episode: Episode) -> tuple[float, float]:
    """Let someone crawl ahead."""
    s, speed = episode.start_s + maker.uniform(28, 45), maker.uniform(1.2, 2.2)
    car = maker.car(episode.route, s, speed, maker.pick('car', 'van', 'truck'))
    car.blind_to = frozenset(['ego'])
    episode.movers.append(car)
    return s, s + 55


def _add_oncoming(maker: Maker, episode: Episode, end: str, start: float, stop: float) -> None:
    """Let some come towards before the way is free; perhaps one more, long after."""
    path = episode.town.path(f'-{end}', '->', 0)
    meet = path.length - (start + stop) / 2  # where on their way the obstacle is
    reach = (start - episode.start_s) / (0.8 * maker.limit)  # when the ego gets there
    speed, time = maker.uniform(6.5, 8.0), reach + maker.uniform(-4, 1)
    cars: list[Mover] = []
    for _ in range(maker.pick(0, 1, 2, 3)):
        s = meet - speed * time
        if s > 3:
            cars.append(
                maker.car(path, s, speed, blind_to=frozenset(b.id for b in episode.statics))
            )
        time += maker.uniform(1.8, 3.2)
    episode.movers += cars


def _add_beside(maker: Maker, episode: Episode, end: str, lane: int) -> None:
    """Let some drive in the lane that the ego needs."""
    path = episode.town.path('>', end, lane - 1)
    speed, s = maker.limit * maker.uniform(0.7, 0.95), episode.start_s + maker.uniform(-9, 14)
    for _ in range(maker.pick(0, 1, 2, 3)):
        if s < 3:
            break
        episode.movers.append(maker.car(path, s, speed))
        s -= maker.uniform(13, 24)
    if maker.chance(0.5):
        other = episode.town.path(f'-{end}', '->')
        episode.movers += maker.arrivals(other, other.length, 14, 3, (2, 5))
