"""What came of labelling with skills, as figures and for people: coverage, disagreement with the rules, failures, cost."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mose_ros.core.skills import GENERAL, Taxonomy
from mose_ros.data.vlm import LABELLED, MALFORMED, REFUSED, REJECTED

UNANSWERED, SKIPPED = 'unanswered', 'skipped'  # beside a Verdict's: no server, no readable sample
STATUSES = (LABELLED, MALFORMED, REFUSED, REJECTED, UNANSWERED, SKIPPED)


def report(
    head: Mapping[str, Any],
    taxonomy: Taxonomy,
    records: Sequence[Mapping[str, Any]],
    cost: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return what came of a labelling: coverage of each level, disagreement with the rules, failures by kind, cost.

    `head` tells source, annotator and model. `records` are lines of labels.jsonl, `cost` is the bill of a model, if any.
    """
    labelled = [record for record in records if record['status'] == LABELLED]
    asked = cost is not None and all(record['rules'] for record in labelled)
    compared = taxonomy.levels if asked else ()
    statuses = Counter(record['status'] for record in records)
    return {
        **head,
        'samples': len(records),
        'statuses': {status: statuses[status] for status in STATUSES},
        'repaired': sum(record['repairs'] > 0 for record in labelled),
        'general_on_all_levels': sum(
            set(record['skills'].values()) == {GENERAL} for record in labelled
        ),
        'coverage': {level: _coverage(taxonomy, level, labelled) for level in taxonomy.levels},
        'against_rules': {level: _confusion(level, labelled) for level in compared},
        'failures': {
            record['name']: f'{record["status"]}: {record["reason"]}'
            for record in records
            if record['status'] != LABELLED
        },
        'cost': cost,
    }


def _coverage(taxonomy: Taxonomy, level: str, labelled) -> dict[str, int]:
    counts = Counter(record['skills'][level] for record in labelled)
    return {skill: counts[skill] for skill in taxonomy.names(level)}


def _confusion(level: str, labelled) -> dict[str, Any]:
    """Return the share of agreement and, for each skill of the rules, what the annotator said how often."""
    table: dict[str, Counter] = {}
    for record in labelled:
        table.setdefault(record['rules'][level], Counter())[record['skills'][level]] += 1
    same = sum(count[skill] for skill, count in table.items())
    return {
        'agreement': round(same / len(labelled), 4) if labelled else None,
        'confusion': {skill: dict(sorted(table[skill].items())) for skill in sorted(table)},
    }


def describe(found: Mapping[str, Any]) -> str:
    """Return the report for people."""
    by = f'{found["annotator"]} {found["model"]}'.strip()
    lines = [f'{found["samples"]} samples of {found["source"]}, labelled by {by}']
    lines += [f'  {count:6d} {status}' for status, count in found['statuses'].items() if count]
    lines.append(
        f'  {found["repaired"]} after being asked again; '
        f'{found["general_on_all_levels"]} are general on all levels'
    )
    for level, counts in found['coverage'].items():
        against = found['against_rules'].get(level)
        share = against and against['agreement']
        said = '' if share is None else f', {share:.1%} as the rules'
        lines += ['', f'{level}{said}']
        total = max(sum(counts.values()), 1)
        for skill, count in counts.items():
            lines.append(
                f'  {count:6d} {count / total:6.1%}  {skill}{"" if count else "  (unused)"}'
            )
        for rule, row in (against['confusion'] if against else {}).items():
            others = [f'{skill} {count}' for skill, count in row.items() if skill != rule]
            if others:
                lines.append(f'         rules say {rule}, the model: {", ".join(others)}')
    if found['cost']:
        lines += ['', *_describe_cost(found['cost'])]
    lines += ['', *(f'{name}: {why}' for name, why in found['failures'].items())]
    return '\n'.join(lines).rstrip() + '\n'


def _describe_cost(cost: Mapping[str, Any]) -> Iterator[str]:
    for kind in ('paid', 'recalled'):
        one = cost[kind]
        money = '' if one['money'] is None else f', {one["money"]:.4f} at the prices given'
        yield (
            f'{kind}: {one["answers"]} answers, {one["prompt_tokens"]} + {one["completion_tokens"]} tokens{money}'
        )
    if cost['retries']:
        yield f'asked again for: {cost["retries"]}'
