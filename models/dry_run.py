"""`train.py --dry-run`: what a run would be, without a weight, a video or a GPU.

It builds the network on the meta device, checks that its keys and those of the released layout map one to one, and
counts parameters, prompt tokens and GPU memory (`models.footprint`).
"""

from dataclasses import replace
from pathlib import Path
from typing import Protocol

from transformers import AutoTokenizer, InternVLConfig

from models.checkpoints import PREPROCESSOR_CONFIG, read_json
from models.footprint import Inventory, Peak, Step, inventory, peaks
from models.lora import root_of
from models.policy import check_parts
from models.released import check_one_to_one, image_tokens, layout
from models.shapes import network
from models.slowfast import CLIPS, check_watched

GIB = 2**30
TEMPLATE_TOKENS = 13  # <|im_start|>, role, newline three times; <|im_end|>, newline twice


class Settings(Protocol):
    """The flags of train.py that matter here; `grpo.config.Config` has them."""

    model: str
    motion: str | None
    slowfast: str | None
    motion_clips: int
    frames: int
    image_side: int | None
    freeze: str | None
    lora_rank: int
    world_size: int | None
    videos_per_step: int
    micro_batch: int
    group_size: int
    max_new_tokens: int
    top_p: float
    beta: float
    precision: str
    parallel: str
    shard_optimizer: bool
    gradient_checkpointing: bool


class Words(Protocol):
    """The prompt's wording; `data.prompts.Prompt` is one."""

    system: str

    def user_text(self, images: list[str], motion: str | None = None) -> str: ...


def report(config: Settings, words: Words, perturbed: bool) -> str:
    """The text that --dry-run prints; `perturbed`: whether each video is also sampled as a perturbed copy.

    Raises ValueError naming the flag at fault, as the run itself would.
    """
    frozen = config.freeze.split(",") if config.freeze else []
    check_parts(frozen)
    model, motion = network(config.model, config.motion or ("slowfast" if config.slowfast else None))
    if "motion" in frozen and motion is None:
        raise ValueError("--freeze motion: the model has no motion token")
    files = root_of(config.model)
    side = frame_side(config, model, files)
    if motion and config.motion_clips:
        motion = replace(motion, **CLIPS)
    if motion:
        check_watched(motion, config.frames, config.motion_clips, side)
    processes = config.world_size or 1
    if config.videos_per_step % processes:
        raise ValueError(f"--videos-per-step {config.videos_per_step}: not a multiple of --world-size {processes}")

    keys = layout(model, motion)
    check_one_to_one(keys)
    counts = inventory(model, motion, frozen, config.lora_rank)
    if not sum(counts.trained.values()):
        raise ValueError(f"--freeze {config.freeze}: leaves nothing to train")
    text, source = text_tokens(files, words, config.frames, motion is not None)
    prompt = config.frames * image_tokens(model, side) + (motion is not None) + text
    step = Step(
        videos=config.videos_per_step // processes,
        copies=2 if perturbed else 1,
        micro_batch=config.micro_batch,
        frames=config.frames,
        clip_frames=config.motion_clips * motion.clip_frames if motion else 0,
        side=side,
        prompt=prompt,
        answers=config.group_size,
        tokens=config.max_new_tokens,
        precision=config.precision,
        checkpointing=config.gradient_checkpointing,
        reference=config.beta > 0,
        processes=processes,
        top_p=config.top_p < 1,
        parallel=config.parallel,
        shard_optimizer=config.shard_optimizer,
        lora=config.lora_rank > 0,
    )
    return "\n".join(
        [
            f"{config.model}{' with a motion token' if motion else ''}: counted from its sizes, nothing loaded",
            f"keys: {len(keys.ours):,} of our layout make {len(keys.released):,} of the released one, one to one",
            "",
            *parameter_table(counts),
            "",
            f"prompt: {config.frames} frames x {image_tokens(model, side)}{' + 1 of motion' if motion else ''}"
            f" + {text} of text ({source}) = {prompt:,} tokens",
            f"step: {config.videos_per_step} videos on {processes} process(es)"
            f" ({config.parallel}{', optimizer shared' if config.shard_optimizer else ''}), {step.videos} each"
            f"{', and as many perturbed copies' if perturbed else ''}; {config.group_size} answers of up to"
            f" {config.max_new_tokens:,} tokens; {min(config.micro_batch, step.videos)} video(s) a micro-batch",
            "",
            *memory_table(peaks(model, motion, counts, step), step),
        ]
    )


