"""A moment as Bench2Drive annotates it, read as our `Scene`; `annotating` writes it. Here the two conventions meet.

Bench2Drive records CARLA's numbers: left-handed world (y to the right), yaw in degrees clockwise, extents of half the
size, `theta` as a compass (0 = towards -y, clockwise), lights as 0 red, 1 yellow, 2 green. What our rules need and
Bench2Drive lacks lies under the one extra key `mose`, in our own conventions. Knows no files; `clips` does.
Sources: Bench2Drive's docs/anno.md and CARLA's Python API.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from mose_ros.core.types import (
    COMMANDS,
    Actor,
    Command,
    Corridor,
    EgoState,
    Guidance,
    Scene,
    Trajectory,
)
from mose_ros.data.driven_path import distance_along

MOSE = 'mose'  # the extra key
LIGHTS = ('red', 'yellow', 'green')  # CARLA's TrafficLightState 0, 1, 2
EMERGENCY = ('ambulance', 'firetruck', 'police', 'emergency')  # in the type_id of such vehicles
CORRIDOR = ('left', 'right', 'own_left', 'lane_width', 'speed_limit')  # its numbers, as packed


def to_scene(
    data: Mapping[str, Any], corridor: Corridor | None = None, progress: float = 0.0
) -> Scene:
    """Return the scene of an annotation; KeyError, TypeError or ValueError where it is malformed.

    A genuine Bench2Drive annotation has no corridor, no time and no memory of stops: give `corridor` and `progress`
    made from the driven path (`driven_corridor`); the caller fills in the rest.
    """
    extra = data.get(MOSE)
    if extra is not None:
        corridor, progress = _corridor(extra['corridor']), float(extra['progress'])
    elif corridor is None:
        raise ValueError('an annotation without `mose` needs a corridor made from the driven path')
    extra = extra or {}
    ego = ego_state(data)
    front = progress + ego.size[0] / 2
    actors = []
    for box in data['bounding_boxes'][1:]:
        actor = _actor(box, extra.get('actors', {}).get(str(box['id']), {}), corridor, front)
        if actor is not None:
            actors.append(actor)
    number = data['command_near']
    command = COMMANDS[number - 1] if number in range(1, 7) else Command.FOLLOW  # -1 is VOID
    return Scene(
        time=float(extra.get('time', 0.0)),
        ego=ego,
        actors=tuple(actors),
        corridor=corridor,
        progress=progress,
        guidance=Guidance(
            near=_ego_point(ego, data['x_command_near'], -data['y_command_near']),
            far=_ego_point(ego, data['x_command_far'], -data['y_command_far']),
            command=command,
        ),
        route_completion=float(extra.get('route_completion', 0.0)),
        family=extra.get('family', ''),
        weather=data['weather'] if isinstance(data.get('weather'), str) else 'clear',
    )


def ego_state(data: Mapping[str, Any]) -> EgoState:
    """Return the ego of an annotation: its box says where, which may be None or NaN where the sensors failed."""
    box = data['bounding_boxes'][0]
    x, y = box['center'][:2]
    yaw = -math.radians(_number(box['rotation'][2], float('nan')))
    if math.isnan(yaw):
        yaw = math.pi / 2 - _number(data.get('theta'), math.pi / 2)
    acceleration, gyro = data.get('acceleration'), data.get('angular_velocity')
    return EgoState(
        x=float(x),
        y=-float(y),
        yaw=_wrap(yaw),
        speed=_number(data.get('speed'), _number(box.get('speed'), 0.0)),
        acceleration=_number(acceleration[0], 0.0) if acceleration else 0.0,
        yaw_rate=-_number(gyro[2], 0.0) if gyro else 0.0,
        since_stop=float(data.get(MOSE, {}).get('since_stop', 100.0)),
        size=_size(box),
    )


def expert_trajectory(data: Mapping[str, Any]) -> Trajectory | None:
    """Return the expert's plan of an annotation, or None where none was recorded."""
    extra = data.get(MOSE, {})
    plan = extra.get('expert_trajectory')
    if plan is None:
        return None
    return Trajectory(time=extra['time'], dt=plan['dt'], xy=np.asarray(plan['xy'], float))


