"""What was measured of a bundle, in its manifest: a summary of each result, with the command that measured it."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mose_ros.core.bundle import Manifest


def of_closed_loop(result: Mapping[str, Any], seeds: str) -> dict[str, Any]:
    """Return success rates (0..1) and driving scores (0..100) of the result, by policy; `seeds` as they were asked for."""
    return {
        'seeds': seeds,
        'excluded': len(result['excluded']),
        'policies': {
            policy: {
                'success_rate': _rounded(figures['success_rate'], 4),
                'driving_score': _rounded(figures['driving_score'], 2),
                'routes': figures['count'],
                'families': {
                    family: _rounded(one['success_rate'], 4)
                    for family, one in figures['families'].items()
                },
            }
            for policy, figures in result['policies'].items()
        },
    }


def of_language(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return F1 of the text by level and accuracies of the routers (0..1) of the result."""
    source = {key: result['config'][key] for key in ('seeds', 'clips') if key in result['config']}
    routers = {
        'view': result['view_router'],
        **result['skill_routers'],
        'action': result['action_router'],
    }
    return {
        **source,
        'frames': result['frames'],
        'f1': {level: _rounded(value, 4) for level, value in result['f1'].items()},
        'router_accuracy': {name: _rounded(one['accuracy'], 4) for name, one in routers.items()},
    }


def record(bundle: str | Path, name: str, figures: Mapping[str, Any]) -> None:
    """Write figures as quality[name] into the bundle's manifest; all else in it stays. BundleError for a changed bundle."""
    manifest = Manifest.load(bundle)
    replace(manifest, quality={**manifest.quality, name: dict(figures)}).write(bundle)


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)
