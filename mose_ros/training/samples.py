"""The sample of one frame: its pictures through `core.vision` and its prompt through `core.prompt`, as on the vehicle.

Everything random about a sample follows from its key.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8

from mose_ros.core import action, prompt, vision
from mose_ros.core.prompt import IM_END, Tokenizer
from mose_ros.core.types import COMMANDS, EgoState, Guidance
from mose_ros.data import storage
from mose_ros.data.shards import BrokenShard
from mose_ros.modeling.config import DriverConfig
from mose_ros.training import annotate
from mose_ros.training.config import Data
from mose_ros.training.fit import Fit
from mose_ros.training.index import Index, place_of

ENDS = {'.jpg': b'\xff\xd9', '.png': b'IEND\xaeB`\x82'}  # of a whole picture
NO_TOKEN = -100  # a token that no loss looks at


class CorruptSample(ValueError):
    """A recorded sample that can't be read."""

    def __init__(self, name: str, reason: str):
        super().__init__(f'{name}: {reason}; record or fetch the clip again')
        self.name = name


@dataclass(frozen=True, kw_only=True)
class Key:
    """Which sample: everything random about it follows from the numbers."""

    frame: int  # of the index
    views: int  # how many are looked at
    numbers: tuple[int, ...] | None  # seed of its random choices; None: nothing is changed
    spares: tuple[int, ...] = ()  # frames that are taken, in turn, where this one can't be read
    draws: bool = (
        False  # whether the view router is to draw the last view: all candidates come along
    )


