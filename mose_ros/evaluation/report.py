"""Results in the CARLA leaderboard's JSON, and the one scorer that reads them: our own runs and Bench2Drive's alike.

Routes that are missing count as zero: sums are divided by the number of routes of the benchmark, never by the number of
records (Bench2Drive's own instruction). Comfort follows nuPlan's limits as Bench2Drive applies them, `official`; `corrected` takes the
true time between samples, derives the yaw acceleration, which the official code forgets, and takes the yaw rate for what it is: CARLA's
degrees per second, which the official code holds against a limit in rad/s, unwrapped as if they were headings.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from mose_ros.core.files import write_json
from mose_ros.core.infractions import INFRACTIONS, SLOWNESS, faults
from mose_ros.core.types import FAMILIES

BENCH2DRIVE_ROUTES = 220
_OBSTACLES = ('Accident', 'ConstructionObstacle', 'HazardAtSideLane', 'ParkedObstacle')
_TURNS = tuple(
    f'{control}Junction{turn}'
    for control in ('Signalized', 'NonSignalized')
    for turn in ('LeftTurn', 'RightTurn', 'LeftTurnEnterFlow')
)
_OPPOSITE = ('OppositeVehicleTakingPriority', 'OppositeVehicleRunningRedLight')
_TURNING = ('VehicleTurningRoute', 'VehicleTurningRoutePedestrian')
ABILITIES = {  # Bench2Drive's five groups, overlapping; and our own families
    'overtaking': (*_OBSTACLES, *(f'{name}TwoWays' for name in _OBSTACLES),
                   'VehicleOpensDoorTwoWays', 'overtaking'),
    'merging': ('SequentialLaneChange', 'HighwayExit', 'InterurbanActorFlow', 'MergerIntoSlowTraffic',
                'MergerIntoSlowTrafficV2', 'CrossingBicycleFlow', 'EnterActorFlow', *_TURNS, 'ParkingExit',
                'HighwayCutIn', 'InterurbanAdvancedActorFlow', 'merging', 'parking_exit'),
    'emergency_brake': ('BlockedIntersection', 'DynamicObjectCrossing', 'PedestrianCrossing',
                        'ParkingCrossingPedestrian', *_TURNING, *_OPPOSITE, 'HardBreakRoute', 'ParkingCutIn',
                        'StaticCutIn', 'ControlLoss', 'emergency_brake'),
    'give_way': ('InvadingTurn', 'YieldToEmergencyVehicle', 'give_way'),
    'traffic_sign': (*_TURNS, 'BlockedIntersection', *_OPPOSITE, 'PedestrianCrossing', *_TURNING, 'EnterActorFlow',
                     'CrossingBicycleFlow', 'T_Junction', 'VanillaNonSignalizedTurn',
                     'VanillaNonSignalizedTurnEncounterStopsign', 'VanillaSignalizedTurnEncounterGreenLight',
                     'VanillaSignalizedTurnEncounterRedLight', 'traffic_sign'),
}  # fmt: skip
_NAMES = sorted({name for group in ABILITIES.values() for name in group}, key=len, reverse=True)
CHUNK, WINDOW = 20, 7  # samples
OFFICIAL_DT = 0.1  # s, what Bench2Drive's code assumes
SAMPLE_DT = 0.05  # s between Bench2Drive's samples in truth


# ---- reading and writing ----


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """Return the records of a results file; ValueError names the file when it is none, or a record that is broken."""
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding='utf-8'))
    except OSError as error:
        raise ValueError(f'{path} cannot be read: {error.strerror}') from None
    except ValueError as error:
        raise ValueError(f'{path} is not JSON: {error}') from None
    try:
        records = data['_checkpoint']['records']
    except (KeyError, TypeError):
        raise ValueError(
            f'{path} has no _checkpoint.records; it must be a results file of the CARLA leaderboard'
        ) from None
    for index, record in enumerate(records):
        try:
            float(record['scores']['score_composed']), str(record['status'])
            dict(record['infractions']), str(record['route_id'])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f'{path}: record {index} is broken ({type(error).__name__}: {error}); run that route again'
            ) from None
    return records


def make_record(index: int, route: Mapping[str, Any]) -> dict[str, Any]:
    """Return a route of ours as the leaderboard's record."""
    infractions = {name: list(route['infractions'].get(name, ())) for name in INFRACTIONS}
    completion, score = 100 * route['route_completion'], route['driving_score']
    name = f'{route["family"]}_{route["seed"]}'
    return {
        'index': index,
        'route_id': f'{name}_rep0',
        'scenario_name': route['family'],
        'save_name': name,
        'status': route['status'],
        'num_infractions': sum(map(len, infractions.values())),
        'infractions': infractions,
        'scores': {
            'score_route': round(completion, 3),
            'score_penalty': round(score / completion, 6) if completion > 0 else 1.0,
            'score_composed': round(score, 6),
        },
        'meta': {'duration_game': route['seconds'], 'duration_system': route['wall_seconds']},
    }


