"""The training loop that all stages share: from one checkpoint and a data set to the next checkpoint.

A stage is its settings (`presets.Stage`): which losses count, which parameters move, how fast. A stopped stage goes on with the
same samples, the same noise and the same numbers as if it had not been stopped. Processes, precision, accumulation and
checkpoints are Accelerate's; the loop is ours, because a Trainer's counts epochs of a data set, and this one counts minutes,
draws each batch by its step, leaves out losses in some steps and judges averaged weights.
"""

import contextlib
import json
import logging
import math
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from mose_ros.core.action import flow
from mose_ros.core.prompt import Tokenizer
from mose_ros.modeling import config as modeling_config
from mose_ros.modeling.batch import Batch, LossWeights
from mose_ros.modeling.config import DriverConfig
from mose_ros.modeling.driver import MoseDriver
from mose_ros.modeling.mose import Decoded
from mose_ros.training import annotate, together
from mose_ros.training.batches import Loaded, Order, load, validation_keys
from mose_ros.training.config import Data, differences, filled, resolve, write_json
from mose_ros.training.index import Index
from mose_ros.training.presets import Stage, Training
from mose_ros.training.samples import Samples

_LOG = logging.getLogger(__name__)
MODEL, STATE, RESULT, METRICS = 'model', 'state.json', 'stage.json', 'metrics.jsonl'
AVERAGE = 'average.safetensors'
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
    found = list(differences(_as_now(old), new))
    if not found:
        return
    text = '; '.join(found[:8]) + (f' and {len(found) - 8} more' if len(found) > 8 else '')
    if not allow:
        raise ValueError(
            f'{folder} was made with other settings or data ({text}); train into another --work, '
            'remove the folder, or keep it with --allow-changes'
        )
    _LOG.warning('%s goes on although it differs: %s', folder, text)


def _as_now(identity: Mapping) -> dict:
    """Return an older identity with the fields that settings have got since; their defaults are what was done before."""
    model = DriverConfig.from_json(json.dumps(identity['model']))
    return {
        **identity,
        'settings': filled(identity['settings'], resolve(Stage())),
        'data': filled(identity['data'], resolve(Data())),
        'model': json.loads(model.to_json()),
    }


