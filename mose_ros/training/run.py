"""A training run in its folder: the verbs of the command line that make one, each going on where it was stopped."""

import argparse
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from mose_ros.core.files import write_json
from mose_ros.core.provenance import commit
from mose_ros.data import storage
from mose_ros.data.cache import Cache
from mose_ros.data.storage import Anywhere
from mose_ros.training import (
    annotate,
    collect,
    presets,
    skill_labels,
    skill_report,
    stages,
)
from mose_ros.training.config import override
from mose_ros.training.fit import Fit
from mose_ros.training.presets import STAGES, Training

_LOG = logging.getLogger(__name__)
STORAGE = {'fp32': 'float32', 'fp16': 'float16'}
PRECISIONS = {**STORAGE, 'int8': 'int8', 'int4': 'int4'}


def from_options(options) -> Training:
    """Return the preset with the changes of the command line; ValueError names what is unknown."""
    if options.policy:
        options.round = options.round or 1
    of_run = options.settings
    if options.verb == 'annotate':
        of_run = [one for one in of_run if not one.startswith(skill_labels.SETTINGS)]
    training = override(presets.preset(options.preset).of_round(options.round), of_run)
    changes = {}
    if options.families and options.families != 'all':
        changes['families'] = tuple(options.families.split(','))
    for name in ('seeds', 'processes'):
        if getattr(options, name) is not None:
            changes[name] = getattr(options, name)
    if options.policy:
        changes['policy'] = options.policy
    changes['round'] = options.round
    collecting = replace(training.collect, **changes)
    return replace(training, collect=collecting, asked=(*training.asked, *of_run))


def open_data(data: Path | str, options, training: Training) -> Anywhere:
    """Return the place that data is read from."""
    cache = Cache(options.cache, int(options.cache_gb * 1e9))
    found = storage.place(data, cache)
    storage.check_room(found, cache, training.data.shards_at_once)
    return found


