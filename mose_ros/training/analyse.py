"""What a trained network does with its experts: how unlike they are, whom its routers choose, the chain of skills over a clip.

    python -m mose_ros.training analyse experts|routing|chains --work DIR [--checkpoint DIR] [--clip NAME]

Each writes its figures as JSON and draws them (PNG), both to WORK/analysis, or to --out.
"""

import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Int64

from mose_ros.core.files import write_json
from mose_ros.data.clips import ClipReader
from mose_ros.data.storage import Anywhere
from mose_ros.modeling.batch import Batch
from mose_ros.modeling.driver import MoseDriver
from mose_ros.modeling.mixture import SkillMixture
from mose_ros.training import stages, validation
from mose_ros.training.batches import load, validation_keys
from mose_ros.training.config import Data
from mose_ros.training.fit import FIT, Fit
from mose_ros.training.index import UNKNOWN, Index, place_of
from mose_ros.training.samples import Key, Samples

_LOG = logging.getLogger(__name__)
KINDS = ('experts', 'routing', 'chains')
MATRIX = 'up_proj'  # of an expert's three; the paper compares "one MLP layer"
SHARED = 'shared'
ACTION, VIEW = 'action', 'view'  # the routers beside those of the levels
SAMPLES = 2000
ALL_ROUNDS = sys.maxsize  # of DAgger
_BATCH = 32


@dataclass(frozen=True, kw_only=True)
class Router:
    """A router of a network: what it is called, what it may choose, and which label it is held to."""

    name: str
    choices: Sequence[str]
    label: int  # 0 to S - 1: the skill of a level; S: the action skill; S + 1: the camera


def experts(driver: MoseDriver, matrix: str = MATRIX) -> dict[str, Any]:
    """Return the cosine similarity of every two experts' weights in each mixture (MoSE, figure 8); the shared one first.

    mean: over the pairs of experts, without the shared one; 1 where all are equal, as at the beginning.
    """
    layers = []
    mose = driver.config.mose
    for index, layer in enumerate(driver.vlm.model.language_model.layers):
        level = mose.level_of(index)
        if getattr(layer.mlp, 'experts', None):
            names = mose.levels[list(mose.levels)[level]]
            layers.append(_similarity(layer.mlp, matrix, 'decoder', index, names))
            layers[-1]['level'] = list(mose.levels)[level]
    for index, layer in enumerate(driver.action_expert.layers):
        if getattr(layer.mlp, 'experts', None):
            names = driver.config.action.skills
            layers.append(_similarity(layer.mlp, matrix, 'action expert', index, names))
    if not layers:
        raise ValueError('the network has no mixture of experts; there is nothing to compare')
    return {'matrix': matrix, 'layers': layers}


def _similarity(mixture, matrix: str, part: str, index: int, names: Sequence[str]) -> dict:
    found = {SHARED: mixture}
    for suffix, group in (('', mixture.experts), (' (image)', mixture.image_experts)):
        for i, expert in enumerate(group):
            # those that tokens choose have no names, even if they are as many as the skills
            name = names[i] if type(mixture) is SkillMixture else f'expert {i}'
            found[name + suffix] = expert
    weights = [
        F.normalize(getattr(one, matrix).weight.detach().float().flatten(), dim=0)
        for one in found.values()
    ]
    rows = [[float(a @ b) for b in weights] for a in weights]
    own = np.asarray(rows)[1:, 1:]
    pairs = own[np.triu_indices(len(own), 1)]
    return {
        'part': part,
        'layer': index,
        'experts': list(found),
        'similarity': [[round(one, 5) for one in row] for row in rows],
        'mean': round(float(pairs.mean()), 5) if len(pairs) else None,
    }


def routers(driver: MoseDriver) -> list[Router]:
    """Return the routers of a network, in the order of `decide`."""
    config, found = driver.config, []
    levels = list(config.mose.levels)
    layers = [x for group in config.mose.layers for x in group]
    for number, level in enumerate(driver.vlm.router_levels):
        name = levels[level]
        if config.mose.router_scope == 'layer':
            name = f'{name}, layer {layers[number]}'
        found.append(Router(name=name, choices=config.mose.levels[levels[level]], label=level))
    if driver.config.action.moe_layers:
        found.append(Router(name=ACTION, choices=config.action.skills, label=len(levels)))
    return [*found, Router(name=VIEW, choices=config.cameras, label=len(levels) + 1)]


