"""From a network to the bundle that the vehicle runs: five ONNX graphs over one file of weights, and the proof.

The export ends by running the files through the engine against PyTorch; what that found is in the manifest, which is written
last: a folder without one is no bundle.
"""

import contextlib
import json
import logging
import shutil
import signal
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from mose_ros.core import action, vision
from mose_ros.core.action import Normalizer
from mose_ros.core.bundle import GRAPHS, TOKENIZER, Manifest
from mose_ros.core.files import folder_beside
from mose_ros.core.prompt import Tokenizer
from mose_ros.core.types import Observation
from mose_ros.engine.bundle import Bundle
from mose_ros.modeling.config import DriverConfig
from mose_ros.modeling.driver import MoseDriver, read_config
from mose_ros.training import quantize
from mose_ros.training.annotate import DATASET
from mose_ros.training.config import FLOW_STEPS, Data
from mose_ros.training.fit import FIT, Fit
from mose_ros.training.graphs import trace
from mose_ros.training.half import halve
from mose_ros.training.moments import fake_moments, recorded_moments, spread
from mose_ros.training.parity import judge, parity
from mose_ros.training.room import check_disk, check_memory
from mose_ros.training.stages import RESULT
from mose_ros.training.stored import count_numbers
from mose_ros.training.weights import WEIGHTS, Weights, rounded

BASE = 1.5e9  # bytes of memory that an export takes beside weights
# Copies of the weights in float32: most by ONNX Runtime, which holds prefill and decode apart (measured with 0.1 B: 2.13), and
# the network as it is, rounded, or halved.
PEAK = 2.25
NETWORKS = {
    ('float32', 'float32'): 1.0,
    ('float32', 'float16'): 2.0,
    ('float16', 'float16'): 1.5,
    ('int8', 'int8'): 2.0,
    ('int4', 'int4'): 2.0,
}
AGAINST = {  # (precision, storage) -> what parity holds the bundle against
    ('float32', 'float32'): 'PyTorch float32',
    ('float32', 'float16'): 'PyTorch float32, weights rounded to float16',
    ('float16', 'float16'): 'PyTorch float32',
    ('int8', 'int8'): 'PyTorch float32',
    ('int4', 'int4'): 'PyTorch float32',
}
BYTES = {'float32': 4, 'float16': 2, 'int8': 2, 'int4': 2}  # of a stored number, at most
FLOATS = 'float32'  # folder of what int8 is calibrated with, until it is
COMPARED = 7  # clips, of two moments each, that parity runs on
# Integers agree at 99 % of moments, which takes a hundred of them; and other clips, that int8 is calibrated with.
JUDGED, CALIBRATED = 50, 32
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Bundling:
    """What a bundle says that its network does not know."""

    name: str
    tokenizer: Path  # tokenizer.json
    action: Normalizer  # (H, 2), m
    proprio: Normalizer  # (P), SI
    anchor: str = 'front'
    fixed_views: Sequence[str] = ('front',)
    top_k: int = 1
    frame_gap: float = 0.4  # s
    history: str = 'all'  # views that show their past
    num_steps: int = FLOW_STEPS
    noise: Sequence[Sequence[float]] | None = None  # (H, 2) where the flow starts; None: zeros
    max_views: int = 6  # room for as many in the longest prompt
    max_new_tokens: int = 96
    precision: str = 'float32'  # what is computed in; see core.bundle.PRECISIONS
    storage: str = ''  # of weights; float16 with precision float32: rounded, half the file. Default: the precision
    training: Mapping[str, Any] | None = None
    data: Mapping[str, Any] | None = None
    commit: str = ''
    created: str = ''
    quality: Mapping[str, Any] | None = None


def manifest(config: DriverConfig, bundling: Bundling) -> Manifest:
    """Return the manifest of a network, without parity and files; ValueError for what no bundle can be made of."""
    b = bundling
    if config.mose.routing == 'skill' and config.mose.router_scope != 'level':
        raise ValueError("bundles hold one decision a level; train with router_scope 'level'")
    if (b.precision, b.storage or b.precision) not in AGAINST:
        known = ', '.join(f'{precision} stored as {storage}' for precision, storage in AGAINST)
        raise ValueError(f'no bundle of {b.precision} stored as {b.storage}; known: {known}')
    decoder, view = config.decoder, config.vision
    noise = np.zeros((config.action.horizon, 2)) if b.noise is None else np.asarray(b.noise)
    made = Manifest(
        name=b.name,
        cameras=list(config.cameras),
        anchor=b.anchor,
        fixed_views=list(b.fixed_views),
        top_k=b.top_k,
        view_width=view.view_width,
        view_height=view.view_height,
        view_frames=view.frames,
        frame_gap=b.frame_gap,
        history=b.history,
        patch=view.patch,
        merge=view.merge,
        thumbnail_width=config.glance.width,
        thumbnail_height=config.glance.height,
        mean=list(vision.CLIP_MEAN),
        std=list(vision.CLIP_STD),
        levels={level: list(names) for level, names in config.mose.choices.items()},
        num_layers=decoder.layers,
        num_kv_heads=decoder.kv_heads,
        head_dim=decoder.head_dim,
        width=decoder.width,
        vocab_size=decoder.vocab_size,
        max_prompt_tokens=64 + b.max_views * (view.tokens + 5),
        max_new_tokens=b.max_new_tokens,
        action_skills=list(config.action.choices),
        dt=config.action.dt,
        action_low=b.action.low.tolist(),
        action_high=b.action.high.tolist(),
        noise=noise.tolist(),
        num_steps=b.num_steps,
        proprio=list(action.PROPRIO),
        proprio_low=b.proprio.low.tolist(),
        proprio_high=b.proprio.high.tolist(),
        precision=b.precision,
        storage=b.storage or b.precision,
        training=b.training or {},
        data=b.data or {},
        commit=b.commit,
        created=b.created,
        quality=b.quality or {},
    )
    made.check()
    return made


