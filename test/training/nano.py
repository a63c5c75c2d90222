"""A nano network and its bundle, exported once for all tests that look at one."""

from dataclasses import asdict

import numpy as np
import torch

from mose_ros.core import prompt
from mose_ros.core.action import PROPRIO, Normalizer
from mose_ros.core.skills import Taxonomy
from mose_ros.core.types import Command, EgoState, Guidance
from mose_ros.modeling.config import MoseConfig, preset
from mose_ros.modeling.driver import MoseDriver
from mose_ros.training import export

LEVELS = {  # few, as each expert costs seconds to export
    'perception': {'general': '', 'vehicle': '', 'vulnerable_road_user': ''},
    'planning': {'general': '', 'normal': '', 'give_way': ''},
}


def make_tokenizer(folder):
    """Write the words that the nano network reads and says; return the file."""
    commands, state = list(Command), EgoState(x=0.0, y=0.0, yaw=0.0, speed=5.0)
    goals = [
        Guidance(near=np.ones(2) * s, far=np.ones(2) * s, command=commands[0]) for s in (-1, 1)
    ]
    texts = [prompt.question(preset('nano').cameras, state, goal) for goal in goals]
    texts += [*prompt.COMMAND_WORDS.values(), 'perception : a car brakes planning : wait']
    prompt.word_tokenizer(texts).save(str(folder / 'tokenizer.json'))
    return folder / 'tokenizer.json'


def export_nano(folder):
    """Return a network whose experts differ, the folder of its bundle, and what was said of it."""
    torch.manual_seed(0)
    path = make_tokenizer(folder)
    config = preset(
        'nano',
        tokenizer=prompt.Tokenizer.load(path),
        taxonomy=Taxonomy(LEVELS),
        mose=MoseConfig(layers=((1,), (3,))),
        semantic_classes=3,
    )
    driver = MoseDriver(config)
    with torch.no_grad():
        for weight in driver.parameters():
            weight.add_(weight.std().nan_to_num(0.1) * torch.randn_like(weight))
    reach = np.ones((config.action.horizon, 2), np.float32)
    bundling = export.Bundling(
        name='nano',
        tokenizer=path,
        action=Normalizer(-10 * reach, 30 * reach),
        proprio=Normalizer(np.full(len(PROPRIO), -20.0), np.full(len(PROPRIO), 20.0)),
        num_steps=3,
        max_new_tokens=5,
        storage='float16',
        training={'model': asdict(config)},
        data={'clips': 3},
    )
    export.export(driver, folder / 'nano', bundling)
    return driver, folder / 'nano', bundling
