"""Reports of measurements as markdown: every figure of the documents comes from here, none is typed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mose_ros.core.files import write_text

START, END = '<!-- made by `engine table`: begin -->', '<!-- end -->'
Report = Mapping[str, Any]


@dataclass(frozen=True)
class Goal:
    """What a report must show; `keys` lead to the figure, two of them to their quotient."""

    what: str
    keys: Sequence[str]
    least: float | None = None
    most: float | None = None
    inverse: bool = False  # 1 / figure is meant

    def found(self, report: Report) -> float | None:
        """Return the figure, None where the report has it not."""
        values = [_at(report, key.split('.')) for key in self.keys]
        if None in values:
            return None
        value = values[0] / values[1] if len(values) == 2 else float(values[0])
        return 1 / value if self.inverse else value

    def met(self, value: float) -> bool:
        """Return whether the figure is good enough."""
        above = self.least is None or value >= self.least
        return above and (self.most is None or value <= self.most)

    def wanted(self) -> str:
        """Return the limits in words."""
        if self.least is not None and self.most is not None:
            return f'{self.least:g} to {self.most:g}'
        return f'>= {self.least:g}' if self.most is None else f'<= {self.most:g}'


GOALS = (
    Goal('PyTorch eager over ours', ['compare.torch_eager.ratio'], least=2.0),
    Goal('torch.compile over ours', ['compare.torch_compile.ratio'], least=1.2),
    Goal(
        'our float32 over our int8, vision + prefill',
        ['compare.int8.vision_prefill.ratio'],
        least=1.3,
        inverse=True,
    ),
    Goal('6 views over 2, vision + prefill', ['views.ratio_6_to_2'], least=2.4),
    Goal('6 views over 1', ['views.ratio_6_to_1'], least=4.0),
    Goal(
        'dense over ours, by what their FLOPs say',
        ['compare.dense.ratio', 'compare.dense.flops_ratio'],
        least=0.95,
        most=1.05,
    ),
    Goal('token experts over ours, end to end', ['compare.token_moe.ratio'], least=1.0),
    Goal('token experts over ours, the block', ['compare.token_moe.block.ratio'], least=1.0),
    Goal('chosen expert over a constant one', ['expert_selection.if.ratio'], most=1.05),
    Goal('share of the GEMM peak, vision + prefill', ['gemm_share'], least=0.5),
    Goal('the same, our fastest plan by the best product', ['gemm_share_best'], least=0.5),
    Goal('the whole over the sum of its stages', ['end_to_end.to_stages'], most=1.15),
    Goal('p99 over p50', ['end_to_end.p99_to_p50'], most=1.3),
    Goal('p99 with a text over without', ['reasoning_interference.p99_ratio'], most=1.1),
    Goal(
        'resident memory flat over 20,000 plans, or as many as were soaked (1: yes)',
        ['soak.resident.flat'],
        least=1.0,
    ),
)


def _at(report: Any, path: Sequence[str]) -> Any:
    for key in path:
        if not isinstance(report, Mapping) or key not in report:
            return None
        report = report[key]
    return report


def write(reports: Sequence[tuple[str, Report]], into: Path) -> None:
    """Put the tables of named reports between the marks of a document, or into a new one; ValueError where a mark is missing."""
    text = f'{START}\n\n{render(reports)}\n{END}\n'
    if into.is_file():
        old = into.read_text(encoding='utf-8')
        head, start, rest = old.partition(START)
        _, end, tail = rest.partition(END)
        if not (start and end):
            raise ValueError(
                f'{into} has no lines {START} and {END}; write them where the tables go'
            )
        text = head + text.rstrip('\n') + tail
    write_text(into, text)


def render(reports: Sequence[tuple[str, Report]]) -> str:
    """Return all tables; a report is called by its file."""
    if not reports:
        raise ValueError('there is no report to make a table of')
    sections = [_measured(reports), _goals(reports)]
    sections += [make(name, report) for name, report in reports for make in _SECTIONS]
    return '\n'.join(section for section in sections if section)


def _measured(reports) -> str:
    lines = ['| report | command | machine | load | commit |', '|---|---|---|---|---|']
    for name, report in reports:
        box = report['machine']
        load = ' to '.join(
            f'{box[key]:.1f}' for key in ('load_before', 'load_after') if key in box
        )
        hardware = ', '.join(box[key] for key in ('processor', 'gpu') if key in box)
        cells = (name, f'`{report.get("command", "")}`', hardware, load)
        lines.append(_line([*cells, report['commit'][:9]]))
    return '\n'.join(lines) + '\n'


def _goals(reports: Sequence[tuple[str, Report]]) -> str:
    """Return what was wanted and what each report that has it found: the worst decides."""
    rows = []
    for goal in GOALS:
        values = [value for _, one in reports if (value := goal.found(one)) is not None]
        verdict = 'yes' if all(map(goal.met, values)) else '**no**'
        found = ', '.join(f'{value:.2f}' for value in values)
        rows.append([goal.what, goal.wanted(), found, verdict if values else 'not measured'])
    text = 'What each report that has it found, in their order; met where all meet it.'
    return _section('Goals', text, ['goal', 'wanted', 'found', 'met'], rows)


def _stages(name: str, report: Report) -> str:
    if 'stages' not in report:
        return ''
    peaks, whole = report['peaks'], report['end_to_end']
    rows = [
        [
            stage,
            *_times(one),
            _number(one['flops'] / 1e6),
            _number(one['bytes'] / 1e6),
            _percent(one['gemm_share']) if 'gemm_share' in one else '',
        ]
        for stage, one in report['stages'].items()
    ]
    rows.append(['**end to end**', *_times(whole), _number(whole['flops'] / 1e6), '', ''])
    if 'left_out' in peaks:
        best, share = f'No peaks: {peaks["left_out"]}', ''
    else:
        best = (
            f'GEMM peak {peaks["gemm_flops"] / 1e9:.0f} GFLOP/s (best {peaks["gemm_flops_best"] / 1e9:.0f}), copy '
            f'{peaks["copy_bytes"] / 1e9:.1f} GB/s'
        )
        share = (
            f'vision + prefill reach {_percent(report["gemm_share"])} of the GEMM peak '
            f'(the fastest of the best: {_percent(report["gemm_share_best"]) if "gemm_share_best" in report else "not kept"}); '
        )
    text = (
        f'{best}, {report["threads"]} threads, {report["plans"]} plans, '
        f'{len(report["looked_at"])} views; the whole is {whole["to_stages"]:.3f} x its stages, p99 '
        f'{whole["p99_to_p50"]:.2f} x p50; {share}memory {report["memory"]["peak_mib"]:.0f} MiB at most ({report["memory"]["python_mib"]:.0f} before the '
        f'bundle was opened). Parity of the bundle with PyTorch: {_parity(report["parity"])}.'
    )
    head = ['stage', 'p50 ms', 'p90', 'p99', 'MFLOP', 'MB', 'of GEMM peak']
    return _section(f'Stages ({name})', text, head, rows)


def _compared(name: str, report: Report) -> str:
    rows = []
    for other, one in report.get('compare', {}).items():
        if 'error' in one:
            rows.append([other, 'failed', *[''] * 6, one['error'].replace('\n', ' ')])
            continue
        large = one.get('vision_prefill')
        rows.append(
            [
                other,
                f'**{one["ratio"]:.2f}**',
                f'{one["ratio_p10"]:.2f} to {one["ratio_p90"]:.2f}',
                _optional(one.get('ratio_fastest')),
                _pair(one, 'p50_ms'),
                _pair(one, 'p99_ms'),
                f'{large["ratio"]:.2f}' if large else '',
                f'{one["flops_ratio"]:.3f}',
                _parity(one['parity']),
            ]
        )
        if 'block' in one:
            block = one['block']
            spread = f'{block["ratio_p10"]:.2f} to {block["ratio_p90"]:.2f}'
            cells = [f'**{block["ratio"]:.2f}**', spread, _optional(block.get('ratio_fastest'))]
            cells += [_pair(block, 'p50_ms', 3), _pair(block, 'p99_ms', 3)]
            rows.append([f'{other}, the block', *cells, '', '', ''])
    head = [
        'compared',
        'theirs / ours',
        'middle 80 %',
        'fastest',
        'p50 ms, theirs / ours',
        'p99 ms',
    ]
    head += ['vision + prefill', 'FLOPs', 'parity']
    text = (
        'Above 1 ours is faster. Ratios are medians of interleaved pairs, end to end unless said otherwise; '
        "`fastest`: of each side's fastest twentieth, which nobody disturbed."
    )
    return _section(f'Compared ({name})', text, head, rows)


def _views(name: str, report: Report) -> str:
    found = report.get('views', {})
    rows = [
        [count, *_times(found[f'with_{count}']), _optional(found.get(f'ratio_6_to_{count}'))]
        for count in (6, 2, 1)
        if f'with_{count}' in found
    ]
    head = ['views', 'p50 ms', 'p90', 'p99', '6 views take so many times as long']
    return _section(f'Views, vision + prefill ({name})', '', head, rows)


def _reasoning(name: str, report: Report) -> str:
    found = report.get('reasoning_interference')
    if not found:
        return ''
    rows = [[side, *_times(found[key])] for side, key in _SIDES]
    text = f'p99 with text over without: {found["p99_ratio"]:.2f}; p50: {found["p50_ratio"]:.2f}.'
    return _section(f'Text beside a plan ({name})', text, ['', 'p50 ms', 'p90', 'p99'], rows)


_SIDES = (('with text', 'with_text'), ('without', 'without'))


def _selected(name: str, report: Report) -> str:
    rows = [
        [way, f'{one["ratio"]:.3f}', f'{one["ratio_fastest"]:.3f}', *_times(one, 3)]
        for way, one in report.get('expert_selection', {}).items()
    ]
    head = ['way', 'of one constant expert', 'fastest', 'p50 ms', 'p90', 'p99']
    return _section(f'Choosing an expert ({name})', '', head, rows)


def _steps(name: str, report: Report) -> str:
    found = report.get('flow_steps')
    if not found:
        return ''
    rows = [
        [
            f'**{steps}**' if int(steps) == found['default'] else steps,
            f'{one["trajectory_mean_m"]:.4f}',
            f'{one["trajectory_max_m"]:.4f}',
            f'{one["flow_p50_ms"]:.2f}',
        ]
        for steps, one in found['steps'].items()
    ]
    head = ['steps', f'mean m from {found["reference"]} steps', 'max m', 'flow ms']
    text = f'Pictures: {report["pictures"]}. The bundle names the bold one.'
    return _section(f'Flow steps ({name})', text, head, rows)


def _operators(name: str, report: Report) -> str:
    rows = [
        [graph, op, int(one['count']), f'{one["ms"]:.2f}', _percent(one['share'])]
        for graph, ops in report.get('operators', {}).items()
        for op, one in list(ops.items())[:4]
    ]
    head = ['graph', 'operator', 'how many', 'ms', 'share']
    return _section(f'Where the time goes ({name})', 'On the CPU.', head, rows)


def _swept(name: str, report: Report) -> str:
    sections = []
    for axis, points in report.get('sweep', {}).items():
        rows = [
            [
                point,
                *_times(one['end_to_end']),
                f'{one["vision_prefill"]["p50_ms"]:.2f}',
                _number(one['flops'] / 1e6),
                f'{one["weights_mib"]:.0f}',
                _parity(one['parity']),
            ]
            for point, one in points.items()
        ]
        head = [axis, 'p50 ms', 'p90', 'p99', 'vision + prefill p50', 'MFLOP', 'MiB', 'parity']
        sections.append(_section(f'Sweep: {axis} ({name})', '', head, rows))
    return '\n'.join(sections)


def _soaked(name: str, report: Report) -> str:
    found = report.get('soak')
    if not found:
        return ''
    held, traced, took = found['resident'], found['traced'], found['end_to_end']
    flat = 'flat' if held['flat'] else 'NOT flat'
    text = (
        f'{found["plans"]} plans: resident memory {held["first_mib"]:.1f} to {held["last_mib"]:.1f} MiB behind the warm-up, '
        f'{held["bytes_per_plan"]:.1f} bytes a plan (95 %: {held["low"]:.1f} to {held["high"]:.1f}), {flat}. Live allocations of '
        f'Python grew by {traced["grown_bytes"]} bytes in {traced["plans"]} plans. p50 {took["p50_ms"]:.1f} ms, p99 {took["p99_ms"]:.1f} ms.'
    )
    return f'### Soak ({name})\n\n{text}\n'


_SECTIONS: tuple[Callable[[str, Report], str], ...] = (
    *(_stages, _compared, _views, _reasoning, _selected, _steps, _operators, _swept, _soaked),
)


def _section(title: str, text: str, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    if not rows:
        return ''
    lines = [f'### {title}', '', *([text, ''] if text else [])]
    lines += [_line(head), '|' + '---|' * len(head), *map(_line, rows)]
    return '\n'.join(lines) + '\n'


def _line(cells: Sequence[Any]) -> str:
    return f'| {" | ".join(map(str, cells))} |'


def _times(one: Mapping[str, float], digits: int = 2) -> list[str]:
    return [f'{one[key]:.{digits}f}' for key in ('p50_ms', 'p90_ms', 'p99_ms')]


def _pair(one: Mapping[str, Any], key: str, digits: int = 1) -> str:
    return f'{one["theirs"][key]:.{digits}f} / {one["ours"][key]:.{digits}f}'


def _number(value: float) -> str:
    return f'{value:.0f}' if value >= 10 else f'{value:.1f}'


def _percent(share: float) -> str:
    return f'{100 * share:.0f} %'


def _optional(value: float | None) -> str:
    return '' if value is None else f'{value:.2f}'


def _parity(found: Mapping[str, Any]) -> str:
    """Return the parity in a few words: how far trajectories are apart at most, and whether skills and views agree."""
    words = []
    if found.get('trajectory_max_m') is not None:
        words.append(f'{found["trajectory_max_m"]:.1e} m at most')
    if 'trajectory_mean_m' in found:
        words.append(f'{found["trajectory_mean_m"]:.1e} m on average')
    if 'skills_equal' in found:
        words.append('same skills' if found['skills_equal'] else 'OTHER SKILLS')
    if 'views_equal_share' in found:
        words.append(f'same views {_percent(found["views_equal_share"])}')
    return ', '.join(words) or 'none'
