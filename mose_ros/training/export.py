"""From a trained network to the bundle that the vehicle runs: five ONNX graphs over one file of weights, and the proof.

Only operators of the standard domain. Each weight lies once in weights.bin, whichever graphs use it. With float16
storage the weights are rounded first (not the routers'), and every tensor that float16 holds without loss is stored as
such with a Cast to float32 behind it, which a runtime folds when it loads. The export ends by running the files through
the engine against PyTorch; what that found is in the manifest.
"""

import hashlib
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import nn

from mose_ros.core import action, prompt, vision
from mose_ros.core.action import Normalizer
from mose_ros.core.bundle import GRAPHS, TOKENIZER, Manifest
from mose_ros.core.types import Command, EgoState, Guidance, Observation
from mose_ros.engine.driver import ACTION, Driver
from mose_ros.engine.view_router import ViewRouter
from mose_ros.modeling.driver import MoseDriver

OPSET = 20  # the newest that TensorRT 10.3, ONNX Runtime and torch's exporter all read or write in full
WEIGHTS = 'weights.bin'
ALIGNMENT = 64  # bytes; of each tensor in weights.bin
INLINE = 64  # numbers; smaller tensors stay in their graph
LIMITS = {
    'logits_max_abs': 1e-3,
    'trajectory_max_m': 1e-3,
}  # against PyTorch with the same weights
_log = logging.getLogger(__name__)


# ---- the graphs, exactly as docs/architecture.md lists them ----


class _Graph(nn.Module):
    """A part of the driver as a function of tensors; inputs are those of `forward`."""

    dynamic: Mapping[str, dict[int, str]] = {}

    def __init__(self, driver: MoseDriver):
        super().__init__()
        self.driver = driver

    def outputs(self) -> list[str]:
        """Return the names of the outputs, in order."""
        raise NotImplementedError


class _ViewRouter(_Graph):
    def forward(self, thumbnails, present, proprio):
        return self.driver.view_router(thumbnails[None], present[None], proprio)[0]

    def outputs(self):
        return ['scores']


class _Vision(_Graph):
    dynamic = {'patches': {0: 'views'}}

    def forward(self, patches):
        return self.driver.vlm.see(patches)[1]

    def outputs(self):
        return ['embeds']


class _Prefill(_Graph):
    dynamic = {'input_ids': {1: 'tokens'}, 'embeds': {0: 'views'}, 'position_ids': {2: 'tokens'}}

    def forward(self, input_ids, embeds, position_ids, skill_override):
        vlm = self.driver.vlm
        everyone = torch.ones_like(input_ids, dtype=torch.float32)
        done = vlm.read(
            input_ids, embeds[None], position_ids, everyone, forced=skill_override[None]
        )
        logits = vlm.lm_head(done.hidden[:, -1])
        # without skill routers: 'general' on each level
        scores = done.scores or [logits.new_zeros(1, 1) for _ in skill_override]
        return (
            logits,
            torch.stack(done.keys),
            torch.stack(done.values),
            done.skills[0],
            *scores,
        )

    def outputs(self):
        levels = self.driver.config.mose.levels
        return ['logits', 'past_k', 'past_v', 'skills', *(f'skill_scores_{one}' for one in levels)]


_PAST = {'past_k': {3: 'past_tokens'}, 'past_v': {3: 'past_tokens'}}


class _Decode(_Graph):
    dynamic = _PAST

    def forward(self, input_ids, position_ids, past_k, past_v, skills):
        vlm = self.driver.vlm
        hidden = vlm.model.language_model.embed_tokens(input_ids)
        past = list(zip(past_k.unbind(), past_v.unbind(), strict=True))
        done = vlm(hidden, position_ids, skills=skills[None], past=past)
        return vlm.lm_head(done.hidden[:, -1]), torch.stack(done.keys), torch.stack(done.values)

    def outputs(self):
        return ['logits', 'new_k', 'new_v']


class _Action(_Graph):
    dynamic = _PAST

    def forward(self, noisy, t, proprio, past_k, past_v, skill_override):
        past = list(zip(past_k.unbind(), past_v.unbind(), strict=True))
        everyone = torch.ones_like(past_k[0, :, 0, :, 0], dtype=torch.bool)
        answer = self.driver.action_expert(
            noisy[:, None], t[:, None], proprio, past, everyone, skill_override
        )
        return answer.velocity[:, 0], answer.scores, answer.skill

    def outputs(self):
        return ['velocity', 'skill_scores', 'skill']


