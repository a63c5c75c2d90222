"""The training loop that all stages share: from one checkpoint and a data set to the next checkpoint.

A stage is its settings (`presets.Stage`): which losses count, which parameters move, how fast. A stopped stage goes on with the
same samples, the same noise and the same numbers as if it had not been stopped.
"""

import contextlib
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from mose_ros.core.action import flow
from mose_ros.core.prompt import Tokenizer
from mose_ros.modeling import config as modeling_config
from mose_ros.modeling.batch import Batch, LossWeights
from mose_ros.modeling.config import DriverConfig
from mose_ros.modeling.driver import MoseDriver
from mose_ros.training import annotate
from mose_ros.training.config import differences, resolve, write_json
from mose_ros.training.dataset import Index, Order, Samples, load, validation_keys
from mose_ros.training.presets import Stage, Training
from mose_ros.training.together import Team

_LOG = logging.getLogger(__name__)
MODEL, STATE, RESULT, METRICS = 'model', 'state.json', 'stage.json', 'metrics.jsonl'
CHECKPOINT = 'checkpoint-'
FLOW_STEPS = 5  # of Euler, where a trajectory is drawn to be judged
RAREST = 0.02  # a class counts as at least that share in the focal losses, or its few samples would outweigh all


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a stage may use of the machine. Not part of what is trained, so it may change from run to run."""

    max_minutes: float = (
        math.inf
    )  # of training in all runs together; the learning rate then follows the time
    threads: int = 0  # of torch; 0 leaves them alone
    device: str = 'cpu'
    bar: bool = True
    stop_at: int | None = None  # leave after that step as if stopped, for tests


class Stopped(Exception):
    """A stage ended before its last step, with a checkpoint to go on from."""


def model_config(training: Training, data: str | Path) -> DriverConfig:
    """Return the network of a run, fitted to the vocabulary of the data; ValueError when that is missing."""
    tokenizer = Tokenizer.load(Path(data) / annotate.TOKENIZER)
    changes = {one.name: getattr(training.model, one.name) for one in fields(training.model)}
    name = changes.pop('name')
    return modeling_config.preset(name, tokenizer=tokenizer, **changes)


def train(
    name: str,
    training: Training,
    data: str | Path,
    folder: str | Path,
    *,
    before: str | Path | None = None,
    rounds: int = 0,
    limits: Limits | None = None,
    allow_changes: bool = False,
) -> Path:
    """Run the stage `name` to its end and return the folder of its model; at once when that is there already.

    before: the model to begin with, a folder of MoseDriver.save; none = from scratch. rounds: DAgger rounds to learn from.
    Raises Stopped at `limits.stop_at`, and ValueError, naming what differs, when the folder holds something else.
    """
    limits = limits or Limits()
    if limits.threads:
        torch.set_num_threads(limits.threads)
    folder = Path(folder)
    stage = getattr(training, name)
    config = model_config(training, data)
    index = Index.load(data, config, rounds)
    identity = _identity(name, training, config, index, before)
    if (folder / RESULT).is_file():
        result = json.loads((folder / RESULT).read_text(encoding='utf-8'))
        _compare(folder, result['identity'], identity, allow_changes)
        _LOG.info('%s is there already: %s', name, folder)
        return folder / MODEL
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(stage.seed)
    driver = MoseDriver.load(before) if before else MoseDriver(config)
    loop = _Loop(name, stage, training, driver, index, folder, limits, identity)
    loop.resume(allow_changes)
    _LOG.info(
        '%s: %s parameters, %d frames of %d clips, from step %d',
        name,
        driver.count_parameters(),
        len(index),
        len(index.clips),
        loop.step,
    )
    return loop.run()


def _identity(name, training: Training, config: DriverConfig, index: Index, before) -> dict:
    """Return all that decides what a stage makes."""
    known = json.loads((index.root / annotate.DATASET).read_text(encoding='utf-8'))
    scales = [
        known[f'{which}_{end}'] for which in ('action', 'proprio') for end in ('low', 'high')
    ]
    return {
        'stage': name,
        'settings': resolve(getattr(training, name)),
        'model': json.loads(config.to_json()),
        'data': resolve(training.data),
        'clips': len(index.clips),
        'frames': len(index),
        'scales': [round(float(np.sum(scale)), 4) for scale in scales],
        'before': str(Path(before).parent.name) if before else None,
    }


def _compare(folder: Path, old: Mapping, new: Mapping, allow: bool) -> None:
    found = list(differences(old, new))
    if not found:
        return
    text = '; '.join(found[:8]) + (f' and {len(found) - 8} more' if len(found) > 8 else '')
    if not allow:
        raise ValueError(
            f'{folder} was made with other settings or data ({text}); train into another --work, '
            'remove the folder, or keep it with --allow-changes'
        )
    _LOG.warning('%s goes on although it differs: %s', folder, text)


class _Loop:
    """A stage under way."""

    def __init__(self, name, stage: Stage, training, driver, index, folder, limits, identity):
        self.name, self.stage, self.training = name, stage, training
        self.driver, self.index, self.folder = driver.to(limits.device), index, folder
        self.limits, self.identity, self.team = limits, identity, Team.join()
        self.samples = Samples(index, driver.config, training.data)
        self.losses = _with_counts(stage.losses, index, training, driver.config)
        self._freeze()
        self.moving = {n: p for n, p in driver.named_parameters() if p.requires_grad}
        decays = [p for p in self.moving.values() if p.ndim >= 2]
        plain = [p for p in self.moving.values() if p.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [{'params': decays}, {'params': plain, 'weight_decay': 0.0}],
            lr=stage.learning_rate,
            betas=(0.9, stage.beta2),
            weight_decay=stage.weight_decay,
            fused=True,
        )
        self.average = {n: p.detach().clone() for n, p in self.moving.items()}
        self.step, self.seconds = 0, 0.0
        self.window: dict[str, list[float]] = {}  # sums and counts since the last line of the log

    def _freeze(self) -> None:
        if self.stage.trainable == 'all':
            return
        prefixes = tuple(one.strip() for one in self.stage.trainable.split(','))
        for prefix in prefixes:
            if not any(n.startswith(prefix) for n, _ in self.driver.named_parameters()):
                raise ValueError(f'trainable: no parameter begins with {prefix!r}')
        for n, parameter in self.driver.named_parameters():
            parameter.requires_grad_(n.startswith(prefixes))

    def run(self) -> Path:
        """Train to the end and write the model."""
        stage = self.stage
        batches = Order(
            self.index,
            self.training.data,
            seed=stage.seed,
            batch=stage.batch_size,
            start=self.step * stage.accumulate,
            stop=stage.steps * stage.accumulate,
        )
        mine = map(self.team.share, batches)
        loader = load(self.samples, mine, self.training.data.workers)
        saved, begun = time.monotonic(), time.monotonic() - self.seconds
        progress = tqdm(
            total=stage.steps,
            initial=self.step,
            desc=self.name,
            disable=not (self.limits.bar and self.team.leads),
        )
        try:
            while self.step < stage.steps and self.seconds < 60 * self.limits.max_minutes:
                shown = self._train_step(loader, time.monotonic() - begun)
                self.step += 1
                progress.update()
                if self.step % stage.log_every == 0:
                    progress.set_postfix(self._log(shown))
                if self.step % stage.validate_every == 0 or self.step == stage.steps:
                    self._write_metrics({'validation': self.validate()})
                minutes = (time.monotonic() - saved) / 60
                if self.step % stage.checkpoint_every == 0 or minutes > stage.checkpoint_minutes:
                    self.save()
                    saved = time.monotonic()
                if self.step == self.limits.stop_at:
                    self.save()
                    raise Stopped(f'{self.name} stopped after step {self.step}')
        except KeyboardInterrupt:
            self.save()
            _LOG.warning('stopped at step %d; the same command goes on from there', self.step)
            raise
        finally:
            loader.close()
            progress.close()
        return self._finish()

    def _train_step(self, loader: Iterator[Batch], seconds: float) -> dict[str, float]:
        stage = self.stage
        rate = self._set_rate()
        noise = stage.seed * 1_000_003 + self.step  # and times of the flow
        torch.manual_seed(noise + (self.team.rank << 40))
        self.driver.train()
        self.optimizer.zero_grad(set_to_none=True)
        speaks = self.step % stage.text_every == 0
        losses = self.losses if speaks else replace(self.losses, text=0.0)
        for _ in range(stage.accumulate):
            batch = next(loader).to(self.limits.device)
            with self._arithmetic():
                output = self.driver(batch, losses, stage.teacher_forcing)
            (output.loss / stage.accumulate).backward()
            values = {'loss': output.loss, **output.parts, **output.metrics}
            self._remember({name: value.item() for name, value in values.items()})
        self.seconds = self.team.mean_gradients(list(self.moving.values()), seconds)
        norm = torch.nn.utils.clip_grad_norm_(list(self.moving.values()), stage.clip)
        if not torch.isfinite(norm):
            raise FloatingPointError(
                f'{self.name}: the gradient is not finite at step {self.step}; lower the learning rate'
            )
        self.optimizer.step()
        decay = min(stage.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.average.values()), list(self.moving.values()), 1 - decay
            )
        self._remember({'gradient': norm.item()})
        return {'rate': rate}

    @contextlib.contextmanager
    def _arithmetic(self) -> Iterator[None]:
        """Compute in bfloat16 where told to; on a CPU with plain attention, whose backward is a third faster there."""
        device = torch.device(self.limits.device).type
        plain = sdpa_kernel(SDPBackend.MATH) if device == 'cpu' else contextlib.nullcontext()
        with torch.autocast(device, torch.bfloat16, enabled=self.stage.bfloat16), plain:
            yield

    def _set_rate(self) -> float:
        stage = self.stage
        done = max(self.step / stage.steps, self.seconds / (60 * self.limits.max_minutes))
        cosine = stage.floor + (1 - stage.floor) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
        rate = stage.learning_rate * cosine * min(1.0, (self.step + 1) / max(1, stage.warmup))
        for group in self.optimizer.param_groups:
            group['lr'] = rate
        return rate

    def _remember(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            if math.isfinite(value):  # an accuracy is nan where nothing is known
                total = self.window.setdefault(name, [0.0, 0])
                total[0] += value
                total[1] += 1

    def _log(self, shown: Mapping[str, float]) -> dict[str, str]:
        """Write the means since the last line; return the most telling of them."""
        means = {name: total / count for name, (total, count) in self.window.items()}
        self.window = {}
        speed = self.step * self.stage.batch_size * self.stage.accumulate / max(self.seconds, 1e-9)
        self._write_metrics({'train': means, **shown, 'samples_per_second': round(speed, 2)})
        return {name: f'{value:.3f}' for name, value in means.items() if name != 'gradient'}

    def _write_metrics(self, values: Mapping[str, Any]) -> None:
        if not self.team.leads:
            return
        line = {'step': self.step, 'seconds': round(self.seconds, 1), **values}
        with (self.folder / METRICS).open('a', encoding='utf-8') as file:
            file.write(json.dumps(line) + '\n')

    @contextlib.contextmanager
    def averaged(self) -> Iterator[MoseDriver]:
        """Lend the network with the averaged weights, those that are exported."""
        own = {n: p.data for n, p in self.moving.items()}
        for n, p in self.moving.items():
            p.data = self.average[n]
        self.driver.eval()
        try:
            yield self.driver
        finally:
            for n, p in self.moving.items():
                p.data = own[n]

    def validate(self) -> dict[str, float]:
        """Return mean losses, accuracies and the trajectory's error in metres on the validation clips."""
        if not self.team.leads:
            return {}
        keys = validation_keys(
            self.index, self.training.data, self.stage.validate_samples, self.stage.batch_size
        )
        with self.averaged() as driver, torch.no_grad(), torch.random.fork_rng():
            return evaluate(driver, self.samples, keys, self.losses, self.limits.device)

    def save(self) -> None:
        """Write a checkpoint beside the last one, then remove that."""
        if not self.team.leads:
            return
        final = self.folder / f'{CHECKPOINT}{self.step:07d}'
        partial = final.with_name(final.name + '.partial')
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        weights = {n: p.detach().contiguous() for n, p in self.driver.named_parameters()}
        save_file(weights, partial / 'weights.safetensors')
        save_file(self.average, partial / 'average.safetensors')
        torch.save(self.optimizer.state_dict(), partial / 'optimizer.pt')
        state = {'step': self.step, 'seconds': self.seconds, 'window': self.window}
        write_json(partial / STATE, state | {'identity': self.identity})
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        for old in self.folder.glob(f'{CHECKPOINT}*'):
            if old != final:
                shutil.rmtree(old)

    def resume(self, allow_changes: bool) -> None:
        """Go on from the newest checkpoint, if there is one."""
        found = sorted(p for p in self.folder.glob(f'{CHECKPOINT}*') if p.suffix != '.partial')
        if not found:
            if self.team.leads:
                (self.folder / METRICS).unlink(missing_ok=True)
            return
        newest = found[-1]
        state = json.loads((newest / STATE).read_text(encoding='utf-8'))
        _compare(newest, state['identity'], self.identity, allow_changes)
        self.driver.load_state_dict(load_file(newest / 'weights.safetensors'), strict=False)
        average = load_file(newest / 'average.safetensors')
        with torch.no_grad():
            for n, value in self.average.items():
                value.copy_(average[n])
        optimizer = torch.load(newest / 'optimizer.pt', weights_only=True)
        self.optimizer.load_state_dict(optimizer)
        self.step, self.seconds, self.window = state['step'], state['seconds'], state['window']
        if self.team.leads:
            self._forget_metrics()
        self.team.wait()

    def _forget_metrics(self) -> None:
        path = self.folder / METRICS
        lines = path.read_text(encoding='utf-8').splitlines() if path.is_file() else []
        kept = [line for line in lines if json.loads(line)['step'] <= self.step]
        path.write_text(''.join(f'{line}\n' for line in kept), encoding='utf-8')

    def _finish(self) -> Path:
        if self.team.leads:
            self._write_model()
        self.team.wait()
        return self.folder / MODEL

    def _write_model(self) -> None:
        measured = self.validate()
        with self.averaged() as driver:
            driver.save(self.folder / MODEL)
        result = {
            'identity': self.identity,
            'steps': self.step,
            'minutes': round(self.seconds / 60, 2),
            'validation': measured,
        }
        write_json(self.folder / RESULT, result)
        for old in self.folder.glob(f'{CHECKPOINT}*'):
            shutil.rmtree(old)
        _LOG.info('%s: %s', self.name, measured)


