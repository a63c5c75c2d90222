"""Label recorded clips: for each frame skills, camera, answer and trajectory in `labels.jsonl`, and what is known of the whole in `dataset.json`.

The labels themselves come from the rules of `data`; here is the fan-out, the resuming, and what follows from all clips
together: the vocabulary and the normalisers of actions and proprioception.
"""

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mose_ros.core import action, prompt
from mose_ros.core.action import Normalizer
from mose_ros.core.bundle import sha256
from mose_ros.core.files import file_beside, write_json, write_text
from mose_ros.core.rig import CAMERAS
from mose_ros.core.skills import LEVELS
from mose_ros.core.types import COMMANDS, EgoState, Guidance, Trajectory
from mose_ros.data import bench2drive, narration, rules, storage
from mose_ros.data.clips import ClipReader, find_clips
from mose_ros.data.storage import Anywhere
from mose_ros.training.config import Data, digest, resolve
from mose_ros.training.workers import fan_out

_LOG = logging.getLogger(__name__)
LABELS = 'labels.jsonl'
DATASET = 'dataset.json'
TOKENIZER = 'tokenizer.json'
STANDING_SECONDS = 4.0  # a car that stays at rest for longer shows little new
GOES_M = 1.0  # a plan that ends further off goes
FIELDS = frozenset(
    ('frame', 'older', 'family', 'camera', 'skills', 'answer', 'action', 'proprio', 'weight')
)
_CHUNK = 16  # clips of one job
# modules of data that have no part in it
_OTHER_LABELS = ('chat', 'coda_lm', 'pictures', 'robo2vlm', 'skill_samples', 'vlm')
_OTHER_LABELS += ('cache', 'remote', 'shards', 'storage')


@dataclass(frozen=True, kw_only=True)
class Target:
    """What the labels must fit: the shape of the trajectory and how frames are chosen."""

    horizon: int
    dt: float
    data: Data

    @property
    def version(self) -> str:
        """Return a hash of all that a clip's labels depend on beside the clip: these settings, and the code that makes them."""
        part = {key: getattr(self.data, key) for key in ('frame_gap', 'future', 'standing_weight')}
        modules = sorted(Path(rules.__file__).parent.glob('*.py'))
        makers = [path for path in modules if path.stem not in _OTHER_LABELS]
        code = [sha256(path) for path in [Path(__file__), *makers]]
        return digest([self.horizon, self.dt, part, code])


def annotate(
    root: str | Path,
    target: Target,
    *,
    processes: int = 2,
    address: str = '',
    bar: bool = True,
) -> dict:
    """Label every clip that has no labels of this target yet; return what dataset.json then holds.

    Clips that can't be read are skipped, named in the log and in dataset.json, and counted. address: see `workers.fan_out`.
    """
    root = storage.writable(root, 'annotate').absolute()
    folders = list(find_clips(root))
    if not folders:
        raise ValueError(f'{root} holds no clip; run `python -m mose_ros.training collect` first')
    todo = [folder for folder in folders if _version(folder) != target.version]
    chunks = [todo[start : start + _CHUNK] for start in range(0, len(todo), _CHUNK)]
    skipped = {}
    with tqdm(total=len(todo), desc='annotate', unit='clip', disable=not bar) as progress:
        jobs = [(chunk, target) for chunk in chunks]
        for results in fan_out(_annotate_clips, jobs, processes, address):
            for folder, error in results:
                if error:
                    name = folder.relative_to(root).as_posix()
                    skipped[name] = error
                    _LOG.warning('skipped %s: %s', name, error)
            progress.update(len(results))
    names = [folder.relative_to(root).as_posix() for folder in folders]
    data = _summarise(root, [one for one in names if one not in skipped], target, skipped)
    with file_beside(root / TOKENIZER) as partial:
        prompt.word_tokenizer(vocabulary()).save(str(partial))
    write_json(root / DATASET, data)
    return data


def vocabulary() -> list[str]:
    """Return texts that hold every word of questions and answers."""
    ego = EgoState(x=0.0, y=0.0, yaw=0.0, speed=0.0)
    sides = (np.array([1.0, 1.0]), np.array([1.0, -1.0]))
    questions = [
        prompt.question(CAMERAS, ego, Guidance(near=side, far=side, command=command))
        for side in sides
        for command in COMMANDS
    ]
    return [*questions, *narration.all_words(), prompt.answer(dict.fromkeys(LEVELS, ''))]


def _version(folder: Path) -> str:
    path = folder / LABELS
    if not path.is_file():
        return ''
    with path.open('rb') as file:
        try:
            return json.loads(file.readline())['version']
        except (ValueError, KeyError, TypeError):
            return ''  # broken, so it is written anew


def _annotate_clips(folders: Sequence[Path], target: Target) -> list[tuple[Path, str]]:
    results = []
    for folder in folders:
        try:
            lines = [json.dumps({'version': target.version})]
            lines += [json.dumps(one) for one in _annotate(ClipReader(folder), target)]
            write_text(folder / LABELS, '\n'.join(lines) + '\n')
            results.append((folder, ''))
        except ValueError as error:
            results.append((folder, str(error)))
    return results


