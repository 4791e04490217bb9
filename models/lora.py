"""LoRA on `peft`: low-rank adapters in the text decoder's linear layers, trained in place of its weights.

    python -m models.lora merge ADAPTER OUTPUT [--precision bfloat16]

Of a network with an adapter the low-rank matrices are trained (Hu et al., arXiv 2106.09685) and the motion projector,
in full; all else is frozen. Switched off, the adapter leaves the network as it was loaded, its motion projector too:
the reference policy needs no network of its own.

A checkpoint is a folder in peft's own format and the network's config.json. It names its base model and holds what the
base does not have. peft is imported only where an adapter is made or read.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from models.keys import compare
from models.slowfast import SlowFast, SlowFastConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # peft's names
TARGETS = r"model\.language_model\.layers\.\d+\.(self_attn\.[qkvo]|mlp\.(gate|up|down))_proj"
MOTION_PROJECTOR, SLOWFAST = "motion_projector", "model.slowfast."
PREFIX = "base_model.model."  # of every key in peft's files, before the network's own


def check_installed(flag: str) -> None:
    """Raise a ValueError naming `flag` if peft is not there."""
    if find_spec("peft") is None:
        raise ValueError(f"{flag}: needs peft: pip install 'vqathinker[lora]'")


class Adapter:
    """A new adapter in the layers of `model`, which is changed in place and trains it from now on.

    It begins as no change at all: the second matrix of each pair is zero. The first is drawn with `seed`, and nothing
    else of torch's randomness is touched. Matrices have the dtype and device of the weights that they adapt.

    Args:
        base: name of the model, for who loads the adapter.
        rank: of the matrices, which are (rank, in) and (out, rank).
        alpha: their product is added to a weight alpha / rank times.
        with_slowfast: the base has no SlowFast, so a checkpoint needs the model's.
    """

    def __init__(
        self, model: PreTrainedModel, base: str, rank: int, alpha: int, seed: int = 0, with_slowfast: bool = False
    ):
        check_installed("--lora-rank")
        from peft import LoraConfig

        motion = getattr(model.config, "motion", None) is not None
        options = {"r": rank, "lora_alpha": alpha, "target_modules": TARGETS}
        options["modules_to_save"] = [MOTION_PROJECTOR] if motion else None
        self.config = LoraConfig(base_model_name_or_path=base, **options)
        self.kept = SLOWFAST if with_slowfast else None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.tuner = tuner(model, self.config)

    @contextmanager
    def off(self) -> Iterator[None]:
        """While it lasts the network is the one that the adapter was made for."""
        self.tuner.disable_adapter_layers()
        try:
            yield
        finally:
            self.tuner.enable_adapter_layers()

    def weights(self) -> dict[str, Tensor]:
        """What a checkpoint holds, by peft's names; the tensors are the network's own."""
        return adapter_tensors(self.tuner, self.kept)

    def save(self, folder: str | os.PathLike, weights: dict[str, Tensor]) -> None:
        """Write `weights`, those of `weights()`, in peft's format, and the network's config.json."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        weights = {name: tensor.contiguous() for name, tensor in weights.items()}
        save_file(weights, Path(folder) / WEIGHTS, {"format": "pt"})
        self.config.save_pretrained(folder)
        self.tuner.model.config.save_pretrained(folder)

    def load(self, folder: str | os.PathLike) -> None:
        """Take the weights of a checkpoint of this very adapter, else raise a ValueError naming the folder."""
        copy_weights(read_weights(folder), self.weights(), folder)


def tuner(model: PreTrainedModel, config):
    """peft's `LoraModel` around the model, whose layers it replaces; the adapter's dtypes are those of the layers."""
    from peft import LoraModel

    return LoraModel(model, {"default": config}, "default")


def adapter_tensors(tuner, kept: str | None = None) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict

    found = get_peft_model_state_dict(tuner, save_embedding_layers=False)
    found = {f"base_model.{name}": tensor for name, tensor in found.items()}
    if kept:
        found |= {PREFIX + name: x for name, x in tuner.model.state_dict().items() if name.startswith(kept)}
    return found


