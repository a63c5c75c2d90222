"""The infractions of the CARLA leaderboard, in Bench2Drive's version: their names and what each costs.

The simulator's judge counts them, the report reads them from any results file; both mean the same by them.
"""

from collections.abc import Mapping, Sequence

SLOWNESS = 'min_speed_infractions'  # written at each quarter of a route: a measure of pace
INFRACTIONS = (
    'collisions_layout',
    'collisions_pedestrian',
    'collisions_vehicle',
    'red_light',
    'stop_infraction',
    'outside_route_lanes',
    SLOWNESS,
    'yield_emergency_vehicle_infractions',
    'scenario_timeouts',
    'route_dev',
    'vehicle_blocked',
    'route_timeout',
)
PENALTIES = {  # what one event leaves of the driving score; one not named here leaves it whole
    'collisions_pedestrian': 0.5,
    'collisions_vehicle': 0.6,
    'collisions_layout': 0.65,
    'red_light': 0.7,
    'stop_infraction': 0.8,
    'scenario_timeouts': 0.7,
    'yield_emergency_vehicle_infractions': 0.7,
}


def penalty(events: Mapping[str, Sequence[str]]) -> float:
    """Return what the events by infraction leave of the driving score, 0..1."""
    left = 1.0
    for name, found in events.items():
        left *= PENALTIES.get(name, 1.0) ** len(found)
    return left


def faults(events: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Return what was done wrong: the infractions that have events, but for slowness, which is none."""
    return {name: tuple(found) for name, found in events.items() if found and name != SLOWNESS}
