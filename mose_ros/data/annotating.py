"""Our moment, written as Bench2Drive annotates one; `annotation` says how the conventions differ, and reads it again."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mose_ros.core.rig import RIG
from mose_ros.core.types import COMMANDS, Actor, EgoState, Scene, Trajectory, VehicleCommand
from mose_ros.data.annotation import CORRIDOR, LIGHTS, MOSE
from mose_ros.data.driven_path import LANE_WIDTH, point_at

GRAVITY = 9.81


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
            front = scene.progress + scene.ego.size[0] / 2
            x, y, yaw = point_at(scene.corridor.xy, front + actor.stop_distance)
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
        **{name: _pack(getattr(corridor, name)) for name in CORRIDOR},
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
