"""Small hand-made moments for the tests of the data and evaluation rooms."""

import numpy as np

from mose_ros.core.types import Actor, Command, Corridor, EgoState, Guidance, Scene, Trajectory

SIZES = {
    'vehicle': (4.5, 1.9, 1.5),
    'walker': (0.4, 0.4, 1.75),
    'traffic_light': (0.4, 0.4, 4.5),
    'traffic_sign': (0.1, 0.8, 2.6),
    'static': (0.5, 0.5, 1.0),
}


def corridor(
    length=110,
    lanes_left=0,
    lanes_right=0,
    opposing=1,
    junction=None,
    command=Command.FOLLOW,
    bend=0.0,
):
    """Return a way along +x from x = -10; `junction` = (start, end) in x, `bend` is its turn in rad (+ = left)."""
    width = 3.5
    heading = np.zeros(length)
    crossing = np.zeros(length, bool)
    if junction:
        first, last = junction[0] + 10, junction[1] + 10
        crossing[first:last] = True
        heading[first:] = bend * np.clip((np.arange(length - first) + 1) / (last - first), 0, 1)
    steps = np.stack([np.cos(heading), np.sin(heading)], axis=1)
    xy = np.vstack([[0.0, 0.0], np.cumsum(steps[:-1], axis=0)]) + (-10.0, 0.0)
    own_left = width / 2 + lanes_left * width
    return Corridor(
        xy=xy,
        left=np.full(length, own_left + opposing * width),
        right=np.full(length, width / 2 + lanes_right * width),
        own_left=np.full(length, own_left),
        lane_width=np.full(length, width),
        junction=crossing,
        speed_limit=np.full(length, 8.5),
        commands=(command,) * length,
    )


def scene(*actors, speed=7.0, y=0.0, yaw=0.0, way=None, command=None, **more):
    """Return a moment with the ego at x = 0 of the way."""
    way = way or corridor()
    command = command or way.commands[12]
    guidance = Guidance(near=np.array([10.0, -y]), far=np.array([25.0, -y]), command=command)
    ego = EgoState(x=0.0, y=y, yaw=yaw, speed=speed, since_stop=more.pop('since_stop', 100.0))
    values = {'time': 1.0, 'progress': 10.0, 'family': 'normal', **more}
    return Scene(ego=ego, actors=actors, corridor=way, guidance=guidance, **values)


def actor(kind, x, y, *, type_id=None, velocity=(0.0, 0.0), yaw=None, **more):
    """Return an actor; it looks where it goes."""
    default = {
        'vehicle': 'vehicle.car',
        'walker': 'walker.pedestrian',
        'traffic_light': 'traffic.traffic_light',
        'traffic_sign': 'traffic.stop',
        'static': 'static.cone',
    }
    if yaw is None:
        yaw = float(np.arctan2(velocity[1], velocity[0])) if any(velocity) else 0.0
    values = {'id': f'{kind}@{x},{y}', 'size': SIZES[kind], **more}
    return Actor(
        kind=kind,
        type_id=type_id or default[kind],
        x=float(x),
        y=float(y),
        yaw=float(yaw),
        velocity=tuple(float(value) for value in velocity),
        **values,
    )


def plan(speed, acceleration=0.0, lateral=0.0, dt=0.2, horizon=15):
    """Return a trajectory with constant acceleration that stops for good, and drifts by `lateral` m at its end."""
    times = dt * np.arange(1, horizon + 1)
    if acceleration < 0:
        times = np.minimum(times, speed / -acceleration)
    x = speed * times + 0.5 * acceleration * times**2
    y = lateral * np.linspace(0, 1, horizon) ** 2
    return Trajectory(time=1.0, dt=dt, xy=np.stack([x, y], axis=1))