def export(
    driver: MoseDriver,
    folder: str | Path,
    bundling: Bundling,
    *,
    moments: Sequence[Observation] | None = None,
    calibration: Sequence[Observation] | None = None,
) -> Manifest:
    """Write the bundle of a float32 network, which is frozen, and return its manifest; what was there goes at the very end.

    moments: recorded ones that parity is measured on, and others that int8 takes its scales from; default: noise pictures. ParityError
    when the files do not do what PyTorch does, ValueError when there is no room for them; nothing is written then, nor when the export
    is interrupted or killed.
    """
    made = manifest(driver.config, bundling)
    exact = driver.eval().requires_grad_(False)
    if made.storage == 'float16' != made.precision:
        exact = rounded(driver)
    with terminable(), folder_beside(folder) as partial:
        shutil.copyfile(bundling.tokenizer, partial / TOKENIZER)
        if made.precision in quantize.INTEGERS:
            others = calibration or fake_moments(made.cameras, seed=1)
            write_integers(rounded(driver), partial, made, others)
        else:
            network = halve(deepcopy(exact)) if made.precision == 'float16' else exact
            write_graphs(network, partial, halve=made.storage != made.precision)
        bundle = Bundle(folder=partial, manifest=made, backend='onnxruntime', threads=2)
        found = parity(exact, bundle, moments)
        found['pictures'] = 'recorded' if moments else 'noise'
        found['against'] = AGAINST[made.precision, made.storage]
        _log.info('parity of %s: %s', bundling.name, found)
        judge(found, made.precision)
        replace(made, parity=found).save(partial)
    return Manifest.load(folder)


def write_graphs(network: MoseDriver, folder: Path, halve: bool, joined: bool = False) -> None:
    """Write the graphs and the file of their weights.

    halve: store as float16 what that holds without loss. joined: with one product for each tensor that several read.
    """
    with open(folder / WEIGHTS, 'wb') as file:
        weights = Weights(file, halve)
        for graph in GRAPHS:
            model = trace(network, graph)
            if joined and graph in quantize.QUANTISED:
                quantize.join(model)
            weights.take(model)
            (folder / f'{graph}.onnx').write_bytes(model.SerializeToString(deterministic=True))
    check_graphs(folder)


def write_integers(
    network: MoseDriver, folder: Path, made: Manifest, moments: Sequence[Observation]
) -> None:
    """Write the graphs of int8, with scales from moments, or of int4, and the file of their weights; what is no integer as float16."""
    floats = folder / FLOATS
    floats.mkdir()
    write_graphs(network, floats, halve=False, joined=True)
    scales = {}
    if made.precision == 'int8':
        shutil.copyfile(folder / TOKENIZER, floats / TOKENIZER)
        scales = quantize.calibrate(floats, replace(made, precision='float32'), moments)
    with open(folder / WEIGHTS, 'wb') as file:
        weights = Weights(file, halve=True)
        for graph in GRAPHS:
            model = onnx.load(floats / f'{graph}.onnx')
            if graph in scales:
                quantize.to_int8(model, scales[graph])
            elif made.precision == 'int4' and graph in quantize.QUANTISED:
                quantize.to_int4(model)
            weights.take(model)
            (folder / f'{graph}.onnx').write_bytes(model.SerializeToString(deterministic=True))
    shutil.rmtree(floats)
    check_graphs(folder)


def check_graphs(folder: Path) -> None:
    """Raise onnx.checker.ValidationError for a graph that breaks ONNX's rules, types and shapes among them."""
    for graph in GRAPHS:
        onnx.checker.check_model(str(folder / f'{graph}.onnx'), full_check=True)


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Let a termination end what is under way as an interrupt does, so that it cleans up behind itself."""

    def stop(number, frame):
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread: signals are not ours
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# ---- of a checkpoint ----


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Which checkpoint becomes which bundle."""

    checkpoint: Path  # a folder of `MoseDriver.save`
    out: Path
    name: str
    precision: str = 'float32'  # as in Bundling, as the next
    storage: str = ''
    num_steps: int = FLOW_STEPS
    commit: str = ''
    fit: Fit | None = None  # of an older checkpoint, which has none
    tokenizer: Path | None = None  # likewise
    views: Data | None = None  # that the checkpoint must have been trained with
    clips: Path | None = None  # recorded ones, for parity


