"""The layout of the released VQAThinker and InternVL3 chat code: its config.json and its keys, to ours and back.

Nothing here reads or writes a file, or holds a weight; `models.checkpoints` converts folders.
"""

import re
from collections import Counter
from dataclasses import asdict
from typing import NamedTuple

import torch
from transformers import InternVLConfig

from models.internvl import VQAThinker, VQAThinkerConfig
from models.slowfast import SlowFastConfig

RELEASED = "internvl_chat"  # model_type
MOTION_KEYS = ("motion_mlp.", "slowfast_model.")
RELEASED_KEYS = ("vision_model.", "mlp1.", "language_model.", *MOTION_KEYS)  # what every released key begins with

# ---- configurations

VISION_FIELDS = {  # ours: (released, its default there)
    "hidden_size": ("hidden_size", 3200),
    "num_hidden_layers": ("num_hidden_layers", 48),
    "num_attention_heads": ("num_attention_heads", 25),
    "intermediate_size": ("intermediate_size", 12800),
    "image_size": ("image_size", 224),
    "patch_size": ("patch_size", 14),
    "num_channels": ("num_channels", 3),
    "attention_bias": ("qkv_bias", False),
    "use_qk_norm": ("qk_normalization", True),
    "hidden_act": ("hidden_act", "gelu"),
    "norm_type": ("norm_type", "rms_norm"),
    "layer_norm_eps": ("layer_norm_eps", 1e-6),
    "attention_dropout": ("attention_dropout", 0.0),
    "projection_dropout": ("dropout", 0.0),
    "initializer_range": ("initializer_range", 0.02),
    "layer_scale_init_value": ("initializer_factor", 0.1),
}
TEXT_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_sliding_window",
    "sliding_window",
    "max_window_layers",
    "attention_dropout",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
FIXED = {  # what the released network has no setting for
    "vision_config.use_absolute_position_embeddings": True,
    "vision_config.use_mask_token": False,
    "vision_config.use_mean_pooling": True,
    "vision_feature_select_strategy": "default",
    "projector_hidden_act": "gelu",
    "text_config.model_type": "qwen2",
}


def config_from_released(released: dict) -> InternVLConfig:
    """The network of a released config.json, all but the tokenizer's `image_token_id` and the motion branch.

    Raises ValueError for what the native InternVL cannot be.
    """
    llm, vision = released["llm_config"], released["vision_config"]
    tied = llm.get("tie_word_embeddings", False)
    if llm.get("model_type") != "qwen2":
        raise ValueError(f"llm_config.model_type is {llm.get('model_type')!r}, not 'qwen2'")
    if released.get("ps_version") != "v2":
        raise ValueError(f"ps_version is {released.get('ps_version')!r}, not 'v2': another pixel shuffle")
    rope = {"rope_type": "default", "rope_theta": llm.get("rope_theta", 10000.0)}
    for name, value in (llm.get("rope_scaling") or {}).items():
        rope["rope_type" if name == "type" else name] = value
    config = InternVLConfig(
        vision_config={ours: vision.get(name, default) for ours, (name, default) in VISION_FIELDS.items()},
        text_config={name: llm[name] for name in TEXT_FIELDS if name in llm}
        | {"model_type": "qwen2", "rope_parameters": rope, "tie_word_embeddings": tied},
        downsample_ratio=released.get("downsample_ratio", 0.5),
        vision_feature_layer=released.get("select_layer", -1),
        tie_word_embeddings=tied,
    )
    image_tokens(config, config.vision_config.image_size[0])
    config.image_seq_length = image_tokens(config, image_side(released))
    return config


def image_side(released: dict) -> int:
    """Pixels of a frame's side, which may differ from those that the ViT's position embeddings were made for."""
    return released.get("force_image_size") or released["vision_config"].get("image_size", 224)


def image_tokens(config: InternVLConfig, side: int) -> int:
    """Visual tokens of a frame. Raises ValueError where patches or the pixel shuffle leave something over."""
    patch = config.vision_config.patch_size[0]
    if side % patch:
        raise ValueError(f"image size {side}: not a multiple of the patch, {patch}")
    tokens = side // patch * config.downsample_ratio
    if tokens % 1:
        raise ValueError(f"image size {side}: {side // patch} patches a side, downsampled by {config.downsample_ratio}")
    return int(tokens) ** 2


def config_from_ours(ours: dict) -> InternVLConfig:
    """The network of our config.json but for the motion branch. Raises ValueError for what the released cannot be."""
    config = InternVLConfig.from_dict({k: v for k, v in ours.items() if k not in ("model_type", "motion")})
    for name, value in FIXED.items():
        part, _, field = name.rpartition(".")
        found = getattr(getattr(config, part) if part else config, field)
        if found != value:
            raise ValueError(f"{name} is {found!r}: the released layout has only {value!r}")
    for name in ("image_size", "patch_size"):
        height, width = getattr(config.vision_config, name)
        if height != width:
            raise ValueError(f"vision_config.{name} is {height} x {width}: the released layout has squares only")
    image_tokens(config, config.vision_config.image_size[0])
    return config


