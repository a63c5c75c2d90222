"""Label a subset of any data with skills, by rules or by a vision-language model, and report what came of it.

    python -m mose_ros.training annotate --source coda_lm --data DIR --annotator vlm --url http://host:8000/v1 --model NAME

Writes labels.jsonl (of clips: what `router --labels` trains the routers on), report.json and report.txt. Answers of a model are kept one by one as they
arrive (`data.chat`), so the same command goes on where it was stopped, and pays for nothing twice.
"""

import argparse
import fcntl
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mose_ros.core import skills
from mose_ros.core.files import write_json, write_text
from mose_ros.core.skills import Taxonomy
from mose_ros.data.bench2drive import ClipSource
from mose_ros.data.chat import Client, Endpoint, Unanswered
from mose_ros.data.coda_lm import CodaLmSource
from mose_ros.data.robo2vlm import Robo2VlmSource
from mose_ros.data.skill_samples import SkillSample, Source, check, missing
from mose_ros.data.vlm import LABELLED, Verdict, VlmAnnotator
from mose_ros.training.config import override
from mose_ros.training.skill_report import SKIPPED, UNANSWERED, describe, report

_LOG = logging.getLogger(__name__)
LABELS, REPORT, TEXT = 'labels.jsonl', 'report.json', 'report.txt'
SOURCES = {  # name -> (reader, its taxonomy unless another is given)
    'clips': (ClipSource, 'skills.yaml'),
    'coda_lm': (CodaLmSource, 'skills.yaml'),
    'robo2vlm': (Robo2VlmSource, 'skills_robot.yaml'),
}
SETTINGS = 'labels.'  # before the fields of a Labelling in --set
ANNOTATORS = ('rules', 'vlm')
_KEPT = 'what was answered is kept, the same command goes on from there'
DOWN = 3  # samples in a row without an answer, after which the server counts as gone


