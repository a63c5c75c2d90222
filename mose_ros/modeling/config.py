"""What a network is made of: frozen dataclasses, presets as values, JSON in and out."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

import torch

from mose_ros.core.action import PROPRIO
from mose_ros.core.prompt import Tokenizer
from mose_ros.core.rig import CAMERAS
from mose_ros.core.skills import GENERAL, Taxonomy, action_skills, default_path
from mose_ros.modeling.batch import Batch, Choices


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """A view in pixels, and the ViT that reads it."""

    view_width: int
    view_height: int
    frames: int = 2  # temporal slots of a patch: the frame before, and now
    patch: int = 14
    merge: int = 2
    width: int
    depth: int
    heads: int
    mlp_ratio: int = 4
    activation: str = 'quick_gelu'  # Qwen2-VL's; 'silu' is faster to train

    @property
    def grid(self) -> tuple[int, int]:
        """Return rows and columns of a view's patches."""
        return self.view_height // self.patch, self.view_width // self.patch

    @property
    def patches(self) -> int:
        """Return N, the patches of a view."""
        return self.grid[0] * self.grid[1]

    @property
    def tokens(self) -> int:
        """Return n, the tokens of a view."""
        return self.patches // self.merge**2

    @property
    def patch_size(self) -> int:
        """Return D, the numbers of a patch."""
        return 3 * self.frames * self.patch**2


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The language model."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    mrope_section: Sequence[int]  # pairs of a head's numbers for time, row and column
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    tied: bool = True  # the output head is the embedding
    initializer_range: float = 0.02  # of all weights, the ViT's too
    vocab_size: int = 512
    image_id: int = 4

    @property
    def head_dim(self) -> int:
        """Return d, the width of a head."""
        return self.width // self.heads


@dataclass(frozen=True, kw_only=True)
class MoseConfig:
    """Which layers are mixtures of experts, and how they choose.

    routing: 'skill', an expert for each sample by its skill on the level (MoSE); 'token', one of `token_experts` for each
    token by a softmax router that learns with them (Switch Transformer; the paper's MoE baselines); 'none', plain FFNs
    (dense SFT). Labels, layers and all else are the same in the three.

    A mixture answers (1 - expert_weight) * shared + expert_weight * chosen. Experts begin as copies of the shared one,
    so a converted network begins as the network it was, with any weight; with weight 0 it stays that.
    """

    levels: Mapping[str, Sequence[str]] = field(
        default_factory=dict
    )  # level -> skills in the order of experts, in order of depth
    layers: Sequence[Sequence[int]] = ()  # of the decoder, for each level, counted from 0
    routing: str = 'skill'
    token_experts: int = 4  # the paper's MoE_41 and MoE_81 have 4 and 8
    router_scope: str = 'level'  # 'level': one decision a level; 'layer': one a layer (the paper)
    expert_weight: float = 0.5
    expert_groups: bool = False  # two experts a skill: one for tokens of images, one for text

    def __post_init__(self):
        if self.router_scope not in ('level', 'layer'):
            raise ValueError(f"router_scope is 'level' or 'layer', not {self.router_scope!r}")
        if self.routing not in ('skill', 'token', 'none'):
            raise ValueError(f"mose.routing is 'skill', 'token' or 'none', not {self.routing!r}")
        if self.routing != 'skill' and self.expert_groups:
            raise ValueError(f"expert_groups need routing 'skill', not {self.routing!r}")
        if self.token_experts < 2:
            raise ValueError(f'token_experts is 2 or more, not {self.token_experts}')
        flat = [layer for group in self.layers for layer in group]
        if self.levels and (len(self.layers) != len(self.levels) or flat != sorted(set(flat))):
            raise ValueError(
                f'need ascending layers for each of {list(self.levels)}, got {list(self.layers)}'
            )

    @property
    def choices(self) -> dict[str, Sequence[str]]:
        """Return what a plan can say of each level: its skills, or 'general' where no skill is chosen."""
        skilled = self.routing == 'skill'
        return {level: names if skilled else (GENERAL,) for level, names in self.levels.items()}

    def level_of(self, layer: int) -> int | None:
        """Return the level of a decoder layer, or None where it is no mixture."""
        for level, layers in enumerate(self.layers):
            if layer in layers:
                return level
        return None


