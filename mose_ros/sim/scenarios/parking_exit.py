"""Out of a parking place beside the lane, between parked cars, when those who come from behind have passed."""

from mose_ros.core.types import Command
from mose_ros.sim.scenarios.base import BAY_WIDTH, Episode, Maker, change_lane


def make(maker: Maker) -> Episode:
    """Draw an episode."""
    lanes = maker.pick(1, 1, 2)
    town, end = maker.road(lanes, (135, 160))
    start = maker.uniform(50, 65)
    episode = maker.episode(town, end, lanes - 1, start_s=start, start_speed=0.0)
    route = episode.route
    begin, stop = start - maker.uniform(12, 30), start + maker.uniform(14, 32)
    maker.parking(episode, begin, stop)
    episode.start_d = -float(route.right[0]) - BAY_WIDTH / 2 + 0.1
    maker.parked_row(episode, start + maker.uniform(7.5, 10.5), stop - 2.5)
    maker.parked_row(episode, start - maker.uniform(6.0, 8.5), begin + 2.5, -1)
    route.right[route.span(begin, stop)] += BAY_WIDTH
    change_lane(episode, Command.LANE_LEFT, stop + 20)
    _add_passing(maker, episode, end, lanes)
    maker.walkers(episode, 120, 0.4)
    return episode


def _add_passing(maker: Maker, episode: Episode, end: str, lanes: int) -> None:
    """Let some pass from behind, then leave the lane free; some come towards."""
    path = episode.town.path('>', end, lanes - 1)
    speed, s = maker.limit * maker.uniform(0.75, 1.0), episode.start_s - maker.uniform(4, 22)
    ignore = frozenset(body.id for body in episode.statics)
    for _ in range(maker.pick(0, 1, 2, 3)):
        if s < 3:
            break
        episode.movers.append(maker.car(path, s, speed, blind_to=ignore))
        s -= maker.uniform(13, 24)
    if maker.chance(0.5):
        other = episode.town.path(f'-{end}', '->')
        episode.movers += maker.arrivals(other, other.length, 12, 3, (2, 5))
