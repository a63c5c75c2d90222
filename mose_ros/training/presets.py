"""Whole training runs: the settings of every stage, and the presets as values."""

from dataclasses import dataclass, field, replace

from mose_ros.modeling import config as modeling_config
from mose_ros.modeling.batch import LossWeights
from mose_ros.modeling.config import DriverConfig
from mose_ros.sim.looks import CLASSES
from mose_ros.training.config import Collect, Data

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
    trainable: str = 'all'  # 'all', or prefixes of parameter names, comma-separated
    teacher_forcing: float = 1.0  # share of samples whose skills are the labelled ones
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
    router: Stage = field(default_factory=lambda: Stage(skill_labels=SKILL_LABELS))
    sft: Stage = field(default_factory=Stage)
    action: Stage = field(default_factory=Stage)


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
        collect=Collect(semantics_every=3),
        data=Data(balance=0.6, max_weight=8.0),
        router=Stage(steps=1500, learning_rate=1.5e-3, losses=eyes, bfloat16=True),
        sft=Stage(steps=1500, learning_rate=1.2e-3, losses=speech, bfloat16=True),
        action=Stage(
            steps=6000,
            learning_rate=1.2e-3,
            losses=deed,
            ema=0.999,
            bfloat16=True,
            teacher_forcing=0.7,
            text_every=2,
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
        router=replace(short, losses=routers),
        sft=replace(short, losses=LossWeights(flow=0, action_router=0)),
        action=replace(short, losses=LossWeights(text=0.25)),
    )


PRESETS = {'tiny': _tiny, 'nano': _nano}


def preset(name: str) -> Training:
    """Return a preset; ValueError with the known names otherwise."""
    if name not in PRESETS:
        raise ValueError(f'no preset {name!r}; known: {", ".join(PRESETS)}')
    return PRESETS[name]()