@dataclass(frozen=True, kw_only=True)
class GlanceConfig:
    """The view router: a small CNN on a thumbnail of each camera."""

    width: int = 96  # of a thumbnail, pixels
    height: int = 48
    channels: Sequence[int] = (24, 40, 56, 64)  # each layer halves the picture
    hidden: int = 64
    glance: str = 'all'  # 'all' cameras, or 'front': only the first (DriveMoE)

    def __post_init__(self):
        if self.glance not in ('all', 'front'):
            raise ValueError(f"glance is 'all' or 'front', not {self.glance!r}")


@dataclass(frozen=True, kw_only=True)
class ActionConfig:
    """The action expert: as many layers as the decoder, each looking into that layer's keys and values."""

    width: int
    ffn: int
    horizon: int = 15
    dt: float = 0.2  # seconds between points
    proprio_tokens: int = 2
    skills: Sequence[str] = ()
    moe_layers: int = (
        2  # the last layers are mixtures; 0: none is, and no skill is chosen (Drive-pi0)
    )
    routing: str = 'trajectory'  # one decision for all tokens, or one for each 'token'
    top_k: int = 1
    expert_weight: float = 0.5  # as in MoseConfig
    sigma: float = 0.001  # noise that stays at t = 1 (DriveMoE 1.4)
    time_beta: float = (
        1.5  # training times t = (1 - sigma) (1 - z), z ~ Beta(time_beta, 1); 1: uniform
    )
    flow_samples: int = 4  # times and noises drawn for each trajectory in a training step
    knowledge_insulation: bool = False  # keep the flow's gradients out of the language model

    def __post_init__(self):
        if self.routing not in ('trajectory', 'token'):
            raise ValueError(f"action.routing is 'trajectory' or 'token', not {self.routing!r}")
        if self.moe_layers and self.skills and self.top_k not in range(1, 1 + len(self.skills)):
            raise ValueError(f'action.top_k is {self.top_k} of {len(self.skills)} skills')
        if self.time_beta <= 0:
            raise ValueError(f'action.time_beta must be above 0, not {self.time_beta}')

    @property
    def choices(self) -> Sequence[str]:
        """Return what a plan can say of its acting: a skill, or 'general' without mixtures."""
        return self.skills if self.moe_layers else (GENERAL,)