def frame_side(config: Settings, model: InternVLConfig, files: str) -> int:
    """Pixels: --image-side, or what the checkpoint's image processor says, or what the vision tower was made for."""
    side, file = config.image_side, Path(files) / PREPROCESSOR_CONFIG
    if side is None and file.is_file():
        side = (read_json(file).get("size") or {}).get("height")
    side = side or model.vision_config.image_size[0]
    try:
        image_tokens(model, side)
    except ValueError as error:
        raise ValueError(f"--image-side {side}: {error}") from error
    return side


def text_tokens(model: str, words: Words, frames: int, motion: bool) -> tuple[int, str]:
    """Tokens of a prompt but for the image slots, and how they were counted.

    Exact with the tokenizer of a checkpoint folder. Without one a guess: 4 characters of ASCII a token (English), any
    other character a token (Chinese), and the chat template's.
    """
    blocks = [["<img></img>"] * frames] + (["<img></img>"] if motion else [])
    if (Path(model) / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(model)
        contents = {"system": words.system, "user": words.user_text(*blocks)}
        messages = [{"role": role, "content": content} for role, content in contents.items()]
        chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return len(tokenizer(chat, add_special_tokens=False).input_ids), "counted"
    blocks = [[""] * frames] + ([""] if motion else [])
    text = words.system + words.user_text(*blocks)
    ascii_characters = sum(character.isascii() for character in text)
    ends = 2 * (frames + motion)  # <img> and </img>
    guess = round(ascii_characters / 4) + len(text) - ascii_characters + ends + TEMPLATE_TOKENS
    return guess, "a guess: no tokenizer at hand"


def parameter_table(counts: Inventory) -> list[str]:
    total, trained = sum(counts.parameters.values()), sum(counts.trained.values())
    rows = [(name, count, counts.trained[name]) for name, count in counts.parameters.items() if count]
    rows.append(("all", total, trained))
    lines = [f"{'parameters, millions':24}{'all':>10}{'trained':>10}"]
    lines += [f"  {name:22}{count / 1e6:>10,.1f}{own / 1e6:>10,.1f}" for name, count, own in rows]
    return [*lines, f"trainable share: {100 * trained / total:.1f} %"]


def memory_table(phases: list[Peak], step: Step) -> list[str]:
    """A column for each phase, at its fullest moment; a row for each component."""
    worst, order = phases[0], ("rollout", "reference", "update", "optimizer step")
    columns = sorted(phases, key=lambda peak: order.index(peak.phase))
    names = {name: None for peak in phases for name, size in peak.components.items() if size}
    lines = [f"{f'GiB of a GPU, {step.precision}':30}" + "".join(f"{peak.phase:>20}" for peak in columns)]
    for name in names:
        lines.append(f"  {name:28}" + "".join(f"{peak.components.get(name, 0) / GIB:>20.2f}" for peak in columns))
    lines.append(f"  {'all':28}" + "".join(f"{peak.total / GIB:>20.2f}" for peak in columns))
    lines.append(f"  {'fullest at':28}" + "".join(f"{peak.moment:>20}" for peak in columns))
    largest, size = next(iter(worst.components.items()))
    return [
        *lines,
        f"peak: {worst.total / GIB:.1f} GiB in the {worst.phase} ({worst.moment}); "
        f"largest term: {largest}, {size / GIB:.1f} GiB; the CUDA context and fragments come on top",
    ]
