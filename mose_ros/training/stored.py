"""Checkpoints on disk, known by their configuration and the headers of their files; no weights are read."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import Qwen2VLConfig

from mose_ros.modeling.driver import CONFIG, VLM, WEIGHTS

INDEX, SINGLE = 'model.safetensors.index.json', 'model.safetensors'
_TYPES = {'F32': torch.float32, 'F16': torch.float16, 'BF16': torch.bfloat16}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Return the bytes."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Checkpoint:
    """A folder in Hugging Face's format: configuration and tensors, by the names that transformers 5 gives them."""

    folder: Path
    config: Qwen2VLConfig
    tensors: Mapping[str, Stored]

    @classmethod
    def open(cls, folder: str | Path) -> 'Checkpoint':
        """Read configuration and headers, no weights; ValueError names the file and what is wrong with it."""
        folder = Path(folder)
        stored = {
            _today(name): place
            for path in _files(folder)
            for name, place in read_headers(path).items()
        }
        return cls(folder, read_hf_config(folder), stored)


def read_headers(path: Path) -> dict[str, Stored]:
    """Return the tensors of a file by name; ValueError names a file that cannot be read, or a type that is none of ours."""
    found = {}
    try:
        with safe_open(path, 'pt') as file:
            for name in file.keys():  # noqa: SIM118 - a handle, no mapping
                part = file.get_slice(name)
                dtype = _TYPES.get(part.get_dtype())
                if dtype is None:
                    raise ValueError(
                        f'{path}: {name} is of type {part.get_dtype()}; '
                        f'take a checkpoint in one of {", ".join(_TYPES)}'
                    )
                found[name] = Stored(path, name, tuple(part.get_shape()), dtype)
    except SafetensorError as error:
        raise ValueError(f'{path} cannot be read ({error}); fetch it again') from None
    return found


def count_numbers(checkpoint: str | Path) -> int:
    """Return how many numbers the weights of a MoSE checkpoint are."""
    checkpoint = Path(checkpoint)
    found = [*Checkpoint.open(checkpoint / VLM).tensors.values()]
    found += read_headers(checkpoint / WEIGHTS).values()
    return sum(prod(one.shape) for one in found)


def check_out(out: Path) -> None:
    """Raise ValueError where a checkpoint would take the place of something else."""
    if out.exists() and not (out / CONFIG).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f'{out} is there and no checkpoint; choose another --out')


def read_hf_config(folder: str | Path) -> Qwen2VLConfig:
    """Return the configuration of a Qwen2-VL folder; ValueError when it is none."""
    path = Path(folder) / 'config.json'
    if not path.is_file():
        raise ValueError(f'{folder} is no checkpoint of Hugging Face: it has no config.json')
    try:
        kind = json.loads(path.read_text(encoding='utf-8')).get('model_type')
    except (UnicodeDecodeError, json.JSONDecodeError, AttributeError) as error:
        raise ValueError(f'{path} is no JSON of a model ({error})') from None
    if kind != 'qwen2_vl':
        raise ValueError(f"{path}: model_type is {kind!r}; a MoSE is made of a 'qwen2_vl'")
    return Qwen2VLConfig.from_pretrained(folder)


def _files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.is_file():
        names = json.loads(index.read_text(encoding='utf-8'))['weight_map'].values()
        paths = [folder / name for name in dict.fromkeys(names)]
    else:
        paths = [folder / SINGLE]
    for path in paths:
        if not path.is_file():
            raise ValueError(
                f'{path} is missing; fetch it, or save the checkpoint as safetensors again'
            )
    return paths


def _today(name: str) -> str:
    """Return a tensor's name in transformers 5; the published checkpoints have those of 4."""
    name = re.sub(r'^visual\.', 'model.visual.', name)
    return re.sub(r'^model\.(?!language_model\.|visual\.)', 'model.language_model.', name)
