"""Any Qwen2-VL folder becomes a MoSE, and a trained MoSE gets expert groups: both copy tensors from file to file.

No model is loaded: a tensor of the new checkpoint is one of the old, under the same or another name, or a new and small
one. So the memory needed is that of one shard, whatever the model's size, and weights keep their type, as bfloat16.
"""

import logging
import re
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm
from transformers import Qwen2VLConfig

from mose_ros.core.bundle import TOKENIZER
from mose_ros.core.files import folder_beside, write_json
from mose_ros.core.skills import Taxonomy, default_path
from mose_ros.modeling.config import PRESETS, DriverConfig, with_skills
from mose_ros.modeling.driver import VLM, WEIGHTS, MoseDriver, read_config
from mose_ros.modeling.mixture import SkillMixture
from mose_ros.modeling.mose import MoseQwen2VL
from mose_ros.modeling.qwen2vl import hf_config, mose_field, sized_like
from mose_ros.training.config import override
from mose_ros.training.fit import FIT, UNFITTED, Fit
from mose_ros.training.room import check_disk
from mose_ros.training.stored import INDEX, Checkpoint, Stored, check_out, read_hf_config

SHARD = 2**31  # bytes of a shard, and so of memory
BESIDE = ('*.json', '*.txt', '*.jinja')  # tokenizer, preprocessor and the like travel along
_log = logging.getLogger(__name__)


# ---- what is to be ----


def mose_config(
    hf: Qwen2VLConfig | None,
    preset: str,
    settings: Sequence[str] = (),
    taxonomy: Taxonomy | None = None,
) -> DriverConfig:
    """Return a preset with the sizes of a checkpoint, then with settings as `mose.router_scope=layer`; checked."""
    if preset not in PRESETS:
        raise ValueError(f'no preset {preset!r}; known: {", ".join(PRESETS)}')
    base = PRESETS[preset] if hf is None else sized_like(PRESETS[preset], hf)
    config = override(base, settings)
    view = config.vision
    given = replace(base.vision, view_width=view.view_width, view_height=view.view_height)
    if hf is not None and (config.decoder, view) != (base.decoder, given):
        raise ValueError(
            "sizes of decoder and vision are the checkpoint's; only the view's can be set"
        )
    unit = view.patch * view.merge
    if view.view_width % unit or view.view_height % unit:
        raise ValueError(
            f'a view of {view.view_width}x{view.view_height} is no multiple of {unit} pixels; '
            'set vision.view_width and vision.view_height'
        )
    return with_skills(config, taxonomy or Taxonomy.load(default_path()))


def on_paper(config: DriverConfig, hf: Qwen2VLConfig, seed: int = 0) -> MoseDriver:
    """Return the network with a language model that has shapes and no weights; the rest, drawn by the seed, has them."""
    with torch.device('meta'):
        vlm = MoseQwen2VL(hf)
    torch.manual_seed(seed)
    return MoseDriver(config, vlm)


def count(driver: MoseDriver) -> dict[str, int]:
    """Return `MoseDriver.count_parameters` and 'active_more': how many of them the experts add to the backbone's."""
    mixtures = [m for m in driver.vlm.modules() if isinstance(m, SkillMixture)]
    chosen = [group[0] for m in mixtures for group in (m.experts, m.image_experts) if len(group)]
    routers = [p for name, p in driver.vlm.named_parameters() if 'router' in name]
    more = sum(p.numel() for p in routers + [p for m in chosen for p in m.parameters()])
    return driver.count_parameters() | {'active_more': more}


def count_only(
    source: str | Path | None,
    preset: str,
    settings: Sequence[str] = (),
    *,
    taxonomy: Taxonomy | None = None,
) -> dict[str, int]:
    """Return the `count` of what `convert` would make, from config.json alone; without a folder, of the preset's sizes."""
    hf = None if source is None else read_hf_config(source)
    config = mose_config(hf, preset, settings, taxonomy)
    if hf is None:
        hf = hf_config(config.vision, config.decoder, config.mose)
    with torch.device('meta'):
        return count(on_paper(config, _with_mose(hf, config)))


