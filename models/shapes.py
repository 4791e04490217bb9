"""Networks without their weights: the configs of the InternVL3 sizes, built in, and of any other checkpoint.

The sizes are those of the public config.json files (OpenGVLab/InternVL3-1B, -2B, -8B: InternViT-300M and Qwen2.5 of
0.5B, 1.5B and 7B). None of the three ties its embeddings: only with a head of their own do they have the 0.94, 2.09 and
7.94 billion parameters that their model cards name.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from transformers import InternVLConfig, PreTrainedConfig

from models.slowfast import PUBLIC_URL, SlowFastConfig

VISION = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "image_size": 448,
    "patch_size": 14,
    "attention_bias": True,
    "use_qk_norm": False,
    "norm_type": "layer_norm",
}
TEXT = {
    "model_type": "qwen2",
    "vocab_size": 151674,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 2.0},
    "use_sliding_window": False,
}
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
INTERNVL3 = {
    "OpenGVLab/InternVL3-1B-hf": (896, 24, 14, 2, 4864),
    "OpenGVLab/InternVL3-2B-hf": (1536, 28, 12, 2, 8960),
    "OpenGVLab/InternVL3-8B-hf": (3584, 28, 28, 4, 18944),
}


def read_fields(name: str) -> dict | None:
    """config.json of a folder or of a hub name; None for a name whose sizes are built in.

    Raises ValueError naming --model for a folder without one, a damaged one, and a hub name that cannot be had.
    """
    if name in INTERNVL3:
        return None
    file = Path(name) / "config.json"
    try:
        fields = json.loads(file.read_bytes()) if file.is_file() else PreTrainedConfig.get_config_dict(name)[0]
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or ["unreadable"])[0]
        raise ValueError(f"--model {name}: no config.json to be had: {reason}") from error
    check_model_type(name, fields if isinstance(fields, dict) else {})
    return fields


def check_model_type(name: str, fields: Mapping) -> None:
    """Raise a ValueError naming --model for a config.json of another architecture, or of the released layout."""
    found = fields.get("model_type")
    if found not in ("internvl", "vqathinker"):
        how = f"; python -m models.checkpoints convert {name} FOLDER makes one" if found == "internvl_chat" else ""
        raise ValueError(f"--model {name}: model_type is {found!r}, not 'internvl' or 'vqathinker'{how}")


def network(name: str, motion: str | None = None) -> tuple[InternVLConfig, SlowFastConfig | None]:
    """The network of a checkpoint, and its SlowFast's settings, if it has a motion token or `motion` asks for one.

    Args:
        name: a folder, or a hub name: built in (INTERNVL3), or from the hub's cache, or from the hub.
        motion: as --motion: 'slowfast' for one (as released, where the checkpoint has none), 'none' for none.

    Raises ValueError naming --model for what is no InternVL.
    """
    fields = read_fields(name)
    if fields is None:
        text = {**TEXT, **dict(zip(SIZES, INTERNVL3[name]))}
        config, settings = InternVLConfig(vision_config=dict(VISION), text_config=text, tie_word_embeddings=False), None
    else:
        settings = fields.get("motion")
        try:
            config = InternVLConfig.from_dict({k: v for k, v in fields.items() if k not in ("model_type", "motion")})
            settings = SlowFastConfig(**settings) if settings else None
        except Exception as error:  # transformers' checks of a file have no common class
            raise ValueError(f"--model {name}: config.json: {' '.join(str(error).split())}") from error
    if motion == "none":
        return config, None
    return config, settings or (SlowFastConfig() if motion == "slowfast" else None)


def check_motion(name: str, motion: str | None, slowfast: str | None) -> None:
    """Raise a ValueError naming --slowfast if a motion token is asked for that --model does not have.

    Of a name that is neither built in nor a folder nothing is known before it is loaded; `load_policy` checks it.
    """
    if motion != "slowfast" or slowfast is not None:
        return
    if name not in INTERNVL3 and not (Path(name) / "config.json").is_file():
        return
    if not (read_fields(name) or {}).get("motion"):
        raise ValueError(
            f"--slowfast is needed: --model {name} has no motion token; download {PUBLIC_URL} and give its path, "
            "or go without by --motion none"
        )
