"""A network of a bundle's shape with random weights, some of it changed, as checkpoint and bundle: what `bench` compares and scales.

`python -m mose_ros.training.twin BUNDLE OUT [--set FIELD=VALUE] [--layers N] [--experts N]` makes OUT/checkpoint and OUT/bundle, which hold the same
weights; what is there already of the same BUNDLE and settings stays. Speed does not depend on weights, so nothing is trained.

A twin of token mixtures reads its experts in groups, one product for each expert's tokens, as engines for GPUs do: lengths
that depend on the data, which ONNX Runtime takes and TensorRT does not. `OUT/block_skill.onnx` and `OUT/block_token.onnx` are then one
mixture of both kinds alone.
"""

import argparse
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from mose_ros.core.bundle import MANIFEST, TOKENIZER, Manifest, sha256
from mose_ros.core.files import write_json
from mose_ros.core.prompt import Tokenizer
from mose_ros.modeling.config import DriverConfig
from mose_ros.modeling.driver import MoseDriver
from mose_ros.modeling.mixture import SkillMixture, TokenMixture
from mose_ros.training.config import override
from mose_ros.training.export import Bundling, export
from mose_ros.training.graphs import OPSET
from mose_ros.training.moments import fake_moments
from mose_ros.training.weights import rounded

CHECKPOINT, BUNDLE, SOURCE = 'checkpoint', 'bundle', 'source.json'
BLOCKS = ('block_skill', 'block_token')
SPREAD = 0.05  # of what makes experts differ, which begin as copies
_LOG = logging.getLogger(__name__)