def describe(counts: Mapping[str, int]) -> str:
    """Return a count in words."""
    giga = {name: f'{value / 1e9:.2f} B' for name, value in counts.items()}
    if counts['total'] < 1e8:
        giga = {name: f'{value / 1e6:.2f} M' for name, value in counts.items()}
    return (
        f'{giga["total"]} parameters in all, {giga["active"]} active ({counts["active"]} of '
        f'{counts["total"]}); the experts add {giga["active_more"]} active ones to the Qwen2-VL'
    )


# ---- from one to the other ----


def convert(
    source: str | Path,
    out: str | Path,
    preset: str = 'qwen2vl_2b',
    settings: Sequence[str] = (),
    *,
    taxonomy: Taxonomy | None = None,
    seed: int = 0,
    bar: bool = False,
) -> dict[str, int]:
    """Write a MoSE checkpoint (`MoseDriver.load` reads it) made of a Qwen2-VL folder; return its `count`.

    Experts are copies of the FFNs they join, so it answers as the Qwen2-VL does; routers, view router and action expert
    are drawn by the seed, and scaled as `Fit.to_nothing` says. ValueError, with nothing written, for a folder that is not whole or a disk that is too full.
    """
    there = Checkpoint.open(source)
    if hasattr(there.config, 'mose'):
        raise ValueError(f'{source} is the language model of a MoSE; take the folder above it')
    config = mose_config(there.config, preset, settings, taxonomy)
    driver = on_paper(config, _with_mose(there.config, config), seed)
    routers = {}
    for name, value in driver.vlm.named_parameters():
        if 'router' not in name:
            continue
        drawn = torch.zeros(value.shape)
        if name.endswith('weight'):
            nn.init.normal_(drawn, std=config.decoder.initializer_range)
        routers[name] = drawn

    def origin(name: str) -> str:
        return re.sub(r'\.(image_)?experts\.\d+\.', '.', name)

    fit, tokenizer = Fit.to_nothing(config.action), there.folder / TOKENIZER
    _write(there, Path(out), driver, origin, routers, bar, fit=fit, tokenizer=tokenizer)
    _log.info('scales of actions and proprioception: %s', UNFITTED)
    return count(driver)


def widen(
    source: str | Path,
    out: str | Path,
    settings: Sequence[str] = ('mose.expert_groups=true',),
    *,
    bar: bool = False,
) -> dict[str, int]:
    """Write a MoSE checkpoint with a second expert for each skill, which takes the tokens of images; return its `count`.

    The new experts are copies of the trained ones, so it answers as before; routers and all else stay (MoSE,
    "Scaling-Up"). ValueError for other settings, and as in `convert`.
    """
    source = Path(source)
    old = read_config(source)
    config = override(old, settings)
    if old.mose.expert_groups or not config.mose.expert_groups:
        raise ValueError(
            f'{source} is a MoSE{" with expert groups" * old.mose.expert_groups} already; '
            'it can get expert groups once, by mose.expert_groups=true'
        )
    if (
        replace(config, mose=old.mose) != old
        or replace(config.mose, expert_groups=False) != old.mose
    ):
        raise ValueError(f'of {source} only mose.expert_groups can be set, not {list(settings)}')
    there = Checkpoint.open(source / VLM)
    driver = on_paper(config, _with_mose(there.config, config))
    driver.load_state_dict(load_file(source / WEIGHTS), strict=False)

    def origin(name: str) -> str:
        return name.replace('.image_experts.', '.experts.')

    fit = Fit.load(source) if (source / FIT).is_file() else None
    _write(there, Path(out), driver, origin, {}, bar, fit=fit, tokenizer=source / TOKENIZER)
    return count(driver)


