"""A small annotated data set that no simulator recorded: noise for pictures, rules' words for labels."""

import json

import cv2
import numpy as np
import pytest

from mose_ros.core import action, prompt
from mose_ros.core.rig import CAMERAS

FRAMES = 8


@pytest.fixture
def drawn(tmp_path):
    """Return a nano run and the folder of three clips of eight frames each."""
    pytest.importorskip('torch', reason='training is an extra: pip install mose_ros[train]')
    from mose_ros.training import annotate, presets

    training = presets.preset('nano')
    random = np.random.default_rng(0)
    root = tmp_path / 'data'
    for clip in ('normal_00000', 'merging_00000', 'merging_00001'):
        for camera in CAMERAS:
            (root / clip / 'camera' / f'rgb_{camera}').mkdir(parents=True)
        lines = [{'version': 'drawn'}]
        for frame in range(FRAMES):
            for camera in CAMERAS:
                picture = random.integers(0, 256, (36, 64, 3), np.uint8)
                cv2.imwrite(str(root / clip / f'camera/rgb_{camera}/{frame:05d}.jpg'), picture)
            lines.append(_record(clip, frame, training.model.action.horizon, random))
        text = '\n'.join(json.dumps(line) for line in lines)
        (root / clip / annotate.LABELS).write_text(text + '\n', encoding='utf-8')
    low = np.zeros((training.model.action.horizon, 2))
    scales = {
        'action_low': low.tolist(),
        'action_high': (low + 9).tolist(),
        'dt': training.model.action.dt,
    }
    states = len(action.PROPRIO)
    scales |= {'proprio_low': [-1.0] * states, 'proprio_high': [20.0] * states}
    scales |= {'clips': 3, 'frames': 3 * FRAMES, 'counts': {}}
    (root / annotate.DATASET).write_text(json.dumps(scales), encoding='utf-8')
    prompt.word_tokenizer(annotate.vocabulary()).save(str(root / annotate.TOKENIZER))
    return training, root


@pytest.fixture(scope='session')
def exported(tmp_path_factory):
    """Return a nano network, the folder of its bundle, and what was said of it."""
    pytest.importorskip('torch', reason='training is an extra: pip install mose_ros[train]')
    from training.nano import export_nano

    return export_nano(tmp_path_factory.mktemp('export'))


def _record(clip: str, frame: int, horizon: int, random: np.random.Generator) -> dict:
    state = {'speed': 5.0, 'near_x': 4.0, 'far_x': 9.0, 'command_follow': 1.0}
    acting = ('normal', 'merging', 'somersault')[frame % 3]  # the last is unknown to the model
    return {
        'frame': frame,
        'older': max(frame - 2, 0),
        'family': clip.split('_')[0],
        'camera': CAMERAS[frame % 4] if frame % 4 else '',
        'skills': {'perception': 'vehicle', 'prediction': 'slowing', 'planning': acting},
        'answer': ' '.join(['the vehicle ahead is slowing .'] * (1 + frame % 3)),
        'action': np.cumsum(random.random((horizon, 2)), axis=0).round(3).tolist(),
        'proprio': [state.get(name, 0.0) for name in action.PROPRIO],
        'weight': 1.0,
    }
