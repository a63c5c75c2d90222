"""The command behind `make faults`: injects faults, prints what becomes of each, and writes docs/reliability.json and its table.

    PYTHONPATH=.:test python -m nodes.measure_faults --repeats 3 --only 'front camera'

A run replaces the rows that it measured and leaves the others, so that the table can be made in parts.
"""

import argparse
import json
import os
import platform
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

from mose_ros.core.files import write_json, write_text
from mose_ros.nodes.drive import take_domain

ROOT = Path(__file__).parents[2]
JSON, PAGE = ROOT / 'docs' / 'reliability.json', ROOT / 'docs' / 'reliability.md'
MARKS = ('<!-- faults: made by `make faults` -->', '<!-- end of faults -->')
DRIVE_MARKS = (
    '<!-- camera faults: made by `python -m nodes.faulty_drive` -->',
    '<!-- end of camera faults -->',
)
HEAD = (
    '| fault | times | noticed after ms: p50 (max) | reaction | unsafe commands | stopped within m (least possible) '
    '| drives again after s |\n|---|---|---|---|---|---|---|'
)


def main() -> None:
    """Measure, write, and exit with 1 where something came to what it should not."""
    parser = argparse.ArgumentParser(prog='make faults', description=__doc__.split('\n')[0])
    parser.add_argument('--repeats', type=int, default=3, help='how often each is injected (3)')
    parser.add_argument('--only', default='', metavar='REGEX', help='faults whose name it finds')
    parser.add_argument('--limit', type=float, default=0.0, metavar='S', help='begin none later')
    parser.add_argument(
        '--busy', action='store_true', help='others are at work: wait longer, say so'
    )
    parser.add_argument('--table', action='store_true', help='only write the table anew')
    options = parser.parse_args()
    if not options.table:
        rows, wrong = _measure(options)
        _keep(rows)
    else:
        wrong = []
    _write_table()
    for line in wrong:
        print(f'WRONG: {line}', file=sys.stderr)
    sys.exit(1 if wrong else 0)


def _measure(options):
    take_domain(None)  # until this process ends; and the shared memory that every drive has
    from nodes.bench import Bench, complaint, measure  # after the domain is set
    from nodes.faults import all_faults

    chosen = [fault for fault in all_faults() if re.search(options.only, fault.name)]
    found: dict[str, list] = {}
    wrong, began = [], time.monotonic()
    for is_simulated in (False, True):
        these = [fault for fault in chosen if fault.is_simulated == is_simulated]
        if not these:
            continue
        with tempfile.TemporaryDirectory(prefix='mose_ros_faults_') as folder:
            # else each fault would be waited for longer than the one before
            patience = 4.0 if options.busy else 1.0
            bench = Bench(Path(folder), is_simulated, patience, relapse_s=0.0)
            try:
                for fault in these * options.repeats:
                    if options.limit and time.monotonic() - began > options.limit:
                        break
                    sample = measure(bench, fault)
                    found.setdefault(fault.name, []).append(sample)
                    bad = complaint(fault, sample)
                    wrong += [f'{fault.name} {fault.which}: {bad}'] if bad else []
                    _say(fault, sample)
            finally:
                bench.close()
    rows = [_row(name, samples) for name, samples in found.items()]
    return [row | {'busy': options.busy} for row in rows], wrong


def _say(fault, sample) -> None:
    noticed = '-' if sample.detected_s is None else f'{1e3 * sample.detected_s:.0f} ms'
    way = '' if sample.stop_m is None else f'{sample.stop_m:.1f} m from {sample.speed:.1f} m/s, '
    again = '-' if sample.recovered_s is None else f'{sample.recovered_s:.1f} s'
    print(
        f'{fault.name} {fault.which}: {noticed}, {" > ".join(sample.states)}, {way}{sample.beside_m:.2f} m '
        f'beside, again {again}  [{sample.reason}]',
        flush=True,
    )


