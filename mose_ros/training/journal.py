"""What a stage tells while it trains: means since the last line as JSON lines and for TensorBoard, and what could not be read."""

import json
import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from mose_ros.core.files import write_text

_LOG = logging.getLogger(__name__)
METRICS = 'metrics.jsonl'


class Journal:
    """The metrics of a stage, from all processes; only the leader writes."""

    def __init__(self, folder: Path, accelerator: Accelerator):
        self.path, self._accelerator = folder / METRICS, accelerator
        self.corrupt: Counter[str] = Counter()  # names of samples that could not be read
        self._window: dict[str, list[float]] = {}  # sums and counts since the last line

    def remember(self, values: Mapping[str, float]) -> None:
        """Count values into the means of the next line."""
        for name, value in values.items():
            if math.isfinite(value):  # an accuracy is nan where nothing is known
                total = self._window.setdefault(name, [0.0, 0])
                total[0] += value
                total[1] += 1

    def means(self) -> dict[str, float]:
        """Return the means since the last call, on the leader."""
        self.gather()
        means = {name: total / count for name, (total, count) in self._window.items()}
        self._window = {}
        return means

    def gather(self) -> None:
        """Bring what all processes remember to the leader."""
        told = gather_object([(self._window, self.corrupt)])
        self._window, self.corrupt = {}, Counter()
        for window, corrupt in told if self._accelerator.is_main_process else []:
            self.corrupt += corrupt
            for name, (value, count) in window.items():
                total = self._window.setdefault(name, [0.0, 0])
                total[0] += value
                total[1] += count

    def open(self, step: int) -> None:
        """Show TensorBoard what follows this step."""
        board = {'purge_step': step + 1}
        self._accelerator.init_trackers('tensorboard', init_kwargs={'tensorboard': board})

    def write(self, step: int, seconds: float, values: Mapping[str, Any]) -> None:
        """Add a line."""
        if not self._accelerator.is_main_process:
            return
        line = {'step': step, 'seconds': round(seconds, 1), **values}
        with self.path.open('a', encoding='utf-8') as file:
            file.write(json.dumps(line) + '\n')
        self._accelerator.log(dict(_flat(line)), step=step)

    def close(self) -> None:
        """Finish what TensorBoard shows."""
        for tracker in self._accelerator.trackers:
            tracker.finish()

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {'window': self._window, 'corrupt': self.corrupt}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Undo `state`."""
        self._window, self.corrupt = state['window'], Counter(state['corrupt'])

    def forget(self, step: int) -> None:
        """Drop the lines behind a step: it is done again."""
        lines = self.path.read_text(encoding='utf-8').splitlines() if self.path.is_file() else []
        kept = []
        for number, line in enumerate(lines, 1):
            try:
                done = json.loads(line)['step'] <= step
            except (ValueError, KeyError, TypeError):
                if number < len(lines):
                    raise ValueError(
                        f'{self.path}: line {number} is none of ours; remove it'
                    ) from None
                _LOG.warning('%s: dropped its last line, which is torn', self.path)
                continue
            if done:
                kept.append(line)
        write_text(self.path, ''.join(f'{line}\n' for line in kept))


def _flat(values: Mapping[str, Any], path: str = '') -> Iterator[tuple[str, float]]:
    """Yield the numbers of nested values, named `train/loss`."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f'{path}{name}/')
        else:
            yield f'{path}{name}', value