def write_leaderboard(path: Path, routes: Sequence[Mapping[str, Any]]) -> None:
    """Write routes of ours as a results file of the leaderboard."""
    records = [make_record(index, route) for index, route in enumerate(routes)]
    mean = {
        key: float(np.mean([record['scores'][key] for record in records])) if records else 0.0
        for key in ('score_route', 'score_penalty', 'score_composed')
    }
    checkpoint = {
        'global_record': {'scores_mean': mean, 'status': 'Completed'},
        'progress': [len(records), len(records)],
        'records': records,
    }
    write_json(path, {'_checkpoint': checkpoint, 'entry_status': 'Finished', 'eligible': True})


# ---- scoring ----


def is_success(record: Mapping[str, Any]) -> bool:
    """Say whether a route was completed without any infraction but slowness."""
    return record['status'] in ('Completed', 'Perfect') and not faults(record['infractions'])


def score(
    records: Sequence[Mapping[str, Any]],
    routes: int,
    metrics: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    sample_dt: float = SAMPLE_DT,
) -> dict[str, Any]:
    """Return driving score (0..100), success rate, efficiency, comfort and abilities of a benchmark of `routes` routes.

    `metrics` are the steps of metric_info.json by save_name, for the comfort; a repeated route counts once, its last record.
    """
    if routes < 1:
        raise ValueError(f'a benchmark has at least one route, not {routes}')
    unique = {record['route_id']: record for record in records}
    warnings = []
    if len(unique) < len(records):
        warnings.append(f'{len(records) - len(unique)} repeated routes: the last record counts')
    if len(unique) > routes:
        raise ValueError(f'{len(unique)} routes were driven but the benchmark has {routes}')
    if len(unique) < routes:
        warnings.append(f'{routes - len(unique)} of {routes} routes are missing and count as zero')
    driven = list(unique.values())
    steps = [(metrics or {}).get(record.get('save_name', '')) for record in driven]
    steps = [one for one in steps if one]
    return {
        'driving_score': sum(one['scores']['score_composed'] for one in driven) / routes,
        'success_rate': sum(map(is_success, driven)) / routes,
        'efficiency': efficiency(driven),
        'comfort': {
            'official': mean_or_none([comfort(one, OFFICIAL_DT) for one in steps]),
            'corrected': mean_or_none([comfort(one, sample_dt, corrected=True) for one in steps]),
            'routes': len(steps),
        },
        'abilities': abilities(driven, routes),
        'routes': routes,
        'records': len(driven),
        'warnings': warnings,
    }


def scenario_of(record: Mapping[str, Any]) -> str:
    """Return the scenario's name: the record's own, else the one that its save_name contains; '' if neither."""
    name = re.sub(r'_\d+$', '', str(record.get('scenario_name', '')))
    if name in _NAMES:
        return name
    text = str(record.get('save_name', ''))
    return next((one for one in _NAMES if f'_{one}_' in f'_{text}_'), name)


def abilities(records: Sequence[Mapping[str, Any]], routes: int) -> dict[str, float | None]:
    """Return the share of successes in each group, and `mean`. None where the benchmark has no such route.

    In Bench2Drive's 220 routes every scenario has five, so missing ones count as failures (the official script drops
    them). That a failed route may still count as traffic_sign when it passed its first junction needs the map: not done here.
    """
    names = [scenario_of(record) for record in records]
    is_bench2drive = routes == BENCH2DRIVE_ROUTES and set(FAMILIES).isdisjoint(names)
    result: dict[str, float | None] = {}
    for ability, group in ABILITIES.items():
        good = [
            is_success(record)
            for record, name in zip(records, names, strict=True)
            if name in group
        ]
        count = len(good)
        if is_bench2drive:
            count = max(count, 5 * sum(name[0].isupper() for name in group))
        result[ability] = sum(good) / count if count else None
    known = [value for value in result.values() if value is not None]
    return {**result, 'mean': sum(known) / len(known) if known else None}


