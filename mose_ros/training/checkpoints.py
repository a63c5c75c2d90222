"""The checkpoints of a stage in its folder: whenever the process ended, the newest is whole.

`checkpoint-NNNNNNN` holds what a stage goes on from: the weights (`learner.py`), and in STATE the step and the rest as JSON.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from mose_ros.core.files import write_json
from mose_ros.training import together
from mose_ros.training.learner import Learner

STATE = 'state.json'
CHECKPOINT = 'checkpoint-'


def save(
    folder: Path, step: int, learner: Learner, state: Mapping[str, Any], accelerator: Accelerator
) -> None:
    """Write a checkpoint beside the last one, then remove that. All processes call it; `state` is the leader's.

    Of the same step it has the same weights, so those stay where they are.
    """
    final = folder / f'{CHECKPOINT}{step:07d}'
    partial = final.with_name(final.name + '.partial')
    leads = accelerator.is_main_process
    if together.anyone(accelerator, leads and final.is_dir()):
        if leads:
            write_json(final / STATE, {'step': step, **state})
        return
    if leads:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    learner.save(partial)
    accelerator.wait_for_everyone()
    if leads:
        write_json(partial / STATE, {'step': step, **state})
        os.replace(partial, final)
        remove(folder, but=final)


def newest(folder: Path) -> Path | None:
    """Return the newest whole checkpoint, if there is one."""
    found = sorted(p for p in folder.glob(f'{CHECKPOINT}*') if p.suffix != '.partial')
    return found[-1] if found else None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return what `save` was given, and the step."""
    return json.loads((checkpoint / STATE).read_text(encoding='utf-8'))


def remove(folder: Path, but: Path | None = None) -> None:
    """Remove all checkpoints but one."""
    for old in folder.glob(f'{CHECKPOINT}*'):
        if old != but:
            shutil.rmtree(old)
