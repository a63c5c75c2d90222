"""The stages of training: each goes from one model and a data set to the next model, in a folder of its own.

A stage is its settings (`presets.Stage`): which losses count, which parameters move, how fast. Here is what it begins with and
what it leaves; `loop.py` trains. A folder knows what decided its content and is never continued with something else.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import torch

from mose_ros.core.bundle import TOKENIZER, sha256
from mose_ros.core.files import write_json
from mose_ros.core.prompt import Tokenizer
from mose_ros.data import storage
from mose_ros.data.storage import Anywhere
from mose_ros.modeling import config as modeling_config
from mose_ros.modeling import driver
from mose_ros.modeling.batch import LossWeights
from mose_ros.modeling.config import DriverConfig
from mose_ros.modeling.driver import MoseDriver, read_config
from mose_ros.training import annotate, checkpoints, skill_labels
from mose_ros.training.batches import DRAWS
from mose_ros.training.config import Data, differences, filled, resolve
from mose_ros.training.fit import Fit
from mose_ros.training.index import Index
from mose_ros.training.loop import Limits, Loop
from mose_ros.training.presets import Stage, Training

_LOG = logging.getLogger(__name__)
MODEL, RESULT, CONFIG = 'model', 'stage.json', 'config.json'
# of the action expert: no weight depends on them, so a stage may have others than the network that it begins with
CHANGEABLE = (
    *('flow_samples', 'sigma', 'time_beta', 'knowledge_insulation'),  # of learning alone
    *('top_k', 'expert_weight'),
)
HASH = 'sha256 '  # before the hash of a checkpoint
RAREST = 0.02  # a class counts as at least that share in the focal losses, or its few samples would outweigh all


def model_config(training: Training, data: str | Anywhere) -> DriverConfig:
    """Return the network of a run, fitted to the vocabulary of the data; ValueError when that is missing."""
    path = storage.place(data) / annotate.TOKENIZER
    tokenizer = Tokenizer.load(storage.local_file(path))
    changes = {one.name: getattr(training.model, one.name) for one in fields(training.model)}
    name = changes.pop('name')
    return modeling_config.preset(name, tokenizer=tokenizer, **changes)


def config_of(before: str | Path, training: Training) -> DriverConfig:
    """Return the network that a stage begins with: the checkpoint's, changed as far as that can be and is asked for.

    What nobody asked for follows the checkpoint. ValueError, naming what it has instead, for what can't be had.
    """
    config = read_config(before)
    there, asked = resolve(config), training.network_asked()
    other, changes = [], {}
    for path, value in asked.items():
        part, _, name = path.rpartition('.')
        had = (there[part] if part else there)[name]
        if part == 'action' and name in CHANGEABLE:
            changes[name] = value
        elif had != value:
            other.append(f'{path}: {had}, not {value}')
    if other:
        raise ValueError(
            f'{before} has {"; ".join(other)}; these are fixed when a network is made: leave the settings out (or the variant of '
            '--preset that makes them), or begin with one made so, by `convert --set` or by the stages before'
        )
    return replace(config, action=replace(config.action, **changes))


def train(
    name: str,
    training: Training,
    data: str | Anywhere,
    folder: str | Path,
    *,
    before: str | Path | None = None,
    labels: str | Path | None = None,
    rounds: int = 0,
    limits: Limits | None = None,
    allow_changes: bool = False,
) -> Path:
    """Run the stage `name` to its end and return the folder of its model; at once when that is there already.

    before: the model to begin with, a folder of MoseDriver.save, whose network it is then (`config_of`); none = from scratch. labels: a labels.jsonl of clips, whose frames and skills alone are learnt from and judged. rounds: DAgger rounds to learn from.
    Raises Stopped at `limits.stop_at`, and ValueError, naming what differs, when the folder holds something else.
    """
    limits = limits or Limits()
    if limits.threads:
        torch.set_num_threads(limits.threads)
    folder = Path(folder)
    stage = getattr(training, name)
    config = config_of(before, training) if before else model_config(training, data)
    training = replace(training, model=config)
    index = Index.load(data, config, rounds)
    if labels:
        index = index.only(skill_labels.of_frames(labels, config.mose.levels), config)
    identity = _identity(name, training, index, before, labels)
    if (folder / RESULT).is_file():
        result = json.loads((folder / RESULT).read_text(encoding='utf-8'))
        _compare(folder, result['identity'], identity, allow_changes)
        _LOG.info('%s is there already: %s', name, folder)
        return folder / MODEL
    folder.mkdir(parents=True, exist_ok=True)
    found = checkpoints.newest(folder)
    if found:
        begun = {'draws': 1, **checkpoints.read_state(found)['identity']}
        _compare(found, begun, identity, allow_changes)
    torch.manual_seed(stage.seed)
    network = MoseDriver.load(before, config) if before else MoseDriver(config)
    losses = _with_counts(stage, index, training)
    words = tokenizer_of(before, index.root, config)
    loop = Loop(name, training, network, index, losses, folder, limits, words)
    if loop.leads:
        write_json(folder / CONFIG, resolve(training))
    loop.resume(found)
    _LOG.info(
        '%s: %s parameters, %d frames of %d clips, from step %d',
        name,
        network.count_parameters(),
        len(index),
        len(index.clips),
        loop.step,
    )
    loop.run(identity)
    _write_model(loop, identity)
    loop.accelerator.wait_for_everyone()
    return folder / MODEL


def tokenizer_of(checkpoint: str | Path | None, root: Anywhere, model: DriverConfig) -> Path:
    """Return the tokenizer beside a checkpoint, or the data's where there is none; ValueError when it is another network's."""
    own = Path(checkpoint) / TOKENIZER if checkpoint else None
    if own is None or not own.is_file():  # models that were trained earlier have none beside them
        own = storage.local_file(root / annotate.TOKENIZER)
    words, known = Tokenizer.load(own), model.decoder
    if words.image_id != known.image_id or words.vocab_size > known.vocab_size:
        raise ValueError(
            f'{own} has {words.vocab_size} tokens and pictures as number {words.image_id}, the network '
            f'{known.vocab_size} and {known.image_id}; put the tokenizer.json that it was made with into {checkpoint}'
        )
    return own


def _identity(name, training: Training, index: Index, before, labels) -> dict:
    """Return all that decides what a stage makes."""
    known = json.loads((index.root / annotate.DATASET).read_text(encoding='utf-8'))
    scales = [
        known[f'{which}_{end}'] for which in ('action', 'proprio') for end in ('low', 'high')
    ]
    return {
        'stage': name,
        'draws': DRAWS,
        'settings': resolve(getattr(training, name)),
        'model': resolve(training.model),
        'data': resolve(training.data),
        'clips': len(index.clips),
        'frames': len(index),
        'scales': [round(float(np.sum(scale)), 4) for scale in scales],
        'before': _hash(Path(before)) if before else None,
        'labels': sha256(labels)[:16] if labels else None,
    }


def _hash(checkpoint: Path) -> str:
    """Return a hash of what a checkpoint computes, wherever it lies: its configuration, weights and words."""
    found = hashlib.sha256()
    for pattern in (driver.CONFIG, driver.WEIGHTS, TOKENIZER, f'{driver.VLM}/*.safetensors'):
        for path in sorted(checkpoint.glob(pattern)):
            found.update(f'{path.name} {sha256(path)}\n'.encode())
    return HASH + found.hexdigest()[:16]


def _compare(folder: Path, old: Mapping, new: Mapping, allow: bool) -> None:
    found = list(differences(_as_now(old, new), new))
    if not found:
        return
    text = '; '.join(found[:8]) + (f' and {len(found) - 8} more' if len(found) > 8 else '')
    if not allow:
        raise ValueError(
            f'{folder} was made with other settings or data ({text}); train into another --work, '
            'remove the folder, or keep it with --allow-changes'
        )
    _LOG.warning('%s goes on although it differs: %s', folder, text)


def _as_now(identity: Mapping, new: Mapping) -> dict:
    """Return an older identity with the fields that settings have got since; their defaults are what was done before."""
    model = DriverConfig.from_json(json.dumps(identity['model']))
    before = identity['before']
    if before and new['before'] and not before.startswith(HASH):
        before = new['before']  # once it was a folder's name, which says nothing
    return {
        'draws': DRAWS,  # what is done is whole, however its samples were drawn
        'labels': None,
        **identity,
        'settings': filled(identity['settings'], resolve(Stage())),
        'data': filled(identity['data'], resolve(Data())),
        'model': resolve(model),
        'before': before,
    }


def _with_counts(stage: Stage, index: Index, training: Training) -> LossWeights:
    """Return the loss weights with how often each camera and action skill is drawn."""
    frames, chances = index.drawn(training.data, stage.skill_labels, stage.seed)
    model = training.model

    def counts(labels: np.ndarray, classes: int) -> tuple[int, ...]:
        known = labels >= 0
        shares = np.bincount(labels[known], chances[known], minlength=classes)
        return tuple(int(1e6 * max(share, RAREST)) for share in shares)

    cameras = index.camera_places(model.cameras)[frames]
    return replace(
        stage.losses,
        camera_counts=counts(cameras, len(model.cameras)),
        action_skill_counts=counts(index.action_skill[frames], len(model.action.skills)),
    )


def _write_model(loop: Loop, identity: Mapping) -> None:
    """Write the model of a stage that is done, and what it is; its checkpoints go."""
    measured = loop.validate()
    loop.learner.write(loop.folder / MODEL)
    if not loop.leads:
        return
    corrupt = loop.journal.corrupt + Counter(loop.index.broken)
    if corrupt:
        _LOG.warning(
            '%s skipped %d samples that cannot be read: %s',
            loop.name,
            corrupt.total(),
            ', '.join(sorted(corrupt)),
        )
    fit = Fit.to_data(loop.index.root, loop.training)
    fit.save(loop.folder / MODEL, loop.tokenizer)
    result = {
        'identity': identity,
        'steps': loop.step,
        'minutes': round(loop.seconds / 60, 2),
        'validation': measured,
        'corrupt': {'count': corrupt.total(), 'samples': dict(sorted(corrupt.items()))},
    }
    write_json(loop.folder / RESULT, result)
    checkpoints.remove(loop.folder)
    _LOG.info('%s: %s', loop.name, measured)