def _with_mose(hf: Qwen2VLConfig, config: DriverConfig) -> Qwen2VLConfig:
    made = deepcopy(hf)
    made.mose = mose_field(config.vision, config.mose)
    made.architectures = [MoseQwen2VL.__name__]
    return made


def _write(
    there: Checkpoint,
    out: Path,
    driver: MoseDriver,
    origin: Callable[[str], str],
    new: Mapping[str, torch.Tensor],
    bar: bool,
    *,
    fit: Fit | None,
    tokenizer: Path,
) -> None:
    """Write the driver's checkpoint, the tensors of its language model being those of `origin(name)`, or new."""
    if out.resolve() in (there.folder.resolve(), *there.folder.resolve().parents):
        raise ValueError(f'{out} holds what is converted; choose another --out')
    check_out(out)
    plan = _plan(there, driver.vlm, origin, new)
    rest = sum(p.nbytes for n, p in driver.named_parameters() if not n.startswith('vlm.'))
    check_disk(out, sum(map(_size, plan.values())) + rest, 'the checkpoint')
    with folder_beside(out) as partial:
        folder = partial / VLM
        folder.mkdir()
        for path in (path for pattern in BESIDE for path in there.folder.glob(pattern)):
            if path.name != INDEX:
                shutil.copyfile(path, folder / path.name)
        driver.vlm.config.save_pretrained(folder)
        _write_shards(folder, plan, bar)
        driver.save_rest(partial)
        if fit is not None:
            fit.save(partial, tokenizer if tokenizer.is_file() else None)


def _plan(there, vlm, origin, new) -> dict[str, Stored | torch.Tensor]:
    """Return what each tensor is made of; ValueError names what is missing, has another shape, or would be lost."""
    shapes = {name: tuple(value.shape) for name, value in vlm.state_dict().items()}
    if vlm.config.tie_word_embeddings:
        del shapes['lm_head.weight']
    plan = {name: new.get(name, there.tensors.get(origin(name))) for name in shapes}
    missing = sorted({origin(name) for name, value in plan.items() if value is None})
    if missing:
        raise ValueError(f'{there.folder} lacks {_some(missing)}; fetch the checkpoint again')
    wrong = {
        origin(name): f'{origin(name)} {tuple(value.shape)} instead of {shapes[name]}'
        for name, value in plan.items()
        if tuple(value.shape) != shapes[name]
    }
    if wrong:
        raise ValueError(f'{there.folder} does not fit its config.json: {_some(wrong.values())}')
    lost = set(there.tensors) - {origin(name) for name in shapes} - {'lm_head.weight'}
    if lost := [name for name in sorted(lost) if not name.endswith('rotary_emb.inv_freq')]:
        raise ValueError(f'{there.folder} has tensors that no Qwen2-VL has: {_some(lost)}')
    return plan


def _some(names: Collection[str]) -> str:
    return ', '.join(list(names)[:3]) + (f' and {len(names) - 3} more' if len(names) > 3 else '')


def _size(value: Stored | torch.Tensor) -> int:
    return value.size if isinstance(value, Stored) else value.nbytes


def _write_shards(folder: Path, plan: Mapping[str, Stored | torch.Tensor], bar: bool) -> None:
    shards, filled = [[]], 0
    for name, value in plan.items():
        if shards[-1] and filled + _size(value) > SHARD:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += _size(value)
    places = {}
    for number, names in enumerate(tqdm(shards, desc='writing', disable=not bar), 1):
        file = f'model-{number:05d}-of-{len(shards):05d}.safetensors'
        tensors = {name: _take(plan[name]) for name in names}
        save_file(tensors, folder / file, metadata={'format': 'pt'})
        places |= dict.fromkeys(names, file)
    size = sum(map(_size, plan.values()))
    write_json(folder / INDEX, {'metadata': {'total_size': size}, 'weight_map': places})


def _take(value: Stored | torch.Tensor) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    with safe_open(value.file, 'pt') as file:
        return file.get_tensor(value.name)
