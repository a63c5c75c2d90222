"""The bundle: the one contract between training and vehicle. A folder with a manifest, five graphs and a tokenizer.

What the engine must know of a model is in the manifest, and nowhere else. docs/architecture.md lists the graphs' inputs and outputs.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from mose_ros.core.action import PROPRIO, Normalizer
from mose_ros.core.files import PARTIAL, write_json
from mose_ros.core.vision import HISTORIES

FORMAT_VERSION = 2  # 1: pictures were cut into patches in front of the vision graph
MANIFEST = 'manifest.json'
TOKENIZER = 'tokenizer.json'
PRECISIONS = ('float32', 'float16', 'int8', 'int4')
GRAPHS = ('view_router', 'vision', 'prefill', 'decode', 'action')


class BundleError(ValueError):
    """A bundle that must not be used; the message names the file and the remedy."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything about a bundle that its graphs do not say. Sizes in pixels, times in seconds."""

    name: str
    # looking
    cameras: Sequence[str]  # the order of the view router's inputs and outputs
    anchor: str  # the camera without which there is no plan
    fixed_views: Sequence[str]
    top_k: int  # how many candidate views are looked at beside the fixed ones
    view_width: int
    view_height: int
    view_frames: int  # temporal slots of a patch
    frame_gap: float  # seconds between a view's frames
    patch: int
    merge: int
    thumbnail_width: int
    thumbnail_height: int
    mean: Sequence[float]
    std: Sequence[float]
    # thinking
    levels: Mapping[
        str, Sequence[str]
    ]  # level -> skills in the order of experts, in order of depth
    num_layers: int  # L
    num_kv_heads: int  # G
    head_dim: int  # d
    width: int  # D
    vocab_size: int
    max_prompt_tokens: int
    max_new_tokens: int
    # acting
    action_skills: Sequence[str]
    dt: float  # seconds between points of the trajectory
    action_low: Sequence[Sequence[float]]  # (H, 2) of the normaliser
    action_high: Sequence[Sequence[float]]
    noise: Sequence[Sequence[float]]  # (H, 2) where the flow starts: a plan is reproducible
    num_steps: int  # of the flow; see `action.flow`
    proprio: Sequence[str]
    proprio_low: Sequence[float]
    proprio_high: Sequence[float]
    history: str = 'all'  # views that show their past: 'all', 'fixed' or 'none'
    # provenance
    precision: str = 'float32'  # of the graphs' products; int4: of their weights alone
    storage: str = 'float32'  # what weights.bin holds; beside integers, float16
    training: Mapping[str, Any] = field(
        default_factory=dict
    )  # the resolved configuration of every stage
    data: Mapping[str, Any] = field(default_factory=dict)
    commit: str = ''
    created: str = ''
    quality: Mapping[str, Any] = field(
        default_factory=dict
    )  # measured, with the command that measured it
    parity: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)  # file -> sha256
    format_version: int = FORMAT_VERSION

    @property
    def carried(self) -> str:
        """Return the type of embeddings and caches, which pass from graph to graph."""
        return 'float16' if self.precision == 'float16' else 'float32'

    @property
    def horizon(self) -> int:
        """Return the number of points of a trajectory."""
        return len(self.action_low)

    @property
    def grid(self) -> tuple[int, int]:
        """Return rows and columns of a view's tokens."""
        unit = self.patch * self.merge
        return self.view_height // unit, self.view_width // unit

    @property
    def tokens_per_view(self) -> int:
        """Return how many tokens one view costs."""
        return self.grid[0] * self.grid[1]

    def action_normalizer(self) -> Normalizer:
        """Return the map between metres and actions."""
        return Normalizer(
            np.asarray(self.action_low, np.float32), np.asarray(self.action_high, np.float32)
        )

    def proprio_normalizer(self) -> Normalizer:
        """Return the map between SI values and what the graphs take as proprioception."""
        return Normalizer(
            np.asarray(self.proprio_low, np.float32), np.asarray(self.proprio_high, np.float32)
        )

    def check(self) -> None:
        """Raise BundleError, naming the field, where the manifest contradicts itself."""
        wrong = [name for name in _SIZES if type(getattr(self, name)) is not int]
        wrong += [name for name in _SIZES if name not in wrong and getattr(self, name) < 1]
        if wrong:
            raise BundleError(
                f'{self.name}: {", ".join(wrong)} in {MANIFEST} must be whole and positive; '
                'export the bundle again'
            )
        unit = self.patch * self.merge
        rules = {
            'cameras': len(set(self.cameras)) == len(self.cameras) > 0,
            'anchor': self.anchor in self.fixed_views,
            'fixed_views': set(self.fixed_views) <= set(self.cameras),
            'top_k': self.top_k in range(len(self.cameras) - len(self.fixed_views) + 1),
            'view_width': self.view_width % unit == 0,
            'view_height': self.view_height % unit == 0,
            'frame_gap': 0 < self.frame_gap < np.inf,
            'history': self.history in HISTORIES,
            'mean': _is_finite(self.mean, (3,)),
            'std': _is_finite(self.std, (3,)) and min(self.std) > 0,
            'levels': len(self.levels) > 0
            and all(len(skills) > 0 for skills in self.levels.values()),
            'action_skills': len(self.action_skills) > 0,
            'dt': 0 < self.dt < np.inf,
            'action_low, action_high': _are_bounds(
                self.action_low, self.action_high, (self.horizon, 2)
            ),
            'noise': _is_finite(self.noise, (self.horizon, 2)),
            # The engine fills proprioception in this order; another one would be read as nonsense, unnoticed.
            'proprio': tuple(self.proprio) == PROPRIO,
            'proprio_low, proprio_high': _are_bounds(
                self.proprio_low, self.proprio_high, (len(self.proprio),)
            ),
            'precision': self.precision in PRECISIONS,
            'storage': self.storage in PRECISIONS,
            'files': all(type(value) is str for value in self.files.values()),
        }
        broken = [name for name, holds in rules.items() if not holds]
        if broken:
            raise BundleError(
                f'{self.name}: bad {", ".join(broken)} in {MANIFEST}; export the bundle again'
            )

    def save(self, folder: str | Path) -> None:
        """Write manifest.json into the folder with the hashes of every other file there."""
        folder = Path(folder)
        names = sorted(path.name for path in folder.iterdir() if path.is_file())
        names = [name for name in names if name != MANIFEST and not name.endswith(PARTIAL)]
        replace(self, files={name: sha256(folder / name) for name in names}).write(folder)

    def write(self, folder: str | Path) -> None:
        """Write manifest.json into the folder as it is, its hashes too; on OSError the old one stays, and nothing else."""
        write_json(Path(folder) / MANIFEST, asdict(self))

    @classmethod
    def load(cls, folder: str | Path, verify: bool = True) -> 'Manifest':
        """Read and check a bundle's manifest and, unless told not to, the hash of every file. Raises BundleError."""
        folder = Path(folder)
        path = folder / MANIFEST
        if not path.is_file():
            known = sorted(found.parent.name for found in folder.parent.glob(f'*/{MANIFEST}'))
            hint = f'; beside it there are: {", ".join(known)}' if known else ''
            raise BundleError(f'{folder} is no bundle: it has no {MANIFEST}{hint}')
        try:
            data = json.loads(path.read_text(encoding='utf-8'))
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise BundleError(
                f'{path} is not JSON ({error}); fetch or export the bundle again'
            ) from None
        if not isinstance(data, dict):
            raise BundleError(f'{path} is not a mapping; fetch or export the bundle again')
        version = data.get('format_version')
        if version != FORMAT_VERSION:
            raise BundleError(
                f'{path} has format version {version}, this engine reads {FORMAT_VERSION}; '
                'export the bundle with this version of mose_ros'
            )
        known = {one.name for one in fields(cls)}
        missing = [one.name for one in fields(cls) if _is_required(one) and one.name not in data]
        foreign = sorted(set(data) - known)
        if missing or foreign:
            parts = [f'lacks {", ".join(missing)}'] if missing else []
            parts += [f'has unknown {", ".join(foreign)}'] if foreign else []
            raise BundleError(f'{path} {" and ".join(parts)}; export the bundle again')
        try:
            manifest = cls(**data)
            manifest.check()
        except BundleError:
            raise
        except (TypeError, ValueError, AttributeError) as error:
            raise BundleError(
                f'{path}: a value has the wrong type ({error}); export the bundle again'
            ) from None
        for name in [*(f'{graph}.onnx' for graph in GRAPHS), TOKENIZER]:
            if name not in manifest.files:
                raise BundleError(f'{path} does not list {name}; export the bundle again')
        if verify:
            manifest.verify(folder)
        return manifest

    def verify(self, folder: str | Path) -> None:
        """Raise BundleError unless every listed file is there, unchanged."""
        for name, expected in self.files.items():
            path = Path(folder) / name
            if Path(name).name != name:
                raise BundleError(
                    f'{folder}/{MANIFEST} lists {name!r}, which is outside the bundle'
                )
            if not path.is_file():
                raise BundleError(f'{path} is missing; fetch or export the bundle again')
            actual = sha256(path)
            if actual != expected:
                raise BundleError(
                    f'{path} has changed: sha256 {actual[:12]} instead of {expected[:12]}; '
                    'fetch or export the bundle again'
                )


_SIZES = (
    *('view_width', 'view_height', 'view_frames', 'patch', 'merge'),
    *('thumbnail_width', 'thumbnail_height', 'num_layers', 'num_kv_heads', 'head_dim', 'width'),
    *('vocab_size', 'max_prompt_tokens', 'max_new_tokens', 'num_steps'),
)


def _is_required(one) -> bool:
    return one.default is MISSING and one.default_factory is MISSING


def _is_finite(values, shape: tuple[int, ...]) -> bool:
    array = np.asarray(values, np.float64)
    return array.shape == shape and bool(np.isfinite(array).all())


def _are_bounds(low, high, shape: tuple[int, ...]) -> bool:
    return (
        _is_finite(low, shape)
        and _is_finite(high, shape)
        and bool((np.asarray(high, np.float32) > np.asarray(low, np.float32)).all())
    )


def sha256(path: str | Path) -> str:
    """Return the hex digest of a file."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
