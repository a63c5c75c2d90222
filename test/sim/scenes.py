"""A small town for tests of the pictures: a straight two-lane road with a crossing, and one actor of each kind."""

import numpy as np

from mose_ros.core.types import Actor, EgoState
from mose_ros.sim.roads import Paint, RoadMap, Surface

EGO = EgoState(x=0.0, y=-1.75, yaw=0.0, speed=8.0)
CAR, WALKER, LIGHT, SIGN = (4.5, 1.85, 1.5), (0.35, 0.35, 1.75), (0.5, 0.5, 4.6), (0.5, 0.5, 2.7)


def along(x0: float, x1: float, y: float, step: float = 2.0) -> np.ndarray:
    """Return a line parallel to x."""
    x = np.linspace(x0, x1, max(2, int(abs(x1 - x0) / step) + 1))
    return np.stack([x, np.full_like(x, y)], 1)


def across(y0: float, y1: float, x: float) -> np.ndarray:
    """Return a line parallel to y."""
    return along(y0, y1, x)[:, ::-1]


def actor(name: str, kind: str, type_id: str, x: float, y: float, size, yaw=0.0, **rest) -> Actor:
    """Return an actor; shorter than the keywords of the type."""
    return Actor(id=name, kind=kind, type_id=type_id, x=x, y=y, yaw=yaw, size=size, **rest)


def town(seed: int = 0, buildings: int = 60) -> RoadMap:
    """Return the road from x = -120 to 160 with a crossing at x = 45, pavements, a parking strip, houses, trees, lamps."""
    rng = np.random.default_rng(seed)
    surfaces = [
        Surface(left=along(-120, 160, 3.5), right=along(-120, 160, -3.5)),
        Surface(left=across(-120, 120, 41.5), right=across(-120, 120, 48.5)),
        Surface(left=along(-60, 25, -3.5), right=along(-60, 25, -6.0), kind='parking'),
    ]
    paint = []
    for x0, x1 in ((-120, 39), (51, 160)):
        paint.append(Paint(points=along(x0, x1, 0.0), color='yellow', broken=True))
        for y in (3.4, -3.4):
            paint.append(Paint(points=along(x0, x1, y)))
        surfaces.append(
            Surface(left=along(x0, x1, 6.0), right=along(x0, x1, 3.5), kind='sidewalk')
        )
        surfaces.append(
            Surface(left=along(x0, x1, -6.0), right=along(x0, x1, -8.5), kind='sidewalk')
        )
    paint.append(Paint(points=across(-3.4, -0.2, 37.0), width=0.4))
    for y in np.arange(-3.0, 3.1, 1.0):
        paint.append(Paint(points=along(38.0, 40.8, y), width=0.5))
    scenery = []
    for index in range(buildings):
        x, side = -115 + 280 * index / buildings, 1 if index % 2 else -1
        if abs(x - 45) < 14:
            continue
        size = tuple(rng.uniform((8, 8, 5), (14, 12, 18)))
        y = side * rng.uniform(18, 26)
        scenery.append(actor(f'house{index}', 'static', 'static.building', x, y, size))
    for index, x in enumerate(np.arange(-100, 150, 16.0)):
        if abs(x - 45) < 10:
            continue
        scenery.append(actor(f'tree{index}', 'static', 'static.tree', x, 9.5, (3.5, 3.5, 6.0)))
        scenery.append(
            actor(f'lamp{index}', 'static', 'static.lamp', x + 8, -9.0, (0.3, 0.3, 6.0), np.pi / 2)
        )
    return RoadMap(surfaces=surfaces, paint=paint, scenery=scenery, seed=seed)


def everyone(light: str = 'red', brakes: str = 'braking') -> list[Actor]:
    """Return one actor of each kind, most within 35 m ahead of EGO, the rest around it."""
    return [
        actor('lead', 'vehicle', 'vehicle.car', 20.0, -1.75, CAR, state=brakes),
        actor('oncoming', 'vehicle', 'vehicle.car', 24.0, 1.75, CAR, np.pi),
        actor('truck', 'vehicle', 'vehicle.truck', -14.0, 1.75, (8.0, 2.4, 3.2), np.pi),
        actor('ambulance', 'vehicle', 'vehicle.emergency', -12.0, -1.75, (5.4, 2.0, 2.4), state='siren'),
        actor('parked', 'vehicle', 'vehicle.parked', 11.0, -4.8, CAR),
        actor('parked2', 'vehicle', 'vehicle.parked', 3.0, -4.8, CAR),
        actor('walker', 'walker', 'walker.pedestrian', 14.0, 4.0, WALKER, -1.57, velocity=(0.0, -1.2)),
        actor('walker2', 'walker', 'walker.pedestrian', 35.0, 2.2, WALKER, 1.57),
        actor('cone', 'static', 'static.cone', 9.0, 3.2, (0.4, 0.4, 0.75)),
        actor('cone2', 'static', 'static.cone', 6.0, 2.6, (0.4, 0.4, 0.75)),
        actor('barrier', 'static', 'static.barrier', 14.0, 1.6, (0.5, 2.4, 1.0)),
        actor('light', 'traffic_light', 'traffic.traffic_light', 37.0, -4.6, LIGHT, state=light),
        actor('stop', 'traffic_sign', 'traffic.stop', 20.0, -6.6, SIGN),
    ]  # fmt: skip


def light(state, distance, yaw=0.0):
    """Return a traffic light to the right of the lane."""
    kind = ('traffic_light', 'traffic.traffic_light')
    return actor('light', *kind, distance, -5.0, LIGHT, yaw, state=state)
