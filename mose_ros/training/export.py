"""From a trained network to the bundle that the vehicle runs: five ONNX graphs over one file of weights, and the proof.

The export ends by running the files through the engine against PyTorch; what that found is in the manifest.
"""

import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from mose_ros.core import action, vision
from mose_ros.core.action import Normalizer
from mose_ros.core.bundle import GRAPHS, TOKENIZER, Manifest
from mose_ros.core.types import Observation
from mose_ros.modeling.driver import MoseDriver
from mose_ros.training.graphs import trace
from mose_ros.training.parity import judge, parity
from mose_ros.training.weights import WEIGHTS, Weights, rounded

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
    num_steps: int = 5  # Euler steps
    noise: Sequence[Sequence[float]] | None = None  # (H, 2) where the flow starts; None: zeros
    max_views: int = 6  # room for as many in the longest prompt
    max_new_tokens: int = 96
    storage: str = 'float16'  # or 'float32'
    training: Mapping[str, Any] | None = None
    data: Mapping[str, Any] | None = None
    commit: str = ''
    created: str = ''
    quality: Mapping[str, Any] | None = None


def manifest(driver: MoseDriver, bundling: Bundling) -> Manifest:
    """Return the manifest of a network, without parity and files."""
    config, b = driver.config, bundling
    if config.mose.routing == 'skill' and config.mose.router_scope != 'level':
        raise ValueError("bundles hold one decision a level; train with router_scope 'level'")
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
        storage=b.storage,
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
) -> Manifest:
    """Write the bundle into `folder` and return its manifest; what was there is replaced only at the very end.

    moments: what parity is measured on; default: noise pictures. ValueError when the files do not do what PyTorch does.
    """
    if bundling.storage not in ('float16', 'float32'):
        raise ValueError(f"storage is 'float16' or 'float32', not {bundling.storage!r}")
    folder = Path(folder)
    partial = folder.with_name(folder.name + '.partial')
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        halve = bundling.storage == 'float16'
        driver = (rounded(driver) if halve else deepcopy(driver)).float().cpu().eval()
        driver.requires_grad_(False)
        made = manifest(driver, bundling)
        shutil.copyfile(bundling.tokenizer, partial / TOKENIZER)
        with open(partial / WEIGHTS, 'wb') as file:
            weights = Weights(file, halve)
            for graph in GRAPHS:
                model = trace(driver, graph)
                weights.take(model)
                (partial / f'{graph}.onnx').write_bytes(
                    model.SerializeToString(deterministic=True)
                )
        for graph in GRAPHS:
            onnx.checker.check_model(str(partial / f'{graph}.onnx'))
        made.save(partial)
        found = parity(driver, partial, moments)
        made = replace(made, parity=found)
        made.save(partial)
        _log.info('parity of %s: %s', bundling.name, found)
        judge(found)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Manifest.load(folder)