_PARTS = dict(zip(GRAPHS, (_ViewRouter, _Vision, _Prefill, _Decode, _Action), strict=True))


def example_inputs(driver: MoseDriver) -> dict[str, dict[str, torch.Tensor]]:
    """Return inputs of every graph, of some size where sizes are dynamic."""
    config = driver.config
    batch = config.fake_batch(1)
    length = int(batch.prompt_lengths[0])
    decoder, levels = config.decoder, len(config.mose.levels)
    shape = (decoder.layers, 1, decoder.kv_heads, length, decoder.head_dim)
    past = {'past_k': torch.randn(shape), 'past_v': torch.randn(shape)}
    override = torch.full((levels,), -1)
    return {
        'view_router': {
            'thumbnails': batch.thumbnails[0],
            'present': batch.present[0],
            'proprio': batch.proprio,
        },
        'vision': {'patches': batch.patches[0]},
        'prefill': {
            'input_ids': batch.input_ids[:, :length],
            'embeds': torch.randn(batch.patches.shape[1], config.vision.tokens, decoder.width),
            'position_ids': batch.position_ids[:, :, :length].contiguous(),
            'skill_override': override,
        },
        'decode': {
            'input_ids': batch.input_ids[:, :1],
            'position_ids': batch.position_ids[:, :, :1].contiguous(),
            **past,
            'skills': torch.zeros_like(override),
        },
        'action': {
            'noisy': torch.randn_like(batch.action),
            't': torch.rand(1),
            'proprio': batch.proprio,
            **past,
            'skill_override': torch.full((1,), -1),
        },
    }


def trace(driver: MoseDriver, graph: str) -> onnx.ModelProto:
    """Return one graph of the driver as ONNX with its weights inside; ValueError for operators outside the standard."""
    part = _PARTS[graph](driver).eval()
    inputs = example_inputs(driver)[graph]
    program = torch.onnx.export(
        part,
        tuple(inputs.values()),
        dynamo=True,
        opset_version=OPSET,
        input_names=list(inputs),
        output_names=part.outputs(),
        dynamic_shapes=tuple(part.dynamic.get(name) for name in inputs),
        verbose=False,
    )
    model = program.model_proto
    foreign = {one.domain for one in model.opset_import} - {'', 'ai.onnx'}
    if foreign or model.functions:
        raise ValueError(f'{graph}: operators outside the standard: {foreign or model.functions}')
    for one in _graphs(model.graph):
        one.ClearField('metadata_props')  # file names and lines of the machine that exported
        for node in one.node:
            node.ClearField('metadata_props')
            node.ClearField('doc_string')
        for value in [*one.value_info, *one.input, *one.output]:
            value.ClearField('metadata_props')
    return model


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Yield a graph and all graphs inside its conditions."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _graphs(attribute.g)


# ---- the weights ----


class _Weights:
    """weights.bin while it is written: each content once."""

    def __init__(self, file: BinaryIO, halve: bool):
        self._file, self._halve = file, halve
        self._places: dict[str, tuple[int, int]] = {}

    def take(self, model: onnx.ModelProto) -> None:
        """Move the larger weights of a model, also those inside its conditions, into the file."""
        for graph in _graphs(model.graph):
            casts = []
            for tensor in graph.initializer:
                array = numpy_helper.to_array(tensor)
                if array.size < INLINE:
                    continue
                if self._halve and _fits_half(array):
                    array = array.astype(np.float16)
                    name = f'{tensor.name}.float16'
                    casts.append(
                        helper.make_node('Cast', [name], [tensor.name], to=onnx.TensorProto.FLOAT)
                    )
                else:
                    name = tensor.name
                self._refer(tensor, name, array)
            nodes = list(graph.node)
            del graph.node[:]
            graph.node.extend([*casts, *nodes])

    def _refer(self, tensor: onnx.TensorProto, name: str, array: np.ndarray) -> None:
        data = np.ascontiguousarray(array).tobytes()
        key = hashlib.sha256(data).hexdigest()
        if key not in self._places:
            self._file.write(b'\0' * (-self._file.tell() % ALIGNMENT))
            self._places[key] = (self._file.tell(), len(data))
            self._file.write(data)
        offset, length = self._places[key]
        tensor.CopyFrom(
            onnx.TensorProto(
                name=name,
                dims=array.shape,
                data_type=helper.np_dtype_to_tensor_dtype(array.dtype),
                data_location=onnx.TensorProto.EXTERNAL,
            )
        )
        for field, value in (('location', WEIGHTS), ('offset', offset), ('length', length)):
            tensor.external_data.add(key=field, value=str(value))


