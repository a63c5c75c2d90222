"""Whole training runs: the settings of every stage, and the presets as values."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from mose_ros.core.rig import CAMERAS
from mose_ros.modeling import config as modeling_config
from mose_ros.modeling.batch import LossWeights
from mose_ros.modeling.config import DriverConfig
from mose_ros.sim.looks import CLASSES
from mose_ros.training.config import Collect, Data, override, resolve

STAGES = ('router', 'sft', 'action')
SKILL_LABELS = 2000  # more gave MoSE nothing


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of training.

    A field that is new has what was done before as its default, so that older runs go on.
    """

    steps: int = 1000
    batch_size: int = 32  # samples a step, of all processes and accumulations together
    accumulate: int = (
        1  # parts that a process makes of its samples, one after the other, where memory is short
    )
    gradient_checkpointing: bool = False  # compute what lies between layers again for the backward: a third slower, less memory
    learning_rate: float = 1e-3
    floor: float = 0.02  # the cosine ends at this share of the learning rate
    warmup: int = 100  # steps
    weight_decay: float = 0.02
    beta2: float = 0.98
    clip: float = 1.0  # norm of the gradient
    text_every: int = 1  # steps; in those between, the answers are left out, which is faster
    bfloat16: bool = False  # autocast; needs a CPU or GPU that is faster with it
    ema: float = 0.998  # of the weights, for export; its warm-up is (1 + step) / (10 + step)
    seed: int = 0
    skill_labels: int = (
        0  # samples it learns from, drawn by seed and evenly over the skills; 0: all there are
    )
    trainable: str = 'all'  # 'all', 'routers', 'experts', 'mose' or prefixes of parameters' names, comma-separated
    teacher_forcing: float = 0.0  # share of samples whose skills are the labelled ones
    view_choice: str = 'label'  # who chooses the view that is looked at: the label, or the 'router' (Gumbel, hard)
    losses: LossWeights = field(default_factory=LossWeights)
    # how often, in steps unless said otherwise
    log_every: int = 20
    validate_every: int = 500
    validate_samples: int = 256
    checkpoint_every: int = 500
    checkpoint_minutes: float = 4.0


@dataclass(frozen=True, kw_only=True)
class Training:
    """A whole run."""

    preset: str
    model: DriverConfig  # its vocabulary and skills are filled in from the data
    collect: Collect = field(default_factory=Collect)
    data: Data = field(default_factory=Data)
    router: Stage = field(
        default_factory=lambda: Stage(skill_labels=SKILL_LABELS, teacher_forcing=1.0)
    )
    sft: Stage = field(default_factory=Stage)
    action: Stage = field(default_factory=Stage)
    rounds: tuple[tuple[str, ...], ...] = ()  # of DAgger: the settings that each changes
    asked: tuple[str, ...] = field(
        default=(), compare=False
    )  # the settings of its variants, and those that were typed

    def of_round(self, number: int) -> 'Training':
        """Return the run of a DAgger round: this one with that round's settings; 0 is this one."""
        if number > len(self.rounds) or not number:
            return self
        return override(self, self.rounds[number - 1])

    def network_asked(self) -> dict[str, Any]:
        """Return the fields of the network that somebody asked for, by path, as JSON values: by a setting, or by a model not the preset's."""
        base = self.preset.split('+')[0]
        plain = (
            PRESETS[base]().model if base in PRESETS else modeling_config.PRESETS[self.model.name]
        )
        known, typed = dict(_paths(plain)), {one.partition('=')[0].strip() for one in self.asked}
        return {
            path: value
            for path, value in _paths(self.model)
            if path != 'name' and (value != known[path] or f'model.{path}' in typed)
        }


def _paths(model: DriverConfig) -> Iterator[tuple[str, Any]]:
    for name, value in resolve(model).items():
        inner = value.items() if isinstance(value, dict) else [(None, value)]
        yield from ((f'{name}.{one}' if one else name, found) for one, found in inner)


def _tiny() -> Training:
    # From scratch there is no backbone to keep, so all stages train the whole network: the first gives it eyes (routers,
    # classes of patches, flow), the second adds language, the third trains everything together.
    eyes = LossWeights(
        text=0, routers=0.5, flow=1, action_router=0.2, view_router=0.5, semantics=0.5
    )
    speech = replace(eyes, text=0.5, routers=0.3, view_router=0.3, semantics=0.25)
    deed = replace(eyes, text=0.25, routers=0.2, view_router=0.2, semantics=0.1)
    return Training(
        preset='tiny',
        model=replace(modeling_config.PRESETS['tiny'], semantic_classes=len(CLASSES)),
        collect=Collect(seeds=_seeds(0, 60), semantics_every=3),
        data=Data(balance=0.6, max_weight=8.0),
        router=Stage(
            steps=1000, learning_rate=1.5e-3, losses=eyes, bfloat16=True, teacher_forcing=1.0
        ),
        sft=Stage(
            steps=1000,
            learning_rate=1.2e-3,
            losses=speech,
            bfloat16=True,
        ),
        action=Stage(
            steps=5000,
            learning_rate=1.2e-3,
            losses=deed,
            ema=0.999,
            bfloat16=True,
            text_every=3,
        ),
        rounds=(
            (
                f'collect.seeds={_seeds(1000, 16)}',
                'action.steps=1500',
                'action.learning_rate=1e-3',
            ),
            (
                f'collect.seeds={_seeds(2000, 16)}',
                'action.steps=2500',
                'action.learning_rate=1e-3',
            ),
        ),
    )


