"""Loading a policy from a Hugging Face checkpoint (folder or hub name) and saving it as one.

Safetensors only, no remote code. `HF_HUB_OFFLINE=1` is respected: a hub name is then looked for in the local cache.
"""

import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, InternVLForConditionalGeneration
from transformers.utils import logging

from models import shared_prefix
from models.policy import Policy

logging.disable_progress_bar()  # transformers' own bars, one per file read or written
logging.set_verbosity_error()  # and its tables of missing keys: they are an error here, told in one line

ATTENTION = {"text_config": shared_prefix.NAME, "vision_config": "sdpa"}


def check_checkpoint(name: str) -> None:
    """Refuse a local folder that cannot hold a model, before anything is loaded; a ValueError names --model."""
    folder = Path(name)
    if not folder.is_dir():
        if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise ValueError(f"--model {name}: no such folder")
        return  # a hub name
    if not (folder / "config.json").is_file():
        raise ValueError(f"--model {name}: no config.json in this folder")
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"--model {name}: no weights (*.safetensors) in this folder")


def load_policy(
    name: str,
    temperature: float = 1.0,
    autocast: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    gradient_checkpointing: bool = False,
) -> Policy:
    """An InternVL checkpoint in transformers' own format, with float32 parameters, as a `Policy` in training mode.

    Raises ValueError naming --model for a folder without a model, another architecture, or keys missing or left over.
    """
    check_checkpoint(name)
    try:
        config = AutoConfig.from_pretrained(name)
        if config.model_type != "internvl":
            raise ValueError(f"--model {name}: model_type is {config.model_type!r}, not 'internvl'")
        model, report = InternVLForConditionalGeneration.from_pretrained(
            name,
            dtype=torch.float32,
            attn_implementation=ATTENTION,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are reported, and refused below
        )
        processors = AutoTokenizer.from_pretrained(name), AutoImageProcessor.from_pretrained(name)
    except (OSError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"--model {name}: cannot be loaded: {reason}") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[problem]:
            raise ValueError(f"--model {name}: {problem.replace('_', ' ')}: {sorted(map(str, report[problem]))}")
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return Policy(model, *processors, temperature, autocast).to(device).train()


def save_policy(policy: Policy, folder: str | os.PathLike) -> None:
    """Write weights, config, tokenizer and image processor in transformers' format."""
    for part in (policy.model, policy.tokenizer, policy.image_processor):
        part.save_pretrained(folder)
