"""An opened bundle: its manifest verified, its graphs opened and held against the contract of docs/architecture.md."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mose_ros.core import prompt
from mose_ros.core.bundle import GRAPHS, MANIFEST, TOKENIZER, BundleError, Manifest, sha256
from mose_ros.engine import session
from mose_ros.engine.session import Build, Port, Session

WORKSPACE = 1 << 30
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A verified bundle and how to run it; graphs are opened one by one, by whom needs them."""

    folder: Path
    manifest: Manifest
    backend: str  # a real one, not 'auto'
    threads: int  # of one run of a graph
    engines: Path | None = None  # folder for what TensorRT builds; None: the user's cache
    workspace: int = WORKSPACE  # bytes for its builder

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        backend: str = 'auto',
        threads: int = 2,
        engines: str | Path | None = None,
        workspace: int = WORKSPACE,
    ) -> 'Bundle':
        """Verify a bundle's version and hashes; BundleError or BackendError where it must not or cannot be run."""
        chosen = session.choose_backend(backend)
        manifest = Manifest.load(folder)
        _log.info(
            'bundle %s (manifest %s, commit %s): backend %s, precision %s, %d threads',
            manifest.name,
            sha256(Path(folder) / MANIFEST)[:12],
            manifest.commit[:12] or 'unknown',
            chosen,
            manifest.precision,
            threads,
        )
        return cls(
            folder=Path(folder),
            manifest=manifest,
            backend=chosen,
            threads=threads,
            engines=Path(engines) if engines else None,
            workspace=workspace,
        )

    def session(self, graph: str, *, threads: int | None = None) -> Session:
        """Open one of the graphs; BundleError where its inputs or outputs are not those of the contract."""
        opened = session.open_session(
            self.folder / f'{graph}.onnx',
            backend=self.backend,
            threads=threads or self.threads,
            build=self.build(graph),
        )
        inputs, outputs = contract(self.manifest)[graph]
        for kind, expected, actual in (
            ('input', inputs, opened.inputs),
            ('output', outputs, opened.outputs),
        ):
            wrong = _mismatch(expected, actual)
            if wrong:
                raise BundleError(
                    f'{self.folder / graph}.onnx: {kind} {wrong}; export the bundle again'
                )
        return opened

    def build(self, graph: str) -> Build:
        """Return what a runtime that builds ahead must know of a graph: all of it is the manifest's."""
        m = self.manifest
        others = {TOKENIZER, *(f'{one}.onnx' for one in GRAPHS if one != graph)}
        inputs, _ = contract(m)[graph]
        shapes = {
            name: tuple(
                tuple(size if fixed is None else fixed for fixed in inputs[name].shape)
                for size in sizes
            )
            for name, sizes in dynamic_sizes(m)[graph].items()
        }
        most = max(map(len, [*m.levels.values(), m.action_skills]))
        return Build(
            files={name: digest for name, digest in m.files.items() if name not in others},
            precision=m.precision,
            shapes=shapes,
            values={name: (-1, most) for name in ('skills', 'skill_override') if name in inputs},
            folder=self.engines,
            workspace=self.workspace,
            background=graph == 'decode',  # the text's lane yields to the trajectory's
        )

    def tokenizer(self) -> prompt.Tokenizer:
        """Read the tokenizer; BundleError where it has more tokens than the graphs."""
        tokenizer = prompt.Tokenizer.load(self.folder / TOKENIZER)
        if tokenizer.vocab_size > self.manifest.vocab_size:
            raise BundleError(
                f'{self.folder / TOKENIZER} has {tokenizer.vocab_size} tokens, the graphs know '
                f'{self.manifest.vocab_size}; export the bundle again'
            )
        return tokenizer