@dataclass(frozen=True, kw_only=True)
class Labelling:
    """What is labelled, and by whom."""

    source: str = 'clips'  # one of SOURCES
    annotator: str = 'rules'  # one of ANNOTATORS
    samples: int = 2000  # drawn by seed (MoSE needs 2000); 0: all
    seed: int = 0
    pool: int = 1  # n: draw n times as many and take them evenly over what the rules say
    split: str = 'train'  # of CODA-LM and Robo2VLM
    taxonomy: str | Path = ''  # a file; else the source's own
    repairs: int = 2  # how often a model is told what is wrong with its answer
    vlm: Endpoint = field(default_factory=Endpoint)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what `annotate` needs to label with skills."""
    group = parser.add_argument_group('to label a subset of any data with skills')
    group.add_argument(
        '--source', choices=SOURCES, dest='labelled', help='what --data holds (default: clips)'
    )
    group.add_argument('--annotator', choices=ANNOTATORS, help='who labels (default: rules)')
    group.add_argument('--split', help='of coda_lm and robo2vlm (default: train)')
    group.add_argument(
        '--samples',
        type=int,
        help='how many, drawn by seed (default: 2000; 0: all)',
    )
    group.add_argument('--seed', type=int, default=0, help='of what is drawn')
    group.add_argument('--skills', type=Path, help='taxonomy (default: config/skills*.yaml)')
    group.add_argument(
        '--url', help='of a server with the OpenAI chat API, as http://host:8000/v1'
    )
    group.add_argument('--model', help='name of the vision-language model on that server')


def from_options(options: argparse.Namespace) -> Labelling | None:
    """Return the labelling a command line asks for, or None where it asks for none; `--set labels.FIELD=VALUE` included."""
    settings = [one for one in options.settings if one.startswith(SETTINGS)]
    names = {'labelled': 'source', 'skills': 'taxonomy'}
    names |= {name: name for name in ('annotator', 'split', 'samples')}
    given = {
        field: getattr(options, name)
        for name, field in names.items()
        if getattr(options, name) is not None
    }
    address = {name: getattr(options, name) for name in ('url', 'model') if getattr(options, name)}
    if not (settings or given or address):
        return None
    if not {'source', 'annotator'} & set(given):
        raise ValueError(
            '--samples, --split, --skills, --url, --model: also say --source or --annotator'
        )
    labelling = override(
        Labelling(**given, seed=options.seed), [one.removeprefix(SETTINGS) for one in settings]
    )
    if address and labelling.annotator != 'vlm':
        raise ValueError('--url and --model are for `--annotator vlm`')
    return replace(labelling, vlm=replace(labelling.vlm, **address))


def run(
    labelling: Labelling, root: str | Path, out: str | Path, cache: str | Path, *, bar: bool = True
) -> dict[str, Any]:
    """Label a subset of the data under `root`; return the report, which is also in `out`.

    Samples that can't be read are skipped, named in the log and in the report, and counted. OSError when a model can't be asked.
    """
    taxonomy = open_taxonomy(labelling)
    source = open_source(labelling, root, taxonomy)
    chosen = choose(source, labelling)
    with _annotator(labelling, taxonomy, Path(cache)) as (annotate, client, threads):
        records = _label(source, chosen, annotate, threads, client, bar)
        cost = client.bill() if client else None
    model = labelling.vlm.model if client else ''
    head = {'source': labelling.source, 'annotator': labelling.annotator, 'model': model}
    found = report(head, taxonomy, records, cost)
    Path(out).mkdir(parents=True, exist_ok=True)
    levels = {level: taxonomy.names(level) for level in taxonomy.levels}
    head = {'version': 1, **head, 'levels': levels}
    lines = [json.dumps(line) for line in (head, *records)]
    write_text(Path(out) / LABELS, '\n'.join(lines) + '\n')
    write_json(Path(out) / REPORT, found)
    write_text(Path(out) / TEXT, describe(found))
    return found


def open_taxonomy(labelling: Labelling) -> Taxonomy:
    """Return the taxonomy of a labelling; ValueError names a source that does not exist."""
    if labelling.source not in SOURCES:
        raise ValueError(f'no source {labelling.source!r}; known: {", ".join(SOURCES)}')
    default = SOURCES[labelling.source][1]
    return Taxonomy.load(labelling.taxonomy or skills.default_path(default))


def open_source(labelling: Labelling, root: str | Path, taxonomy: Taxonomy) -> Source:
    """Return the samples of a labelling's source; ValueError where its rules don't know the taxonomy, and label.

    A model may label with any taxonomy; there is nothing to compare it with then.
    """
    reader = SOURCES[labelling.source][0]
    foreign = missing(taxonomy, reader.SKILLS)
    if foreign and labelling.annotator == 'rules':
        raise ValueError(
            f'the rules of {labelling.source} say {", ".join(foreign)}, which the taxonomy lacks; '
            f'take {SOURCES[labelling.source][1]}, or --annotator vlm'
        )
    if foreign:
        _LOG.info('the taxonomy lacks %s: no comparison with rules', ', '.join(foreign))
    split = () if labelling.source == 'clips' else (labelling.split,)
    return reader(root, None if foreign else taxonomy, *split)


def choose(source: Source, labelling: Labelling) -> list[int]:
    """Return the indices of a subset, in order; without a pool, a larger subset of the same seed holds the smaller ones."""
    count = labelling.samples or len(source)
    drawn = np.random.default_rng(labelling.seed).permutation(len(source))
    drawn = drawn[: count * max(labelling.pool, 1)].tolist()
    if len(drawn) > count:
        drawn = _evenly(source, drawn)[:count]
    return sorted(drawn)


def _evenly(source: Source, drawn: Sequence[int]) -> list[int]:
    """Return indices in turns of the skill chains that the rules say; what can't be read is a chain of its own."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for index in drawn:
        try:
            chain = tuple(source.sample(index).rules.values())
        except ValueError:
            chain = ()
        groups.setdefault(chain, []).append(index)
    turns = zip_longest(*groups.values())
    return [index for turn in turns for index in turn if index is not None]


def read(path: str | Path, taxonomy: Taxonomy) -> dict[str, dict[str, str]]:
    """Return the labels of a labels.jsonl by the samples' names; ValueError where one is not of this taxonomy."""
    lines = Path(path).read_text(encoding='utf-8').splitlines()[1:]
    try:
        return {
            record['name']: check(taxonomy, record['skills'])
            for record in map(json.loads, lines)
            if record['status'] == LABELLED
        }
    except (ValueError, KeyError) as error:
        raise ValueError(f'{path}: {error}; label again with this taxonomy') from None