def _with_counts(losses: LossWeights, index: Index, training: Training, model) -> LossWeights:
    """Return the loss weights with how often each camera and action skill is drawn."""
    frames = index.split(validation=False, config=training.data)
    chances = index.chances(frames, training.data)

    def counts(labels: np.ndarray, classes: int) -> tuple[int, ...]:
        known = labels >= 0
        shares = np.bincount(labels[known], chances[known], minlength=classes)
        return tuple(int(1e6 * max(share, RAREST)) for share in shares)

    cameras = index.camera_places(model.cameras)[frames]
    return replace(
        losses,
        camera_counts=counts(cameras, len(model.cameras)),
        action_skill_counts=counts(index.action_skill[frames], len(model.action.skills)),
    )


def evaluate(driver: MoseDriver, samples: Samples, keys, losses: LossWeights, device) -> dict:
    """Return the losses without any teacher, and the error of sampled trajectories, over batches of keys."""
    torch.manual_seed(0)
    totals: dict[str, list[float]] = {}

    def add(name: str, value: float, weight: int) -> None:
        if math.isfinite(value):
            total = totals.setdefault(name, [0.0, 0.0])
            total[0] += weight * value
            total[1] += weight

    for batch in load(samples, keys, 0):
        batch = batch.to(device)
        output = driver(batch, losses, 0.0)
        for name, value in {'loss': output.loss, **output.parts, **output.metrics}.items():
            add(name, value.item(), len(batch))
        if losses.flow:
            error = samples.metres(draw_actions(driver, batch)) - samples.metres(batch.action)
            distance = np.hypot(error[..., 0], error[..., 1])
            add('ade_m', float(distance.mean()), len(batch))
            add('fde_m', float(distance[:, -1].mean()), len(batch))
    return {name: round(total / weight, 5) for name, (total, weight) in totals.items()}


def draw_actions(driver: MoseDriver, batch: Batch, num_steps: int = FLOW_STEPS) -> torch.Tensor:
    """Return the normalised trajectories (B, H, 2) that the network draws, from no noise, with its own skills."""
    _, embeds = driver.vlm.see(batch.patches.flatten(0, 1))
    end = int(batch.prompt_lengths.max())
    mask = torch.arange(end, device=embeds.device) < batch.prompt_lengths[:, None]
    words = driver.vlm.embed(
        batch.input_ids[:, :end], embeds.unflatten(0, batch.patches.shape[:2])
    )
    read = driver.vlm(words, batch.position_ids[..., :end], mask.float())
    cache = list(zip(read.keys, read.values, strict=True))

    def velocity(x, t):
        time = torch.full((len(batch), 1), float(t), device=embeds.device)
        return driver.action_expert(x[:, None], time, batch.proprio, cache, mask).velocity[:, 0]

    return flow(velocity, torch.zeros_like(batch.action), num_steps)
