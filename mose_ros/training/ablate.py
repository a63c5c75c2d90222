"""Tables that compare networks: the same data, the same steps, one thing different.

A cell is one training and one judgement; it is made by plain commands of `mose_ros.training` and `mose_ros.evaluation`,
which stand in its log and in the table's JSON, so that anyone can type one again. What is done is kept: the same command
goes on where it was stopped.
"""

import json
import logging
import math
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mose_ros.core.files import write_json, write_text
from mose_ros.data import storage
from mose_ros.training import plan_times, presets
from mose_ros.training.config import override
from mose_ros.training.plan_times import PlanTimes

_LOG = logging.getLogger(__name__)
LOG, RESULT, BUNDLE = 'log.txt', 'result.json', 'bundle'
ROUTES = '20000-20004'  # seeds that are driven in closed loop
TIMED = 'plan_ms'  # a figure that is taken of all cells together
TAIL = 1500  # characters of a log that an error shows


@dataclass(frozen=True, kw_only=True)
class Table:
    """What a table compares, and how a cell is made and judged."""

    rows: Mapping[str, str]  # what is printed -> variants of the preset, as `+moe_41`
    stages: Sequence[str]
    shares: Sequence[float]  # of the training clips
    seeds: Sequence[int]
    figures: Sequence[str]  # what is printed, of the figures that a cell gives


