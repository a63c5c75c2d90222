"""Look and think in one call, in lock-step: a bundle as a `core.types.Policy` that also says why."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from time import perf_counter

from mose_ros.core.types import Observation, Plan, Scene
from mose_ros.engine.bundle import Bundle
from mose_ros.engine.driver import Driver
from mose_ros.engine.view_router import ViewRouter


class Policy:
    """Drive by looking, with a bundle."""

    def __init__(self, router: ViewRouter, driver: Driver):
        self.router, self.driver = router, driver
        self.manifest = driver.manifest

    @classmethod
    def load(
        cls,
        folder: str | Path,
        backend: str = 'auto',
        threads: int = 2,
        *,
        mode: str = 'learned',
        force_view: str = '',
    ) -> 'Policy':
        """Open a bundle; arguments as those of `Bundle.open` and `ViewRouter`."""
        bundle = Bundle.open(folder, backend=backend, threads=threads)
        return cls(ViewRouter(bundle, mode=mode, force_view=force_view), Driver(bundle))

    def reset(self) -> None:
        """Forget the previous episode."""
        self.router.reset()
        self.driver.reset()

    def plan(self, observation: Observation, scene: Scene | None = None) -> Plan:
        """Answer one observation; the scene is not looked at. Raises as `ViewRouter.select` and `Driver.plan` do."""
        start = perf_counter()
        ego, guidance = observation.ego, observation.guidance
        views = self.router.select(observation.time, observation.images, ego, guidance)
        glance = (perf_counter() - start) * 1e3
        plan = self.driver.plan(views, ego, guidance)
        total = (perf_counter() - start) * 1e3
        return replace(plan, timings_ms={'glance': glance, **plan.timings_ms, 'total': total})

    def reason(self, *, cancel: Callable[[], bool] = lambda: False) -> Iterator[str]:
        """Yield the growing text about the newest plan; see `Driver.reason`."""
        return self.driver.reason(cancel=cancel)