def _fits_half(array: np.ndarray) -> bool:
    if array.dtype != np.float32:
        return False
    with np.errstate(over='ignore'):
        return bool((array.astype(np.float16).astype(np.float32) == array).all())


def rounded(driver: MoseDriver) -> MoseDriver:
    """Return a copy whose weights are numbers of float16; routers keep theirs, where ties decide."""
    driver = deepcopy(driver)
    with torch.no_grad():
        for name, weight in driver.named_parameters():
            if 'router' not in name:
                weight.copy_(weight.half())
                if not weight.isfinite().all():
                    raise ValueError(f'{name} is too large for float16; export with float32')
    return driver


# ---- the bundle ----


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
            weights = _Weights(file, halve)
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
        _judge(found)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Manifest.load(folder)


# ---- the proof ----


def fake_moments(cameras: Sequence[str], count: int = 6, seed: int = 0) -> list[Observation]:
    """Return moments with pictures of coloured blotches, every state and command, a camera missing now and then."""
    random = np.random.default_rng(seed)
    moments = []
    for index in range(count):
        images = {
            name: np.kron(
                random.integers(0, 256, (6, 10, 3), dtype=np.uint8), np.ones((24, 32, 1), np.uint8)
            )
            for name in cameras
        }
        if index % 3 == 2:
            del images[cameras[-1]]
        ego = EgoState(x=0.0, y=0.0, yaw=0.0, speed=float(random.uniform(0, 14)))
        near, far = random.uniform([5, -3], [10, 3]), random.uniform([12, -9], [25, 9])
        command = list(Command)[index % len(Command)]
        guidance = Guidance(near=near, far=far, command=command)
        moments.append(Observation(time=0.1 * index, images=images, ego=ego, guidance=guidance))
    return moments


def parity(
    driver: MoseDriver, folder: str | Path, moments: Sequence[Observation] | None = None
) -> dict[str, Any]:
    """Run a bundle through the engine beside the network it was made of, and return how far they are apart.

    The network must hold the bundle's weights (see `rounded`). Every expert is also forced and compared:
    `experts_reached` counts those where the engine, told to use it, answers as PyTorch does with it.
    """
    engine, router = Driver(folder), ViewRouter(folder)
    m = engine.manifest
    moments = fake_moments(m.cameras) if moments is None else moments
    reference = _Reference(driver, m, Path(folder) / TOKENIZER)
    worst = {'logits_max_abs': 0.0, 'trajectory_max_m': 0.0}
    equal = {'text_equal': True, 'views_equal': True, 'skills_equal': True}
    looked = []
    for moment in moments:
        views = router.select(moment.time, moment.images, moment.ego, moment.guidance)
        plan = engine.plan(views, moment.ego, moment.guidance)
        text = (list(engine.reason()) or [''])[-1]
        want = reference.plan(views, moment, m.max_new_tokens)
        looked.append((views, moment, want))
        gaps = _gaps(m, engine, plan, want)
        worst = {name: max(worst[name], gap) for name, gap in gaps.items()}
        equal['text_equal'] &= text == reference.text(want.answer)
        equal['views_equal'] &= views.names == reference.views(moment, views)
        equal['skills_equal'] &= _chain(plan, m) == (*want.skills, want.action_skill)
    reached = _reach_experts(m, engine, reference, *looked[0])
    total = sum(map(len, m.levels.values())) + len(m.action_skills)
    return {
        **worst,
        **equal,
        'experts_reached': len(reached),
        'experts_total': total,
        'moments': len(moments),
        'against': f'PyTorch float32, weights rounded to {m.storage}',
    }