class GroupedMixture(TokenMixture):
    """A token mixture whose export sorts the tokens by their experts and gives each expert its own in one piece."""

    @classmethod
    def of(cls, mixture: TokenMixture) -> 'GroupedMixture':
        """Return the same mixture, grouped."""
        ffn, width = mixture.gate_proj.weight.shape
        grouped = cls(width, ffn, len(mixture.experts), mixture.expert_weight)
        grouped.load_state_dict(mixture.state_dict())
        return grouped

    def pick(self, chosen: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Give each token to its expert."""
        if not torch.compiler.is_exporting():
            return super().pick(chosen, x)
        owner = chosen.flatten()
        order = owner.argsort()
        rest = x.flatten(0, 1).index_select(0, order)
        counts = (owner[:, None] == torch.arange(len(self.experts))).sum(0)
        done = []
        for expert, count in zip(self.experts, counts.unbind(), strict=True):
            length = count.item()
            torch._check(length >= 0)
            torch._check(length <= rest.shape[0])
            done.append(expert(rest[:length]))
            rest = rest[length:]
        return torch.cat(done).index_select(0, order.argsort()).view(x.shape)


def config_of(
    m: Manifest, settings: Sequence[str] = (), *, layers: int = 0, experts: int = 0
) -> DriverConfig:
    """Return the configuration of a bundle's network, changed; ValueError where the bundle does not say it.

    layers: of the decoder, its mixtures at the same shares of its depth. experts: skills of each level.
    """
    if 'model' not in m.training:
        raise ValueError(
            f'{m.name} does not say in {MANIFEST} what network it was made of; export it anew from its checkpoint'
        )
    config = DriverConfig.from_json(json.dumps(m.training['model']))
    mose = replace(config.mose, levels=_levels(m, experts), layers=_tuples(config.mose.layers))
    decoder = replace(config.decoder, vocab_size=m.vocab_size)
    if layers:
        places = [[(x + 1) * layers // decoder.layers - 1 for x in one] for one in mose.layers]
        mose = replace(mose, layers=_tuples(places))
        decoder = replace(decoder, layers=layers)
    action = replace(config.action, skills=tuple(m.action_skills))
    return override(replace(config, decoder=decoder, mose=mose, action=action), settings)


def _levels(m: Manifest, experts: int) -> Mapping[str, Sequence[str]]:
    if not experts:
        return {level: tuple(skills) for level, skills in m.levels.items()}
    names = ('general', *(f'skill_{index}' for index in range(1, experts)))
    return dict.fromkeys(m.levels, names)


def _tuples(layers: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple(map(tuple, layers))


def random_driver(config: DriverConfig, seed: int = 0) -> MoseDriver:
    """Return a network of random weights, no two experts alike, its token mixtures grouped."""
    torch.manual_seed(seed)
    driver = MoseDriver(config)
    with torch.no_grad():
        for name, weight in driver.named_parameters():
            if 'experts.' in name:
                weight.add_(SPREAD * torch.randn_like(weight))
    for layer in driver.vlm.model.language_model.layers:
        if isinstance(layer.mlp, TokenMixture):
            layer.mlp = GroupedMixture.of(layer.mlp)
    return driver.eval().requires_grad_(False)


def make(
    source: str | Path,
    out: str | Path,
    settings: Sequence[str] = (),
    *,
    layers: int = 0,
    experts: int = 0,
) -> Manifest:
    """Make the twin of a bundle, unless it is there; return its manifest."""
    source, out = Path(source), Path(out)
    m = Manifest.load(source)
    asked = {
        'bundle': sha256(source / MANIFEST),
        'settings': list(settings),
        'layers': layers,
        'experts': experts,
    }
    if _is_made(out, asked):
        _LOG.info('%s is made already', out)
        return Manifest.load(out / BUNDLE)
    image_id = Tokenizer.load(source / TOKENIZER).image_id
    config = config_of(m, settings, layers=layers, experts=experts)
    config = replace(config, decoder=replace(config.decoder, image_id=image_id))
    driver = random_driver(config)
    if m.storage != m.precision:
        driver = rounded(driver)
    out.mkdir(parents=True, exist_ok=True)
    driver.save(out / CHECKPOINT)
    made = export(
        driver,
        out / BUNDLE,
        _bundling(m, source, config, f'{m.name}-{out.name}'),
        moments=fake_moments(m.cameras, 2),
    )
    if config.mose.routing == 'token':
        decoder, mose = config.decoder, config.mose
        sizes = (decoder.width, decoder.ffn, mose.token_experts, mose.expert_weight)
        for name, kind in zip(BLOCKS, (SkillMixture, GroupedMixture), strict=True):
            write_block(out / f'{name}.onnx', kind(*sizes))
    write_json(out / SOURCE, asked)
    return made


def _is_made(out: Path, asked: Mapping[str, Any]) -> bool:
    try:
        return json.loads((out / SOURCE).read_text(encoding='utf-8')) == asked
    except (OSError, ValueError):
        return False


def _bundling(m: Manifest, source: Path, config: DriverConfig, name: str) -> Bundling:
    return Bundling(
        name=name,
        tokenizer=source / TOKENIZER,
        action=m.action_normalizer(),
        proprio=m.proprio_normalizer(),
        anchor=m.anchor,
        fixed_views=m.fixed_views,
        top_k=m.top_k,
        frame_gap=m.frame_gap,
        history=m.history,
        num_steps=m.num_steps,
        noise=m.noise,
        max_new_tokens=m.max_new_tokens,
        precision=m.precision,
        storage=m.storage,
        training={'model': asdict(config), 'weights': 'random'},
        commit=m.commit,
    )


# ---- one mixture alone ----


class _SkillBlock(torch.nn.Module):
    def __init__(self, mixture: SkillMixture):
        super().__init__()
        self.mixture = mixture

    def forward(self, x, chosen):
        return self.mixture(x, chosen)


class _TokenBlock(torch.nn.Module):
    def __init__(self, mixture: GroupedMixture):
        super().__init__()
        self.mixture = mixture

    def forward(self, x):
        return self.mixture(x)[0]


def write_block(path: Path, mixture: SkillMixture) -> None:
    """Write a mixture as a graph: x f32 (1, T, D) and, where it does not choose by itself, chosen i64 (1, 1) in; y out."""
    is_grouped = isinstance(mixture, GroupedMixture)
    inputs = {'x': torch.randn(1, 24, mixture.hidden_size)}
    if not is_grouped:
        inputs['chosen'] = torch.zeros(1, 1, dtype=torch.long)
    block = _TokenBlock(mixture) if is_grouped else _SkillBlock(mixture)
    program = torch.onnx.export(
        block.eval().requires_grad_(False),
        tuple(inputs.values()),
        dynamo=True,
        opset_version=OPSET,
        input_names=list(inputs),
        output_names=['y'],
        dynamic_shapes=tuple({1: 'tokens'} if one == 'x' else None for one in inputs),
        verbose=False,
    )
    path.write_bytes(program.model_proto.SerializeToString())


def main(arguments: Sequence[str] | None = None) -> int:
    """Make a twin; return 0, or 1 with the error on stderr."""
    parser = argparse.ArgumentParser(
        prog='python -m mose_ros.training.twin', description=__doc__.splitlines()[0]
    )
    parser.add_argument('bundle', type=Path, help='whose shape it has')
    parser.add_argument('out', type=Path, help='folder for its checkpoint and bundle')
    parser.add_argument(
        *('--set', '-s'), action='append', default=[], metavar='FIELD=VALUE', dest='settings'
    )
    parser.add_argument('--layers', type=int, default=0, help='of the decoder')
    parser.add_argument('--experts', type=int, default=0, help='skills of each level')
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format='%(message)s', stream=sys.stderr)
    try:
        sizes = {'layers': options.layers, 'experts': options.experts}
        make(options.bundle, options.out, options.settings, **sizes)
    except (ValueError, OSError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
