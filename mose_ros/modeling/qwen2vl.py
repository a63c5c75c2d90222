"""Our configuration as Hugging Face's of Qwen2-VL, and theirs as ours."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from transformers import Qwen2VLConfig

from mose_ros.modeling.config import DecoderConfig, DriverConfig, MoseConfig, VisionConfig


def hf_config(vision: VisionConfig, decoder: DecoderConfig, mose: MoseConfig) -> Qwen2VLConfig:
    """Return the same as Hugging Face's configuration; ours travels in its field `mose`."""
    return Qwen2VLConfig(
        text_config={
            'vocab_size': decoder.vocab_size,
            'hidden_size': decoder.width,
            'intermediate_size': decoder.ffn,
            'num_hidden_layers': decoder.layers,
            'num_attention_heads': decoder.heads,
            'num_key_value_heads': decoder.kv_heads,
            'rms_norm_eps': decoder.rms_norm_eps,
            'initializer_range': decoder.initializer_range,
            'rope_parameters': {
                'rope_type': 'default',
                'rope_theta': decoder.rope_theta,
                'mrope_section': list(decoder.mrope_section),
            },
            'bos_token_id': None,
            'eos_token_id': None,
        },
        vision_config={
            'depth': vision.depth,
            'embed_dim': vision.width,
            'hidden_size': decoder.width,
            'mlp_ratio': vision.mlp_ratio,
            'hidden_act': vision.activation,
            'num_heads': vision.heads,
            'patch_size': vision.patch,
            'spatial_merge_size': vision.merge,
            'temporal_patch_size': vision.frames,
            'initializer_range': decoder.initializer_range,
        },
        image_token_id=decoder.image_id,
        video_token_id=-1,  # views are pictures
        tie_word_embeddings=decoder.tied,
        mose=mose_field(vision, mose),
    )


def mose_field(vision: VisionConfig, mose: MoseConfig) -> dict[str, Any]:
    """Return what `MoseQwen2VL` reads in the field `mose` of its configuration, as JSON keeps it."""
    return asdict(mose) | {
        # pairs, as Hugging Face sorts the keys of its JSON
        'levels': [[level, list(skills)] for level, skills in mose.levels.items()],
        'layers': [list(layers) for layers in mose.layers],
        'view': [vision.view_width, vision.view_height],
    }


def sized_like(config: DriverConfig, hf: Qwen2VLConfig) -> DriverConfig:
    """Return the configuration with the sizes of a Qwen2-VL; ValueError, naming them, for options that we do not compute."""
    text, seen = hf.text_config, hf.vision_config
    rope = text.rope_parameters
    _refuse(
        {
            'rope_type': (rope.get('rope_type', 'default'), 'default'),
            'use_sliding_window': (bool(text.use_sliding_window), False),
            'hidden_act': (text.hidden_act, 'silu'),
            'in_channels': (seen.in_channels, 3),
            'vision hidden_size': (seen.hidden_size, text.hidden_size),
            'patch_size': (type(seen.patch_size), int),
            'temporal_patch_size': (type(seen.temporal_patch_size), int),
            'mrope_section': ('mrope_section' in rope, True),
        }
    )
    vision = replace(
        config.vision,
        frames=seen.temporal_patch_size,
        patch=seen.patch_size,
        merge=seen.spatial_merge_size,
        width=seen.embed_dim,
        depth=seen.depth,
        heads=seen.num_heads,
        mlp_ratio=seen.mlp_ratio,
        activation=seen.hidden_act,
    )
    decoder = DecoderConfig(
        width=text.hidden_size,
        layers=text.num_hidden_layers,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        ffn=text.intermediate_size,
        mrope_section=tuple(rope['mrope_section']),
        rope_theta=rope['rope_theta'],
        rms_norm_eps=text.rms_norm_eps,
        tied=hf.tie_word_embeddings,
        initializer_range=text.initializer_range,
        vocab_size=text.vocab_size,
        image_id=hf.image_token_id,
    )
    return replace(config, vision=vision, decoder=decoder)


def _refuse(options: Mapping[str, tuple[Any, Any]]) -> None:
    wrong = [f'{name} {got!r}' for name, (got, known) in options.items() if got != known]
    if wrong:
        raise ValueError(f'a Qwen2-VL with {", ".join(wrong)} is not supported')