class Run:
    """A training run in its folder."""

    def __init__(self, training: Training, options):
        self.training, self.options = training, options
        self.work = options.work or Path('runs') / training.preset
        self.data = (
            options.data or (options.verb == 'collect' and options.out) or self.work / 'data'
        )
        self.bar = not options.quiet
        self.round = options.round
        self.labelling = skill_labels.from_options(options) if options.verb == 'annotate' else None
        if options.verb == 'all':
            self._before(STAGES[0], None)  # rather than after hours of recording
        if self.labelling is not None and options.address:
            raise ValueError('--address is for annotate without --source and --annotator')

    def collect(self) -> None:
        """Record what is not recorded yet."""
        found = collect.collect(
            self.training.collect, self.data, address=self.options.address, bar=self.bar
        )
        for family, counts in found.items():
            _LOG.info('%s: %s', family, counts)

    def annotate(self) -> None:
        """Label what is not labelled yet."""
        if self.labelling is not None:
            self._label_skills(self.labelling)
            return
        model = self.training.model.action
        target = annotate.Target(horizon=model.horizon, dt=model.dt, data=self.training.data)
        found = annotate.annotate(
            self.data,
            target,
            processes=self.training.collect.processes,
            address=self.options.address,
            bar=self.bar,
        )
        _LOG.info(
            '%d frames of %d clips, %d skipped; %s',
            found['frames'],
            found['clips'],
            len(found['skipped']),
            found['counts'],
        )

    def _label_skills(self, labelling: skill_labels.Labelling) -> None:
        folder = self.work / 'skills'
        out = self.options.out or folder / f'{labelling.source}-{labelling.annotator}'
        data = self.data
        if labelling.source == 'clips':
            data = open_data(data, self.options, self.training)
        elif storage.is_url(data):
            raise ValueError(f'{labelling.source} is read from a local folder, not from {data}')
        found = skill_labels.run(labelling, data, out, folder / 'cache', bar=self.bar)
        _LOG.info('%s\n%s', out, skill_report.describe(found))

    def router(self) -> None:
        """Train the routers; from scratch, the eyes with them."""
        self._stage('router', None, self.options.labels)

    def sft(self) -> None:
        """Train the language."""
        self._stage('sft', self.work / 'router' / stages.MODEL)

    def action(self) -> None:
        """Train the action expert, everything else going on; after a DAgger round, again."""
        name = 'sft' if self.round == 0 else _round_folder(self.round - 1)
        self._stage('action', self.work / name / stages.MODEL)

    def _stage(self, name: str, before: Path | None, labels: Path | None = None) -> None:
        options, before = self.options, self._before(name, before)
        folder = self.work / (_round_folder(self.round) if name == 'action' else name)
        stages.train(
            name,
            self.training,
            open_data(self.data, options, self.training),
            folder,
            before=before,
            labels=labels,
            rounds=self.round,
            limits=stages.Limits(
                max_minutes=_minutes_of(name, options.max_minutes),
                threads=options.threads,
                device=options.device,
                bar=self.bar,
            ),
            allow_changes=options.allow_changes,
        )

    def _before(self, name: str, last: Path | None) -> Path | None:
        """Return the model that a stage begins with: --before, that of the last stage, or none; ValueError where it can't begin."""
        asked, preset = self.options.before, self.training.preset
        before = (asked if self.options.verb == name or last is None else None) or last
        trains = getattr(self.training, name).trainable
        if before is None and trains != 'all':
            raise ValueError(
                f'{name} of {preset} moves {trains} of a network that is there: name that by --before, '
                'as `convert HF_DIR --out DIR` makes it'
            )
        if before is None:
            return None
        if not before.is_dir():
            raise ValueError(
                f'{before} is missing; run the stage before {name} first, or name by --before the model to begin with'
            )
        if trains == 'routers' and stages.config_of(before, self.training).mose.routing != 'skill':
            raise ValueError(
                f'{name} of {preset} moves skill routers alone, of which {before} has none; '
                f'it needs no such stage: go on with `sft --before {before}`'
            )
        return before

    def export(self) -> None:
        """Write the bundle of the newest model, or of --checkpoint, proven against PyTorch."""
        from mose_ros.training import export, parity

        options = self.options
        out = options.out or self.work / 'bundle'
        checkpoint = options.checkpoint or self.work / _round_folder(self.round) / stages.MODEL
        if not checkpoint.is_dir():
            raise ValueError(
                f'{checkpoint} is missing; train it first, or name a model with --checkpoint'
            )
        asked = export.Asked(
            checkpoint=checkpoint,
            out=out,
            name=options.name or (out.name if options.out else f'mose-{self.training.preset}'),
            precision=PRECISIONS[options.precision],
            storage=PRECISIONS[options.storage or options.precision],
            num_steps=options.flow_steps,
            commit=commit(),
            views=self.training.data if options.settings else None,
            **self._at_hand(),
        )
        found = None
        try:
            found = export.export_checkpoint(asked).parity
        except parity.ParityError as error:
            found = error.found
            raise
        finally:
            if options.json and found:
                write_json(options.json, {'precision': options.precision, 'parity': dict(found)})
        _LOG.info('%s: %s', out, dict(found))

    def _at_hand(self) -> dict[str, Any]:
        """Return what an export finds in the data: fit and tokenizer for a checkpoint without, clips for parity."""
        if not storage.is_url(self.data) and not self.data.is_dir():
            if self.options.data:
                raise ValueError(
                    f'{self.data} is no folder; leave --data out, or name that of the clips'
                )
            return {}
        data = open_data(self.data, self.options, self.training)
        found: dict[str, Any] = {'clips': data} if isinstance(data, Path) else {}
        if (data / annotate.DATASET).is_file():
            found['fit'] = Fit.to_data(data, self.training)
        if (data / annotate.TOKENIZER).is_file():
            found['tokenizer'] = storage.local_file(data / annotate.TOKENIZER)
        return found

    def dagger(self) -> None:
        """Let the bundle drive, label what it met, train on, export; as many rounds as asked for."""
        rounds = self.options.dagger_rounds
        for number in range(1, 1 + (len(self.training.rounds) if rounds is None else rounds)):
            bundle = self.options.out or self.work / 'bundle'
            asked = argparse.Namespace(
                **{**vars(self.options), 'round': number, 'policy': str(bundle)}
            )
            self.round, self.training = number, from_options(asked)
            for verb in ('collect', 'annotate', 'action', 'export'):
                getattr(self, verb)()


def _minutes_of(stage: str, text: str) -> float:
    """Return a stage's budget from `30` or `router=10,action=40`; unlimited where it is not named."""
    try:
        if '=' not in text:
            return float(text) if text else math.inf
        budgets = dict(part.split('=') for part in text.split(','))
        if not set(budgets) <= set(STAGES):
            raise ValueError
        return float(budgets.get(stage, math.inf))
    except ValueError:
        raise ValueError(
            f'--max-minutes {text!r}: expected minutes, or {"=M,".join(STAGES)}=M'
        ) from None


def _round_folder(number: int) -> str:
    return 'action' if number == 0 else f'action-r{number}'
