"""A moment as Bench2Drive annotates it, and as our `Scene`: the one place where the two conventions meet.

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

from mose_ros.core.rig import RIG
from mose_ros.core.types import (
    COMMANDS,
    Actor,
    Command,
    Corridor,
    EgoState,
    Guidance,
    Scene,
    Trajectory,
    VehicleCommand,
)

MOSE = 'mose'  # the extra key
GRAVITY = 9.81
LANE_WIDTH = 3.5  # m, of genuine Bench2Drive clips, which do not tell
LIGHTS = ('red', 'yellow', 'green')  # CARLA's TrafficLightState 0, 1, 2
EMERGENCY = ('ambulance', 'firetruck', 'police', 'emergency')  # in the type_id of such vehicles
_CORRIDOR = ('left', 'right', 'own_left', 'lane_width', 'speed_limit')


# ---- our moment, written as Bench2Drive writes it ----


def from_scene(
    scene: Scene,
    image_sizes: Mapping[str, tuple[int, int]],
    control: VehicleCommand | None = None,
    expert: Trajectory | None = None,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the annotation of a scene; `image_sizes` are (width, height) of the cameras recorded with it."""
    ego = scene.ego
    near, far = (_world_point(ego, point) for point in (scene.guidance.near, scene.guidance.far))
    command = COMMANDS.index(scene.guidance.command) + 1
    control = control or VehicleCommand(steer=0.0, throttle=0.0, brake=0.0)
    brakes = control.brake > 0.05
    return {
        'x': _round(ego.x),
        'y': _round(-ego.y),
        'throttle': _round(control.throttle),
        'steer': _round(-control.steer),
        'brake': _round(control.brake),
        'reverse': False,
        'theta': round((math.pi / 2 - ego.yaw) % (2 * math.pi), 5),
        'speed': _round(ego.speed),
        'x_command_far': _round(far[0]),
        'y_command_far': _round(-far[1]),
        'command_far': command,
        'x_command_near': _round(near[0]),
        'y_command_near': _round(-near[1]),
        'command_near': command,
        'should_brake': int(brakes),
        'only_ap_brake': int(brakes),
        'x_target': _round(near[0]),
        'y_target': _round(-near[1]),
        'next_command': command,
        'weather': scene.weather,
        'acceleration': [_round(ego.acceleration), _round(-ego.speed * ego.yaw_rate), GRAVITY],
        'angular_velocity': [0.0, 0.0, round(-ego.yaw_rate, 5)],
        'sensors': _sensors(ego, image_sizes),
        'bounding_boxes': [_ego_box(ego), *(_actor_box(actor, scene) for actor in scene.actors)],
        MOSE: _extra(scene, expert, extra or {}),
    }


def _ego_box(ego: EgoState) -> dict[str, Any]:
    box = _box('ego_vehicle', 'vehicle', 'vehicle.ego', ego.x, ego.y, ego.yaw, ego.size)
    return box | {'speed': _round(ego.speed), 'world2ego': _inverse_pose(ego.x, ego.y, ego.yaw)}


def _actor_box(actor: Actor, scene: Scene) -> dict[str, Any]:
    box = _box(actor.id, actor.kind, actor.type_id, actor.x, actor.y, actor.yaw, actor.size)
    speed = math.hypot(*actor.velocity)
    box['distance'] = _round(math.hypot(actor.x - scene.ego.x, actor.y - scene.ego.y))
    if actor.kind == 'vehicle':
        box['state'] = 'static' if actor.type_id == 'vehicle.parked' else 'dynamic'
        box['speed'] = _round(speed)
        box['brake'] = float(actor.state == 'braking')
        box['light_state'] = {'braking': 'Brake', 'siren': 'Special1'}.get(actor.state, 'NONE')
        box['world2vehicle'] = _inverse_pose(actor.x, actor.y, actor.yaw)
    elif actor.kind == 'walker':
        box['speed'] = _round(speed)
    elif actor.kind in ('traffic_light', 'traffic_sign'):
        box['affects_ego'] = actor.affects_ego
        if actor.kind == 'traffic_light':
            box['state'] = LIGHTS.index(actor.state)
        if actor.affects_ego:
            x, y, yaw = point_at(scene.corridor.xy, scene.progress + actor.stop_distance)
            box['trigger_volume_location'] = [_round(x), _round(-y), 0.0]
            box['trigger_volume_rotation'] = [0.0, 0.0, round(math.degrees(actor.yaw - yaw), 3)]
            box['trigger_volume_extent'] = [0.5, LANE_WIDTH / 2, 1.0]
    return box


