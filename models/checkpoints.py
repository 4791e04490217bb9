"""Checkpoints of the released VQAThinker and InternVL3 chat code, in and out of transformers' InternVL layout.

    python -m models.checkpoints convert SRC DST [--motion-recipe train|test]

SRC's config.json tells the direction: a released folder (model_type internvl_chat) becomes one that `models.loading`
loads, and such a folder becomes a released one, with the same bytes in every tensor. Nothing is written before all keys
and shapes have been checked from the headers, and DST appears whole or not at all. Weights are streamed: no more than a
shard is in memory. Safetensors only, no remote code.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, InternVLConfig, PreTrainedTokenizerBase

from models.keys import compare
from models.lora import CONFIG as ADAPTER_CONFIG
from models.released import (
    EMBEDDING,
    HEAD,
    MOTION_KEYS,
    RELEASED,
    config_from_ours,
    config_from_released,
    config_to_released,
    image_side,
    image_tokens,
    layout,
    released_key,
    state_dict_key,
)
from models.slowfast import RECIPES, SlowFastConfig

OURS = ("vqathinker", "internvl")  # model_type
MOTION_RECIPES = {name: SlowFastConfig(**fields) for name, fields in RECIPES.items()}
SPECIAL_TOKENS = ("<img>", "</img>", "<IMG_CONTEXT>", "<|im_end|>")
SHARD_BYTES = 4 * 10**9

CONFIG, GENERATION_CONFIG, INDEX = "config.json", "generation_config.json", "model.safetensors.index.json"
KEPT_CONFIG = "released_config.json"  # beside our config.json: where a folder was converted from, for the way back
COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    GENERATION_CONFIG,
    "recipe.json",
)
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
PREPROCESSOR_CONFIG = "preprocessor_config.json"
PREPROCESSOR = {
    "image_processor_type": "GotOcr2ImageProcessor",
    "crop_to_patches": False,
    "do_convert_rgb": True,
    "do_resize": True,
    "resample": 3,  # bicubic
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}
CHATML = (  # the released code's `internvl2_5` conversation, for a tokenizer without a template
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# ---- weights


class Stored(NamedTuple):
    """A tensor of a checkpoint folder, from its file's header."""

    file: Path
    key: str
    dtype: str
    shape: torch.Size

    def read(self) -> Tensor:
        with safe_open(self.file, "pt") as file:
            return file.get_tensor(self.key)


def read_headers(folder: Path) -> dict[str, Stored]:
    """The tensors of a folder by key. Raises ValueError for files that are missing, damaged or not safetensors."""
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX)
        if not isinstance(index.get("weight_map"), dict):
            raise ValueError(f"{folder / INDEX}: no weight_map")
        files = [folder / name for name in sorted(set(index["weight_map"].values()))]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = sorted(file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth"))
        if pickles:
            raise ValueError(f"{folder / pickles[0]}: a pickle, which may run code; only safetensors are read")
        raise ValueError(f"{folder}: no weights (*.safetensors) in this folder")
    tensors: dict[str, Stored] = {}
    for file in files:
        if not file.is_file():
            raise ValueError(f"{folder / INDEX}: names {file.name}, which is not there")
        try:
            with safe_open(file, "pt") as opened:
                for key in opened.keys():  # noqa: SIM118
                    if key in tensors:
                        raise ValueError(f"{file}: has {key}, and so has {tensors[key].file.name}")
                    part = opened.get_slice(key)
                    tensors[key] = Stored(file, key, part.get_dtype(), torch.Size(part.get_shape()))
        except SafetensorError as error:
            raise ValueError(f"{file}: not whole safetensors: {error}") from error
    return tensors


def check_keys(source: Path, found: dict[str, Stored], expected: dict[str, torch.Size], optional: set[str]) -> None:
    """Raise a ValueError that lists what does not match."""
    problems = compare({key: stored.shape for key, stored in found.items()}, expected, optional)
    if problems:
        raise ValueError(f"{source}: its weights are not those of its {CONFIG}: {problems}")


# ---- folders


def read_json(file: Path) -> dict:
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file}: not a JSON object")
    return value