@torch.no_grad()
def decide(
    driver: MoseDriver, batch: Batch, fixed: Sequence[str] = ()
) -> tuple[Int64[np.ndarray, 'B R'], Int64[np.ndarray, 'B R']]:
    """Return what the routers choose by themselves for B moments, and what the labels say (-1: nothing)."""
    read, cache, mask = validation.read_prompt(driver, batch)
    start = torch.zeros_like(batch.action)[:, None]
    now = torch.zeros(len(batch), 1, device=start.device)
    acting = driver.action_expert(start, now, batch.proprio, cache, mask).skill
    scores = driver.view_router(batch.thumbnails, batch.present, batch.proprio).float()
    free = torch.tensor([name not in fixed for name in driver.config.cameras])
    looks = scores.masked_fill((batch.present == 0) | ~free.to(scores.device), -torch.inf)
    by_level = list(read.skills.unbind(1))[: len(driver.vlm.router_levels)]
    labels = [*batch.skills.unbind(1), batch.action_skill, batch.camera]
    chosen = by_level + ([acting] if driver.config.action.moe_layers else [])
    chosen.append(looks.argmax(1))
    known = [labels[router.label] for router in routers(driver)]
    return torch.stack(chosen, 1).cpu().numpy(), torch.stack(known, 1).cpu().numpy()


def routing(
    driver: MoseDriver, batches: Iterable[Batch], fixed: Sequence[str] = ()
) -> dict[str, Any]:
    """Return for each router how often it chose what, by label: counts[label][choice], and what follows from them."""
    all_chosen, all_known = zip(*(decide(driver, one, fixed) for one in batches), strict=True)
    chosen, known = np.concatenate(all_chosen), np.concatenate(all_known)
    return {
        'samples': len(chosen),
        'routers': [
            confusion(router, known[:, column], chosen[:, column])
            for column, router in enumerate(routers(driver))
        ],
    }


def confusion(
    router: Router, known: Int64[np.ndarray, 'N'], chosen: Int64[np.ndarray, 'N']
) -> dict[str, Any]:
    """Return the confusion of a router with its labels; a ratio over nothing is None, and counts in no mean."""
    size = len(router.choices)
    said = known != UNKNOWN
    counts = np.bincount(known[said] * size + chosen[said], minlength=size**2).reshape(size, size)
    right, labels, choices = np.diag(counts), counts.sum(1), counts.sum(0)
    skills = {
        name: {
            'labels': int(labels[i]),
            'chosen': int(choices[i]),
            'precision': _ratio(right[i], choices[i]),
            'recall': _ratio(right[i], labels[i]),
            'f1': _ratio(2 * right[i], labels[i] + choices[i]),
        }
        for i, name in enumerate(router.choices)
    }
    recalls = [one['recall'] for one in skills.values() if one['labels']]
    f1 = [one['f1'] for one in skills.values() if one['labels']]
    return {
        'name': router.name,
        'choices': list(router.choices),
        'labelled': int(said.sum()),
        'counts': counts.tolist(),
        'accuracy': _ratio(right.sum(), said.sum()),
        'balanced_accuracy': round(float(np.mean(recalls)), 4) if recalls else None,
        'macro_f1': round(float(np.mean(f1)), 4) if f1 else None,
        'skills': skills,
    }


def _ratio(part, whole) -> float | None:
    return round(float(part / whole), 4) if whole else None