def _row(name, samples) -> dict:
    from nodes.bench import least_m

    noticed = [1e3 * s.detected_s for s in samples if s.detected_s is not None]
    stopped = [s for s in samples if s.stop_m is not None]
    longest = max(stopped, key=lambda s: s.stop_m / least_m(s.speed), default=None)
    again = [s.recovered_s for s in samples]
    calm = (
        'the vehicle brakes by itself' if stopped else 'drives on'
    )  # the controller says nothing
    reaction = Counter(' > '.join(s.states) or calm for s in samples).most_common(1)[0][0]
    return {
        'name': name,
        'runs': len(samples),
        'detected_ms': {
            'p50': round(float(np.median(noticed)), 0) if noticed else None,
            'max': round(max(noticed), 0) if noticed else None,
        },
        'noticed_in': len(noticed),
        'reaction': reaction,
        'reason': Counter(s.reason for s in samples).most_common(1)[0][0],
        'unsafe_commands': sum(len(s.unsafe) for s in samples),
        'stop_m': round(longest.stop_m, 2) if longest else None,
        'stop_min_m': round(least_m(longest.speed), 2) if longest else None,
        'speed': round(longest.speed, 2) if longest else None,
        'beside_m': round(max(s.beside_m for s in samples), 2),
        'recovered_s': None if None in again else round(max(again), 2),
    }


def _keep(rows) -> None:
    from nodes.faults import all_faults

    kept = json.loads(JSON.read_text()) if JSON.exists() else {}
    known = {row['name']: row for row in kept.get('faults', [])} | {r['name']: r for r in rows}
    order = dict.fromkeys(fault.name for fault in all_faults())
    kept['machine'] = f'{os.cpu_count()} cores, {platform.platform()}'
    kept['faults'] = [known[name] for name in order if name in known]
    write_json(JSON, kept)


def _write_table() -> None:
    lines = [HEAD]
    for row in json.loads(JSON.read_text())['faults']:
        noticed = row['detected_ms']
        times = 'not' if noticed['p50'] is None else f'{noticed["p50"]:.0f} ({noticed["max"]:.0f})'
        if noticed['p50'] is not None and row['noticed_in'] < row['runs']:
            times += f', in {row["noticed_in"]} of {row["runs"]}'
        way = '' if row['stop_m'] is None else f'{row["stop_m"]:.1f} ({row["stop_min_m"]:.1f})'
        again = 'not' if row['recovered_s'] is None else f'{row["recovered_s"]:.1f}'
        times += ' \\*' if row['busy'] else ''
        cells = [
            row['name'],
            row['runs'],
            times,
            row['reaction'],
            row['unsafe_commands'],
            way,
            again,
        ]
        lines.append(f'| {" | ".join(map(str, cells))} |')
    text = PAGE.read_text(encoding='utf-8')
    text = _between(text, MARKS, lines)
    text = _between(text, DRIVE_MARKS, _driven(json.loads(JSON.read_text())))
    write_text(PAGE, text)


def _between(text, marks, lines) -> str:
    before, after = text.split(marks[0])[0], text.split(marks[1])[1]
    return before + '\n'.join([marks[0], *lines, marks[1]]) + after


def _driven(kept) -> list[str]:
    found = kept.get('camera_faults')
    if found is None:
        return ['Not run.']
    runs = found['runs']
    families = ', '.join(dict.fromkeys(run['family'] for run in runs))
    kinds = ', '.join(dict.fromkeys(run['fault'] for run in runs))
    on = sum(run['state'] in ('NORMAL', 'DEGRADED') for run in runs)
    before = sum(bool(run['hit_without']) for run in runs)
    caused = [run for run in runs if run['caused']]
    lines = [
        f'{len(runs)} pairs of episodes with {found["bundle"]} ({families}; seeds '
        f'{sorted({run["seed"] for run in runs})}; {kinds}; front and front left camera): {on} drove on, {len(runs) - on} '
        f'stopped; in {before} something was hit without any fault; **{len(caused)}** collisions came with a fault alone.'
    ]
    for run in caused:
        events = '; '.join(event for events in run['hit'].values() for event in events)
        lines.append(
            f'- {run["family"]}, seed {run["seed"]}, {run["camera"]} camera {run["fault"]} ({run["state"]}): {events}'
        )
    return lines


if __name__ == '__main__':
    main()