TABLES = {
    'language': Table(
        rows={
            'SFT': '+sft',
            'MoE 4/1': '+moe_41',
            'MoE 8/1': '+moe_81',
            'MoSE': '',
            'MoSE, expert groups': '+groups',
        },
        stages=('router', 'sft'),
        shares=(0.25, 0.5, 1.0),
        seeds=(0, 1, 2),
        figures=('perception', 'prediction', 'planning', 'mean'),
    ),
    'driving': Table(
        rows={
            'Drive-pi0 (front only)': '+drive_pi0',
            'front only': '+front_only',
            'all six views, plain action': '+all_views+plain_action',
            'all six views': '+all_views',
            'three fixed views, plain action': '+three_views+plain_action',
            'three fixed views': '+three_views',
            'routed views, plain action': '+plain_action',
            'routed views (MoSE)': '',
        },
        stages=('router', 'sft', 'action'),
        shares=(1.0,),
        seeds=(0, 1, 2),
        figures=('success_rate', 'driving_score', TIMED),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training and what it is judged by."""

    row: str
    share: float
    seed: int
    folder: Path
    commands: Sequence[Sequence[str]]  # each after `python -m`

    @property
    def lines(self) -> list[str]:
        """Return the commands as they would be typed."""
        return [f'python -m {shlex.join(one)}' for one in self.commands]

    def result(self) -> dict[str, Any] | None:
        """Return what these very commands gave, or None where they are not all done."""
        path = self.folder / RESULT
        found = json.loads(path.read_text(encoding='utf-8')) if path.is_file() else {}
        return found if found.get('commands') == self.lines else None


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """A table to be made.

    settings: of all cells. collects: whether the preset's clips are recorded and labelled first. routes: seeds that are driven
    in closed loop. frames: of the judgement of language, from clips that the expert drives for it alone. only: the rows to make;
    all by default.
    """

    table: str
    preset: str
    work: Path
    data: Path | str
    shares: Sequence[float] = ()
    seeds: Sequence[int] = ()
    settings: Sequence[str] = ()
    only: Sequence[str] = ()
    families: str = 'all'
    routes: str = ROUTES
    held_seeds: str = '19900-19903'  # of the clips that language is judged on
    frames: int = 420
    processes: int = 1  # cells at once, of one thread each
    collects: bool = False
    bar: bool = True
    known: Table = field(init=False)

    def __post_init__(self):
        if self.table not in TABLES:
            raise ValueError(f'no table {self.table!r}; choose of {", ".join(TABLES)}')
        object.__setattr__(self, 'known', TABLES[self.table])
        unknown = sorted(set(self.only) - set(self.known.rows))
        if unknown:
            raise ValueError(f'no row {unknown}; choose of {", ".join(self.known.rows)}')
        if not all(0 < share <= 1 for share in self.shares):
            raise ValueError(f'shares are above 0 and at most 1, not {list(self.shares)}')
        first = override(presets.preset(self.preset), self.settings).router
        if first.trainable != 'all':
            raise ValueError(
                f'a table trains each network from nothing, and {self.preset} moves {first.trainable} of one that is there; '
                'make each row by hand: `convert HF_DIR --out DIR --set ...`, then the stages with --before DIR'
            )
        if self.processes < 1:
            raise ValueError(f'{self.processes} processes train nothing; use 1 or more')

    @property
    def folder(self) -> Path:
        """Return where the table's cells lie."""
        return self.work / self.table

    @property
    def held(self) -> Path:
        """Return the folder of the clips that language is judged on."""
        return self.work / 'held'

    def cells(self) -> list[Cell]:
        """Return all cells; the whole table with the first seed comes before the second."""
        return [
            self._cell(row, share, seed)
            for seed in self.seeds or self.known.seeds
            for share in self.shares or self.known.shares
            for row in self.only or self.known.rows
        ]

    def _cell(self, row: str, share: float, seed: int) -> Cell:
        variants = self.known.rows[row]
        name = f'{variants.strip("+") or "mose"}-{round(100 * share):03d}-s{seed}'
        folder = self.folder / name
        common = ['--preset', self.preset + variants, '--work', str(folder)]
        common += ['--data', str(self.data), '--quiet']
        changes = [f'data.share={share:g}', *(f'{one}.seed={seed}' for one in self.known.stages)]
        for change in (*self.settings, *changes):
            common += ['--set', change]
        last, bundle = self.known.stages[-1], str(folder / BUNDLE)
        train = 'mose_ros.training'
        return Cell(
            row=row,
            share=share,
            seed=seed,
            folder=folder,
            commands=[
                *([train, stage, *common] for stage in self.known.stages),
                [train, 'export', *common, '--checkpoint', str(folder / last / 'model')],
                ['mose_ros.evaluation', *self._judgement(bundle, folder)],
            ],
        )

    def _judgement(self, bundle: str, folder: Path) -> list[str]:
        judged = ['--families', self.families, '--json', str(folder / f'{self.table}.json')]
        if self.table == 'language':
            clips = ['--clips', str(self.held), '--frames', str(self.frames)]
            return ['language', bundle, *clips, *judged]
        driven = ['--seeds', self.routes, '--policies', 'bundle']
        return ['closed-loop', bundle, *driven, *judged]


def ablate(ablation: Ablation) -> Path:
    """Make what is not made yet, write the table as JSON, Markdown and a picture, and return the JSON's path.

    ValueError when a command fails, with the end of its log; what is done then stays.
    """
    cells = ablation.cells()
    ablation.folder.mkdir(parents=True, exist_ok=True)
    if ablation.collects:
        _record_data(ablation)
    if ablation.table == 'language':
        _record_held(ablation)
    missing = [cell for cell in cells if cell.result() is None]
    _LOG.info('%d of %d cells are made', len(cells) - len(missing), len(cells))
    total = sum(len(cell.commands) for cell in missing)
    progress = tqdm(total=total, desc=ablation.table, unit='command', disable=not ablation.bar)
    with progress, ThreadPoolExecutor(ablation.processes) as pool:
        futures = [pool.submit(_make, ablation, cell, progress) for cell in missing]
        try:
            for future in as_completed(futures):
                future.result()
                write(ablation, cells)
        finally:
            for future in futures:
                future.cancel()
    return write(ablation, cells, _times(ablation, cells))


def _times(ablation: Ablation, cells: Sequence[Cell]) -> PlanTimes | None:
    """Time the bundles of all cells that are made, whenever they were, where the table asks for it."""
    bundles = {
        cell.folder.name: cell.folder / BUNDLE for cell in cells if cell.result() is not None
    }
    if TIMED not in ablation.known.figures or not bundles:
        return None
    return plan_times.measure(bundles, ablation.data)


def _record_data(ablation: Ablation) -> None:
    common = ['--preset', ablation.preset, '--data', str(ablation.data), '--quiet']
    common += ['--processes', str(ablation.processes)]
    for change in ablation.settings:
        common += ['--set', change]
    for verb in (['collect', '--families', ablation.families], ['annotate']):
        _run(['mose_ros.training', *verb, *common], ablation.work / LOG, alone=True)


def _record_held(ablation: Ablation) -> None:
    known = set(storage.names(storage.place(ablation.data)))
    collect = ['mose_ros.training', 'collect', '--preset', ablation.preset, '--quiet']
    collect += ['--out', str(ablation.held), '--set', 'collect.disturbed_share=0']
    collect += ['--seeds', ablation.held_seeds, '--families', ablation.families]
    ablation.held.mkdir(parents=True, exist_ok=True)
    _run(collect, ablation.held / LOG, alone=True)
    both = sorted(
        known & {path.parent.parent.name for path in ablation.held.glob('*/anno/00000*')}
    )
    if both:
        raise ValueError(
            f'{ablation.data} holds {both[0]}, which the networks are judged on; train without seeds {ablation.held_seeds}'
        )


def _make(ablation: Ablation, cell: Cell, progress: tqdm) -> None:
    cell.folder.mkdir(parents=True, exist_ok=True)
    for command in cell.commands:
        _run(command, cell.folder / LOG, alone=ablation.processes == 1)
        progress.update()
    write_json(cell.folder / RESULT, figures(ablation, cell))


def _run(command: Sequence[str], log: Path, alone: bool) -> None:
    """Run a command with its words in the log; ValueError with the log's end when it fails."""
    words = [sys.executable, '-m', *command]
    environment = os.environ if alone else {**os.environ, 'OMP_NUM_THREADS': '1'}
    with log.open('a', encoding='utf-8') as file:
        file.write(f'$ {shlex.join(words)}\n')
        file.flush()
        status = subprocess.run(words, stdout=file, stderr=file, env=environment).returncode
    if status in (130, -2):
        raise KeyboardInterrupt
    if status:
        end = log.read_text(encoding='utf-8')[-TAIL:]
        raise ValueError(
            f'{shlex.join(command[:2])} failed with {status}; the end of {log}:\n{end}'
        )


# ---- the figures ----


def figures(ablation: Ablation, cell: Cell) -> dict[str, Any]:
    """Return what a made cell shows."""
    judged = json.loads((cell.folder / f'{ablation.table}.json').read_text(encoding='utf-8'))
    stages = {}
    for stage in ablation.known.stages:
        made = json.loads((cell.folder / stage / 'stage.json').read_text(encoding='utf-8'))
        stages[stage] = {'steps': made['steps'], 'minutes': made['minutes']}
    read = _of_language if ablation.table == 'language' else _of_driving
    return {
        'row': cell.row,
        'share': cell.share,
        'seed': cell.seed,
        'figures': read(judged),
        'stages': stages,
        'commit': judged['commit'],
        'commands': cell.lines,
    }


def _of_language(judged: Mapping[str, Any]) -> dict[str, float]:
    f1 = judged['f1']
    return {**f1, 'mean': statistics.fmean(f1.values()), 'frames': judged['frames']}


def _of_driving(judged: Mapping[str, Any]) -> dict[str, float]:
    driven = judged['policies']['bundle']
    families = {name: one['success_rate'] for name, one in driven['families'].items()}
    return {
        'success_rate': driven['success_rate'],
        'driving_score': driven['driving_score'],
        'routes': driven['count'],
        **families,
    }


def write(ablation: Ablation, cells: Sequence[Cell], times: PlanTimes | None = None) -> Path:
    """Write what is made so far, as JSON, as a table and as a picture; return the JSON's path. Without `times` nothing is said of them."""
    from mose_ros.training.figures import draw_table, save  # matplotlib takes a second to load

    made = [_timed(cell, found, times) for cell in cells if (found := cell.result()) is not None]
    rows = list(_summaries(made))
    path = ablation.folder.with_suffix('.json')
    table = {
        'table': ablation.table,
        'preset': ablation.preset,
        'settings': list(ablation.settings),
        'figures': list(ablation.known.figures),
        'measured': str(times) if times else '',
        'made': len(made),
        'of': len(cells),
        'rows': rows,
        'cells': made,
    }
    write_json(path, table)
    text = markdown(rows, ablation.known.figures)
    write_text(path.with_suffix('.md'), f'{text}\n{times}\n' if times else text)
    if made:
        save(draw_table(table), path.with_suffix('.png'))
    return path


def _timed(cell: Cell, found: Mapping[str, Any], times: PlanTimes | None) -> dict[str, Any]:
    """Return a cell's result with its time per plan; what an older one says of that was taken beside other cells."""
    own = {name: value for name, value in found['figures'].items() if name != TIMED}
    if times:
        own[TIMED] = times.p50_ms[cell.folder.name]
    return {**found, 'figures': own}


def _summaries(made: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for row, share in dict.fromkeys((one['row'], one['share']) for one in made):
        same = [one['figures'] for one in made if (one['row'], one['share']) == (row, share)]
        values = {
            name: [one[name] for one in same if one.get(name) is not None] for name in same[0]
        }
        yield {
            'row': row,
            'share': share,
            'seeds': len(same),
            'mean': {name: statistics.fmean(found) for name, found in values.items() if found},
            'spread': {  # standard deviation over the seeds; none of a single one
                name: statistics.stdev(found) for name, found in values.items() if len(found) > 1
            },
        }


def markdown(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """Return the rows as a table: mean, and ± standard deviation where there are several seeds."""
    lines = [
        f'| network | data | seeds | {" | ".join(names)} |',
        '|---' * (3 + len(names)) + '|',
    ]
    for row in rows:
        shown = [_show(row['mean'].get(name, math.nan), row['spread'].get(name)) for name in names]
        lines.append(
            f'| {row["row"]} | {100 * row["share"]:.0f} % | {row["seeds"]} | {" | ".join(shown)} |'
        )
    return '\n'.join(lines) + '\n'


def _show(mean: float, spread: float | None) -> str:
    digits = 3 if abs(mean) <= 1 else 1
    return f'{mean:.{digits}f}' + (f' ± {spread:.{digits}f}' if spread is not None else '')