class _Loop:
    """A stage under way."""

    def __init__(self, name, stage: Stage, training, driver, index, folder, limits, identity):
        self.name, self.stage, self.training = name, stage, training
        self.driver, self.index, self.folder = driver, index, folder
        self.limits, self.identity = limits, identity
        self.accelerator = together.join(
            folder, device=limits.device, bfloat16=stage.bfloat16, accumulate=stage.accumulate
        )
        self.leads, self.device = self.accelerator.is_main_process, self.accelerator.device
        self.samples = Samples(index, driver.config, training.data)
        self.losses = _with_counts(stage, index, training, driver.config)
        driver.train_only(stage.trainable)
        driver.to(self.device)
        self.moving = {n: p for n, p in driver.named_parameters() if p.requires_grad}
        decays = [p for p in self.moving.values() if p.ndim >= 2]
        plain = [p for p in self.moving.values() if p.ndim < 2]
        optimizer = torch.optim.AdamW(
            [{'params': decays}, {'params': plain, 'weight_decay': 0.0}],
            lr=stage.learning_rate,
            betas=(0.9, stage.beta2),
            weight_decay=stage.weight_decay,
            fused=True,
        )
        self.model, self.optimizer = self.accelerator.prepare(driver, optimizer)
        # a checkpoint is the same from however many processes
        self.accelerator.register_save_state_pre_hook(self._save_plain)
        self.accelerator.register_load_state_pre_hook(self._load_plain)
        self.average = {n: p.detach().clone() for n, p in self.moving.items()}
        self.step, self.seconds = 0, 0.0
        self.asked = self.leaving = (
            False  # asked: this process; leaving: all of them, after this step
        )
        self.corrupt: Counter[str] = Counter()  # names of samples that could not be read
        self.window: dict[str, list[float]] = {}  # sums and counts since the last line of the log

    def _save_plain(self, models: list, weights: list, folder: str) -> None:
        weights[:] = [{n: p.detach() for n, p in self.driver.named_parameters()}]

    def _load_plain(self, models: list, folder: str) -> None:
        models[:] = [self.driver]

    def run(self) -> Path:
        """Train to the end and write the model."""
        stage, processes = self.stage, self.accelerator.num_processes
        batches = Order(
            self.index,
            self.training.data,
            seed=stage.seed,
            batch=stage.batch_size,
            start=self.step,
            stop=stage.steps,
            skill_labels=stage.skill_labels,
            view_choice=stage.view_choice,
        )
        parts = stage.accumulate * processes
        mine = together.deal(batches, parts, self.accelerator.process_index, processes)
        loader = load(self.samples, mine, self.training.data.workers)
        begun, saved = time.monotonic() - self.seconds, self.seconds
        board = {'purge_step': self.step + 1}
        self.accelerator.init_trackers('tensorboard', init_kwargs={'tensorboard': board})
        progress = tqdm(
            total=stage.steps,
            initial=self.step,
            desc=self.name,
            disable=not (self.limits.bar and self.leads),
        )
        try:
            with self._asked_to_leave():
                while self.step < stage.steps and self.seconds < 60 * self.limits.max_minutes:
                    shown = self._train_step(loader, time.monotonic() - begun)
                    self.step += 1
                    progress.update()
                    if self.step % stage.log_every == 0:
                        progress.set_postfix(self._log(shown))
                    if self.step % stage.validate_every == 0 or self.step == stage.steps:
                        self._write_metrics({'validation': self.validate()})
                    minutes = (self.seconds - saved) / 60
                    due = minutes > stage.checkpoint_minutes
                    stops = self.leaving or self.step == self.limits.stop_at
                    if due or stops or self.step % stage.checkpoint_every == 0:
                        self.save()
                        saved = self.seconds
                    if self.leaving:
                        _LOG.warning('stopped after step %d; the same command goes on', self.step)
                        raise KeyboardInterrupt
                    if stops:
                        raise Stopped(f'{self.name} stopped after step {self.step}')
        finally:
            loader.close()
            progress.close()
            for tracker in self.accelerator.trackers:
                tracker.finish()
        return self._finish()

    @contextlib.contextmanager
    def _asked_to_leave(self) -> Iterator[None]:
        """Let the first interrupt or termination end the loop after a whole step, with a checkpoint; the second, at once."""

        def ask(number, frame):
            self.asked = True
            signal.signal(number, before[number])

        before = {}
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                before[number] = signal.signal(number, ask)
        except ValueError:
            pass  # not the main thread: signals are not ours
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _train_step(self, loader: Iterator[Loaded], seconds: float) -> dict[str, float]:
        stage = self.stage
        loaded = [next(loader) for _ in range(stage.accumulate)]
        self.corrupt.update(name for one in loaded for name in one.corrupt)
        parts = [one.batch.to(self.device) for one in loaded]
        agreed = together.agree(self.accelerator, parts, seconds, self.asked)
        self.seconds, self.leaving = agreed.seconds, agreed.leaving
        rate = self._set_rate()
        noise = stage.seed * 1_000_003 + self.step  # of what a batch does not bring
        torch.manual_seed(noise + (self.accelerator.process_index << 40))
        self.model.train()
        speaks = self.step % stage.text_every == 0
        losses = self.losses if speaks else replace(self.losses, text=0.0)
        for batch, share in zip(parts, agreed.shares, strict=True):
            with self.accelerator.accumulate(self.model), self._attention():
                output = self.model(batch, together.weigh(losses, share), stage.teacher_forcing)
                self.accelerator.backward(output.loss)
            known = {name: share.get(name, 1.0) * part for name, part in output.parts.items()}
            values = {'loss': output.loss, **known, **output.metrics}
            self._remember({name: value.item() for name, value in values.items()})
        moving = list(self.moving.values())
        norm = self.accelerator.clip_grad_norm_(moving, stage.clip)
        if not torch.isfinite(norm):
            raise FloatingPointError(
                f'{self.name}: the gradient is not finite at step {self.step}; lower the learning rate'
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        decay = min(stage.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.values()), moving, 1 - decay)
        self._remember({'gradient': norm.item()})
        return {'rate': rate}

    def _attention(self) -> contextlib.AbstractContextManager:
        """Attend plainly on a CPU, where the backward of that is a third faster in bfloat16."""
        plain = self.device.type == 'cpu'
        return sdpa_kernel(SDPBackend.MATH) if plain else contextlib.nullcontext()

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
        self._gather()
        means = {name: total / count for name, (total, count) in self.window.items()}
        self.window = {}
        speed = self.step * self.stage.batch_size / max(self.seconds, 1e-9)
        self._write_metrics({'train': means, **shown, 'samples_per_second': round(speed, 2)})
        return {name: f'{value:.3f}' for name, value in means.items() if name != 'gradient'}

    def _gather(self) -> None:
        """Bring what all processes remember to the leader."""
        told = gather_object([(self.window, self.corrupt)])
        self.window, self.corrupt = {}, Counter()
        for window, corrupt in told if self.leads else []:
            self.corrupt += corrupt
            for name, (value, count) in window.items():
                total = self.window.setdefault(name, [0.0, 0])
                total[0] += value
                total[1] += count

    def _write_metrics(self, values: Mapping[str, Any]) -> None:
        if not self.leads:
            return
        line = {'step': self.step, 'seconds': round(self.seconds, 1), **values}
        with (self.folder / METRICS).open('a', encoding='utf-8') as file:
            file.write(json.dumps(line) + '\n')
        self.accelerator.log(dict(_flat(line)), step=self.step)

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
        if not self.leads:
            return {}
        keys = validation_keys(
            self.index, self.training.data, self.stage.validate_samples, self.stage.batch_size
        )
        with self.averaged() as driver, torch.no_grad(), torch.random.fork_rng():
            return evaluate(driver, self.samples, self._whole(keys), self.losses, self.device)

    def _whole(self, keys) -> Iterator[Batch]:
        for loaded in load(self.samples, keys, 0):
            self.corrupt.update(loaded.corrupt)
            yield loaded.batch

    def save(self) -> None:
        """Write a checkpoint beside the last one, then remove that."""
        final = self.folder / f'{CHECKPOINT}{self.step:07d}'
        partial = final.with_name(final.name + '.partial')
        if self.leads:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self._gather()
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(partial))
        self.accelerator.wait_for_everyone()
        if self.leads:
            save_file(self.average, partial / AVERAGE)
            state = {'step': self.step, 'seconds': self.seconds, 'window': self.window}
            state |= {'corrupt': self.corrupt, 'identity': self.identity}
            write_json(partial / STATE, state)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial, final)
            for old in self.folder.glob(f'{CHECKPOINT}*'):
                if old != final:
                    shutil.rmtree(old)

    def resume(self, allow_changes: bool) -> None:
        """Go on from the newest checkpoint, if there is one."""
        found = sorted(p for p in self.folder.glob(f'{CHECKPOINT}*') if p.suffix != '.partial')
        if found:
            newest = found[-1]
            state = json.loads((newest / STATE).read_text(encoding='utf-8'))
            _compare(newest, state['identity'], self.identity, allow_changes)
            self.accelerator.load_state(str(newest))
            average = load_file(newest / AVERAGE)
            with torch.no_grad():
                for n, value in self.average.items():
                    value.copy_(average[n])
            self.step, self.seconds = state['step'], state['seconds']
            if self.leads:
                self.window, self.corrupt = state['window'], Counter(state['corrupt'])
        if self.leads:
            self._forget_metrics()
        self.accelerator.wait_for_everyone()

    def _forget_metrics(self) -> None:
        path = self.folder / METRICS
        lines = path.read_text(encoding='utf-8').splitlines() if path.is_file() else []
        kept = [line for line in lines if json.loads(line)['step'] <= self.step]
        path.write_text(''.join(f'{line}\n' for line in kept), encoding='utf-8')

    def _finish(self) -> Path:
        self._gather()
        if self.leads:
            self._write_model()
        self.accelerator.wait_for_everyone()
        return self.folder / MODEL

    def _write_model(self) -> None:
        measured, corrupt = self.validate(), self.corrupt + Counter(self.index.broken)
        if corrupt:
            _LOG.warning(
                '%s skipped %d samples that cannot be read: %s',
                self.name,
                corrupt.total(),
                ', '.join(sorted(corrupt)),
            )
        with self.averaged() as driver:
            driver.save(self.folder / MODEL)
        result = {
            'identity': self.identity,
            'steps': self.step,
            'minutes': round(self.seconds / 60, 2),
            'validation': measured,
            'corrupt': {'count': corrupt.total(), 'samples': dict(sorted(corrupt.items()))},
        }
        write_json(self.folder / RESULT, result)
        for old in self.folder.glob(f'{CHECKPOINT}*'):
            shutil.rmtree(old)
        _LOG.info('%s: %s', self.name, measured)