def of_frames(
    path: str | Path, levels: Mapping[str, Sequence[str]]
) -> dict[tuple[str, int], dict[str, str]]:
    """Return the labels of clips' frames, by clip and frame, for a network's levels of skills.

    ValueError for labels of other data, which no stage reads, and for another taxonomy.
    """
    with open(path, encoding='utf-8') as file:
        head = json.loads(file.readline())
    if head['source'] != 'clips':
        raise ValueError(
            f"{path} labels {head['source']}; a stage learns from clips, so only clips' labels train at present: "
            'label some with `annotate --source clips`'
        )
    known = {level: sorted(names) for level, names in levels.items()}
    if {level: sorted(names) for level, names in head['levels'].items()} != known:
        raise ValueError(
            f'{path} is of the skills {head["levels"]}, the network of {dict(levels)}; label again with its taxonomy, by --skills'
        )
    taxonomy = Taxonomy({level: dict.fromkeys(names, '') for level, names in levels.items()})
    named = ((name.rpartition(':'), skills) for name, skills in read(path, taxonomy).items())
    return {(clip, int(frame)): skills for (clip, _, frame), skills in named}


@contextmanager
def _annotator(labelling: Labelling, taxonomy: Taxonomy, cache: Path):
    """Yield what labels a sample, the client it asks if any, and how many threads may do so."""
    if labelling.annotator == 'rules':
        yield lambda sample: Verdict(status=LABELLED, skills=sample.rules), None, 1
        return
    if labelling.annotator != 'vlm':
        raise ValueError(f'no annotator {labelling.annotator!r}; known: {", ".join(ANNOTATORS)}')
    client = Client(labelling.vlm, cache)
    with _alone(cache):
        try:
            annotator = VlmAnnotator(client, taxonomy, repairs=labelling.repairs)
            yield annotator.annotate, client, max(labelling.vlm.concurrency, 1)
        finally:
            client.close()


@contextmanager
def _alone(cache: Path) -> Iterator[None]:
    """Hold the cache for this process: two runs at a time would pay for the same answers."""
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / 'lock').open('a') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f'{cache} is in use by another run; wait for it or end it') from None
        yield


def _label(
    source: Source, chosen: Sequence[int], annotate, threads: int, client: Client | None, bar: bool
) -> list[dict[str, Any]]:
    """Return a record for each chosen sample, in order."""

    def work(index: int) -> dict[str, Any]:
        try:
            sample = source.sample(index)
            return _record(sample, annotate(sample))
        except Unanswered as error:
            return {'name': f'#{index}', 'status': UNANSWERED, 'reason': str(error)}
        except ValueError as error:
            return {'name': f'#{index}', 'status': SKIPPED, 'reason': str(error)}

    finished: dict[int, dict[str, Any]] = {}
    todo, in_a_row = iter(chosen), 0
    with ThreadPoolExecutor(threads) as pool:
        try:
            running = {pool.submit(work, index): index for index in islice(todo, 2 * threads)}
            with tqdm(total=len(chosen), desc='label', unit='sample', disable=not bar) as progress:
                while running:
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        record = finished[running.pop(future)] = future.result()
                        progress.update()
                        running |= {pool.submit(work, index): index for index in islice(todo, 1)}
                        if record['status'] in (SKIPPED, UNANSWERED):
                            _LOG.warning('%(status)s %(name)s: %(reason)s', record)
                        in_a_row = in_a_row + 1 if record['status'] == UNANSWERED else 0
                        if in_a_row == DOWN:
                            raise Unanswered(f'{record["reason"]}; {_KEPT}')
        except (
            BaseException
        ):  # also a key: what is under way has been paid for, so it is waited for
            if client is not None:
                client.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [finished[index] for index in chosen]


def _record(sample: SkillSample, verdict: Verdict) -> dict[str, Any]:
    return {
        'name': sample.name,
        'status': verdict.status,
        'skills': dict(verdict.skills),
        'rules': dict(sample.rules),
        'reason': verdict.reason,
        'repairs': verdict.repairs,
    }