def _box(name, kind, type_id, x, y, yaw, size) -> dict[str, Any]:
    length, width, height = size
    return {
        'class': kind,
        'id': name,
        'type_id': type_id,
        'base_type': type_id.rpartition('.')[2],
        'location': [_round(x), _round(-y), 0.0],
        'rotation': [0.0, 0.0, round(-math.degrees(yaw), 4)],
        'bbx_loc': [0.0, 0.0, _round(height / 2)],
        'center': [_round(x), _round(-y), _round(height / 2)],
        'extent': [round(length / 2, 4), round(width / 2, 4), round(height / 2, 4)],
        'road_id': None,  # the simulator's roads have no CARLA numbers
        'lane_id': None,
    }


def _inverse_pose(x: float, y: float, yaw: float) -> list[list[float]]:
    """Return world -> body as CARLA has it: both frames left-handed."""
    cos, sin = math.cos(yaw), -math.sin(yaw)
    x, y = x, -y
    return [
        [round(cos, 6), round(sin, 6), 0.0, _round(-cos * x - sin * y)],
        [round(-sin, 6), round(cos, 6), 0.0, _round(sin * x - cos * y)],
        [0.0, 0.0, 1.0, 0.0],
        [0.0, 0.0, 0.0, 1.0],
    ]


def _sensors(ego: EgoState, image_sizes: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    sensors = {}
    for camera in RIG:
        if camera.name not in image_sizes:
            continue
        width, height = image_sizes[camera.name]
        x, y = _world_point(ego, (camera.x, camera.y))
        world2cam = _inverse_pose(x, y, ego.yaw + camera.yaw)
        world2cam[2][3] = -camera.z
        cos, sin = round(math.cos(camera.yaw), 6), round(-math.sin(camera.yaw), 6)
        focal = round(camera.focal_px(width), 3)
        sensors[f'CAM_{camera.name.upper()}'] = {
            'location': [_round(x), _round(-y), camera.z],
            'rotation': [
                -math.degrees(camera.pitch),
                0.0,
                round(-math.degrees(ego.yaw + camera.yaw), 3),
            ],
            'intrinsic': [[focal, 0.0, width / 2], [0.0, focal, height / 2], [0.0, 0.0, 1.0]],
            'world2cam': world2cam,
            'cam2ego': [
                [cos, -sin, 0.0, camera.x],
                [sin, cos, 0.0, -camera.y],
                [0.0, 0.0, 1.0, camera.z],
                [0.0, 0.0, 0.0, 1.0],
            ],
            'fov': round(math.degrees(camera.fov), 3),
            'image_size_x': width,
            'image_size_y': height,
        }
    return sensors


def _extra(scene: Scene, expert: Trajectory | None, extra: Mapping[str, Any]) -> dict[str, Any]:
    corridor = scene.corridor
    packed = {
        'xy': np.round(corridor.xy, 3).tolist(),
        **{name: _pack(getattr(corridor, name)) for name in _CORRIDOR},
        'junction': _pack(np.asarray(corridor.junction).astype(int)),
        'commands': _pack(np.array([COMMANDS.index(one) for one in corridor.commands])),
    }
    actors = {}
    for actor in scene.actors:
        if any(actor.velocity):
            actors[actor.id] = {'velocity': [_round(value) for value in actor.velocity]}
        if math.isfinite(actor.stop_distance):
            actors.setdefault(actor.id, {})['stop_distance'] = _round(actor.stop_distance)
    data = {
        'version': 1,
        'time': round(scene.time, 4),
        'family': scene.family,
        'progress': _round(scene.progress),
        'route_completion': round(scene.route_completion, 5),
        'since_stop': _round(scene.ego.since_stop),
        'corridor': packed,
        'actors': actors,
        **extra,
    }
    if expert is not None:
        data['expert_trajectory'] = {'dt': expert.dt, 'xy': np.round(expert.xy, 3).tolist()}
    return data


def _pack(values: np.ndarray):
    """Return one number where all are equal, else the list."""
    values = np.round(values, 3)
    return values[0].item() if (values == values[0]).all() else values.tolist()


def _round(value: float) -> float:
    return round(float(value), 3)


def _world_point(ego: EgoState, point) -> tuple[float, float]:
    cos, sin = math.cos(ego.yaw), math.sin(ego.yaw)
    x, y = float(point[0]), float(point[1])
    return ego.x + cos * x - sin * y, ego.y + sin * x + cos * y


# ---- an annotation, read as ours ----


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
    actors = []
    for box in data['bounding_boxes'][1:]:
        actor = _actor(box, extra.get('actors', {}).get(str(box['id']), {}), corridor, progress)
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


def _actor(box, extra, corridor: Corridor, progress: float) -> Actor | None:
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
            stop = distance_along(corridor.xy, float(place[0]), -float(place[1])) - progress
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
        **{name: unpack(name) for name in _CORRIDOR},
        junction=unpack('junction').astype(bool),
        commands=tuple(COMMANDS[int(index)] for index in unpack('commands')),
    )


