"""What takes turns in a measurement: our engine, its text, its graphs, and what the machine can do at best."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter, sleep

import numpy as np

from mose_ros.core.process import TEXT_NICE, lower_priority
from mose_ros.engine import cuda
from mose_ros.engine.bundle import Bundle
from mose_ros.engine.driver import Driver
from mose_ros.engine.peaks import Copy, Gemm
from mose_ros.engine.policy import Policy
from mose_ros.engine.scenery import Scenery
from mose_ros.engine.session import open_session
from mose_ros.engine.turns import Turn
from mose_ros.engine.view_router import ViewRouter

CPU = 'CPU'  # the provider whose peaks are known
LARGE = ('vision', 'prefill')  # the stages that view selection and quantisation are about
PRACTICE = 5  # plans after which a view has its past
TEXT_EVERY = 10  # rounds: a whole text is decoded
COPY_EVERY = 5  # rounds: a copy is measured


@dataclass(frozen=True, kw_only=True)
class Looking:
    """How views are chosen, by all that are compared alike."""

    views: int = 0  # how many are looked at; 0: as the manifest says
    mode: str = 'learned'
    force_view: str = ''

    def __post_init__(self):
        if self.views and self.mode != 'learned':
            raise ValueError(
                f'views: in mode {self.mode!r} their number is given; leave out --views or --mode'
            )

    def at(self, bundle: Bundle) -> Bundle:
        """Return the bundle, made to look at so many views."""
        m = bundle.manifest
        if not self.views:
            return bundle
        fixed = len(m.fixed_views)
        least = fixed + (self.force_view not in ('', *m.fixed_views))
        if not least <= self.views <= len(m.cameras):
            raise ValueError(
                f'views: {m.name} looks at {least} to {len(m.cameras)}, not at {self.views}'
            )
        return replace(bundle, manifest=replace(m, top_k=self.views - fixed))

    def router(self, bundle: Bundle) -> ViewRouter:
        """Return what chooses so."""
        return ViewRouter(self.at(bundle), mode=self.mode, force_view=self.force_view)


class Engine:
    """A bundle on our engine, from the cameras' pictures to the trajectory."""

    def __init__(self, bundle: Bundle, scenery: Scenery, looking: Looking = Looking()):
        """Open it."""
        self.bundle, self.scenery, self.looking = looking.at(bundle), scenery, looking
        self.policy = Policy(looking.router(bundle), Driver(self.bundle))

    def hardware(self) -> dict[str, str]:
        """Return what computes, and the GPU where it is one."""
        provider = self.policy.driver.provider
        if provider == CPU:
            return {'provider': provider}
        gpu = cuda.device()
        return {
            'provider': provider,
            'gpu': gpu.name,
            'gpu_architecture': gpu.architecture,
            'cuda': gpu.cuda,
        }

    def plan(self, index: int) -> Turn:
        """Answer the observation of this number."""
        plan = self.policy.plan(self.scenery(index))
        timings = dict(plan.timings_ms)
        ms = timings.pop('total')
        return Turn(ms=ms, timings=timings, xy=plan.trajectory.xy, views=plan.views)


class Peaks:
    """What the machine can do, measured in between."""

    def __init__(self, threads: int):
        self._gemm, self._copy = Gemm(threads), Copy(threads)
        self._flops: list[float] = []
        self._bytes: list[float] = []

    def plan(self, index: int) -> Turn:
        """Measure a product, and now and then a copy."""
        start = perf_counter()
        self._flops.append(self._gemm.rate())
        if index % COPY_EVERY == 0:
            self._bytes.append(self._copy.rate())
        return Turn(ms=(perf_counter() - start) * 1e3)

    def row(self) -> dict[str, float]:
        """Return FLOP/s and bytes per second: the medians, which what is judged by them is held to, and the best product."""
        return {
            'gemm_flops': float(np.median(self._flops)),
            'gemm_flops_best': float(np.max(self._flops)),
            'copy_bytes': float(np.median(self._bytes)),
        }

    def close(self) -> None:
        """End its threads."""
        self._copy.close()


class Words:
    """The text of our newest plan, now and then."""

    def __init__(self, ours: Engine):
        self._ours = ours
        self.tokens: list[float] = []  # ms of each but the first, which comes from the prefill

    def plan(self, index: int) -> Turn:
        """Decode a whole text every so often."""
        start = perf_counter()
        if index % TEXT_EVERY == 0:
            stamps = [perf_counter() for _ in self._ours.policy.reason()]
            self.tokens += (np.diff(stamps) * 1e3).tolist()
        return Turn(ms=(perf_counter() - start) * 1e3)


class Talking:
    """Our engine while a text is decoded in the slower lane, as the driver node does it: a plan begins in the middle of a token."""

    def __init__(self, ours: Engine):
        """Take an engine of its own, which has planned already: one that has just seen the same pictures need not look again."""
        self._ours, self._random = ours, np.random.default_rng(0)

    def plan(self, index: int) -> Turn:
        """Plan while another thread decodes; that stands aside at its next token."""
        driver = self._ours.policy.driver
        thought = driver.thought
        idle, spoke, over = threading.Event(), threading.Event(), threading.Event()
        idle.set()

        def cancel() -> bool:
            idle.wait(1.0)
            return over.is_set()

        def talk():
            lower_priority(TEXT_NICE)
            while not over.is_set():
                for _ in driver.reason(thought, cancel=cancel):
                    spoke.set()

        thread = threading.Thread(target=talk)
        thread.start()
        try:
            spoke.wait(5.0)
            sleep(self._random.uniform(0, 0.004))
            idle.clear()
            return self._ours.plan(index)
        finally:
            over.set()
            idle.set()
            thread.join()


class Graph:
    """One graph alone on the same inputs; what says which expert is chosen changes from round to round."""

    def __init__(
        self,
        path: Path,
        threads: int,
        experts: int,
        *,
        tokens: int,
        known: Mapping[str, np.ndarray] | None = None,
        repeats: int = 1,
    ):
        """Open it.

        Args:
            experts: whole numbers that are not known choose one of so many.
            tokens: sizes that are not fixed, of inputs that are not known, which are noise.
            known: inputs of a run of a bundle, by name; those with a single axis choose instead.
            repeats: runs in a turn, where one is too short to be timed.
        """
        self._session = open_session(path, backend='onnxruntime', threads=threads, provider='CPU')
        self._repeats, self._experts = repeats, experts
        random = np.random.default_rng(0)
        data = {name: value for name, value in (known or {}).items() if value.ndim > 1}
        self._inputs, self._choosing = {}, []
        for name, port in self._session.inputs.items():
            shape = [tokens if size is None else size for size in port.shape]
            if name in data:
                self._inputs[name] = data[name]
            elif port.dtype == np.int64:
                self._inputs[name] = np.zeros(shape, np.int64)
                self._choosing.append(name)
            else:
                noise = random.standard_normal(shape) / np.sqrt(shape[-1] if shape else 1)
                self._inputs[name] = noise.astype(port.dtype)

    def plan(self, index: int) -> Turn:
        """Run it."""
        for name in self._choosing:
            self._inputs[name][...] = index % self._experts
        start = perf_counter()
        for _ in range(self._repeats):
            self._session.run(self._inputs)
        return Turn(ms=(perf_counter() - start) * 1e3 / self._repeats)