class _Reference:
    """The network asked as the engine is, by way of core alone."""

    def __init__(self, driver: MoseDriver, m: Manifest, tokenizer: Path):
        self._driver, self._m = driver, m
        self._tokenizer = prompt.Tokenizer.load(tokenizer)

    def plan(self, views, moment, max_new_tokens=0, **override):
        m = self._m
        frames = vision.split_views(views.image, len(views.names), m.view_frames)
        normal = vision.normalize(frames, m.mean, m.std)
        patches = np.stack([vision.patchify(view, m.patch, m.merge) for view in normal])
        text = prompt.question(views.names, moment.ego, moment.guidance)
        ids = self._tokenizer.encode_prompt(text, m.tokens_per_view)
        positions = prompt.rope_positions(ids, self._tokenizer.image_id, m.grid)
        return self._driver.plan(
            torch.from_numpy(patches),
            torch.from_numpy(ids),
            torch.from_numpy(positions),
            torch.from_numpy(self._proprio(moment)),
            torch.tensor(m.noise, dtype=torch.float32),
            num_steps=m.num_steps,
            max_new_tokens=max_new_tokens,
            end_id=self._tokenizer.end_id,
            **override,
        )

    def text(self, answer) -> str:
        return self._tokenizer.decode(answer)

    def views(self, moment, views) -> tuple[str, ...]:
        """Return the views that the network's own scores choose."""
        m = self._m
        small = {
            name: vision.resize(image, m.view_width, m.view_height)
            for name, image in moment.images.items()
        }
        size = (m.thumbnail_width, m.thumbnail_height)
        thumbnails, present = vision.glance(small, m.cameras, *size, m.mean, m.std)
        inputs = (thumbnails, present, self._proprio(moment))
        scores = self._driver.view_router(*(torch.from_numpy(one)[None] for one in inputs))[0]
        by_name = dict(zip(m.cameras, scores.tolist(), strict=True))
        fixed = [name for name in m.fixed_views if name in small]
        rest = [name for name in m.cameras if name in small and name not in m.fixed_views]
        return (*fixed, *sorted(rest, key=lambda name: -by_name[name])[: m.top_k])

    def _proprio(self, moment):
        return self._m.proprio_normalizer().encode(action.proprio(moment.ego, moment.guidance))


def _gaps(m, engine, plan, want) -> dict[str, float]:
    logits = engine.thought.logits[0] - want.logits.numpy()
    there = action.to_trajectory(want.action.numpy(), m.action_normalizer(), 0.0, m.dt).xy
    return {
        'logits_max_abs': float(np.abs(logits).max()),
        'trajectory_max_m': float(np.hypot(*(plan.trajectory.xy - there).T).max()),
    }


def _chain(plan, m) -> tuple[int, ...]:
    levels = [list(m.levels[level]).index(plan.skills[level]) for level in m.levels]
    return (*levels, list(m.action_skills).index(plan.action_skill))


def _reach_experts(m, engine, reference, views, moment, want) -> list[tuple[str, str]]:
    reached = []
    ladders = {**m.levels, ACTION: m.action_skills}
    for place, (level, skills) in enumerate(ladders.items()):
        for index, skill in enumerate(skills):
            plan = engine.plan(views, moment.ego, moment.guidance, force={level: skill})
            chain = [-1] * len(ladders)
            chain[place] = index
            forced = reference.plan(
                views, moment, skill_override=chain[:-1], action_override=chain[-1]
            )
            gaps = _gaps(m, engine, plan, forced)
            same = _chain(plan, m) == (*forced.skills, forced.action_skill)
            if same and all(gaps[name] <= limit for name, limit in LIMITS.items()):
                reached.append((level, skill))
    return reached


def _judge(found: Mapping[str, Any]) -> None:
    """Raise ValueError, naming what is apart, unless the bundle does what PyTorch does."""
    wrong = [
        f'{name} {found[name]:.2g} > {limit}'
        for name, limit in LIMITS.items()
        if not found[name] <= limit
    ]
    wrong += [name for name in ('text_equal', 'views_equal', 'skills_equal') if not found[name]]
    if found['experts_reached'] != found['experts_total']:
        wrong.append(f'{found["experts_reached"]} of {found["experts_total"]} experts reached')
    if wrong:
        raise ValueError(f'the exported bundle differs from PyTorch: {", ".join(wrong)}')