def export_checkpoint(asked: Asked) -> Manifest:
    """Write the bundle of a checkpoint, as `export` does; ValueError, before weights are read, when it cannot become one."""
    checkpoint = asked.checkpoint
    config = read_config(checkpoint)
    fit, tokenizer = _fit(asked), _tokenizer(asked)
    _check_tokenizer(tokenizer, config)
    bundling = Bundling(
        name=asked.name,
        tokenizer=tokenizer,
        action=fit.action,
        proprio=fit.proprio,
        anchor=fit.fixed_views[0],
        fixed_views=fit.fixed_views,
        top_k=fit.top_k,
        frame_gap=fit.frame_gap,
        history=fit.history,
        num_steps=asked.num_steps,
        precision=asked.precision,
        storage=asked.storage,
        training=fit.training,
        data=fit.data,
        commit=asked.commit,
        created=datetime.now(timezone.utc).isoformat(timespec='seconds'),
        quality=_quality(checkpoint),
    )
    made = manifest(config, bundling)
    check_room(checkpoint, config, asked.out, made)
    moments, calibration = _moments(asked, made)
    return export(
        MoseDriver.load(checkpoint),
        asked.out,
        bundling,
        moments=moments,
        calibration=calibration,
    )


def check_room(checkpoint: Path, config: DriverConfig, out: Path, made: Manifest) -> None:
    """Raise ValueError, naming what is needed and what is there, unless disk and memory take the export."""
    numbers = count_numbers(checkpoint)
    head = (
        config.decoder.vocab_size * config.decoder.width
    )  # lies twice: as embedding, and transposed
    integers = made.precision in quantize.INTEGERS
    size = (BYTES[made.storage] + 4 * integers) * (numbers + head)  # beside the float32 graphs
    check_disk(out, size, f'the bundle of {numbers / 1e9:.2f} B parameters')
    networks = NETWORKS[made.precision, made.storage] * numbers
    memory = BASE + 4 * (networks + PEAK * (numbers + head))
    check_memory(int(memory), f'the export of {numbers / 1e9:.2f} B parameters')


def _moments(
    asked: Asked, made: Manifest
) -> tuple[Sequence[Observation] | None, Sequence[Observation] | None]:
    """Return the recorded moments of parity and of calibration, None where there are no clips."""
    if asked.clips is None:
        if made.precision == 'int8':
            raise ValueError(
                'int8 takes its scales from recorded clips: name with --data a folder of them'
            )
        return None, None
    counts = {'int8': (JUDGED, CALIBRATED), 'int4': (JUDGED, 0)}.get(made.precision, (COMPARED, 0))
    size = (made.view_width, made.view_height)
    judged, calibrated = (
        recorded_moments(folders, made.cameras, made.frame_gap, size)
        for folders in spread(asked.clips, counts)
    )
    if made.precision == 'int8' and not calibrated:
        raise ValueError(f'{asked.clips} has no moment with all cameras to take scales from')
    return judged, calibrated


def _fit(asked: Asked) -> Fit:
    if not (asked.checkpoint / FIT).is_file():
        if asked.fit is None:
            raise ValueError(
                f'{asked.checkpoint} has no {FIT}: it was made by an older version; name with --data '
                f'the folder of the clips that it was trained on, where {DATASET} and {TOKENIZER} lie'
            )
        return asked.fit
    fit = Fit.load(asked.checkpoint)
    if asked.views is not None and (wrong := fit.differences(asked.views)):
        raise ValueError(
            f'{asked.checkpoint} was trained otherwise: {"; ".join(wrong)}; leave these settings out'
        )
    return fit


def _tokenizer(asked: Asked) -> Path:
    own = asked.checkpoint / TOKENIZER
    if own.is_file():
        return own
    if asked.tokenizer is None:
        raise ValueError(
            f'{own} is missing; copy there the one of the Qwen2-VL or of the data that the network '
            'was made of, or name with --data a folder that has it'
        )
    return asked.tokenizer


def _check_tokenizer(path: Path, config: DriverConfig) -> None:
    tokenizer, decoder = Tokenizer.load(path), config.decoder
    if tokenizer.image_id != decoder.image_id or tokenizer.vocab_size > decoder.vocab_size:
        raise ValueError(
            f'{path} is not the tokenizer of this network: it has {tokenizer.vocab_size} tokens, that of '
            f'pictures is {tokenizer.image_id}; the network knows {decoder.vocab_size} and {decoder.image_id}'
        )


def _quality(checkpoint: Path) -> dict[str, Any]:
    """Return what training measured, where the checkpoint lies in the folder of a stage."""
    if not (checkpoint.parent / RESULT).is_file():
        return {}
    found = {
        path.parent.name: json.loads(path.read_text(encoding='utf-8'))
        for path in sorted(checkpoint.parent.parent.glob(f'*/{RESULT}'))
    }
    return {
        'validation': found[checkpoint.parent.name]['validation'],
        'minutes': {name: one['minutes'] for name, one in found.items()},
    }
