"""Pictures of what `analyse` finds and of the tables of `ablate`. They are drawn from its figures alone, so a JSON file of an earlier run draws the same."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mose_ros.core.files import file_beside

SCALE, ABSENT = 'Blues', '0.92'  # colours: of shares and similarities; of what was never labelled
LABEL, RIGHT, WRONG = '0.78', '#1f6fb4', '#d1495b'
CELL = 0.42  # inches
DPI = 130
PANELS = 3  # side by side
TINY = 0.05  # a range of colours is never narrower


def draw_experts(found: Mapping[str, Any]) -> Figure:
    """Draw a matrix for each mixture: how alike the weights of every two experts are."""
    layers = found['layers']
    values = np.concatenate([np.ravel(one['similarity']) for one in layers])
    low = min(float(np.floor(20 * values.min()) / 20), 1 - TINY)
    sizes = [len(one['experts']) for one in layers]
    figure, panels = _grid(sizes)
    for panel, one in zip(panels, layers, strict=True):
        matrix = np.asarray(one['similarity'])
        image = panel.imshow(matrix, cmap=SCALE, vmin=low, vmax=1)
        _numbers(panel, matrix, (matrix - low) / (1 - low), '{:.2f}')
        _ticks(panel, one['experts'], one['experts'])
        where = f'{one["part"]}, layer {one["layer"]}'
        mean = '' if one['mean'] is None else f'\nmean over pairs of experts {one["mean"]:.3f}'
        panel.set_title(f'{one["level"]} ({where}){mean}' if 'level' in one else f'{where}{mean}')
    figure.colorbar(image, ax=panels, shrink=0.8, label=f'cosine similarity of {found["matrix"]}')
    figure.suptitle('How alike the experts of a mixture are (1 = equal)')
    return figure


def draw_routing(found: Mapping[str, Any]) -> Figure:
    """Draw a matrix for each router: what it chooses, by label; skills that were neither labelled nor chosen are left out."""
    shown = []
    for one in found['routers']:
        counts = np.asarray(one['counts'])
        seen = np.flatnonzero(counts.sum(0) + counts.sum(1))
        shown.append((one, [one['choices'][i] for i in seen], counts[np.ix_(seen, seen)]))
    shown = [(one, names, counts) for one, names, counts in shown if names]
    if not shown:
        raise ValueError('no sample has a label; there is nothing to draw')
    figure, panels = _grid([len(names) for _, names, _ in shown])
    for panel, (one, names, counts) in zip(panels, shown, strict=True):
        total = counts.sum(1, keepdims=True)
        shares = np.where(total > 0, counts / np.maximum(total, 1), np.nan)
        panel.set_facecolor(ABSENT)
        image = panel.imshow(np.ma.masked_invalid(shares), cmap=SCALE, vmin=0, vmax=1)
        _numbers(panel, counts, np.nan_to_num(shares), '{:d}', zeros=False)
        _ticks(
            panel, names, [f'{name}  ({n})' for name, n in zip(names, total[:, 0], strict=True)]
        )
        panel.set(xlabel='the router chooses', ylabel='label (samples)')
        panel.set_title(
            f'{one["name"]}: accuracy {one["accuracy"]:.2f}\n'
            f'mean recall {one["balanced_accuracy"]:.2f}, macro F1 {one["macro_f1"]:.2f}'
        )
    figure.colorbar(image, ax=panels, shrink=0.8, label='share of the label')
    figure.suptitle(f'What the routers choose, against the labels ({found["samples"]} samples)')
    return figure


def draw_chains(found: Mapping[str, Any]) -> Figure:
    """Draw the chain of skills over a clip: a band where the label is, a dot where the router goes."""
    frames, routers = found['frames'], found['routers']
    if not frames:
        raise ValueError(f'{found["clip"]} has no frame to draw')
    times = np.array([one['time'] for one in frames])
    step = float(np.median(np.diff(times))) if len(times) > 1 else 1.0
    kept = {name: _seen(frames, name, choices) for name, choices in routers.items()}
    heights = [0.5 + 0.28 * len(choices) for choices in kept.values()]
    width = float(np.clip(4 + 0.06 * len(frames), 9, 18))
    figure = _figure(width, 1.4 + sum(heights))
    panels = figure.subplots(
        len(kept), 1, sharex=True, squeeze=False, gridspec_kw={'height_ratios': heights}
    )[:, 0]
    for panel, (name, choices) in zip(panels, kept.items(), strict=True):
        _trace(panel, frames, times, step, name, choices)
    panels[-1].set_xlabel('time in the clip (s)')
    panels[-1].set_xlim(times[0] - step, times[-1] + step)
    marks = {}
    for panel in panels:
        marks |= dict(zip(*panel.get_legend_handles_labels()[::-1], strict=True))
    figure.legend(
        marks.values(), marks, loc='outside upper right', ncols=len(marks), frameon=False
    )
    figure.suptitle(f'Skill chain over {found["clip"]}', x=0.01, ha='left')
    return figure


MEASURES = {'language': 'F1'}  # what all panels of a table show, where that is one thing


def draw_table(found: Mapping[str, Any]) -> Figure:
    """Draw a panel for each figure of a table: curves over the share of the data, bars where all rows had the same.

    Marks are single seeds; curves and bars their mean.
    """
    if not found['rows']:
        raise ValueError(
            f'no cell of the table {found["table"]} is made; there is nothing to draw'
        )
    rows = list(dict.fromkeys(one['row'] for one in found['rows']))
    shares = sorted({one['share'] for one in found['rows']})
    are_curves = len(shares) > 1
    names, columns = found['figures'], len(found['figures'])
    height = 4.2 if are_curves else 1.6 + 0.32 * len(rows)
    figure = _figure(3.3 * columns + (0 if are_curves else 2), height)
    panels = figure.subplots(1, columns, sharey=True, squeeze=False)[0]
    for panel, name in zip(panels, names, strict=True):
        for place, row in enumerate(rows):
            cells = [one for one in found['cells'] if one['row'] == row]
            points = [
                (one['share'], one['figures'][name]) for one in cells if name in one['figures']
            ]
            if not points:
                continue
            (_curve if are_curves else _bar)(panel, row, place, np.array(points))
        panel.set_title(_words(name))
        panel.grid(axis='y' if are_curves else 'x', color='0.92')
        panel.set_axisbelow(True)
        panel.spines[['top', 'right']].set_visible(False)
        if are_curves:
            panel.set_xscale('log')
            panel.set_xticks(shares, [f'{100 * one:.0f} %' for one in shares])
            panel.minorticks_off()
            panel.margins(x=0.08)
            panel.set_xlabel('share of the training clips')
    if are_curves:
        panels[0].set_ylabel(MEASURES.get(found['table'], ''))
        marks = dict(zip(*panels[0].get_legend_handles_labels()[::-1], strict=True))
        figure.legend(marks.values(), marks, loc='outside lower center', ncols=5, frameon=False)
    else:
        panels[0].set_yticks(range(len(rows)), rows)
        panels[0].invert_yaxis()
    return figure


def _curve(panel, row: str, place: int, points: np.ndarray) -> None:
    colour = f'C{place}'
    shares = np.unique(points[:, 0])
    means = [points[points[:, 0] == one, 1].mean() for one in shares]
    panel.plot(shares, means, color=colour, label=row)
    beside = points[:, 0] * 1.02 ** (place - 2)  # so that no row hides another
    panel.scatter(beside, points[:, 1], s=12, color=colour, alpha=0.6, linewidths=0)


def _bar(panel, row: str, place: int, points: np.ndarray) -> None:
    panel.barh(place, points[:, 1].mean(), color=RIGHT, alpha=0.85)
    panel.scatter(points[:, 1], np.full(len(points), place), s=12, color='0.2')


DRAW = {'experts': draw_experts, 'routing': draw_routing, 'chains': draw_chains}


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG beside the path, then rename."""
    with file_beside(path) as partial:
        figure.savefig(partial, format='png', dpi=DPI)