def efficiency(records: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the mean speed in percent of the surrounding traffic's, over routes that have such entries."""
    means = []
    for record in records:
        found = [
            re.search(r'(\d+(?:\.\d+)?)\s*%', str(text))
            for text in record['infractions'].get(SLOWNESS, ())
        ]
        values = [float(match[1]) for match in found if match]
        values = [value for value in values if value <= 1000]
        if values:
            means.append(float(np.mean(values)))
    return mean_or_none(means)


def comfort(steps: Sequence[Mapping[str, Any]], dt: float, corrected: bool = False) -> float:
    """Return the share of comfortable chunks of a route's steps; `dt` seconds between them, angular velocities in deg/s."""
    acceleration = np.array([step['acceleration'] for step in steps], float)[:, :2]
    forward = np.array([step['forward_vector'] for step in steps], float)[:, :2]
    right = np.array([step['right_vector'] for step in steps], float)[:, :2]
    yaw_rate = np.array([step['angular_velocity'] for step in steps], float)[:, 2]
    lengthwise = np.einsum('nk,nk->n', acceleration, forward)
    sideways = np.einsum('nk,nk->n', acceleration, right)
    count = len(steps) // CHUNK if len(steps) > CHUNK else 1
    size = CHUNK if len(steps) > CHUNK else len(steps)
    chunks = [slice(index * size, (index + 1) * size) for index in range(count)]
    good = [
        _is_comfortable(lengthwise[part], sideways[part], yaw_rate[part], dt, corrected)
        for part in chunks
    ]
    return float(np.mean(good))


def _is_comfortable(lengthwise, sideways, yaw_rate, dt: float, corrected: bool) -> bool:
    along, across = smooth(lengthwise, dt), smooth(sideways, dt)
    size = smooth(np.hypot(lengthwise, sideways), dt)
    turning = smooth(np.radians(yaw_rate) if corrected else np.unwrap(yaw_rate), dt)
    yaw_acceleration = smooth(turning, dt, derivative=corrected)
    return bool(
        (along > -4.05).all()
        and (along < 2.40).all()
        and (np.abs(across) < 4.89).all()
        and (np.abs(smooth(size, dt, derivative=True)) < 8.37).all()
        and (np.abs(smooth(along, dt, derivative=True)) < 4.13).all()
        and (np.abs(turning) < 0.95).all()
        and (np.abs(yaw_acceleration) < 1.93).all()
    )


def smooth(
    values: Float[np.ndarray, 'N'], dt: float, derivative: bool = False
) -> Float[np.ndarray, 'N']:
    """Return the Savitzky-Golay filter of order 2 over 7 samples, or its first derivative; ends by the fit at the ends."""
    window = min(WINDOW, len(values) - (1 - len(values) % 2))
    if window < 3:
        return np.zeros_like(values) if derivative else values
    half = window // 2
    offsets = np.arange(-half, half + 1)
    fit = np.linalg.pinv(np.stack([np.ones(window), offsets, offsets**2], axis=1))  # (3, window)
    middles = np.clip(np.arange(len(values)), half, len(values) - 1 - half)
    constant, linear, square = fit @ values[middles + offsets[:, None]]
    away = np.arange(len(values)) - middles
    if derivative:
        return (linear + 2 * square * away) / dt
    return constant + linear * away + square * away**2


def mean_or_none(values: Sequence[float]) -> float | None:
    """Return the mean, or None of nothing."""
    return float(np.mean(values)) if len(values) else None


def read_metrics(folder: str | Path, records: Sequence[Mapping[str, Any]]) -> dict[str, list]:
    """Return the steps of each record's <folder>/<save_name>/metric_info.json, where there is one; ValueError if broken."""
    found = {}
    for record in records:
        path = Path(folder) / str(record.get('save_name', '')) / 'metric_info.json'
        if not path.is_file():
            continue
        try:
            data = json.loads(path.read_text(encoding='utf-8'))
            found[record['save_name']] = [data[key] for key in sorted(data, key=int)]
        except (ValueError, AttributeError, TypeError) as error:
            raise ValueError(f'{path} is no metric_info.json ({error})') from None
    return found