def _seeds(first: int, count: int) -> str:
    """Return seeds of all families; twice as many where the car has most to learn, half where it has least."""
    own = {'normal': count // 2, 'overtaking': 2 * count, 'parking_exit': 3 * count}
    named = [f'{name}:{first}-{first + many - 1}' for name, many in own.items()]
    return ';'.join([f'{first}-{first + count - 1}', *named])


def _mini() -> Training:
    # Language first and alone, as its table asks for; the views and the action join in the last stage.
    tiny = _tiny()
    eyes = LossWeights(text=0, routers=0.5, flow=0, action_router=0, view_router=0, semantics=1)
    speech = replace(eyes, text=1, routers=0.3, semantics=0.25)
    short = replace(tiny.sft, steps=500, learning_rate=2e-3, validate_every=10**9, losses=speech)
    return Training(
        preset='mini',
        model=replace(modeling_config.PRESETS['mini'], semantic_classes=len(CLASSES)),
        collect=replace(tiny.collect, seeds='0-19'),
        data=tiny.data,
        router=replace(short, steps=100, losses=eyes, teacher_forcing=1.0),
        sft=short,
        action=replace(
            tiny.action,
            steps=1200,
            learning_rate=2e-3,
            validate_every=10**9,
        ),
    )


def _nano() -> Training:
    short = Stage(
        steps=2,
        batch_size=4,
        warmup=1,
        log_every=1,
        validate_every=2,
        validate_samples=4,
        checkpoint_every=1,
    )
    routers = LossWeights(text=0, flow=0, action_router=0)
    return Training(
        preset='nano',
        model=modeling_config.PRESETS['nano'],
        collect=Collect(seeds='0-0', processes=0, max_seconds=4.0, software_share=0.0),
        data=Data(workers=0, validation_share=0.5),
        router=replace(short, losses=routers, teacher_forcing=1.0),
        sft=replace(short, losses=LossWeights(flow=0, action_router=0)),
        action=replace(short, losses=LossWeights(text=0.25)),
    )


def _qwen2vl_2b() -> Training:
    # The backbone knows pictures and words already: routers first, on few labels; then the MoSE blocks alone (MoSE); then the
    # action with them (learning rate of DriveMoE's first stage). Begins with what `convert` makes. Never trained by us.
    routers = LossWeights(text=0, routers=1, flow=0, action_router=0, view_router=0)
    speech = replace(routers, text=1, routers=0.1)
    deed = LossWeights(text=0.25, routers=0.1, flow=1, action_router=0.2, view_router=0.2)
    large = Stage(
        batch_size=128,
        bfloat16=True,
        gradient_checkpointing=True,
        ema=0.999,
        validate_every=1000,
        checkpoint_every=1000,
        checkpoint_minutes=30.0,
    )
    return Training(
        preset='qwen2vl_2b',
        model=modeling_config.PRESETS['qwen2vl_2b'],
        data=Data(balance=0.6, max_weight=8.0),
        router=replace(
            large,
            steps=200,
            learning_rate=1e-3,
            warmup=20,
            trainable='routers',
            losses=routers,
            skill_labels=SKILL_LABELS,
            teacher_forcing=1.0,
        ),
        sft=replace(
            large,
            steps=3000,
            learning_rate=2e-5,
            trainable='mose',
            losses=speech,
        ),
        action=replace(
            large,
            steps=10000,
            learning_rate=5e-5,
            trainable='mose,action_expert,view_router',
            losses=deed,
        ),
    )


PRESETS = {'tiny': _tiny, 'mini': _mini, 'nano': _nano, 'qwen2vl_2b': _qwen2vl_2b}


def _views(*names: str) -> tuple[str, ...]:
    """Return the settings of a network that always looks at the same views: no router chooses."""
    blind = [f'{stage}.losses.view_router=0' for stage in STAGES]
    return (f'data.fixed_views={",".join(names)}', 'data.top_k=0', *blind)


_PLAIN_ACTION = ('model.action.moe_layers=0',)

# What a run is compared with: the same run with these settings.
VARIANTS = {
    # the language model (MoSE, table 1)
    'sft': ('model.mose.routing=none',),
    'moe_41': ('model.mose.routing=token', 'model.mose.token_experts=4'),
    'moe_81': ('model.mose.routing=token', 'model.mose.token_experts=8'),
    'groups': ('model.mose.expert_groups=true',),
    # the action expert (DriveMoE, granularity)
    'plain_action': _PLAIN_ACTION,
    'token_action': ('model.action.routing=token',),
    # the views (DriveMoE, view ablation)
    'front_only': _views('front'),
    'three_views': _views('front', 'front_left', 'front_right'),
    'all_views': _views(*CAMERAS),
    'glance_front': ('model.glance.glance=front',),
    # both of DriveMoE's mixtures off
    'drive_pi0': (*_views('front'), *_PLAIN_ACTION),
}


def preset(name: str) -> Training:
    """Return a preset, with variants as in `tiny+moe_41+drive_pi0`; ValueError with the known names otherwise."""
    base, *variants = name.split('+')
    for one, known in [(base, PRESETS), *((variant, VARIANTS) for variant in variants)]:
        if one not in known:
            kind = 'preset' if known is PRESETS else 'variant'
            raise ValueError(f'no {kind} {one!r}; known: {", ".join(known)}')
    settings = [setting for variant in variants for setting in VARIANTS[variant]]
    return replace(override(PRESETS[base](), settings), preset=name, asked=tuple(settings))
