"""Offline training from the command line: `python -m mose_ros.training collect|annotate|router|sft|action|export|all|pack|convert|analyse|ablate`.

Everything of a run lies under --work: data/ (clips), router/, sft/, action/ (checkpoints, metrics, model/), bundle/. The same
command again goes on where it was stopped, and does nothing where all is done.

`pack --data DIR --out URL_OR_DIR` packs annotated clips into shards. Stages, export and analyse read from there as well:
--data is a folder or a URL that fsspec knows (s3://bucket/data, https://host/data), packed or not.

`convert HF_DIR --out DIR --preset qwen2vl_2b` makes a MoSE checkpoint of any Qwen2-VL in Hugging Face's format; without
--out it only counts parameters. `convert CHECKPOINT --out DIR --set mose.expert_groups=true` gives a trained MoSE a second
expert for each skill, for the tokens of images.

`export --checkpoint DIR --out models/NAME --json FILE` makes a bundle of any checkpoint, trained or converted, in --precision fp32 or fp16.
It asks for disk and memory first, proves the bundle against PyTorch, on recorded frames where --data has some, and keeps none that differs.

`analyse experts|routing|chains --work DIR` draws what a trained network does with its experts, to WORK/analysis.

`ablate --table language|driving --work DIR --data CLIPS` trains and judges the baselines beside MoSE, and writes the table.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from mose_ros.core.files import write_json
from mose_ros.core.skills import Taxonomy, default_path
from mose_ros.core.types import FAMILIES
from mose_ros.data import storage
from mose_ros.data.cache import FOLDER, LIMIT
from mose_ros.training import (
    pack,
    presets,
    skill_labels,
)
from mose_ros.training.config import parse_seeds
from mose_ros.training.presets import STAGES, Training
from mose_ros.training.run import PRECISIONS, STORAGE, Run, from_options, open_data

_LOG = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; return the exit status."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format='%(levelname)s %(message)s')
    for library in ('OpenGL', 'accelerate', 'onnx_ir', 'onnxscript'):
        logging.getLogger(library).setLevel(logging.WARNING)
    try:
        if storage.is_url(options.out) and options.verb not in ('pack', 'collect'):
            raise ValueError(f'{options.verb} writes to local folders, not to {options.out}')
        if options.verb == 'convert':
            _convert(options)
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
        clusters = options.verb in ('collect', 'annotate', 'all')
        run = Run(training, options)
        if options.address and (not clusters or run.labelling):
            raise ValueError('--address is for collect, and for annotate without --source')
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog='python -m mose_ros.training', description=__doc__)
    parser.add_argument('verb', choices=[*_VERBS, 'all', 'pack', 'convert', 'analyse', 'ablate'])
    parser.add_argument(
        'source',
        nargs='?',
        type=Path,
        help='of convert: what is converted; of analyse: experts, routing or chains',
    )
    parser.add_argument('--preset', default='tiny', help=f'one of {", ".join(presets.PRESETS)}')
    parser.add_argument('--work', type=Path, help='folder of the run (default: runs/PRESET)')
    parser.add_argument(
        '--data',
        type=storage.location,
        help='folder or URL of the clips or their shards, as s3://bucket/data (default: WORK/data); '
        'collect and annotate write there, to a local folder',
    )
    parser.add_argument(
        '--out',
        type=storage.location,
        help='of collect: as --data; of export, convert, analyse: what is made; of pack: folder or URL of the shards',
    )
    parser.add_argument(
        '--shard-mb', type=float, default=pack.SHARD_MB, help='of pack: a shard is no larger'
    )
    parser.add_argument(
        '--cache', type=Path, default=FOLDER, help='where fetched shards are kept (%(default)s)'
    )
    parser.add_argument(
        '--cache-gb', type=float, default=LIMIT / 1e9, help='how much of them (%(default)s)'
    )
    parser.add_argument(
        '--skills', type=Path, help='of convert, annotate: taxonomy (default: config/skills*.yaml)'
    )
    parser.add_argument(
        '--checkpoint', type=Path, help='of export, analyse: the model (default: the last)'
    )
    parser.add_argument(
        '--before',
        type=Path,
        help='of router: the model to begin with, as convert makes it (default: from nothing)',
    )
    parser.add_argument('--table', default='', help='of ablate: language or driving')
    parser.add_argument(
        '--only', action='append', default=[], metavar='ROW', help='of ablate: a row of the table'
    )
    parser.add_argument('--shares', default='', help='of ablate: of the clips, as 0.25,0.5,1')
    parser.add_argument(
        '--routes', default='20000-20004', help='of ablate: seeds that are driven in closed loop'
    )
    parser.add_argument('--clip', default='', help='of analyse chains: name of a clip of the data')
    parser.add_argument(
        '--set', action='append', default=[], metavar='STAGE.FIELD=VALUE', dest='settings'
    )
    parser.add_argument('--seed', type=int, default=0, help='of convert, annotate: what is drawn')
    parser.add_argument('--families', help=f'`all` or some of {",".join(FAMILIES)}')
    parser.add_argument(
        '--seeds',
        help='of collect, as 0-399 or 0-99;parking_exit:0-299 (20000 and more are for evaluation); of ablate, as 0-2',
    )
    parser.add_argument('--processes', type=int, help='of collect, annotate, ablate')
    parser.add_argument(
        '--address',
        default='',
        help='of collect and annotate: a Ray cluster that does it, as auto, host:6379 or ray://host:10001 '
        '(default: processes of this machine, without Ray)',
    )
    parser.add_argument('--policy', default='', help='of collect: a bundle that drives (DAgger)')
    parser.add_argument('--round', type=int, default=0, help='DAgger round to collect or train')
    parser.add_argument(
        '--dagger-rounds', type=int, help="of all: rounds after export (default: the preset's)"
    )
    parser.add_argument(
        '--max-minutes', default='', help='of each stage, as 30 or router=10,sft=10,action=40'
    )
    parser.add_argument('--threads', type=int, default=0, help='of torch (default: all cores)')
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--allow-changes', action='store_true', help='go on with other settings')
    parser.add_argument('--name', default='', help='of the bundle (default: that of --out)')
    parser.add_argument(
        '--precision',
        choices=PRECISIONS,
        default='fp32',
        help='of export: what the graphs compute in; fp16: products in float16, as TensorRT takes them; '
        'int8: products of integers, scaled by the clips of --data; int4: weights of 4 bits',
    )
    parser.add_argument(
        '--storage',
        choices=STORAGE,
        help='of export: fp16 rounds the weights of an fp32 bundle, for half the file (default: the precision)',
    )
    parser.add_argument(
        '--json', type=Path, help='where the parity report of export, the counts of convert go'
    )
    parser.add_argument('--quiet', action='store_true', help='no progress bars')
    skill_labels.add_options(parser)
    return parser


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
    analyse.run(str(options.source or ''), asked, options.out or work / 'analysis')


def _ablate(options) -> None:
    from mose_ros.training import ablate

    work = options.work or Path('runs') / 'ablation'
    if (options.cache, options.cache_gb) != (FOLDER, LIMIT / 1e9):
        raise ValueError(
            'ablate starts trainings that keep shards in the usual cache; leave --cache out'
        )
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
