"""What can be typed behind `python -m mose_ros.training`: each verb takes the options that it uses, and no other."""

import argparse
from argparse import ArgumentParser
from pathlib import Path

from mose_ros.core.types import FAMILIES
from mose_ros.data import storage
from mose_ros.data.cache import FOLDER, LIMIT
from mose_ros.training import pack, presets, skill_labels
from mose_ros.training.ablate import ROUTES
from mose_ros.training.config import FLOW_STEPS
from mose_ros.training.presets import STAGES
from mose_ros.training.run import PRECISIONS, STORAGE

HELP = {
    'collect': 'record clips: the expert drives in the simulator, or a bundle does (DAgger)',
    'annotate': 'label recorded frames; with --source or --annotator, label any data with skills',
    'router': 'train the routers; from scratch, the eyes with them',
    'sft': 'train the language',
    'action': 'train the action expert, everything else going on',
    'export': 'write the bundle of a trained or converted model, proven against PyTorch',
    'all': "collect, annotate, train all stages, export, and the preset's DAgger rounds",
    'pack': 'pack annotated clips into shards, for a folder or any storage',
    'convert': "make a MoSE checkpoint of any Qwen2-VL in Hugging Face's format",
    'restore': 'make the checkpoint of a bundle anew, to train on from it',
    'analyse': 'draw what a trained network does with its experts',
    'ablate': 'train and judge the baselines beside MoSE, and write the table',
}
# of what is read of every verb's options, whether it takes them or not
EVERYWHERE = {'families': None, 'seeds': None, 'processes': None, 'policy': '', 'round': 0}


def parser(description: str) -> ArgumentParser:
    """Return the parser of all verbs."""
    shape = argparse.RawDescriptionHelpFormatter
    whole = ArgumentParser(
        prog='python -m mose_ros.training', description=description, formatter_class=shape
    )
    verbs = whole.add_subparsers(dest='verb', required=True, metavar='VERB')
    for name, about in HELP.items():
        one = verbs.add_parser(name, help=about, description=f'{about[0].upper()}{about[1:]}.')
        one.set_defaults(**EVERYWHERE)
        _run(one)
        (_stage if name in STAGES else _OF[name])(one)
        if name == 'router':
            _labels(one)
    return whole


# ---- what several verbs take ----


def _run(one: ArgumentParser) -> None:
    known = ', '.join(presets.PRESETS)
    one.add_argument('--preset', default='tiny', help=f'one of {known}, with variants: tiny+sft')
    one.add_argument(
        '--set',
        action='append',
        default=[],
        metavar='STAGE.FIELD=VALUE',
        dest='settings',
        help='change any field of the preset',
    )
    one.add_argument('--quiet', action='store_true', help='no progress bars')


def _work(one: ArgumentParser) -> None:
    one.add_argument('--work', type=Path, help='folder of the run (default: runs/PRESET)')
    one.add_argument(
        '--data',
        type=storage.location,
        help='folder or URL of the clips or their shards, as s3://bucket/data (default: WORK/data); '
        'collect and annotate write there, to a local folder',
    )


def _out(one: ArgumentParser, about: str) -> None:
    one.add_argument('--out', type=storage.location, help=about)


def _cache(one: ArgumentParser) -> None:
    one.add_argument(
        '--cache', type=Path, default=FOLDER, help='where fetched shards are kept (%(default)s)'
    )
    one.add_argument(
        '--cache-gb', type=float, default=LIMIT / 1e9, help='how much of them (%(default)s)'
    )


def _round(one: ArgumentParser) -> None:
    one.add_argument('--round', type=int, default=0, help='number of the DAgger round')


def _drives(one: ArgumentParser) -> None:
    one.add_argument('--families', help=f'`all` or some of {",".join(FAMILIES)}')
    one.add_argument(
        '--seeds', help='as 0-399 or 0-99;parking_exit:0-299 (20000 and more are for evaluation)'
    )


def _pool(one: ArgumentParser) -> None:
    one.add_argument('--processes', type=int, help='how many work at once')
    one.add_argument(
        '--address',
        default='',
        help='a Ray cluster that does it, as auto, host:6379 or ray://host:10001 '
        '(default: processes of this machine, without Ray)',
    )


def _fits(one: ArgumentParser) -> None:
    one.add_argument(
        '--max-minutes', default='', help='of each stage, as 30 or router=10,sft=10,action=40'
    )
    one.add_argument('--threads', type=int, default=0, help='of torch (default: all cores)')
    one.add_argument(
        '--device', default='cpu', help='of torch, as cpu, cuda or cuda:1 (%(default)s)'
    )
    one.add_argument('--allow-changes', action='store_true', help='go on with other settings')


def _before(one: ArgumentParser) -> None:
    one.add_argument(
        '--before',
        type=Path,
        help='the model to begin with, as convert makes it; of `all`, the first stage (default: that of the stage before in '
        'WORK; the first: from nothing)',
    )