class Samples:
    """Makes the sample of a key."""

    def __init__(
        self,
        index: Index,
        model: DriverConfig,
        config: Data,
        tokenizer: Path | None = None,
        fit: Fit | None = None,
    ):
        """Take words from the tokenizer and scales from the fit of a network; from the data where there is none."""
        if config.history not in vision.HISTORIES:
            raise ValueError(
                f'data.history is one of {", ".join(vision.HISTORIES)}, not {config.history!r}'
            )
        self._index, self._model, self._config = index, model, config
        tokenizer = tokenizer or storage.local_file(index.root / annotate.TOKENIZER)
        self._tokenizer = Tokenizer.load(tokenizer)
        known = json.loads((index.root / annotate.DATASET).read_text(encoding='utf-8'))
        self._actions = fit.action if fit else annotate.normalizer(known, 'action')
        self._states = fit.proprio if fit else annotate.normalizer(known, 'proprio')
        self._patch_of = _patch_numbers(model) * model.semantic_classes
        self._candidates = [name for name in model.cameras if name not in config.fixed_views]

    def __getitem__(self, key: Key) -> dict[str, np.ndarray]:
        """Return the arrays of one sample, named as the fields of Batch; of its `choices`, see `_choices`."""
        index, model, i = self._index, self._model, key.frame
        random = None if key.numbers is None else np.random.default_rng(key.numbers)
        alive = self._alive(key.views, random)
        names = self._choose_views(i, key.views, alive, random)
        newest, older = index.frame[i], index.older[i]
        if random is not None and random.random() < self._config.still:
            older = newest
        look = Look.draw(random, self._config.photometric)
        # all in the same way, as on the vehicle: were the views of another size, the router would learn to tell them by that
        now = {name: self._picture(i, newest, name) for name in alive}
        views = [self._frames(i, older, name, now[name]) for name in names]
        glance = model.glance
        thumbnails, present = vision.glance(now, model.cameras, glance.width, glance.height)
        thumbnails[present > 0] = look.recolour(thumbnails[present > 0])
        camera = index.camera[i] if index.camera[i] in alive else ''
        sample = {
            'patches': np.stack([self._patches(view, look, random) for view in views]),
            'proprio': self._states.encode(index.proprio[i]),
            'action': self._actions.encode(index.action[i]),
            'skills': index.skills[i],
            'action_skill': index.action_skill[i],
            'thumbnails': thumbnails,
            'present': present,
            'camera': np.int64(place_of(camera, model.cameras)),
            **self._text(i, names),
        }
        chance = np.random.default_rng(i) if random is None else random
        draws = model.action.flow_samples
        sample['coin'] = np.float32(chance.random())
        sample['moments'] = chance.random(draws, dtype=np.float32)
        shape = (draws, *index.action.shape[1:])
        sample['noise'] = chance.standard_normal(shape, dtype=np.float32)
        if model.semantic_classes:
            sample['semantics'] = np.stack([self._classes(i, name) for name in names])
        if key.draws:
            sample['choices'] = self._choices(i, older, look, random)
            sample['choices']['noise'] = chance.random(len(self._candidates), dtype=np.float32)
        return sample

    def _choices(self, i: int, older: int, look: 'Look', random) -> dict:
        """Return patches and texts of all candidates, and where they stand among the cameras."""
        newest, patches, texts = self._index.frame[i], [], []
        for name in self._candidates:
            frames = self._frames(i, older, name, self._picture(i, newest, name))
            patches.append(self._patches(frames, look, random))
            texts.append(self._text(i, [*self._config.fixed_views, name]))
        places = [self._model.cameras.index(name) for name in self._candidates]
        return {'patches': np.stack(patches), 'texts': texts, 'places': np.asarray(places)}

    def fetch_ahead(self, keys: Sequence[Key]) -> bool:
        """Begin to fetch what samples are made of; return whether they lie in shards."""
        index = self._index
        if not index.shard:
            return False
        clips = index.clip[[key.frame for key in keys]].tolist()
        storage.fetch_ahead(index.root, dict.fromkeys(index.shard[clip] for clip in clips))
        return True

    def metres(self, actions: torch.Tensor) -> Float[np.ndarray, 'B H 2']:
        """Return normalised trajectories in metres."""
        return self._actions.decode(actions.float().cpu().numpy())

    def _alive(self, views: int, random) -> list[str]:
        fixed = self._config.fixed_views
        alone = views == len(fixed) and random is not None
        if alone and random.random() < self._config.cameras_missing:
            return list(fixed)
        return list(self._model.cameras)

    def _choose_views(self, i: int, views: int, alive, random) -> list[str]:
        """Return the fixed views and the labelled one, or now and then others in its place."""
        fixed, label = self._config.fixed_views, self._index.camera[i]
        others = [name for name in self._candidates if name != label and name in alive]
        chosen = [label] if label in self._candidates and label in alive else []
        if random is not None:
            others = [others[j] for j in random.permutation(len(others))]
            if random.random() < self._config.other_view:
                chosen = []
        return [*fixed, *(chosen + others)[: views - len(fixed)]]

    def _frames(self, i: int, older: int, name: str, now: np.ndarray) -> list[np.ndarray]:
        """Return a view's older and newest frame; the newest twice where it shows no past."""
        config = self._config
        moves = vision.shows_past(name, config.history, config.fixed_views)
        if older == self._index.frame[i] or not moves:
            return [now, now]
        return [self._picture(i, older, name), now]

    def _picture(self, i: int, frame: int, camera: str) -> UInt8[np.ndarray, 'H W 3']:
        """Return a camera's picture at view size."""
        index, view = self._index, self._model.vision
        name = f'{index.clips[index.clip[i]]}/camera/rgb_{camera}/{frame:05d}.jpg'
        image = self._read(name, cv2.IMREAD_COLOR_RGB)
        return vision.resize(image, view.view_width, view.view_height)

    def _patches(self, view: Sequence[np.ndarray], look: 'Look', random):
        """Return `patchify(normalize(...))` of a changed view; the colours last, where they are quick."""
        config = self._model.vision
        frames = np.stack(look.blur(view)).astype(np.float32)
        patches = vision.patchify(frames, config.patch, config.merge)
        span = config.frames * config.patch**2  # numbers of a colour in a patch
        std = np.asarray(vision.CLIP_STD, np.float32)
        offset = look.offset - look.gain * np.asarray(vision.CLIP_MEAN, np.float32) / std
        patches *= np.repeat(look.gain / (255 * std), span)
        patches += np.repeat(offset, span)
        if look.noise:
            patches += look.noise * random.standard_normal(patches.shape, dtype=np.float32)
        return patches

    def _classes(self, i: int, camera: str) -> Float[np.ndarray, 'N K']:
        """Return the share of each class in each patch; zeros where no class picture was recorded."""
        index, view, count = self._index, self._model.vision, self._model.semantic_classes
        name = f'{index.clips[index.clip[i]]}/camera/semantic_{camera}/{index.frame[i]:05d}.png'
        if not (index.root / name).is_file():
            return np.zeros((view.patches, count), np.float32)
        image = self._read(name, cv2.IMREAD_GRAYSCALE)
        size = (view.view_width, view.view_height)
        image = cv2.resize(image, size, interpolation=cv2.INTER_NEAREST)
        places = np.bincount((self._patch_of + image).ravel(), minlength=view.patches * count)
        return (places / view.patch**2).astype(np.float32).reshape(view.patches, count)

    def _read(self, name: str, mode: int) -> np.ndarray:
        try:
            data = (self._index.root / name).read_bytes()
        except BrokenShard as error:
            raise CorruptSample(error.name, error.reason) from None
        except OSError as error:
            raise CorruptSample(name, error.strerror or 'it cannot be opened') from None
        # the decoder fills what is missing with grey and says nothing
        if not data.rstrip(b'\0').endswith(ENDS[name[-4:]]):
            raise CorruptSample(name, 'it is cut off')
        image = cv2.imdecode(np.frombuffer(data, np.uint8), mode)
        if image is None:
            raise CorruptSample(name, 'it is no picture')
        return image

    def _text(self, i: int, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Return the tokens of question and answer, not padded yet."""
        tokenizer, view = self._tokenizer, self._model.vision
        grid = (view.grid[0] // view.merge, view.grid[1] // view.merge)
        text = prompt.question(names, *_moment(self._index.proprio[i]))
        question = tokenizer.encode_prompt(text, grid[0] * grid[1])
        answer = np.asarray(tokenizer.encode(self._index.answer[i] + IM_END), np.int64)
        places = prompt.rope_positions(question, tokenizer.image_id, grid)
        following = places.max() + 1 + np.arange(len(answer))
        return {
            'input_ids': np.concatenate([question, answer]),
            'labels': np.concatenate([np.full(len(question), NO_TOKEN), answer]),
            'position_ids': np.concatenate([places, np.tile(following, (3, 1))], axis=1),
            'prompt_lengths': np.int64(len(question)),
        }


def _patch_numbers(model: DriverConfig) -> Int64[np.ndarray, 'H W']:
    """Return for each pixel of a view which patch it lies in, in the order of `vision.patchify`."""
    view = model.vision
    (rows, columns), merge = view.grid, view.merge
    order = np.arange(rows * columns).reshape(rows // merge, columns // merge, merge, merge)
    grid = order.transpose(0, 2, 1, 3).reshape(rows, columns)
    return np.kron(grid, np.ones((view.patch, view.patch), np.int64))


def _moment(state: Float[np.ndarray, 'P']) -> tuple[EgoState, Guidance]:
    """Return what a prompt says of the ego, from its proprioception."""
    at = {name: float(value) for name, value in zip(action.PROPRIO, state, strict=True)}
    command = next(one for one in COMMANDS if at[f'command_{one.value}'])
    near, far = (np.array([at[f'{name}_x'], at[f'{name}_y']]) for name in ('near', 'far'))
    ego = EgoState(x=0.0, y=0.0, yaw=0.0, speed=at['speed'])
    return ego, Guidance(near=near, far=far, command=command)


@dataclass(frozen=True, kw_only=True)
class Look:
    """A mild change of a moment's pictures that moves nothing."""

    gain: np.ndarray  # (3,) of the normalised colours
    offset: np.ndarray  # (3,)
    noise: float = 0.0  # standard deviation
    sigma: float = 0.0  # of the blur, pixels

    @classmethod
    def draw(cls, random: np.random.Generator | None, probability: float) -> 'Look':
        """Draw a change, or none with 1 - probability."""
        if random is None or random.random() >= probability:
            return cls(gain=np.ones(3, np.float32), offset=np.zeros(3, np.float32))
        gain = random.uniform(0.85, 1.18) * random.uniform(0.97, 1.03, 3)
        offset = random.uniform(-0.25, 0.25) + random.uniform(-0.05, 0.05, 3)
        return cls(
            gain=gain.astype(np.float32),
            offset=offset.astype(np.float32),
            noise=random.uniform(0.0, 0.08) if random.random() < 0.4 else 0.0,
            sigma=random.uniform(0.4, 0.9) if random.random() < 0.3 else 0.0,
        )

    def blur(self, frames: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        """Return the frames less sharp."""
        if not self.sigma:
            return frames
        return [cv2.GaussianBlur(frame, (3, 3), self.sigma) for frame in frames]

    def recolour(self, thumbnails: Float[np.ndarray, 'C 3 h w']) -> Float[np.ndarray, 'C 3 h w']:
        """Return normalised pictures brighter or darker, with more or less contrast."""
        return thumbnails * self.gain[:, None, None] + self.offset[:, None, None]