def chains(
    driver: MoseDriver, samples: Samples, index: Index, clip: str, config: Data, frame_dt: float
) -> dict[str, Any]:
    """Return what the routers choose in each labelled frame of a clip, in order, beside its labels; frame_dt in s.

    ValueError where the clip is not among the annotated ones.
    """
    place = place_of(clip, index.clips)
    if place == UNKNOWN:
        raise ValueError(f'{index.root} has no annotated clip {clip!r}; as {index.clips[0]}')
    frames = np.flatnonzero(index.clip == place)
    views = len(config.fixed_views) + config.top_k
    keys = [Key(frame=int(frame), views=views, numbers=None) for frame in frames]
    steps, known = [], routers(driver)
    for key in keys:  # one by one, so that one that cannot be read leaves a gap in its place
        for loaded in load(samples, [[key]], 0):
            chosen, labels = (one[0] for one in decide(driver, loaded.batch, config.fixed_views))
            number = int(index.frame[key.frame])
            steps.append(
                {
                    'frame': number,
                    'time': round(number * frame_dt, 3),
                    'chosen': _named(known, chosen),
                    'label': _named(known, labels),
                }
            )
    return {
        'clip': clip,
        'routers': {router.name: list(router.choices) for router in known},
        'frames': steps,
    }


def _named(known: Sequence[Router], places: Int64[np.ndarray, 'R']) -> dict[str, str | None]:
    return {
        router.name: None if place == UNKNOWN else router.choices[place]
        for router, place in zip(known, places, strict=True)
    }


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What an analysis looks at."""

    checkpoint: Path
    root: Anywhere  # the annotated clips; of no account for `experts`
    data: Data  # views are the checkpoint's, where it names them
    samples: int = SAMPLES  # frames of the validation clips, evenly spaced; 0: all of them
    clip: str = ''  # of `chains`; the first validation clip where none is named


def run(kind: str, asked: Asked, out: str | Path) -> dict[str, Any]:
    """Analyse a checkpoint, write KIND.json and KIND.png to `out`, and return what the first holds."""
    from mose_ros.training import figures  # matplotlib takes a second to load

    if kind not in KINDS:
        raise ValueError(f'analyse: {kind!r} is none of {", ".join(KINDS)}')
    driver = MoseDriver.load(asked.checkpoint).eval()
    found: Mapping[str, Any] = {'checkpoint': str(asked.checkpoint)}
    found = {**found, **(experts(driver) if kind == 'experts' else _looked(kind, driver, asked))}
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / f'{kind}.json', found)
    figures.save(figures.DRAW[kind](found), out / f'{kind}.png')
    _LOG.info('%s', out / f'{kind}.png')
    return found


def _looked(kind: str, driver: MoseDriver, asked: Asked) -> dict[str, Any]:
    """Return an analysis that needs the clips, shown as the network learned to see them: its words, scales and views."""
    index = Index.load(asked.root, driver.config, rounds=ALL_ROUNDS)
    words = stages.tokenizer_of(asked.checkpoint, index.root, driver.config)
    if (asked.checkpoint / FIT).is_file():
        fit = Fit.load(asked.checkpoint)
        asked = replace(asked, data=fit.seen_by(asked.data))
    else:
        fit = None  # made before there was one: the data's scales
    samples = Samples(index, driver.config, asked.data, words, fit)
    if kind == 'routing':
        count = asked.samples or len(index)
        keys = validation_keys(index, asked.data, count, _BATCH)
        if not keys:
            raise ValueError(f'{asked.root} has no validation clip; set data.validation_share')
        batches = (loaded.batch for loaded in load(samples, keys, asked.data.workers))
        return routing(driver, batches, asked.data.fixed_views)
    held = index.split(validation=True, config=asked.data)
    clip = asked.clip or index.clips[index.clip[held[0] if len(held) else 0]]
    dt = ClipReader(index.root / clip).frame_dt
    return chains(driver, samples, index, clip, asked.data, dt)


def newest(work: Path) -> Path:
    """Return the model of the last finished stage of a run, the last DAgger round first; ValueError where there is none."""
    done = {
        path.parent.name: path.parent / stages.MODEL for path in work.glob(f'*/{stages.RESULT}')
    }
    rounds = [name for name in done if name.startswith('action')]
    rounds.sort(key=lambda name: int(name.rpartition('-r')[2]) if '-r' in name else 0)
    for name in (*reversed(rounds), 'sft', 'router'):
        if name in done:
            return done[name]
    raise ValueError(f'{work} has no finished stage; name a model with --checkpoint')