@dataclass(frozen=True, kw_only=True)
class DriverConfig:
    """The whole network."""

    name: str
    vision: VisionConfig
    decoder: DecoderConfig
    mose: MoseConfig = MoseConfig()
    glance: GlanceConfig = GlanceConfig()
    action: ActionConfig
    cameras: Sequence[str] = CAMERAS
    proprio: int = len(PROPRIO)
    semantic_classes: int = 0  # of the auxiliary loss on patches; 0: no such head

    def __post_init__(self):
        beyond = [x for group in self.mose.layers for x in group if x >= self.decoder.layers]
        if beyond:
            raise ValueError(
                f'mose.layers names {beyond}, but the decoder has layers 0 to {self.decoder.layers - 1}'
            )
        if self.action.moe_layers not in range(self.decoder.layers + 1):
            raise ValueError(
                f'action.moe_layers is {self.action.moe_layers} of {self.decoder.layers} layers'
            )

    def to_json(self) -> str:
        """Return the configuration as JSON."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> 'DriverConfig':
        """Undo `to_json`."""
        data = json.loads(text)
        parts = {
            'vision': VisionConfig,
            'decoder': DecoderConfig,
            'mose': MoseConfig,
            'glance': GlanceConfig,
            'action': ActionConfig,
        }
        return cls(**data | {name: part(**data[name]) for name, part in parts.items()})

    def fake_batch(
        self,
        batch_size: int,
        *,
        views: int = 2,
        answer: int = 12,
        seed: int = 0,
        candidates: int = 0,
    ) -> Batch:
        """Return random moments of the right shapes; prompts of two lengths, answers of `answer` tokens or one less.

        candidates: how many of the last cameras the network may choose the last view from; 0: it is given.
        """
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(shape, generator=generator)

        def below(high, *shape):
            return torch.randint(high, shape, generator=generator)

        image, tokens = self.decoder.image_id, self.vision.tokens
        lengths = 8 + views * tokens + below(2, batch_size)
        ends = lengths + answer - below(2, batch_size)
        total = int(ends.max())
        ids = 5 + below(self.decoder.vocab_size - 5, batch_size, total)
        ids[:, 2 : 2 + views * tokens] = image
        place = torch.arange(total)
        is_token = place < ends[:, None]
        is_answer = is_token & (place >= lengths[:, None])
        cameras, glance = len(self.cameras), self.glance
        semantics = None
        if self.semantic_classes:
            shape = (batch_size, views, self.vision.patches, self.semantic_classes)
            semantics = normal(*shape).softmax(-1)
        attention, answers = is_token.long(), torch.where(is_answer, ids, -100)
        positions = place.expand(3, batch_size, total).contiguous()
        choices = None
        if candidates:
            named = ids[:, None].repeat(1, candidates, 1)
            named[:, :, 1] = 5 + torch.arange(candidates)  # each names its view
            choices = Choices(
                patches=normal(
                    batch_size, candidates, self.vision.patches, self.vision.patch_size
                ),
                input_ids=named,
                attention_mask=attention[:, None].expand(named.shape),
                labels=answers[:, None].expand(named.shape),
                position_ids=positions[:, :, None].expand(3, *named.shape),
                prompt_lengths=lengths[:, None].expand(named.shape[:2]),
                places=torch.arange(cameras - candidates, cameras),
                noise=torch.rand(named.shape[:2], generator=generator),
            )
        return Batch(
            patches=normal(batch_size, views, self.vision.patches, self.vision.patch_size),
            input_ids=ids,
            attention_mask=attention,
            labels=answers,
            position_ids=positions,
            prompt_lengths=lengths,
            proprio=normal(batch_size, self.proprio).clamp(-1, 1),
            action=normal(batch_size, self.action.horizon, 2).clamp(-1, 1),
            skills=torch.stack(
                [below(len(skills), batch_size) for skills in self.mose.levels.values()], 1
            ),
            action_skill=below(len(self.action.skills), batch_size),
            thumbnails=normal(batch_size, cameras, 3, glance.height, glance.width),
            present=torch.ones(batch_size, cameras),
            camera=below(cameras, batch_size),
            semantics=semantics,
            choices=choices,
        )


PRESETS = {
    'tiny': DriverConfig(
        name='tiny',
        vision=VisionConfig(
            view_width=256,
            view_height=128,
            patch=16,
            width=160,
            depth=4,
            heads=5,
            activation='silu',
        ),
        decoder=DecoderConfig(
            width=192,
            layers=6,
            heads=6,
            kv_heads=2,
            ffn=384,
            mrope_section=(4, 6, 6),
            rope_theta=1e4,  # prompts are a hundred tokens long
            initializer_range=0.05,
        ),
        mose=MoseConfig(layers=((1,), (3,), (5,))),
        action=ActionConfig(width=128, ffn=256),
    ),
    # A tiny of half the width: what the tables of `training ablate` train many of. It sees what tiny sees.
    'mini': DriverConfig(
        name='mini',
        vision=VisionConfig(
            view_width=256,
            view_height=128,
            patch=16,
            width=64,
            depth=3,
            heads=2,
            activation='silu',
        ),
        decoder=DecoderConfig(
            width=96,
            layers=6,
            heads=3,
            kv_heads=1,
            ffn=192,
            mrope_section=(4, 6, 6),
            rope_theta=1e4,
            initializer_range=0.05,
        ),
        mose=MoseConfig(layers=((1,), (3,), (5,))),
        glance=GlanceConfig(width=64, height=32, channels=(16, 24, 32), hidden=32),
        action=ActionConfig(width=64, ffn=128),
    ),
    'nano': DriverConfig(
        name='nano',
        vision=VisionConfig(
            view_width=64, view_height=32, patch=8, width=32, depth=1, heads=2, activation='silu'
        ),
        decoder=DecoderConfig(
            width=48,
            layers=4,
            heads=2,
            kv_heads=1,
            ffn=64,
            mrope_section=(4, 4, 4),
            rope_theta=1e4,
        ),
        mose=MoseConfig(layers=((1,), (2,), (3,))),
        glance=GlanceConfig(width=32, height=16, channels=(8, 8), hidden=16),
        action=ActionConfig(width=32, ffn=48, horizon=6, moe_layers=1, flow_samples=2),
    ),
    # Sizes of the published Qwen2-VL-2B; `training convert` takes those of the checkpoint instead. What it has, by
    # `python -m mose_ros.training convert --preset qwen2vl_2b`: 4.87 B in all and 2.78 B active, of which the language
    # model and its ViT 2.62 B, 0.41 B more than before. All fourteen even layers: 5.82 B, 2.94 B, 0.58 B more. With
    # `mose.expert_groups=true`: 7.31 B, 3.19 B, 0.83 B more (the paper: +0.8 B).
    'qwen2vl_2b': DriverConfig(
        name='qwen2vl_2b',
        vision=VisionConfig(view_width=560, view_height=280, width=1280, depth=32, heads=16),
        decoder=DecoderConfig(
            width=1536,
            layers=28,
            heads=12,
            kv_heads=2,
            ffn=8960,
            mrope_section=(16, 24, 24),
            vocab_size=151936,
            image_id=151655,
        ),
        glance=GlanceConfig(width=128, height=64),
        action=ActionConfig(width=512, ffn=2048, moe_layers=4),
    ),
}


def even_layers(depth: int, levels: int) -> tuple[tuple[int, ...], ...]:
    """Return the layers of each level: even-numbered ones, shared out evenly, the first levels taking what is left over.

    The paper's text says all even-numbered layers, its +0.4 B active parameters are ten of Qwen2-VL-2B's 28 (all fourteen:
    +0.58 B). Both hold with the first two sevenths of the depth left alone, and the first router reads what some layers
    have already joined. ValueError when there are fewer even-numbered layers than levels.
    """
    even = range(0, depth, 2)
    if len(even) < levels:
        raise ValueError(
            f'{depth} decoder layers have {len(even)} even-numbered ones for {levels} levels; set mose.layers'
        )
    even = even[min(depth // 7, len(even) - levels) :]
    share, more = divmod(len(even), levels)
    starts = [level * share + min(level, more) for level in range(levels + 1)]
    return tuple(tuple(even[a:b]) for a, b in zip(starts, starts[1:], strict=False))


def with_skills(config: DriverConfig, taxonomy: Taxonomy) -> DriverConfig:
    """Return the configuration for the skills of a taxonomy; layers that are not given are those of `even_layers`."""
    levels = {level: taxonomy.names(level) for level in taxonomy.levels}
    layers = config.mose.layers or even_layers(config.decoder.layers, len(levels))
    return replace(
        config,
        mose=replace(config.mose, levels=levels, layers=layers),
        action=replace(config.action, skills=action_skills(taxonomy)),
    )


def preset(
    name: str,
    *,
    tokenizer: Tokenizer | None = None,
    taxonomy: Taxonomy | None = None,
    **changes,
) -> DriverConfig:
    """Return a preset for a vocabulary and a taxonomy (default: config/skills.yaml), with fields of DriverConfig changed."""
    if name not in PRESETS:
        raise ValueError(f'no preset {name!r}; known: {", ".join(PRESETS)}')
    config = replace(PRESETS[name], **changes)
    if tokenizer is not None:
        decoder = replace(
            config.decoder, vocab_size=tokenizer.vocab_size, image_id=tokenizer.image_id
        )
        config = replace(config, decoder=decoder)
    return with_skills(config, taxonomy or Taxonomy.load(default_path()))
