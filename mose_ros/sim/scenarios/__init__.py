"""The scenario families: from a seed to an episode, that is roads, route, traffic, and what will happen."""

from mose_ros.sim.scenarios import (
    emergency_brake,
    give_way,
    merging,
    normal,
    overtaking,
    parking_exit,
    traffic_sign,
)
from mose_ros.sim.scenarios.base import Episode, Maker

MAKERS = {  # family -> Maker -> Episode
    'normal': normal.make,
    'merging': merging.make,
    'overtaking': overtaking.make,
    'emergency_brake': emergency_brake.make,
    'give_way': give_way.make,
    'traffic_sign': traffic_sign.make,
    'parking_exit': parking_exit.make,
}

__all__ = ['MAKERS', 'Episode', 'Maker']