def config_to_released(config: InternVLConfig, dtype: str | None, side: int) -> dict:
    """A config.json for the released code, of a network that has none."""
    vision = {name: getattr(config.vision_config, ours) for ours, (name, _) in VISION_FIELDS.items()}
    vision |= {name: vision[name][0] for name in ("image_size", "patch_size")}
    rope = dict(config.text_config.rope_parameters)
    llm = {name: getattr(config.text_config, name) for name in TEXT_FIELDS} | {
        "rope_theta": rope.pop("rope_theta"),
        "rope_scaling": None if rope["rope_type"] == "default" else rope,
        "tie_word_embeddings": config.tie_word_embeddings,
    }
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": RELEASED,
        "torch_dtype": dtype,
        "vision_config": vision
        | {"architectures": ["InternVisionModel"], "model_type": "intern_vit_6b", "torch_dtype": dtype},
        "llm_config": llm | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "torch_dtype": dtype},
        "hidden_size": config.text_config.hidden_size,
        "tie_word_embeddings": config.tie_word_embeddings,
        "downsample_ratio": config.downsample_ratio,
        "select_layer": config.vision_feature_layer,
        "force_image_size": side,
        "ps_version": "v2",
        "template": "internvl2_5",
        "dynamic_image_size": False,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 1,
        "use_thumbnail": False,
        "pad2square": False,
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
    }


# ---- keys

PREFIXES = {  # ours: released
    "model.vision_tower.": "vision_model.",
    "model.multi_modal_projector.layer_norm.": "mlp1.0.",
    "model.multi_modal_projector.linear_1.": "mlp1.1.",
    "model.multi_modal_projector.linear_2.": "mlp1.3.",
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "model.motion_projector.": "motion_mlp.",
    "model.slowfast.": "slowfast_model.",
}
VISION_PARTS = {
    "embeddings.cls_token": "embeddings.class_embedding",
    "embeddings.position_embeddings": "embeddings.position_embedding",
    "embeddings.patch_embeddings.projection": "embeddings.patch_embedding",
    "encoder.layer.": "encoder.layers.",
    "lambda_": "ls",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.projection_layer": "attn.proj",
    "attention.": "attn.",
}
QKV = re.compile(r"\.attention\.[qkv]_proj\.")  # of the ViT
HEAD, EMBEDDING = "lm_head.weight", "model.language_model.embed_tokens.weight"
FIRST_PREFIXES = {
    "language_model.lm_head.": "lm_head.",
    "language_model.model.": "model.language_model.",
    "vision_tower.": "model.vision_tower.",
    "multi_modal_projector.": "model.multi_modal_projector.",
    "motion_projector.": "model.motion_projector.",
    "slowfast.": "model.slowfast.",
}


def released_key(ours: str) -> str:
    """
    >>> released_key("model.vision_tower.encoder.layer.0.attention.q_proj.weight")
    'vision_model.encoder.layers.0.attn.qkv.weight'
    """
    prefix = next(prefix for prefix in PREFIXES if ours.startswith(prefix))
    name = ours.removeprefix(prefix)
    if prefix == "model.vision_tower.":
        name = QKV.sub(".attn.qkv.", name)
        for part, released in VISION_PARTS.items():
            name = name.replace(part, released)
    return PREFIXES[prefix] + name


def state_dict_key(key: str) -> str:
    """Our key as the network's state dict has it; transformers' files may have the names of its first InternVL.

    >>> state_dict_key("language_model.model.norm.weight")
    'model.language_model.norm.weight'
    """
    for old, new in FIRST_PREFIXES.items():
        if key.startswith(old):
            return new + key.removeprefix(old)
    return key


class Layout(NamedTuple):
    """Every key with its shape, and which of ours make a released one: q, k and v, in this order, or one."""

    ours: dict[str, torch.Size]
    released: dict[str, torch.Size]
    sources: dict[str, list[str]]


def meta_network(config: InternVLConfig, motion: SlowFastConfig | None) -> VQAThinker:
    """The network on the meta device: its modules, names and shapes, without memory for a weight."""
    fields = {name: value for name, value in config.to_dict().items() if name != "model_type"}
    with torch.device("meta"):
        return VQAThinker(VQAThinkerConfig.from_dict(fields | {"motion": asdict(motion) if motion else None}))


def layout(config: InternVLConfig, motion: SlowFastConfig | None) -> Layout:
    """The keys of a network, without memory for a weight."""
    ours = {name: value.shape for name, value in meta_network(config, motion).state_dict().items()}
    released, sources = {}, {}
    for name, shape in ours.items():
        key = released_key(name)
        if ".attn.qkv." in key:
            released[key] = torch.Size([3 * shape[0], *shape[1:]])
            sources[key] = [QKV.sub(f".attention.{part}_proj.", name) for part in "qkv"]
        else:
            released[key], sources[key] = shape, [name]
    return Layout(ours, released, sources)


def check_one_to_one(keys: Layout) -> None:
    """Raise a ValueError listing the keys, of ours or released, that do not have exactly one place on the other side.

    Each of ours has to be a source of one released key, each released one has to be made of one or three of ours with
    as many numbers together, and be in a part that the released network has.
    """
    uses = Counter(name for names in keys.sources.values() for name in names)
    problems = {
        "not a source of exactly one": [name for name in keys.ours if uses[name] != 1],
        "a source, but none of ours": sorted(uses.keys() - keys.ours.keys()),
        "not of one or three": [key for key in keys.released if len(keys.sources[key]) not in (1, 3)],
        "of another size than its sources": [
            key
            for key, shape in keys.released.items()
            if shape.numel() != sum(keys.ours[name].numel() for name in keys.sources[key] if name in keys.ours)
        ],
        "in no released part": [key for key in keys.released if not key.startswith(RELEASED_KEYS)],
    }
    found = [f"{problem}: {names[:5]}" for problem, names in problems.items() if names]
    if found:
        raise ValueError(f"keys do not map one to one: {'; '.join(found)}")
