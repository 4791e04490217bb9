"""Loading a policy from a Hugging Face checkpoint (folder or hub name) and saving it as one.

Safetensors only, no remote code. `HF_HUB_OFFLINE=1` is respected: a hub name is then looked for in the local cache.
"""

import os
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    InternVLConfig,
    InternVLForConditionalGeneration,
    PreTrainedConfig,
)
from transformers.utils import logging

from models import lora, shared_prefix
from models.internvl import REPORTED, VQAThinkerConfig, load_vqathinker, refuse_other_keys
from models.policy import Policy
from models.shapes import check_model_type
from models.slowfast import CLIPS, SlowFast, load_slowfast

logging.disable_progress_bar()  # transformers' own bars, one per file read or written
logging.set_verbosity_error()  # and its tables of missing keys: they are an error here, told in one line

ATTENTION = {"text_config": shared_prefix.NAME, "vision_config": "sdpa"}
PRECISIONS = {  # name: dtype of the parameters, and of autocast if there is any
    "float32": (torch.float32, None),
    "mixed": (torch.float32, torch.bfloat16),
    "bfloat16": (torch.bfloat16, None),
}


def check_checkpoint(name: str) -> None:
    """Refuse a local folder that cannot hold a model, before anything is loaded; a ValueError names --model.

    An adapter is refused too if its base model is, or if peft is not there.
    """
    folder = Path(name)
    if not folder.is_dir():
        if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise ValueError(f"--model {name}: no such folder")
        return  # a hub name
    if not (folder / "config.json").is_file():
        raise ValueError(f"--model {name}: no config.json in this folder")
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"--model {name}: no weights (*.safetensors) in this folder")
    if base := lora.base_of(name):
        lora.check_installed(f"--model {name}")
        try:
            check_checkpoint(base)
        except ValueError as error:
            raise ValueError(f"--model {name}: an adapter of {base}: {error}") from error


def load_policy(
    name: str,
    temperature: float = 1.0,
    precision: str = "float32",
    device: str | torch.device = "cpu",
    gradient_checkpointing: bool = False,
    motion: str | None = None,
    slowfast: str | None = None,
    image_side: int | None = None,
    motion_settings: Mapping[str, int] | None = None,
    motion_clips: bool = False,
    cuda_graph: bool = False,
) -> Policy:
    """A VQAThinker checkpoint, or an InternVL one in transformers' own format, as a `Policy` in training mode.

    Of an adapter (`models.lora`) the base model, with the adapter merged into its weights.

    precision: one of PRECISIONS; SlowFast stays float32 in all, and so do log-probabilities.
    motion: 'slowfast' if there must be a motion token, 'none' to leave out the model's.
    slowfast: for an InternVL, the weights file of SlowFast-R50 (`load_slowfast`): it gets a motion token and a new
    projector. motion_settings: fields of `SlowFastConfig` that replace the model's; motion_clips: with those for dense
    clips. image_side, cuda_graph: see `Policy`.

    Raises ValueError naming --model for a folder without a model, another architecture, or keys missing or left over,
    and --motion, --motion-clips, --slowfast or --image-side where it does not go with the model.
    """
    check_checkpoint(name)
    if motion == "none" and slowfast:
        raise ValueError("--motion none: goes without --slowfast")
    dtype, autocast = PRECISIONS[precision]
    options = {"dtype": dtype, "attn_implementation": ATTENTION}
    try:
        encoder = load_slowfast(slowfast) if slowfast else None
        model = load_network(name, motion, encoder, CLIPS if motion_clips else motion_settings, **options)
        root = lora.root_of(name)
        processors = AutoTokenizer.from_pretrained(root), AutoImageProcessor.from_pretrained(root)
    except (OSError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"--model {name}: cannot be loaded: {reason}") from error
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    policy = Policy(model, *processors, temperature, autocast, image_side, cuda_graph)
    if motion == "slowfast" and not policy.has_motion:
        raise ValueError(f"--motion slowfast: --model {name} has no motion token; --slowfast FILE gives it one")
    return policy.to(device).train()


def load_network(
    name: str, motion: str | None, slowfast: SlowFast | None, settings: Mapping[str, int] | None, **options
) -> InternVLForConditionalGeneration:
    """The network of `load_policy`, whose `motion_settings` are `settings` here."""
    fields = PreTrainedConfig.get_config_dict(name)[0]
    if base := lora.base_of(name):
        return load_merged(name, base, fields.get("motion"), motion, slowfast, settings, **options)
    if slowfast or (fields.get("model_type") == VQAThinkerConfig.model_type and motion != "none"):
        return load_vqathinker(name, slowfast, settings, **options)
    if settings:
        flag = "--motion-clips" if settings == CLIPS else "--motion-recipe"
        raise ValueError(f"{flag}: --model {name} has no motion token")
    return load_internvl(name, **options)


def load_merged(
    name: str,
    base: str,
    own: Mapping[str, int] | None,
    motion: str | None,
    slowfast: SlowFast | None,
    settings: Mapping[str, int] | None,
    **options,
) -> InternVLForConditionalGeneration:
    """The same for an adapter of the network `base`; `own`, the motion settings that it was trained with, if any."""
    if own and motion == "none":
        raise ValueError(f"--motion none: --model {name} is an adapter with a motion projector; merge it first")
    if own and slowfast:
        raise ValueError(f"--slowfast: --model {name} has its own")
    weights = lora.read_weights(name)
    if own:
        slowfast, settings = lora.saved_slowfast(weights, own), {**own, **(settings or {})}
    with warnings.catch_warnings():
        if own:  # the adapter has the projector that a base without motion lacks
            warnings.filterwarnings("ignore", ".*the motion projector is new")
        model = load_network(base, None if own or slowfast else "none", slowfast, settings, **options)
    return lora.merge(model, name, weights)


def load_internvl(name: str, **options) -> InternVLForConditionalGeneration:
    """The InternVL of a checkpoint, without its motion token if it has one; saved, it is one for transformers alone."""
    fields, _ = PreTrainedConfig.get_config_dict(name)
    check_model_type(name, fields)
    fields = {key: value for key, value in fields.items() if key not in ("model_type", "motion", "architectures")}
    config = InternVLConfig.from_dict(fields)
    model, report = InternVLForConditionalGeneration.from_pretrained(name, config=config, **options, **REPORTED)
    parts = ("model.slowfast.", "model.motion_projector.")
    report["unexpected_keys"] = {key for key in report["unexpected_keys"] if not key.startswith(parts)}
    refuse_other_keys(name, report)
    return model


def save_policy(policy: Policy, folder: str | os.PathLike, weights: dict[str, Tensor] | None = None) -> None:
    """Write weights, config, tokenizer and image processor in transformers' format; or an adapter in peft's.

    weights: those of `policy.weights()`, by default themselves; put together, if processes share them.
    """
    if policy.adapter:
        policy.adapter.save(folder, weights or policy.weights())
        return
    policy.model.save_pretrained(folder, state_dict=weights or policy.weights())
    for part in (policy.tokenizer, policy.image_processor):
        part.save_pretrained(folder)