def contract(manifest: Manifest) -> Mapping[str, tuple[Mapping[str, Port], Mapping[str, Port]]]:
    """Return each graph's inputs and outputs as docs/architecture.md lists them, None where a size is dynamic."""
    m = manifest
    count, levels, proprio = len(m.cameras), len(m.levels), _f32(1, len(m.proprio))
    carried = np.dtype(m.carried)  # between graphs; at the borders all is float32
    embeds, positions = Port(carried, (None, m.tokens_per_view, m.width)), _i64(3, 1, None)
    action = _f32(1, m.horizon, 2)
    shape = (None, m.view_frames, m.view_height, m.view_width, 3)
    pictures = Port(np.dtype(np.uint8), shape)

    def cache(tokens, *names):
        port = Port(carried, (m.num_layers, 1, m.num_kv_heads, tokens, m.head_dim))
        return dict.fromkeys(names, port)

    past = cache(None, 'past_k', 'past_v')
    level_scores = {
        f'skill_scores_{level}': _f32(1, len(skills)) for level, skills in m.levels.items()
    }
    logits = {'logits': _f32(1, m.vocab_size)}
    return {
        'view_router': (
            {
                'thumbnails': _f32(count, 3, m.thumbnail_height, m.thumbnail_width),
                'present': _f32(count),
                'proprio': proprio,
            },
            {'scores': _f32(count)},
        ),
        'vision': ({'views': pictures}, {'embeds': embeds}),
        'prefill': (
            {
                'input_ids': _i64(1, None),
                'embeds': embeds,
                'position_ids': positions,
                'skill_override': _i64(levels),
            },
            {**logits, **past, 'skills': _i64(levels), **level_scores},
        ),
        'decode': (
            {
                'input_ids': _i64(1, 1),
                'position_ids': _i64(3, 1, 1),
                **past,
                'skills': _i64(levels),
            },
            {**logits, **cache(1, 'new_k', 'new_v')},
        ),
        'action': (
            {
                'noisy': action,
                't': _f32(1),
                'proprio': proprio,
                **past,
                'skill_override': _i64(1),
            },
            {
                'velocity': action,
                'skill_scores': _f32(1, len(m.action_skills)),
                'skill': _i64(1),
            },
        ),
    }


def dynamic_sizes(manifest: Manifest) -> Mapping[str, Mapping[str, tuple[int, int, int]]]:
    """Return each graph's inputs with a dynamic size and its least, usual and largest value."""
    m, n = manifest, manifest.tokens_per_view
    most = len(m.cameras)
    usual = len(m.fixed_views) + m.top_k
    views = (1, usual, most)
    longest = m.max_prompt_tokens
    words = max(1, longest - most * n)
    shortest = min(n + 1, longest)
    prompt_length = max(shortest, min(usual * n + words, longest))
    tokens = (shortest, prompt_length, longest)
    cache = (shortest, prompt_length + m.max_new_tokens // 2, longest + m.max_new_tokens)
    return {
        'view_router': {},
        'vision': {'views': views},
        'prefill': {'input_ids': tokens, 'embeds': views, 'position_ids': tokens},
        'decode': {'past_k': cache, 'past_v': cache},
        'action': {'past_k': tokens, 'past_v': tokens},
    }


def _f32(*shape: int | None) -> Port:
    return Port(np.dtype(np.float32), shape)


def _i64(*shape: int | None) -> Port:
    return Port(np.dtype(np.int64), shape)


def _mismatch(expected: Mapping[str, Port], actual: Mapping[str, Port]) -> str:
    """Return what is wrong with a graph's ports, or nothing; a size that an exporter left open may be any."""
    for name in [*expected, *actual]:
        if name not in actual:
            return f'{name} is missing'
        if name not in expected:
            return f'{name} is not in the contract'
        want, got = expected[name], actual[name]
        fits = len(want.shape) == len(got.shape) and all(
            have is None or have == size for size, have in zip(want.shape, got.shape, strict=True)
        )
        if want.dtype != got.dtype or not fits:
            return f'{name} is {got}, not {want}'
    return ''
