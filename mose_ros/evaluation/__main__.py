"""python -m mose_ros.evaluation closed-loop|language|bench2drive ...: judge a policy and write the figures as JSON."""

import argparse
import logging
import re
import shlex
import sys
from pathlib import Path

from mose_ros.core.files import write_json
from mose_ros.core.types import FAMILIES
from mose_ros.data import storage

RECORD = "write the summary into the bundle's manifest, under quality"


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; 0 when it did what was asked, 2 when the input is wrong."""
    logging.basicConfig(level=logging.INFO, format='%(levelname)s %(name)s: %(message)s')
    options = _parser().parse_args(arguments)
    words = sys.argv[1:] if arguments is None else arguments
    options.command = shlex.join(['python', '-m', 'mose_ros.evaluation', *words])
    try:
        options.verb(options)
    except (ValueError, OSError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog='python -m mose_ros.evaluation', description=__doc__)
    verbs = parser.add_subparsers(required=True, metavar='VERB')

    closed = verbs.add_parser(
        'closed-loop', help='drive families and seeds of the simulator in lock-step'
    )
    closed.add_argument('bundle', help='folder of the bundle, models/mose-tiny for example')
    closed.add_argument('--families', default='all', help=f'all, or some of {",".join(FAMILIES)}')
    closed.add_argument('--seeds', default='20000-20019', help='20000-20019, or 3, or 1-4,9')
    closed.add_argument('--policies', default='bundle,expert,constant_velocity')
    closed.add_argument('--json', type=Path, metavar='FILE', help='write all figures there')
    closed.add_argument('--leaderboard', type=Path, metavar='DIR', help="the leaderboard's files")
    closed.add_argument('--processes', type=int, default=1)
    closed.add_argument(
        '--renderer', default='auto', help='back end of the cameras: auto, egl, tiny'
    )
    closed.add_argument('--record', action='store_true', help=RECORD)
    closed.set_defaults(verb=_closed_loop)

    language = verbs.add_parser('language', help='compare text and routers with the annotation')
    language.add_argument('bundle')
    language.add_argument(
        '--clips', type=storage.location, metavar='DIR', help='recorded clips, or a URL; or else'
    )
    language.add_argument('--seeds', default='21000-21003', help='episodes that the expert drives')
    language.add_argument('--families', default='all')
    language.add_argument('--frames', type=int, default=200)
    language.add_argument('--json', type=Path, metavar='FILE')
    language.add_argument('--renderer', default='auto')
    language.add_argument('--record', action='store_true', help=RECORD)
    language.set_defaults(verb=_language)

    bench = verbs.add_parser('bench2drive', help='score a results file of the leaderboard')
    bench.add_argument('results', type=Path, help='the file with _checkpoint.records')
    bench.add_argument('--routes', type=int, default=220, help='of the benchmark, not of the file')
    bench.add_argument(
        '--metrics', type=Path, metavar='DIR', help='holds SAVE_NAME/metric_info.json'
    )
    bench.add_argument('--sample-dt', type=float, default=0.05, help='s between its samples')
    bench.add_argument('--json', type=Path, metavar='FILE')
    bench.set_defaults(verb=_bench2drive)
    return parser


def parse_seeds(text: str) -> tuple[int, ...]:
    """Return the seeds of `20000-20019`, `3`, or `1-4,9`; ValueError otherwise."""
    seeds = []
    for part in text.split(','):
        match = re.fullmatch(r'\s*(\d+)(?:-(\d+))?\s*', part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
        if first > last:
            raise ValueError(
                f'seeds {text!r}: expected FIRST-LAST, a number, or these with commas'
            )
        seeds += range(first, last + 1)
    return tuple(dict.fromkeys(seeds))


def parse_families(text: str) -> tuple[str, ...]:
    """Return the families of `all` or of names with commas; ValueError for an unknown one."""
    if text == 'all':
        return FAMILIES
    names = tuple(name.strip() for name in text.split(',') if name.strip())
    unknown = [name for name in names if name not in FAMILIES]
    if unknown or not names:
        raise ValueError(f'unknown family {text!r}; choose all or some of {", ".join(FAMILIES)}')
    return names


def _closed_loop(options: argparse.Namespace) -> None:
    from mose_ros.evaluation import closed_loop, quality

    config = closed_loop.Config(
        bundle=options.bundle,
        families=parse_families(options.families),
        seeds=parse_seeds(options.seeds),
        policies=tuple(name.strip() for name in options.policies.split(',')),
        processes=options.processes,
        renderer=options.renderer,
    )
    if options.record and 'bundle' not in config.policies:
        raise ValueError('--record is about the bundle; add it to --policies')
    store = options.json.with_name(options.json.name + '.routes') if options.json else None
    result = closed_loop.run(config, store)
    if options.leaderboard:
        closed_loop.write_leaderboard(options.leaderboard, result)
    if options.json:
        write_json(options.json, closed_loop.without_steps(result))
    _print_policies(result)
    if options.record:
        _record(options, 'closed_loop', quality.of_closed_loop(result, options.seeds), result)


def _record(options: argparse.Namespace, name: str, figures: dict, result: dict) -> None:
    from mose_ros.evaluation import quality

    source = {'command': options.command, 'commit': result['commit']}
    quality.record(options.bundle, name, source | figures)
    print(f'recorded as quality.{name} in {options.bundle}')


def _print_policies(result) -> None:
    print(f'{"policy":18s} {"success":>8s} {"score":>7s}  by family')
    for policy, figures in result['policies'].items():
        families = ' '.join(
            f'{family} {_percent(one["success_rate"])}'
            for family, one in figures['families'].items()
        )
        score = figures['driving_score']
        shown = '-' if score is None else f'{score:.1f}'
        print(f'{policy:18s} {_percent(figures["success_rate"]):>8s} {shown:>7s}  {families}')
    if result['excluded']:
        names = ' '.join(f'{one["family"]}:{one["seed"]}' for one in result['excluded'])
        print(f'excluded, since the expert does not solve them: {names}')


def _percent(share: float | None) -> str:
    return '-' if share is None else f'{100 * share:.0f} %'


def _language(options: argparse.Namespace) -> None:
    from mose_ros.core.bundle import Manifest
    from mose_ros.engine.policy import Policy
    from mose_ros.evaluation import language, quality
    from mose_ros.evaluation.provenance import provenance

    if options.frames < 1:
        raise ValueError(f'{options.frames} frames cannot be judged; use 1 or more')
    families, seeds = parse_families(options.families), parse_seeds(options.seeds)
    manifest = Manifest.load(options.bundle)
    gap = manifest.frame_gap
    if options.clips:
        frames = language.frames_of_clips(options.clips, options.frames, gap, families)
    else:
        frames = language.frames_of_world(
            seeds, options.frames, gap, families, renderer=options.renderer
        )
    policy = Policy.load(options.bundle)
    result = language.judge(policy, frames, manifest.fixed_views, options.frames)
    source = {'clips': str(options.clips)} if options.clips else {'seeds': options.seeds}
    result = {'config': {'frames': options.frames, 'families': families, **source}, **result}
    result |= provenance(options.bundle)
    if options.json:
        write_json(options.json, result)
    for level, value in result['f1'].items():
        router = result['skill_routers'][level]['accuracy']
        print(f'{level:12s} F1 of the text {value:.3f}   accuracy of the router {router:.3f}')
    print(f'view router  accuracy {result["view_router"]["accuracy"]:.3f}')
    print(f'action router accuracy {result["action_router"]["accuracy"]:.3f}')
    if options.record:
        _record(options, 'language', quality.of_language(result), result)


def _bench2drive(options: argparse.Namespace) -> None:
    from mose_ros.evaluation import report

    records = report.read_records(options.results)
    metrics = report.read_metrics(options.metrics or options.results.parent, records)
    result = report.score(records, options.routes, metrics, options.sample_dt)
    if options.json:
        write_json(options.json, result)
    for warning in result['warnings']:
        print(f'warning: {warning}', file=sys.stderr)
    print(f'driving score {result["driving_score"]:.2f}')
    print(f'success rate  {100 * result["success_rate"]:.2f} %')
    for name in ('efficiency', 'comfort', 'abilities'):
        print(f'{name:13s} {result[name]}')


if __name__ == '__main__':
    sys.exit(main())
