"""The training loop that all stages share.

A stopped stage goes on with the same samples, the same noise and the same numbers as if it had not been stopped. Processes,
precision and accumulation are Accelerate's; the loop is ours, because a Trainer's counts epochs of a data set, and this one
counts minutes, draws each batch by its step, leaves out losses in some steps and judges averaged weights.
"""

import contextlib
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from mose_ros.modeling.batch import Batch, LossWeights
from mose_ros.modeling.driver import MoseDriver
from mose_ros.training import checkpoints, sharding, together
from mose_ros.training.batches import Loaded, Order, load, validation_keys
from mose_ros.training.index import Index
from mose_ros.training.journal import Journal
from mose_ros.training.presets import Stage, Training
from mose_ros.training.samples import Samples
from mose_ros.training.validation import evaluate

_LOG = logging.getLogger(__name__)
SAME_SECONDS = 2.0  # interrupts that follow one another this quickly are one


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


class _Leaving(Exception):
    """A validation was left because the process is to leave."""


@contextlib.contextmanager
def _asked_to_leave(ask: Callable[[], None]) -> Iterator[None]:
    """Call `ask` at an interrupt or a termination instead of ending; an interrupt that comes later again ends at once.

    Launchers hand on what the terminal or `timeout` has already sent to all, and torchrun terminates a second time when it is
    told so a second time: none of that is impatience, for which there is also SIGKILL.
    """
    asked = math.inf

    def handle(number, frame):
        nonlocal asked
        now = time.monotonic()
        if number == signal.SIGINT and now > asked + SAME_SECONDS:
            raise KeyboardInterrupt
        asked = min(asked, now)
        ask()

    before = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, handle)
    except ValueError:
        pass  # not the main thread: signals are not ours
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Loop:
    """A stage under way."""

    def __init__(
        self,
        name: str,
        training: Training,
        driver: MoseDriver,
        index: Index,
        losses: LossWeights,
        folder: Path,
        limits: Limits,
        tokenizer: Path,
    ):
        self.name, self.training, self.index, self.losses = name, training, index, losses
        self.stage: Stage = getattr(training, name)
        self.folder, self.limits, self.tokenizer = folder, limits, tokenizer
        self.accelerator = together.join(
            folder,
            device=limits.device,
            bfloat16=self.stage.bfloat16,
            accumulate=self.stage.accumulate,
        )
        self.leads, self.device = self.accelerator.is_main_process, self.accelerator.device
        self.samples = Samples(index, driver.config, training.data, tokenizer)
        self.learner = sharding.learner(driver, self.stage, self.accelerator)
        self.journal = Journal(folder, self.accelerator)
        self.step, self.seconds = 0, 0.0
        self.validated = 0  # the last step that was judged
        self.asked = False  # this process to leave; all do so before the next step

    def run(self, identity: Mapping[str, Any]) -> None:
        """Train to the end; `identity` goes into the checkpoints."""
        stage = self.stage
        loader = self._loader()
        begun, saved = time.monotonic() - self.seconds, self.seconds
        self.journal.open(self.step)
        progress = tqdm(
            total=stage.steps,
            initial=self.step,
            desc=self.name,
            disable=not (self.limits.bar and self.leads),
        )
        try:
            with _asked_to_leave(self._ask):
                self._validate_if_due()  # again, where a stop came in between
                while self.step < stage.steps and self.seconds < 60 * self.limits.max_minutes:
                    shown = self._train_step(loader, time.monotonic() - begun)
                    if shown is None:
                        self._save(identity)
                        _LOG.warning('stopped after step %d; the same command goes on', self.step)
                        raise KeyboardInterrupt
                    self.step += 1
                    progress.update()
                    if self.step % stage.log_every == 0:
                        progress.set_postfix(self._log(shown))
                    self._validate_if_due()
                    minutes = (self.seconds - saved) / 60
                    due = minutes > stage.checkpoint_minutes
                    stops = self.step == self.limits.stop_at
                    if due or stops or self.step % stage.checkpoint_every == 0:
                        self._save(identity)
                        saved = self.seconds
                    if stops:
                        raise Stopped(f'{self.name} stopped after step {self.step}')
        finally:
            loader.close()
            progress.close()
            self.journal.close()
        self.asked = False  # what is left is the end
        self.journal.gather()

    def _loader(self) -> Iterator[Loaded]:
        """Return this process' parts of all batches that are left."""
        stage, processes = self.stage, self.accelerator.num_processes
        batches = Order(
            self.index,
            self.training.data,
            stage=self.name,
            seed=stage.seed,
            batch=stage.batch_size,
            start=self.step,
            stop=stage.steps,
            skill_labels=stage.skill_labels,
            view_choice=stage.view_choice,
        )
        parts = stage.accumulate * processes
        mine = together.deal(batches, parts, self.accelerator.process_index, processes)
        return load(self.samples, mine, self.training.data.workers)

    def _ask(self) -> None:
        self.asked = True

    def _train_step(self, loader: Iterator[Loaded], seconds: float) -> dict[str, float] | None:
        """Learn from a batch and return what to show of it; None, and nothing is learned, where a process is to leave."""
        stage = self.stage
        loaded = [next(loader) for _ in range(stage.accumulate)]
        parts = [one.batch.to(self.device) for one in loaded]
        agreed = together.agree(self.accelerator, parts, seconds, self.asked)
        if agreed.leaving:
            return None
        self.seconds = agreed.seconds
        self.journal.corrupt.update(name for one in loaded for name in one.corrupt)
        noise = stage.seed * 1_000_003 + self.step  # of what a batch does not bring
        torch.manual_seed(noise + (self.accelerator.process_index << 40))
        self.learner.model.train()
        speaks = self.step % stage.text_every == 0
        losses = self.losses if speaks else replace(self.losses, text=0.0)
        for batch, share in zip(parts, agreed.shares, strict=True):
            weighed = together.weigh(losses, share)
            with self._attention():
                output = self.learner.learn(batch, weighed, stage.teacher_forcing)
            known = {name: share.get(name, 1.0) * part for name, part in output.parts.items()}
            values = {'loss': output.loss, **known, **output.metrics}
            self.journal.remember({name: value.item() for name, value in values.items()})
        rate = self._rate()
        norm = self.learner.move(rate, self.step)
        if not math.isfinite(norm):
            raise FloatingPointError(
                f'{self.name}: the gradient is not finite at step {self.step}; lower the learning rate'
            )
        self.journal.remember({'gradient': norm})
        return {'rate': rate}

    def _attention(self) -> contextlib.AbstractContextManager:
        """Attend plainly on a CPU, where the backward of that is a third faster in bfloat16."""
        plain = self.device.type == 'cpu'
        return sdpa_kernel(SDPBackend.MATH) if plain else contextlib.nullcontext()

    def _rate(self) -> float:
        """Return the learning rate of this step: a warm-up, then a cosine over the steps or over the time."""
        stage = self.stage
        done = max(self.step / stage.steps, self.seconds / (60 * self.limits.max_minutes))
        cosine = stage.floor + (1 - stage.floor) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
        return stage.learning_rate * cosine * min(1.0, (self.step + 1) / max(1, stage.warmup))

    def _log(self, shown: Mapping[str, float]) -> dict[str, str]:
        """Write the means since the last line; return the most telling of them."""
        means = self.journal.means()
        speed = self.step * self.stage.batch_size / max(self.seconds, 1e-9)
        line = {'train': means, **shown, 'samples_per_second': round(speed, 2)}
        self.journal.write(self.step, self.seconds, line)
        return {name: f'{value:.3f}' for name, value in means.items() if name != 'gradient'}

    def _validate_if_due(self) -> None:
        """Judge and tell, where this step is one for that; a process that is to leave has no time for it."""
        due = self.step % self.stage.validate_every == 0 or self.step == self.stage.steps
        if not due or self.validated == self.step:
            return
        try:
            self.journal.write(self.step, self.seconds, {'validation': self.validate()})
            self.validated = self.step
        except _Leaving:
            _LOG.warning('left the validation after step %d for later', self.step)

    def validate(self) -> dict[str, float]:
        """Return mean losses, accuracies and the trajectory's error in metres on the validation clips."""
        if not (self.leads or self.learner.judges_together):
            return {}
        keys = validation_keys(
            self.index, self.training.data, self.stage.validate_samples, self.stage.batch_size
        )
        with self.learner.averaged(), torch.no_grad(), torch.random.fork_rng():
            judged = partial(self.learner.judge, losses=self.losses)
            return evaluate(judged, self.samples, self._whole(keys))

    def _whole(self, keys) -> Iterator[Batch]:
        for loaded in load(self.samples, keys, 0):
            leaves = self.asked
            if self.learner.judges_together:
                leaves = together.anyone(self.accelerator, leaves)
            if leaves:
                raise _Leaving
            if self.leads:  # the others, if they judge, judge the same
                self.journal.corrupt.update(loaded.corrupt)
            yield loaded.batch.to(self.device)

    def _save(self, identity: Mapping[str, Any]) -> None:
        self.journal.gather()
        state = {'seconds': self.seconds, 'validated': self.validated, 'identity': identity}
        state |= self.journal.state()
        checkpoints.save(self.folder, self.step, self.learner, state, self.accelerator)

    def resume(self, checkpoint: Path | None) -> None:
        """Go on from a checkpoint, or begin where there is none."""
        if checkpoint is not None:
            state = checkpoints.read_state(checkpoint)
            self.learner.load(checkpoint)
            self.step, self.seconds = state['step'], state['seconds']
            self.validated = state.get('validated', self.step)  # an older one does not say
            if self.leads:
                self.journal.restore(state)
        if self.leads:
            self.journal.forget(self.step)
        self.accelerator.wait_for_everyone()