def driven_corridor(
    track: Float[np.ndarray, 'N 2'], commands: list[Command], index: int, speed_limit: float = 14.0
) -> tuple[Corridor, float]:
    """Make a corridor around frame `index` from the path that was driven, and return where the ego is on it.

    `track` is the ego at each frame of the clip. Behind its ends the corridor goes straight on. One lane of 3.5 m; the
    curved parts where a turn was commanded count as junctions.
    """
    fresh = np.concatenate([[True], np.hypot(*np.diff(track, axis=0).T) > 0.02])
    along = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(track, axis=0).T))])
    s, points, which = along[fresh], track[fresh], np.flatnonzero(fresh)
    if len(points) < 2:
        raise ValueError('the ego vehicle never moves in this clip, so it has no driven path')
    first, last = _unit(points[:2]), _unit(points[-2:])
    stations = np.arange(along[index] - 10.0, along[index] + 81.0)
    xy = np.stack([np.interp(stations, s, points[:, axis]) for axis in (0, 1)], axis=1)
    xy += np.minimum(stations - s[0], 0.0)[:, None] * first
    xy += np.maximum(stations - s[-1], 0.0)[:, None] * last
    frames = which[np.clip(np.searchsorted(s, stations), 0, len(s) - 1)]
    asked = tuple(commands[frame] for frame in frames)
    heading = np.unwrap(np.arctan2(*np.gradient(xy, axis=0).T[::-1]))
    turning = np.abs(np.gradient(heading)) > 0.02
    turn = np.array([one in (Command.LEFT, Command.RIGHT) for one in asked])
    half = np.full(len(xy), LANE_WIDTH / 2)
    corridor = Corridor(
        xy=xy,
        left=half,
        right=half,
        own_left=half,
        lane_width=2 * half,
        junction=turning & turn,
        speed_limit=np.full(len(xy), speed_limit),
        commands=asked,
    )
    return corridor, 10.0


def _unit(segment: Float[np.ndarray, '2 2']) -> Float[np.ndarray, '2']:
    step = segment[1] - segment[0]
    return step / np.hypot(*step)


def point_at(xy: Float[np.ndarray, 'N 2'], s: float) -> tuple[float, float, float]:
    """Return x, y and heading at s metres along a polyline, straight on behind its ends."""
    steps = np.diff(xy, axis=0)
    along = np.concatenate([[0.0], np.cumsum(np.hypot(*steps.T))])
    index = int(np.clip(np.searchsorted(along, s, side='right') - 1, 0, len(steps) - 1))
    heading = math.atan2(steps[index, 1], steps[index, 0])
    rest = s - along[index]
    x, y = xy[index]
    return float(x + rest * math.cos(heading)), float(y + rest * math.sin(heading)), heading


def distance_along(xy: Float[np.ndarray, 'N 2'], x: float, y: float) -> float:
    """Return how far along a polyline the point of it lies that is nearest to (x, y)."""
    steps = np.diff(xy, axis=0)
    length = np.maximum(np.hypot(*steps.T), 1e-9)
    rest = np.clip(np.einsum('nk,nk->n', (x, y) - xy[:-1], steps) / length, 0.0, length)
    foot = xy[:-1] + steps * (rest / length)[:, None]
    best = int(np.argmin(np.hypot(*(foot - (x, y)).T)))
    return float(length[:best].sum() + rest[best])


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
