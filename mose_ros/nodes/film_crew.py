"""Films a drive beside it: takes what the monitor has heard, draws it in a thread of low priority, never in anybody's way."""

import threading
import time

from mose_ros.core.process import lower_priority
from mose_ros.nodes.film import Film, Shot
from mose_ros.nodes.monitor import Moment, Monitor, picture

PATIENCE_S = 0.4  # a frame is filmed with its plan, or without one after so long


class FilmCrew:
    """One film of one drive."""

    def __init__(self, path: str, monitor: Monitor, title: str):
        self._film, self._monitor, self._title = Film(path), monitor, title
        self._filmed, self._first = 0, None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name='film', daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Film what is left, and finish the file."""
        self._done.set()
        self._thread.join(10.0)
        self._film.close()

    def _run(self) -> None:
        lower_priority(10)
        while not self._done.wait(0.03):
            self._film_ready()
        self._film_ready()

    def _film_ready(self) -> None:
        with self._monitor.lock:
            waiting = [item for item in self._monitor.moments.items() if item[0] > self._filmed]
        for stamp, moment in sorted(waiting, key=lambda item: item[0]):
            is_old = time.time() - moment.time > PATIENCE_S
            is_whole = moment.trajectory is not None and 'front' in moment.pictures
            if not (is_whole or is_old):
                return
            self._filmed = stamp
            if 'front' in moment.pictures:
                self._film.add(self._shot(moment))

    def _shot(self, moment: Moment) -> Shot:
        monitor = self._monitor
        self._first = self._first or moment.time
        pictures = {name: picture(msg) for name, msg in moment.pictures.items()}
        return Shot(
            pictures={name: one for name, one in pictures.items() if one is not None},
            views=moment.views,
            trajectory=moment.trajectory,
            skills=moment.skills,
            text=monitor.sentence,
            title=self._title,
            seconds=moment.time - self._first,
            speed=monitor.speed,
            latency_ms=moment.latency_ms,
            is_emergency=monitor.is_emergency,
        )