def _labels(one: ArgumentParser) -> None:
    one.add_argument(
        '--labels',
        type=Path,
        help='labels.jsonl of `annotate --source clips`, whose frames and skills the routers learn (default: all clips, '
        'as annotate without --source labels them)',
    )


def _bundle(one: ArgumentParser) -> None:
    _out(one, 'folder of the bundle (default: WORK/bundle)')
    one.add_argument('--name', default='', help='of the bundle (default: that of --out)')
    one.add_argument(
        '--precision',
        choices=PRECISIONS,
        default='fp32',
        help='what the graphs compute in; fp16: products in float16, as TensorRT takes them; '
        'int8: products of integers, scaled by the clips of --data; int4: weights of 4 bits',
    )
    one.add_argument(
        '--storage',
        choices=STORAGE,
        help='fp16 rounds the weights of an fp32 bundle, for half the file (default: the precision)',
    )
    one.add_argument(
        '--flow-steps',
        type=int,
        default=FLOW_STEPS,
        help='of the flow, in a plan; `engine bench` says what they cost and move (%(default)s)',
    )
    _json(one, 'the parity report')


def _json(one: ArgumentParser, what: str) -> None:
    one.add_argument('--json', type=Path, help=f'file for {what}')


def _checkpoint(one: ArgumentParser) -> None:
    one.add_argument('--checkpoint', type=Path, help='the model (default: the last of WORK)')


# ---- verbs ----


def _collect(one: ArgumentParser) -> None:
    _work(one)
    _out(one, 'as --data')
    _drives(one)
    _pool(one)
    _round(one)
    one.add_argument('--policy', default='', help='a bundle that drives (DAgger)')


def _annotate(one: ArgumentParser) -> None:
    _work(one)
    _out(one, 'folder of the skill labels (default: WORK/skills/...)')
    _pool(one)
    _cache(one)
    _round(one)
    skill_labels.add_options(one)


def _stage(one: ArgumentParser) -> None:
    _work(one)
    _cache(one)
    _round(one)
    _before(one)
    _fits(one)


def _export(one: ArgumentParser) -> None:
    _work(one)
    _cache(one)
    _round(one)
    _checkpoint(one)
    _bundle(one)


def _all(one: ArgumentParser) -> None:
    _work(one)
    _drives(one)
    _pool(one)
    _cache(one)
    _before(one)
    _labels(one)
    _fits(one)
    _bundle(one)
    one.add_argument('--dagger-rounds', type=int, help="rounds (default: the preset's)")
    one.set_defaults(checkpoint=None)


def _pack(one: ArgumentParser) -> None:
    _work(one)
    _out(one, 'folder or URL of the shards')
    one.add_argument('--shard-mb', type=float, default=pack.SHARD_MB, help='a shard is no larger')


def _convert(one: ArgumentParser) -> None:
    one.add_argument('source', nargs='?', type=Path, help='a Qwen2-VL, or a MoSE to widen')
    _out(one, 'folder of the checkpoint; without, parameters are counted only')
    one.add_argument('--skills', type=Path, help='taxonomy (default: config/skills.yaml)')
    one.add_argument('--seed', type=int, default=0, help='of the weights that are drawn')
    _json(one, 'the counts')
    one.epilog = (
        '`convert CHECKPOINT --out DIR --set mose.expert_groups=true` gives a trained MoSE a second '
        'expert for each skill, for the tokens of images.'
    )


def _restore(one: ArgumentParser) -> None:
    one.add_argument('bundle', type=Path, help='a float32 bundle, as models/mose-tiny')
    _out(one, 'folder of the checkpoint')
    one.add_argument('--seed', type=int, default=0, help='of what no bundle holds')


def _analyse(one: ArgumentParser) -> None:
    one.add_argument('kind', help='experts, routing or chains')
    _work(one)
    _out(one, 'folder of the figures (default: WORK/analysis)')
    _cache(one)
    _checkpoint(one)
    one.add_argument('--samples', type=int, help='of routing: how many (0: all)')
    one.add_argument('--clip', default='', help='of chains: name of a clip of the data')


def _ablate(one: ArgumentParser) -> None:
    _work(one)
    _drives(one)
    one.add_argument('--processes', type=int, help='cells at once')
    one.add_argument('--table', required=True, help='language or driving')
    one.add_argument('--only', action='append', default=[], metavar='ROW', help='a row to make')
    one.add_argument('--shares', default='', help='of the clips, as 0.25,0.5,1')
    one.add_argument('--routes', default=ROUTES, help='seeds that are driven in closed loop')


_OF = {
    'collect': _collect,
    'annotate': _annotate,
    'export': _export,
    'all': _all,
    'pack': _pack,
    'convert': _convert,
    'restore': _restore,
    'analyse': _analyse,
    'ablate': _ablate,
}