def write_json(value: dict, file: Path) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_tokenizer(folder: Path, config: InternVLConfig) -> PreTrainedTokenizerBase:
    """Raises ValueError if it cannot be loaded without remote code, or lacks a token that the prompt needs."""
    with errors_naming(f"{folder}: its tokenizer cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(folder, config=config.text_config, trust_remote_code=False)
    missing = [token for token in SPECIAL_TOKENS if token not in tokenizer.get_vocab()]
    if missing:
        raise ValueError(f"{folder}: its tokenizer has no {', '.join(missing)}")
    return tokenizer


@contextmanager
def errors_naming(source: object) -> Iterator[None]:
    """Whatever is raised inside, as a ValueError of one line: a library's checks of a file have no common class."""
    try:
        yield
    except Exception as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise ValueError(f"{source}: {reason}") from error


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its name at the end, or is gone."""
    temporary = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)  # of a conversion that was killed
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in [*temporary.iterdir(), temporary]:  # rename may reach the disk before the data does
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_shards(tensors: Iterable[tuple[str, Tensor]], folder: Path) -> None:
    """Write safetensors of at most SHARD_BYTES, or one tensor, each, and then their index if they are several."""
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        save_file(pending, folder / f"{len(shards)}.partial", metadata={"format": "pt"})
        shards.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        if pending and size + tensor.nbytes > SHARD_BYTES:
            flush()
            size = 0
        pending[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    names = [f"model-{k + 1:05d}-of-{len(shards):05d}.safetensors" for k in range(len(shards))]
    if len(shards) == 1:
        names = ["model.safetensors"]
    for k, name in enumerate(names):
        (folder / f"{k}.partial").rename(folder / name)
    if len(shards) > 1:
        weight_map = {key: name for keys, name in zip(shards, names) for key in keys}
        write_json({"metadata": {"total_size": total}, "weight_map": weight_map}, folder / INDEX)


def copy_files(source: Path, folder: Path) -> None:
    for name in COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


# ---- conversion


def to_ours(source: Path, folder: Path, motion: SlowFastConfig | None) -> None:
    """Convert a released checkpoint.

    `motion` None means, if it has the motion branch at all, what `to_released` left of ours, or else SlowFastConfig().
    """
    released = read_json(source / CONFIG)
    with errors_naming(source / CONFIG):
        config = config_from_released(released)
    tensors = read_headers(source)
    if any(key.startswith(MOTION_KEYS) for key in tensors):
        with errors_naming(source / CONFIG):
            motion = motion or SlowFastConfig(**released.get("motion", {}))
    elif motion is not None:
        raise ValueError(f"{source}: has no motion branch for a motion recipe")
    with errors_naming(source / CONFIG):
        keys = layout(config, motion)
    check_keys(source, tensors, keys.released, {released_key(HEAD)} if config.tie_word_embeddings else set())
    tokenizer = read_tokenizer(source, config)
    config.image_token_id = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")

    def converted() -> Iterator[tuple[str, Tensor]]:
        for key, stored in tensors.items():
            names, tensor = keys.sources[key], stored.read()
            yield from zip(names, tensor.chunk(3) if len(names) == 3 else [tensor])

    with new_folder(folder) as new:
        write_shards(converted(), new)
        copy_files(source, new)
        ours = {
            "architectures": ["VQAThinker"],
            "model_type": OURS[0],
            "dtype": DTYPES.get(tensors[released_key(EMBEDDING)].dtype),
            "motion": asdict(motion) if motion else None,
        }
        write_json(json.loads(config.to_json_string()) | ours, new / CONFIG)
        shutil.copyfile(source / CONFIG, new / KEPT_CONFIG)
        side = image_side(released)
        write_json(PREPROCESSOR | {"size": {"height": side, "width": side}}, new / PREPROCESSOR_CONFIG)
        complete_tokenizer(tokenizer, new)


def complete_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """What released folders may leave to the released code: to stop at <|im_end|>, and the chat template."""
    file = folder / GENERATION_CONFIG
    generation = read_json(file) if file.is_file() else {}
    ends, end = generation.get("eos_token_id"), tokenizer.convert_tokens_to_ids("<|im_end|>")
    ends = ends if isinstance(ends, list) else [ends]
    if end not in ends:
        write_json(generation | {"eos_token_id": [i for i in ends if i is not None] + [end]}, file)
    if tokenizer.chat_template is None:
        (folder / "chat_template.jinja").write_text(CHATML)
    file = folder / "tokenizer_config.json"
    if file.is_file() and "auto_map" in (settings := read_json(file)):
        del settings["auto_map"]  # remote code
        write_json(settings, file)


def to_released(source: Path, folder: Path) -> None:
    """Convert a checkpoint that `models.loading` loads into one for the released code."""
    ours = read_json(source / CONFIG)
    with errors_naming(source / CONFIG):
        config = config_from_ours(ours)
        keys = layout(config, SlowFastConfig(**ours["motion"]) if ours.get("motion") else None)
    tensors = {state_dict_key(key): stored for key, stored in read_headers(source).items()}
    check_keys(source, tensors, keys.ours, {HEAD} if config.tie_word_embeddings else set())
    read_tokenizer(source, config)
    released = released_config(source, config, DTYPES.get(tensors[EMBEDDING].dtype), ours.get("motion"))

    def converted() -> Iterator[tuple[str, Tensor]]:
        for key, names in keys.sources.items():
            if names[0] in tensors:
                parts = [tensors[name].read() for name in names]
                yield key, torch.cat(parts) if len(parts) == 3 else parts[0]

    with new_folder(folder) as new:
        write_shards(converted(), new)
        copy_files(source, new)
        write_json(released, new / CONFIG)


def released_config(source: Path, config: InternVLConfig, dtype: str | None, motion: dict | None) -> dict:
    """The config.json that `source` was converted from, or one made from ours.

    Ours has `motion` beside what the released code reads, since a network that was never released may have another.
    """
    side = config.vision_config.image_size[0]
    if (source / PREPROCESSOR_CONFIG).is_file():
        with errors_naming(source / PREPROCESSOR_CONFIG):
            side = read_json(source / PREPROCESSOR_CONFIG)["size"]["height"]
            image_tokens(config, side)
    made, file = config_to_released(config, dtype, side), source / KEPT_CONFIG
    if not file.is_file():
        return made | ({"motion": motion} if motion else {})
    kept = read_json(file)
    with errors_naming(file):
        if config_to_released(config_from_released(kept), dtype, side) != made:
            raise ValueError(f"describes another network than {CONFIG}")
    return kept


def convert(source: str | os.PathLike, folder: str | os.PathLike, motion: SlowFastConfig | None = None) -> None:
    """Convert the checkpoint `source`, in the direction that its config.json tells, into the new `folder`.

    Args:
        source: a released folder, or one that `models.loading` loads.
        folder: must not exist; it appears once it is complete.
        motion: of a released folder with a motion branch: how SlowFast is to see frames, which its config.json does
            not say. Default: as the released code trains, SlowFastConfig().

    Raises ValueError, naming the file and what is wrong with it, before anything is written.
    """
    source, folder = Path(source), Path(folder)
    if not source.is_dir():
        raise ValueError(f"{source}: no such folder")
    if not (source / CONFIG).is_file():
        raise ValueError(f"{source}: no {CONFIG} in this folder")
    if folder.exists():
        raise ValueError(f"{folder}: exists already")
    if (source / ADAPTER_CONFIG).is_file():
        raise ValueError(f"{source}: a LoRA adapter; merge it first: python -m models.lora merge {source} OUTPUT")
    model_type = read_json(source / CONFIG).get("model_type")
    if model_type == RELEASED:
        to_ours(source, folder, motion)
    elif model_type not in OURS:
        raise ValueError(f"{source / CONFIG}: model_type is {model_type!r}, not one of {[RELEASED, *OURS]}")
    elif motion is not None:
        raise ValueError(f"{source / CONFIG}: has its own motion recipe; the released layout has no place for one")
    else:
        to_released(source, folder)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m models.checkpoints", description=__doc__.splitlines()[0])
    command = parser.add_subparsers(required=True).add_parser("convert", help="released layout to ours, or back")
    command.add_argument("source", metavar="SRC", help="checkpoint folder; its config.json tells the direction")
    command.add_argument("folder", metavar="DST", help="folder to make")
    command.add_argument(
        "--motion-recipe",
        choices=MOTION_RECIPES,
        help="frames as the released code's training (6 of them; default) or its test (12) shows them to SlowFast",
    )
    args = parser.parse_args(arguments)
    try:
        convert(args.source, args.folder, MOTION_RECIPES.get(args.motion_recipe))
    except (ValueError, OSError, SafetensorError) as error:
        print(f"checkpoints: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
