"""Run a bundle without ROS: python -m mose_ros.engine check|build|bench|run BUNDLE, table REPORT... --into FILE."""

import argparse
import json
import logging
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from mose_ros.core import provenance
from mose_ros.core.bundle import GRAPHS
from mose_ros.core.files import write_json
from mose_ros.core.rig import CAMERAS
from mose_ros.core.types import FAR_M, NEAR_M, Command, EgoState, Guidance, Observation
from mose_ros.engine import bench, memory, session, sweep, tables, twins
from mose_ros.engine.bundle import WORKSPACE, Bundle
from mose_ros.engine.contestants import Engine, Looking
from mose_ros.engine.driver import Driver
from mose_ros.engine.policy import Policy
from mose_ros.engine.scenery import Scenery, grey
from mose_ros.engine.view_router import MODES, ViewRouter

ERRORS = (ValueError, OSError, MemoryError, session.BackendError, FloatingPointError)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return 0, or 1 with the error on stderr."""
    options = _parser().parse_args(arguments)
    level = logging.DEBUG if options.verbose else logging.INFO
    logging.basicConfig(level=level, format='%(message)s', stream=sys.stderr)
    try:
        return options.command_function(options)
    except ERRORS as error:
        print(f'error: {error}', file=sys.stderr)
        return 1


def check(options) -> int:
    """Verify hashes and graphs, then plan twice on grey pictures: both plans must be the same bits."""
    bundle = _open(options)
    m = bundle.manifest
    print(f'{len(m.files)} files as the manifest says')
    router, driver = ViewRouter(bundle), Driver(bundle)
    print('5 graphs as the contract says')
    answers = [_think(router, driver, grey(m)) for _ in range(2)]
    if answers[0] != answers[1]:
        raise ValueError(f'{m.name} does not answer the same picture in the same way twice')
    print('the same plan and the same text twice')
    return 0


def build(options) -> int:
    """Build what the backend needs before it can run the bundle."""
    bundle = _open(options)
    if bundle.backend == 'onnxruntime':
        print(f'{bundle.backend} runs the ONNX files as they are: nothing to build')
        return 0
    for graph in GRAPHS:
        bundle.session(graph)
        print(f'{graph}: its engine is ready')
    return 0


def run_bench(options) -> int:
    """Measure, print the tables, write JSON."""
    bundle = _open(options)
    if options.soak:
        report = _soak(bundle, options)
    elif options.sweep is not None:
        keep = options.json and (lambda report: write_json(options.json, report))
        report = sweep.sweep(
            bundle,
            options.made,
            plans=options.plans,
            warmup=options.warmup,
            axes=options.sweep or sweep.AXES,
            done=sweep.earlier(options.json) if options.json else None,
            keep=keep or (lambda report: None),
        )
    else:
        report = bench.measure(
            bench.Asked(
                bundle=bundle,
                plans=options.plans,
                warmup=options.warmup,
                looking=_looking(options),
                clip=options.clip,
                parts=options.parts,
                compare=options.compare,
                checkpoint=options.checkpoint,
                int8=options.int8,
                selection=options.selection,
                made=options.made,
            )
        )
    report['command'] = shlex.join(['python', '-m', 'mose_ros.engine', *sys.argv[1:]])
    print(tables.render([(bundle.manifest.name, report)]))
    if options.json:
        write_json(options.json, report)
    return 0


def _soak(bundle: Bundle, options) -> dict[str, Any]:
    """Plan very often, and report what memory does."""
    ours = Engine(bundle, Scenery(bundle.manifest, clip=options.clip), _looking(options))
    before = os.getloadavg()[0]
    found = memory.soak(ours, options.soak, _show(options.soak))
    return {
        'bundle': {'name': bundle.manifest.name, 'commit': bundle.manifest.commit},
        'threads': bundle.threads,
        'soak': found,
        'machine': {
            **provenance.machine(),
            **ours.hardware(),
            'load_before': before,
            'load_after': os.getloadavg()[0],
        },
        'versions': provenance.versions(),
        'commit': provenance.commit(),
    }


def _looking(options) -> Looking:
    return Looking(views=options.views, mode=options.mode, force_view=options.view)


def _show(total: int) -> Callable[[int], None]:
    """Return what shows how many of all are done, where somebody looks."""
    if not sys.stderr.isatty():
        return lambda done: None
    return lambda done: print(f'\r{done} of {total}', end='', file=sys.stderr, flush=True)


def make_tables(options) -> int:
    """Put the tables of reports of `bench` into a document, between its marks."""
    reports = []
    for path in options.reports:
        try:
            reports.append((path.stem, json.loads(path.read_text(encoding='utf-8'))))
        except ValueError as error:
            raise ValueError(f'{path} is no report of bench: {error}') from None
    tables.write(reports, options.into)
    return 0


def run(options) -> int:
    """Plan once on picture files, then say why."""
    policy = _load(options)
    paths = {name: getattr(options, name) for name in CAMERAS}
    images = {name: _read_picture(path) for name, path in paths.items() if path}
    if not images:
        raise ValueError('no picture was given; name at least --front FILE')
    guidance = Guidance(
        near=np.array(options.near), far=np.array(options.far), command=Command(options.command)
    )
    ego = EgoState(x=0.0, y=0.0, yaw=0.0, speed=options.speed)
    plan = policy.plan(Observation(time=0.0, images=images, ego=ego, guidance=guidance))
    print('views      ', ', '.join(plan.views))
    print('skills     ', ' > '.join(plan.skills.values()), f'({plan.action_skill})')
    for when, (x, y) in zip(plan.trajectory.times(), plan.trajectory.xy, strict=True):
        print(f'{when:8.2f} s   x {x:7.2f} m   y {y:7.2f} m')
    print('reasoning  ', *list(policy.reason())[-1:])
    print('milliseconds ', '  '.join(f'{k} {v:.1f}' for k, v in plan.timings_ms.items()))
    return 0


def _open(options) -> Bundle:
    return Bundle.open(
        options.bundle,
        backend=options.backend,
        threads=options.threads,
        engines=options.engines,
        workspace=options.workspace << 20,
    )


def _load(options) -> Policy:
    bundle = _open(options)
    router = ViewRouter(bundle, mode=options.mode, force_view=options.view)
    return Policy(router, Driver(bundle))


def _think(router: ViewRouter, driver: Driver, seen: Observation):
    router.reset()
    driver.reset()  # or it would not look again at what it has just seen
    views = router.select(seen.time, seen.images, seen.ego, seen.guidance)
    plan = driver.plan(views, seen.ego, seen.guidance)
    return plan.trajectory.xy.tobytes(), plan.skills, list(driver.reason())


def _read_picture(path: Path) -> np.ndarray:
    picture = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if picture is None:
        raise ValueError(f'{path} cannot be read as a picture')
    return cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog='python -m mose_ros.engine', description=__doc__)
    commands = parser.add_subparsers(required=True, metavar='check|build|bench|table|run')
    for name, function in (('check', check), ('build', build), ('bench', run_bench), ('run', run)):
        command = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
        command.set_defaults(command_function=function)
        command.add_argument('bundle', type=Path, help='folder of the bundle')
        command.add_argument('--backend', choices=session.BACKENDS, default='auto')
        command.add_argument('--threads', type=int, default=2, help='of one run of a graph')
        command.add_argument(
            '--engines', type=Path, metavar='FOLDER', help='for what TensorRT builds'
        )
        command.add_argument(
            '--workspace', type=int, default=WORKSPACE >> 20, metavar='MIB', help='for its builder'
        )
        command.add_argument('--verbose', action='store_true')
        if name in ('bench', 'run'):
            command.add_argument(
                '--mode', choices=MODES, default='learned', help='of choosing views'
            )
            command.add_argument('--view', default='', help='a view to look at whatever its score')
        if name == 'bench':
            _add_bench(command)
        if name == 'run':
            for camera in CAMERAS:
                flag = f'--{camera.replace("_", "-")}'
                command.add_argument(flag, type=Path, metavar='PICTURE', help=f'camera {camera}')
            command.add_argument('--speed', type=float, default=0.0, help='m/s')
            values = [one.value for one in Command]
            command.add_argument('--command', choices=values, default=Command.FOLLOW.value)
            point = {'nargs': 2, 'type': float, 'metavar': ('X', 'Y')}
            command.add_argument('--near', default=(NEAR_M, 0.0), help='route 10 m ahead', **point)
            command.add_argument('--far', default=(FAR_M, 0.0), help='route 25 m ahead', **point)
    table = commands.add_parser('table', help=make_tables.__doc__, description=make_tables.__doc__)
    table.set_defaults(command_function=make_tables, verbose=False)
    table.add_argument('reports', type=Path, nargs='+', metavar='REPORT', help='JSON of bench')
    table.add_argument('--into', type=Path, required=True, help='document, as docs/performance.md')
    return parser


def _add_bench(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add('--plans', type=int, default=200, help='how many are measured')
    add('--warmup', type=int, default=20, help='plans before them')
    add('--views', type=int, default=0, help="how many are looked at (default: the manifest's)")
    add('--clip', default='', help='folder of a recorded clip to look at (default: noise)')
    add(
        '--parts',
        type=_names,
        default=bench.PARTS,
        help=f'what is measured beside the stages, or nothing (default: {",".join(bench.PARTS)})',
    )
    add(
        '--compare',
        type=_names,
        default=(),
        help=f'programs that take turns with ours, of {",".join(bench.COMPARED)}; all but int8 need the '
        'extra mose_ros[train]',
    )
    add(
        '--checkpoint',
        type=Path,
        help='what the bundle was exported from, for PyTorch (default: a twin of random weights)',
    )
    add('--int8', type=Path, metavar='BUNDLE', help='the same network, exported with int8')
    add(
        '--selection',
        type=Path,
        metavar='FOLDER',
        help='graphs that choose an expert, one a way, and constant.onnx',
    )
    add(
        '--made',
        type=Path,
        default=twins.default_folder(),
        metavar='FOLDER',
        help='where networks that are made for it are kept (%(default)s)',
    )
    add(
        '--sweep',
        type=_names,
        nargs='?',
        const=(),
        help=f'how cost grows instead, over {",".join(sweep.AXES)} or some of them; goes on from --json',
    )
    add('--soak', type=int, default=0, metavar='PLANS', help='plan so often instead: memory')
    add('--json', type=Path, help='file for the figures')


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(',') if name.strip())


if __name__ == '__main__':
    sys.exit(main())