# ---- checkpoints


def base_of(name: str) -> str | None:
    """The model that the adapter in the folder `name` is for; None if there is no adapter.

    Raises ValueError naming --model if the folder does not say.
    """
    file = Path(name) / CONFIG
    if not file.is_file():
        return None
    try:
        fields = json.loads(file.read_bytes())
        if fields["peft_type"] != "LORA":
            raise ValueError(f"peft_type is {fields['peft_type']!r}, not 'LORA'")
        if not isinstance(fields["base_model_name_or_path"], str):
            raise ValueError("names no base model")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--model {name}: {CONFIG}: {error}") from error
    return fields["base_model_name_or_path"]


def root_of(name: str) -> str:
    """The model at the end of a chain of adapters, whose tokenizer and image processor are those of all; or `name`."""
    base = base_of(name)
    return name if base is None else root_of(base)


def read_weights(folder: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors of an adapter by peft's names; a ValueError names the file if they cannot be read."""
    file = Path(folder) / WEIGHTS
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file}: cannot be read: {error}") from error


@torch.no_grad()
def copy_weights(saved: dict[str, Tensor], own: dict[str, Tensor], folder: str | os.PathLike) -> None:
    """Copy tensors by name, or raise a ValueError that lists the names and shapes which differ."""
    shapes = ({name: x.shape for name, x in tensors.items()} for tensors in (saved, own))
    if problems := compare(*shapes, set()):
        raise ValueError(f"{folder}: not an adapter of this network: {problems}")
    for name, tensor in own.items():
        tensor.copy_(saved[name])


def saved_slowfast(weights: dict[str, Tensor], settings: dict) -> SlowFast | None:
    """The SlowFast that an adapter brings along, with the `settings` of its config.json; None if its base has one."""
    own = {name.removeprefix(PREFIX + SLOWFAST): x for name, x in weights.items() if SLOWFAST in name}
    if not own:
        return None
    network = SlowFast(SlowFastConfig(**settings))
    network.load_state_dict(own)
    return network


def merge(model: PreTrainedModel, folder: str | os.PathLike, weights: dict[str, Tensor]) -> PreTrainedModel:
    """The base model with the adapter of a folder, whose `weights` were read, in its own weights; it is used up.

    Raises ValueError naming the folder for an adapter of another network.
    """
    from peft import LoraConfig

    tuned = tuner(model, LoraConfig.from_pretrained(folder))
    own = adapter_tensors(tuned)
    copy_weights({name: x for name, x in weights.items() if SLOWFAST not in name}, own, folder)
    return tuned.merge_and_unload().requires_grad_(True)


def main(arguments: list[str] | None = None) -> int:
    from models.checkpoints import new_folder  # both import this module
    from models.loading import load_policy, save_policy

    parser = argparse.ArgumentParser(prog="python -m models.lora", description=__doc__.splitlines()[0])
    command = parser.add_subparsers(required=True).add_parser("merge", help="a whole checkpoint of base and adapter")
    command.add_argument("adapter", metavar="ADAPTER", help="folder of the adapter; it names its base model")
    command.add_argument("output", metavar="OUTPUT", help="folder to make")
    command.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="of the weights")
    args = parser.parse_args(arguments)
    try:
        if base_of(args.adapter) is None:
            raise ValueError(f"ADAPTER {args.adapter}: no {CONFIG} in this folder")
        if Path(args.output).exists():
            raise ValueError(f"OUTPUT {args.output}: exists already")
        policy = load_policy(args.adapter, precision=args.precision)
        with new_folder(Path(args.output)) as folder:
            save_policy(policy, folder)
            recipe = Path(args.adapter) / "recipe.json"
            if recipe.is_file():
                shutil.copy(recipe, folder)
    except (ValueError, OSError) as error:
        print(f"lora: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