def _seen(frames, name: str, choices: Sequence[str]) -> list[str]:
    """Return the choices that occur in a clip, as labels or as decisions."""
    seen = {one[which][name] for one in frames for which in ('label', 'chosen')}
    return [choice for choice in choices if choice in seen]


def _trace(panel, frames, times, step: float, name: str, choices: Sequence[str]) -> None:
    rows = {choice: len(choices) - 1 - i for i, choice in enumerate(choices)}
    labels = [one['label'][name] for one in frames]
    chosen = [one['chosen'][name] for one in frames]
    known = np.array([label is not None for label in labels])
    right = np.array([a == b for a, b in zip(labels, chosen, strict=True)])
    bands = [rows[label] for label in labels if label is not None]
    heights = np.array([rows[one] for one in chosen])
    panel.bar(
        times[known], 0.8, width=step, bottom=np.array(bands) - 0.4, color=LABEL, label='label'
    )
    panel.plot(times, heights, color='0.45', lw=0.6, drawstyle='steps-mid', zorder=2)
    for which, colour, text in (
        (right & known, RIGHT, 'the router agrees'),
        (~right & known, WRONG, 'it differs'),
        (~known, '0.3', 'nobody labelled'),
    ):
        if which.any() or text != 'nobody labelled':
            panel.scatter(times[which], heights[which], s=14, color=colour, label=text, zorder=3)
    agrees = f'agrees {100 * right[known].mean():.0f} %' if known.any() else 'no labels'
    panel.set_title(f'{name}: {agrees}', loc='left', fontsize='medium')
    panel.set_yticks(list(rows.values()), map(_words, rows))
    panel.set_ylim(-0.6, len(rows) - 0.4)
    panel.grid(axis='x', color='0.9')
    panel.set_axisbelow(True)
    panel.spines[['top', 'right']].set_visible(False)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout='constrained')
    FigureCanvasAgg(figure)
    return figure


def _grid(sizes: Sequence[int]) -> tuple[Figure, list]:
    """Return a figure and square panels for matrices of these sizes."""
    columns = min(PANELS, len(sizes))
    rows = -(-len(sizes) // columns)
    side = 2.2 + CELL * max(sizes)
    figure = _figure(columns * side + 1.2, rows * (side + 0.3) + 0.5)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for spare in panels[len(sizes) :]:
        spare.remove()
    return figure, list(panels[: len(sizes)])


def _numbers(panel, values, darkness, text: str, zeros: bool = True) -> None:
    """Write each value into its cell, white where the cell is dark."""
    for (row, column), value in np.ndenumerate(values):
        if zeros or value:
            colour = 'white' if darkness[row, column] > 0.55 else '0.15'
            place = {'ha': 'center', 'va': 'center', 'color': colour, 'fontsize': 'x-small'}
            panel.text(column, row, text.format(value), **place)


def _words(name: str) -> str:
    return name.replace('_', ' ')


def _ticks(panel, columns: Sequence[str], rows: Sequence[str]) -> None:
    turned = {'rotation': 45, 'ha': 'right', 'rotation_mode': 'anchor'}
    panel.set_xticks(range(len(columns)), map(_words, columns), **turned)
    panel.set_yticks(range(len(rows)), map(_words, rows))
    panel.tick_params(length=0, labelsize='small')