def _flat(values: Mapping[str, Any], path: str = '') -> Iterator[tuple[str, float]]:
    """Yield the numbers of nested values, named `train/loss`."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f'{path}{name}/')
        else:
            yield f'{path}{name}', value


def _with_counts(stage: Stage, index: Index, training: Training, model) -> LossWeights:
    """Return the loss weights with how often each camera and action skill is drawn."""
    frames, chances = index.drawn(training.data, stage.skill_labels, stage.seed)

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


def evaluate(
    driver: MoseDriver, samples: Samples, batches: Iterable[Batch], losses: LossWeights, device
) -> dict:
    """Return the losses without any teacher, and the error of sampled trajectories, over batches."""
    torch.manual_seed(0)
    totals: dict[str, list[float]] = {}

    def add(name: str, value: float, weight: int) -> None:
        if math.isfinite(value):
            total = totals.setdefault(name, [0.0, 0.0])
            total[0] += weight * value
            total[1] += weight

    for batch in batches:
        batch = batch.to(device)
        output = MoseDriver.forward(driver, batch, losses, 0.0)  # without Accelerate's autocast
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
    _, cache, mask = read_prompt(driver, batch)

    def velocity(x, t):
        time = torch.full((len(batch), 1), float(t), device=mask.device)
        return driver.action_expert(x[:, None], time, batch.proprio, cache, mask).velocity[:, 0]

    return flow(velocity, torch.zeros_like(batch.action), num_steps)


def read_prompt(
    driver: MoseDriver, batch: Batch
) -> tuple[Decoded, list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
    """Read the prompts of a batch with the network's own skills; return that, and what the action expert sees of it."""
    _, embeds = driver.vlm.see(batch.patches.flatten(0, 1))
    end = int(batch.prompt_lengths.max())
    mask = torch.arange(end, device=embeds.device) < batch.prompt_lengths[:, None]
    embeds = embeds.unflatten(0, batch.patches.shape[:2])
    read = driver.vlm.read(
        batch.input_ids[:, :end], embeds, batch.position_ids[..., :end], mask.float()
    )
    return read, list(zip(read.keys, read.values, strict=True)), mask