def _actor(box, extra, corridor: Corridor, front: float) -> Actor | None:
    kind = box['class']
    x, y, yaw, size = _pose(box)
    velocity, state, affects, stop = (0.0, 0.0), '', False, float('inf')
    type_id = str(box.get('type_id') or kind)
    if kind == 'vehicle':
        type_id, state = _vehicle(box, type_id)
        speed = _number(box.get('speed'), 0.0)
        velocity = (speed * math.cos(yaw), speed * math.sin(yaw))
    elif kind == 'walker':
        type_id = 'walker.pedestrian'
    elif kind in ('traffic_light', 'traffic_sign'):
        affects = bool(box.get('affects_ego'))
        if kind == 'traffic_light':
            number = box['state']
            state = LIGHTS[number] if number in range(3) else 'green'  # 3, 4: off, unknown
        elif 'stop' in type_id:
            type_id = 'traffic.stop'
        if affects and 'trigger_volume_location' in box:
            place = box['trigger_volume_location']
            stop = distance_along(corridor.xy, float(place[0]), -float(place[1])) - front
    elif kind != 'static':
        return None  # classes that Bench2Drive may add concern no rule of ours
    return Actor(
        id=str(box['id']),
        kind=kind,
        type_id=type_id,
        x=x,
        y=y,
        yaw=yaw,
        size=size,
        velocity=tuple(float(v) for v in extra.get('velocity', velocity)),
        state=state,
        affects_ego=affects,
        stop_distance=float(extra.get('stop_distance', stop)),
    )


def _pose(box) -> tuple[float, float, float, tuple[float, float, float]]:
    """Return x, y, yaw and size; Bench2Drive's location and rotation of static vehicles are wrong, their box is right."""
    x, y = (float(value) for value in box['center'][:2])
    corners = box.get('world_cord')
    if box.get('state') == 'static' and corners and box['class'] == 'vehicle':
        ground = np.asarray(corners, float)[:, :2] * (1, -1)
        spread = ground - ground.mean(0)
        axis = np.linalg.svd(spread, full_matrices=False)[2][0]
        across = np.array([-axis[1], axis[0]])
        length, width = np.ptp(spread @ axis), np.ptp(spread @ across)
        return x, -y, math.atan2(axis[1], axis[0]), (length, width, _size(box)[2])
    return x, -y, _wrap(-math.radians(_number(box['rotation'][2], 0.0))), _size(box)


def _vehicle(box, type_id: str) -> tuple[str, str]:
    lights = str(box.get('light_state', ''))
    base = str(box.get('base_type', ''))
    if any(word in type_id for word in EMERGENCY):
        return 'vehicle.emergency', 'siren' if 'Special' in lights else ''
    state = 'braking' if _number(box.get('brake'), 0.0) > 0.1 else ''
    if box.get('state') == 'static':
        return 'vehicle.parked', ''
    if base in ('bicycle', 'truck', 'van', 'bus'):
        return 'vehicle.bicycle' if base == 'bicycle' else 'vehicle.truck', state
    return 'vehicle.car', state


def _corridor(packed: Mapping[str, Any]) -> Corridor:
    xy = np.asarray(packed['xy'], float)

    def unpack(name):
        values = np.asarray(packed[name], float)
        if values.ndim and len(values) != len(xy):
            raise ValueError(f'corridor.{name} has {len(values)} values for {len(xy)} points')
        return np.broadcast_to(values, len(xy)).copy()

    return Corridor(
        xy=xy,
        **{name: unpack(name) for name in CORRIDOR},
        junction=unpack('junction').astype(bool),
        commands=tuple(COMMANDS[int(index)] for index in unpack('commands')),
    )


def _ego_point(ego: EgoState, x: float, y: float) -> Float[np.ndarray, '2']:
    cos, sin = math.cos(ego.yaw), math.sin(ego.yaw)
    dx, dy = float(x) - ego.x, float(y) - ego.y
    return np.array([cos * dx + sin * dy, cos * dy - sin * dx])


def _number(value, otherwise: float) -> float:
    return float(value) if value is not None and math.isfinite(value) else otherwise


def _size(box) -> tuple[float, float, float]:
    return tuple(2.0 * float(half) for half in box['extent'][:3])


def _wrap(angle: float) -> float:
    return (angle + math.pi) % (2 * math.pi) - math.pi