def _annotate(clip: ClipReader, target: Target) -> list[dict[str, Any]]:
    """Return the labels of a clip's frames; frames without a trajectory are left out."""
    scenes = [clip.scene(index) for index in range(len(clip))]
    ours = clip.metadata['ours']
    if not ours:
        scenes = [bench2drive.mend(scene) for scene in scenes]
    times = np.array([scene.time for scene in scenes])
    records, standing = [], 0.0
    for index, scene in enumerate(scenes):
        standing = standing + times[index] - times[max(index - 1, 0)]
        if abs(scene.ego.speed) > 0.1:
            standing = 0.0
        xy = _trajectory(clip, index, target)
        if xy is None:
            continue
        driven = Trajectory(time=scene.time, dt=target.dt, xy=xy)  # where nobody planned
        if ours:
            plan = clip.expert_trajectory(index) or driven
            label = rules.label(scene, plan, clip.decision(index))
            answer = narration.tell(label)
        else:
            label, answer = bench2drive.label(clip, index, scene, driven)
        dull = standing > STANDING_SECONDS and np.hypot(*xy[-1]) <= GOES_M
        older = int(np.argmin(np.abs(times - (scene.time - target.data.frame_gap))))
        near_enough = abs(times[index] - times[older] - target.data.frame_gap) < 0.06
        records.append(
            {
                'frame': index,
                'older': older if near_enough else index,
                'family': scene.family,
                'camera': label.camera,
                'skills': dict(label.skills),
                'answer': answer,
                'action': np.round(xy, 3).tolist(),
                'proprio': np.round(action.proprio(scene.ego, scene.guidance), 4).tolist(),
                'weight': target.data.standing_weight if dull else 1.0,
            }
        )
    return records


def _trajectory(clip: ClipReader, index: int, target: Target):
    """Return the points (H, 2) of the frame's target, resampled to its time step; None where the clip has none."""
    if target.data.future == 'driven':
        found = clip.future_trajectory(index, target.horizon, target.dt)
        return None if found is None else found.xy
    found = clip.expert_trajectory(index)
    if found is None:
        raise ValueError(
            f'{clip.folder} has no plans of an expert; annotate with --set data.future=driven'
        )
    times = target.dt * np.arange(1, target.horizon + 1)
    known = np.concatenate([[0.0], found.times()])
    if times[-1] > known[-1] + 1e-6:
        raise ValueError(
            f'{clip.folder} holds plans of {known[-1]:.1f} s, the model plans {times[-1]:.1f} s'
        )
    points = np.vstack([np.zeros((1, 2)), found.xy])
    return np.stack([np.interp(times, known, points[:, axis]) for axis in (0, 1)], axis=1)


def _summarise(root: Path, names: Sequence[str], target: Target, skipped) -> dict[str, Any]:
    """Count the labels of all clips and fit the normalisers."""
    counts: dict[str, Counter] = {'family': Counter(), 'camera': Counter()}
    trajectories, states, frames = [], [], 0
    for name in names:
        for record in read_labels(root, name)[0]:
            frames += 1
            counts['family'][record['family']] += 1
            counts['camera'][record['camera']] += 1
            for level, skill in record['skills'].items():
                counts.setdefault(level, Counter())[skill] += 1
            trajectories.append(record['action'])
            states.append(record['proprio'])
    if not frames:
        raise ValueError(f'{root}: none of {len(skipped)} clips could be labelled; see the log')
    actions = Normalizer.fit(np.asarray(trajectories, np.float32))
    proprio = _fit_proprio(np.asarray(states, np.float32))
    if (root / DATASET).is_file():  # models were trained in its units
        known = json.loads((root / DATASET).read_text(encoding='utf-8'))
        if np.shape(known['action_low']) == actions.low.shape and known['dt'] == target.dt:
            actions, proprio = normalizer(known, 'action'), normalizer(known, 'proprio')
            _LOG.info('kept the normalisers of %s; remove it to fit them anew', root / DATASET)
    return {
        'clips': len(names),
        'frames': frames,
        'counts': {name: dict(sorted(count.items())) for name, count in counts.items()},
        'skipped': skipped,
        'dt': target.dt,
        'data': resolve(target.data),
        'action_low': actions.low.tolist(),
        'action_high': actions.high.tolist(),
        'proprio': list(action.PROPRIO),
        'proprio_low': proprio.low.tolist(),
        'proprio_high': proprio.high.tolist(),
    }


def _fit_proprio(states) -> Normalizer:
    """Fit percentiles; a one-hot keeps 0 to 1, however rare it is."""
    fitted = Normalizer.fit(states, percent=0.2, margin=0.05)
    flags = np.array([name.startswith('command_') for name in action.PROPRIO])
    return Normalizer(
        np.where(flags, 0, fitted.low).astype(np.float32),
        np.where(flags, 1, fitted.high).astype(np.float32),
    )


def labelled(root: Anywhere) -> list[str]:
    """Return the names of the clips that have labels, sorted: where they lie under the root, `Accident/Town03_...` too."""
    found = (folder.relative_to(root).as_posix() for folder in storage.find(root, LABELS))
    return sorted(name for name in found if name != '.')


def read_labels(root: Anywhere, name: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the records of a clip's labels, and the names of lines that hold none, which are also in the log."""
    lines = (root / name / LABELS).read_bytes().splitlines()
    records, broken = [], []
    for number, line in enumerate(lines[1:], start=2):
        try:
            record = json.loads(line)
            if missing := FIELDS - record.keys():
                raise ValueError(f'it lacks {", ".join(sorted(missing))}')
            records.append(record)
        except (ValueError, AttributeError) as error:
            broken.append(f'{name}/{LABELS}:{number}')
            _LOG.warning('skipped %s: %s; remove the file and annotate again', broken[-1], error)
    return records, broken


def normalizer(dataset: Mapping[str, Any], name: str) -> Normalizer:
    """Return the normaliser `action` or `proprio` of a dataset.json."""
    low, high = (np.asarray(dataset[f'{name}_{end}'], np.float32) for end in ('low', 'high'))
    return Normalizer(low, high)
