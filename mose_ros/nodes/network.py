"""What view router and driver share: a bundle that is opened at `configure` and can be exchanged while the node runs.

The new bundle is opened and warmed up beside the old one, in a thread of its own; only when that has succeeded does it take
the old one's place, between two frames. So a bad bundle changes nothing but what the service answers.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from std_srvs.srv import Trigger

from mose_ros.core.bundle import MANIFEST, PRECISIONS, sha256
from mose_ros.engine.bundle import Bundle
from mose_ros.nodes.files import shared
from mose_ros.nodes.lifecycle import OK, WARN, ManagedNode, NodeParameters
from mose_ros.nodes.parameters import parameter

T = TypeVar('T')


@dataclass(frozen=True, kw_only=True)
class NetworkParameters(NodeParameters):
    """Parameters of a node that runs a bundle."""

    bundle: str = parameter(
        '',
        'folder of the exported bundle, read again by reload_bundle; empty: models/mose-tiny, which comes with us',
        live=True,
    )
    backend: str = parameter(
        'auto', 'inference backend, as `python -m mose_ros.engine` knows them'
    )
    precision: str = parameter(
        'auto', 'precision that the bundle must have; auto: any', choices=('auto', *PRECISIONS)
    )
    engines: str = parameter('', "folder for what TensorRT builds; empty: the user's cache")
    threads: int = parameter(1, 'threads of one inference', minimum=1, maximum=64)


class NetworkNode(ManagedNode):
    """A managed node with a bundle. `load` makes what runs it, `take` puts that into use."""

    def __init__(self, name: str, kind: type[NetworkParameters], **options):
        super().__init__(name, kind, **options)
        self._is_reloading = False
        service = self._on_reload
        self.create_service(Trigger, '~/reload_bundle', service, callback_group=self.patient)

    def load(self, bundle: Bundle) -> T:
        """Return what runs the bundle, warmed up; ValueError where this node can't take it. Touches nothing that is in use."""
        raise NotImplementedError

    def take(self, loaded: T) -> None:
        """Put into use what `load` returned."""
        raise NotImplementedError

    def open(self) -> T:
        """Open, check and warm up the bundle of the parameters."""
        p = self.parameters
        folder = p.bundle or str(shared('models/mose-tiny'))
        bundle = Bundle.open(folder, backend=p.backend, threads=p.threads, engines=p.engines)
        manifest = bundle.manifest
        if p.precision not in ('auto', manifest.precision):
            raise ValueError(
                f'{folder} is {manifest.precision}, not {p.precision}: export one with that '
                '--precision, or set `precision` to auto'
            )
        loaded = self.load(bundle)
        digest = sha256(Path(folder) / MANIFEST)[:12]
        self.report(
            'bundle',
            OK,
            f'{manifest.name} runs on {bundle.backend}',
            bundle=folder,
            manifest=digest,
            precision=manifest.precision,
            commit=manifest.commit[:12] or 'unknown',
        )
        return loaded

    async def _on_reload(self, request, response):
        if self.state not in ('inactive', 'active') or self._is_reloading:
            said = 'a reload is under way' if self._is_reloading else f'the node is {self.state}'
            response.success, response.message = False, f'nothing reloaded: {said}'
            return response
        self._is_reloading = True
        try:
            loaded = await self.in_thread(self.open)
            if self.state not in ('inactive', 'active'):
                raise ValueError(f'the node has become {self.state}')
            self.take(loaded)
            response.success, response.message = (
                True,
                f'{self.parameters.bundle or "models/mose-tiny"} is in use',
            )
        except Exception as error:  # whatever a bad bundle raises, the old one goes on
            response.success = False
            response.message = f'the old bundle stays in use: {error}'
            self.report('reload', WARN, response.message)
        finally:
            self._is_reloading = False
        if response.success:
            self.report('reload', OK, response.message)
        return response


def give_back_memory() -> None:
    """Return to the system what a freed network held; glibc keeps it otherwise. Does nothing where there is no glibc."""
    trim: Callable | None = getattr(ctypes.CDLL(None), 'malloc_trim', None)
    if trim:
        trim(0)
