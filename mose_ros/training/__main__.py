"""Offline training from the command line: clips in, an ONNX bundle out. `VERB --help` says what a verb takes.

Everything of a run lies under --work: data/ (clips), router/, sft/, action/ (checkpoints, metrics, model/), bundle/. The same
command again goes on where it was stopped, and does nothing where all is done. Stages, export and analyse read clips and
shards from folders and from URLs that fsspec knows (s3://bucket/data, https://host/data).
"""

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from mose_ros.core.files import write_json
from mose_ros.core.skills import Taxonomy, default_path
from mose_ros.data import storage
from mose_ros.training import command_line, pack
from mose_ros.training.config import parse_seeds
from mose_ros.training.presets import STAGES, Training
from mose_ros.training.run import Run, from_options, open_data

_LOG = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; return the exit status."""
    options = command_line.parser(__doc__).parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format='%(levelname)s %(message)s')
    for library in ('OpenGL', 'accelerate', 'onnx_ir', 'onnxscript'):
        logging.getLogger(library).setLevel(logging.WARNING)
    try:
        out = getattr(options, 'out', None)
        if storage.is_url(out) and options.verb not in ('pack', 'collect'):
            raise ValueError(f'{options.verb} writes to local folders, not to {out}')
        if options.verb == 'convert':
            _convert(options)
            return 0
        if options.verb == 'restore':
            _restore(options)
            return 0
        training = from_options(options)
        if options.verb == 'pack':
            _pack(training, options)
            return 0
        if options.verb == 'analyse':
            _analyse(training, options)
            return 0
        if options.verb == 'ablate':
            _ablate(options)
            return 0
        run = Run(training, options)
        if options.verb not in STAGES and int(os.environ.get('WORLD_SIZE', '1')) > 1:
            raise ValueError(
                f'{options.verb} starts its own processes; launch only {", ".join(STAGES)} in several'
            )
        for verb in _VERBS if options.verb == 'all' else [options.verb]:
            getattr(run, verb)()
        if options.verb == 'all':
            run.dagger()
    except (ValueError, OSError, FloatingPointError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('stopped; the same command goes on from here', file=sys.stderr)
        return 130
    return 0


_VERBS = ('collect', 'annotate', *STAGES, 'export')


def _pack(training: Training, options) -> None:
    if options.out is None:
        raise ValueError('pack: say with --out where the shards go, a folder or a URL')
    found = pack.pack(
        options.data or (options.work or Path('runs') / training.preset) / 'data',
        options.out,
        shard_mb=options.shard_mb,
        seed=training.data.seed,
        bar=not options.quiet,
    )
    size = sum(one.tar.size for one in found.shards) / 1e9
    clips = sum(len(one.clips) for one in found.shards)
    _LOG.info('%s: %d clips in %d shards, %.2f GB', options.out, clips, len(found.shards), size)


def _convert(options) -> None:
    from mose_ros.modeling import driver
    from mose_ros.training import convert

    source, out, bar = options.source, options.out, not options.quiet
    if source is not None and (source / driver.CONFIG).is_file():
        if out is None:
            raise ValueError(f'{source} is a MoSE already; say with --out where a wider one goes')
        counts = convert.widen(source, out, options.settings, bar=bar)
    else:
        taxonomy = Taxonomy.load(options.skills or default_path())
        given = (options.preset, options.settings)
        if out is None:
            counts = convert.count_only(source, *given, taxonomy=taxonomy)
        elif source is None:
            raise ValueError('convert: name the Qwen2-VL folder, as `convert HF_DIR --out DIR`')
        else:
            counts = convert.convert(
                source, out, *given, taxonomy=taxonomy, seed=options.seed, bar=bar
            )
    if options.json:
        write_json(options.json, counts)
    print(convert.describe(counts))


def _restore(options) -> None:
    from mose_ros.training import restore

    if options.out is None:
        raise ValueError('restore: say with --out where the checkpoint goes')
    restore.restore(options.bundle, options.out, options.seed)


def _analyse(training: Training, options) -> None:
    from mose_ros.training import analyse

    work = options.work or Path('runs') / training.preset
    asked = analyse.Asked(
        checkpoint=options.checkpoint or analyse.newest(work),
        root=open_data(options.data or work / 'data', options, training),
        data=training.data,
        samples=analyse.SAMPLES if options.samples is None else options.samples,
        clip=options.clip,
    )
    analyse.run(options.kind, asked, options.out or work / 'analysis')


def _ablate(options) -> None:
    from mose_ros.training import ablate

    work = options.work or Path('runs') / 'ablation'
    try:
        shares = tuple(float(one) for one in options.shares.split(',') if one)
    except ValueError:
        raise ValueError(f'--shares {options.shares!r}: expected numbers, as 0.25,0.5,1') from None
    made = ablate.ablate(
        ablate.Ablation(
            table=options.table,
            preset=options.preset,
            work=work,
            data=options.data or work / 'data',
            shares=shares,
            seeds=parse_seeds(options.seeds) if options.seeds else (),
            settings=tuple(options.settings),
            only=tuple(options.only),
            families=options.families or 'all',
            routes=options.routes,
            processes=options.processes or 1,
            collects=options.data is None,
            bar=not options.quiet,
        )
    )
    print(made.with_suffix('.md').read_text(encoding='utf-8'), end='')
    _LOG.info('%s', made)


if __name__ == '__main__':
    sys.exit(main())
