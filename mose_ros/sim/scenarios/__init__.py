"""The scenario families: from a seed to an episode, that is roads, route, traffic, and what will happen."""

from mose_ros.sim.scenarios import emergency_brake, give_way, normal, traffic_sign
from mose_ros.sim.scenarios.base import Episode, Maker

MAKERS = {
    'normal': normal.make,
    'emergency_brake': emergency_brake.make,
    'give_way': give_way.make,
    'traffic_sign': traffic_sign.make,
}

__all__ = ['MAKERS', 'Episode', 'Maker']
