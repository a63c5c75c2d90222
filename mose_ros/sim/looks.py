"""How actors look: the mesh and the class of every kind of them. Knows no renderer.

A mesh stands at the origin, looks along +x and fits the actor's size.
"""

import functools
import zlib
from collections.abc import Callable

import numpy as np

from mose_ros.core.types import Actor
from mose_ros.sim import roadside_looks, vehicle_looks
from mose_ros.sim.meshes import Mesh

CLASSES = (
    'sky',
    'ground',
    'road',
    'sidewalk',
    'parking',
    'line',
    'vehicle',
    'walker',
    'traffic_light',
    'traffic_sign',
    'obstacle',
    'building',
    'vegetation',
    'pole',
)  # a pixel of Renderer.semantics is an index into this

_LOOKS: dict[str, Callable[..., Mesh]] = {
    'vehicle': vehicle_looks.car,  # any vehicle without a look of its own, parked ones too
    'vehicle.truck': vehicle_looks.truck,
    'vehicle.emergency': vehicle_looks.emergency,
    'vehicle.ego': functools.partial(vehicle_looks.car, paint=(0.05, 0.62, 0.62)),
    'walker': roadside_looks.walker,
    'traffic_light': roadside_looks.traffic_light,
    'traffic.stop': roadside_looks.stop_sign,
    'static.cone': roadside_looks.cone,
    'static.barrier': roadside_looks.barrier,
    'static.building': roadside_looks.building,
    'static.tree': roadside_looks.tree,
    'static.lamp': roadside_looks.lamp,
}


def class_of(actor: Actor) -> str:
    """Return the name of the actor's class, one of CLASSES."""
    if actor.kind == 'static':
        return {
            'static.building': 'building',
            'static.tree': 'vegetation',
            'static.lamp': 'pole',
        }.get(actor.type_id, 'obstacle')
    return actor.kind


def mesh_of(actor: Actor, seed: int = 0) -> Mesh:
    """Return the actor's mesh in its own frame; its colours come from its id and the seed."""
    choice = zlib.crc32(f'{seed}:{actor.id}'.encode())
    size = tuple(round(float(side), 2) for side in actor.size)
    walks = actor.kind == 'walker' and np.hypot(*actor.velocity) > 0.2
    state = 'walking' if walks else actor.state
    return _mesh(actor.kind, actor.type_id, size, state, choice)


@functools.lru_cache(maxsize=256)
def _mesh(kind, type_id, size, state, choice) -> Mesh:
    look = _LOOKS.get(type_id) or _LOOKS.get(kind)
    if look is None:
        raise ValueError(
            f'nothing to draw for kind {kind!r}, type_id {type_id!r}; known: {", ".join(_LOOKS)}'
        )
    if min(size) <= 0:
        raise ValueError(f'{type_id}: every side of size {size} must be above 0')
    return look(size, state, np.random.default_rng(choice))
