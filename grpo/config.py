"""Every setting of a run, in one frozen dataclass: a field is a flag, its text is the flag's help.

This module imports no torch, so `--help` and a wrong flag answer at once.
"""

import argparse
import dataclasses
import difflib
import json
import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

TINY_MODEL = str(Path(__file__).resolve().parent.parent / "models" / "tiny" / "checkpoint")

# What the InternVL3 presets fill in, and where a value is from. `script` is the training script that was released with
# VQAThinker, for the 8B model; the paper's body was not available. `ours` is a choice of this project.
SCRIPT, OURS = "released script", "our choice"
RELEASED = {
    "motion": ("slowfast", SCRIPT),
    "labels": (None, "your own"),
    "videos": (None, "your own"),
    "steps": (2630, f"{SCRIPT}: 3 epochs of LSVQ's 28,056 training videos"),
    "videos_per_step": (32, f"{SCRIPT}: 8 GPUs x 8 sequences x 2 accumulated / G"),
    "group_size": (4, SCRIPT),
    "frames": (6, SCRIPT),
    "prompt": ("released-train", SCRIPT),
    "temperature": (1.0, SCRIPT),
    "max_new_tokens": (2048, SCRIPT),
    "clip_low": (0.2, SCRIPT),
    "clip_high": (0.2, SCRIPT),
    "beta": (0.04, SCRIPT),
    "kl": ("k3", SCRIPT),
    "inner_epochs": (1, SCRIPT),
    "micro_batch": (1, OURS),
    "lr": (1e-6, SCRIPT),
    "warmup_steps": (0, OURS),
    "schedule": ("cosine", OURS),
    "eval_every": (200, OURS),
    "save_every": (200, OURS),
    "precision": ("bfloat16", OURS),
    "gradient_checkpointing": (True, SCRIPT),
    "workers": (4, OURS),
}
# Flags override a preset. `tiny` is the dataclass's own defaults: the demo, made for two CPU cores. The whole of 8B and
# its optimizer fit no GPU (docs/scaling.md).
PRESETS = {"tiny": {}} | {
    f"internvl3-{size.lower()}": {"model": f"OpenGVLab/InternVL3-{size}-hf", "parallel": parallel}
    | {name: value for name, (value, _) in RELEASED.items()}
    for size, parallel in (("1B", "ddp"), ("2B", "ddp"), ("8B", "fsdp"))
}


def flag(
    default,
    text: str,
    *,
    choices: tuple[str, ...] | None = None,
    low=None,
    high=None,
    above=None,
    changes: str = "results",
):
    """A dataclass field with its help and bounds: low <= value <= high, value > above.

    changes: what another value changes in a run that is resumed, its 'results', their 'rounding' alone, or 'nothing'.
    """
    metadata = {"help": text, "choices": choices, "low": low, "high": high, "above": above, "changes": changes}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Config:
    """Settings of a training run. Equation numbers refer to docs/algorithm.md."""

    preset: str = flag(
        "tiny", "settings to start from; other flags override them", choices=tuple(PRESETS), changes="nothing"
    )
    model: str = flag(TINY_MODEL, "checkpoint in transformers' InternVL format: a folder or a hub name")
    motion: str | None = flag(
        None,
        "a motion token: 'slowfast' asks for one, 'none' for none; without it as in --model",
        choices=("slowfast", "none"),
    )
    slowfast: str | None = flag(None, "SlowFast-R50's weights file, to give a motion token to an InternVL")
    motion_clips: int = flag(
        0,
        "short dense clips that SlowFast sees, its features averaged; 0: the frames that the ViT sees, as released",
        low=0,
    )
    dry_run: bool = flag(
        False, "count parameters, tokens and GPU memory of the run; load nothing, write nothing", changes="nothing"
    )
    world_size: int | None = flag(
        None, "processes to count for, with --dry-run; torchrun sets a run's", low=1, changes="nothing"
    )
    labels: str | None = flag("clips/demo/labels.jsonl", "label file (docs/data.md); the demo's is made if missing")
    videos: str | None = flag("clips/demo", "folder that the label file's paths start from")
    mos_mapping: str = flag(
        "linear", "MOS to target: from its range to 1..5, or 5 MOS / high as released", choices=("linear", "released")
    )
    val_fraction: float = flag(
        0.0, "share of split 'train' to make a split 'val' of, saved as split.jsonl; 0: as labelled", low=0, high=0.5
    )
    output: str | None = flag(None, "folder of the run; without it the next free runs/PRESET-K", changes="nothing")
    resume: str | None = flag(
        None, "continue a run: a checkpoint folder, or 'auto' for the newest one in --output", changes="nothing"
    )
    allow_changed: str | None = flag(
        None,
        "flags that may differ from those of the run that --resume continues, with commas: lr,steps",
        changes="nothing",
    )
    seed: int = flag(
        0, "seed of clip order, frame choice, perturbations, sampling, new adapters and --val-fraction", low=0
    )

    steps: int = flag(250, "updates of the policy", low=1)
    videos_per_step: int = flag(16, "videos per update over all processes (N)", low=1)
    group_size: int = flag(8, "answers per video (G)", low=2)
    frames: int = flag(6, "frames per video (F)", low=1)
    sampler: str = flag(
        "uniform", "which frames to train on", choices=("uniform", "uniform-time", "random-segment", "dense")
    )
    image_side: int | None = flag(None, "side of a frame in pixels; without it the one the model was made for", low=1)
    system: str | None = flag(None, "system message; without it the prompt's own")
    prompt: str = flag("released-train", "wording of the prompt", choices=("released-train", "released-test"))

    rewards: str = flag(
        "regression,ranking,temporal,format", "reward terms, NAME or NAME=WEIGHT or MODULE:CLASS=WEIGHT, in any order"
    )
    sigma: float = flag(0.5, "width of the regression reward's bell, in MOS (Eq. 8)", above=0)
    coarse_factor: float = flag(
        0.8, "what the regression reward keeps if fewer than two decimals are written (Eq. 8)", low=0, high=1
    )
    variance_floor: float = flag(0.04, "least variance of a score difference in the ranking reward (Eq. 9)", above=0)
    ranking_opponents: str = flag(
        "all", "ranking compares with all other videos of the step, or with the next one", choices=("all", "one")
    )
    temporal_bonus: float = flag(0.3, "bonus for scoring the clip above its perturbed copy (Eq. 11)", low=0)
    temporal_scope: str = flag(
        "video", "compare each video with its own copy, or the means of the whole step", choices=("video", "batch")
    )

    temperature: float = flag(1.0, "temperature of the policy, in sampling and in the loss (Eq. 1)", above=0)
    top_p: float = flag(1.0, "sample from the most likely tokens with this total probability only", above=0, high=1)
    max_new_tokens: int = flag(40, "longest answer, in tokens (T)", low=1)

    advantage_std: bool = flag(True, "divide advantages by the group's standard deviation (Eq. 2)")
    clip_low: float = flag(0.2, "the ratio is clipped below 1 - this (Eq. 4)", low=0, high=1)
    clip_high: float = flag(0.2, "the ratio is clipped above 1 + this (Eq. 4)", low=0)
    beta: float = flag(0.04, "weight of the KL to the initial policy; 0 builds no reference (Eq. 6)", low=0)
    kl: str = flag("k3", "estimator of that KL (Eq. 5)", choices=("k1", "k2", "k3"))
    loss_mean: str = flag(
        "sequence",
        "mean over answers, tokens, or a constant length (Eq. 6)",
        choices=("sequence", "token", "constant"),
    )
    inner_epochs: int = flag(1, "passes over one batch of rollouts (mu)", low=1)
    micro_batch: int = flag(
        16, "videos per forward pass of one process; changes memory, not the result", low=1, changes="rounding"
    )

    lr: float = flag(4e-4, "peak learning rate of AdamW", above=0)
    warmup_steps: int = flag(10, "steps of linear warm-up", low=0)
    schedule: str = flag("cosine", "learning rate after the warm-up; cosine ends at 0", choices=("constant", "cosine"))
    weight_decay: float = flag(0.0, "AdamW's weight decay", low=0)
    grad_clip: float = flag(1.0, "largest norm of the gradient", above=0)
    max_bad_steps: int = flag(
        5, "stop after so many steps in a row whose loss or gradient is not finite", low=1, changes="nothing"
    )
    lora_rank: int = flag(
        0, "train LoRA adapters of this rank in the text decoder, and the motion projector; 0: train all", low=0
    )
    lora_alpha: int | None = flag(
        None, "the adapters' product counts this / rank times; without it twice the rank", low=1
    )
    freeze: str | None = flag(None, "parts not to train, with commas: vision, projector, language, motion")

    eval_every: int = flag(50, "steps between evaluations on the split 'val'; 0: never", low=0)
    save_every: int = flag(100, "steps between checkpoints; 0: at the end only", low=0, changes="nothing")
    keep_checkpoints: int = flag(
        2, "newest checkpoints to keep; the best one stays in any case", low=1, changes="nothing"
    )

    inspect: str | None = flag(
        None, "steps to write a page about, in RUN/inspect: 1,10,100 or every:50", changes="nothing"
    )
    tensorboard: bool = flag(
        False, "write the numbers of every step for TensorBoard too, in RUN/tensorboard", changes="nothing"
    )

    device: str = flag(
        "auto", "where to compute; auto takes CUDA if there is any", choices=("auto", "cpu", "cuda"), changes="rounding"
    )
    dist_timeout: float = flag(
        600.0, "seconds that a process waits for the others before all stop", above=0, changes="nothing"
    )
    precision: str = flag(
        "float32",
        "float32; mixed: float32 parameters, computing in bfloat16 under autocast; bfloat16: parameters too, with "
        "float32 master weights in the optimizer",
        choices=("float32", "mixed", "bfloat16"),
    )
    parallel: str = flag(
        "ddp",
        "ddp: each process holds the whole model; fsdp, what internvl3-8b takes: processes share weights, gradients, "
        "optimizer and reference",
        choices=("ddp", "fsdp"),
        changes="rounding",
    )
    shard_optimizer: bool = flag(
        False, "with ddp: each process keeps its share of the optimizer's state (ZeRO-1)", changes="rounding"
    )
    gradient_checkpointing: bool = flag(
        False, "recompute activations in the backward pass to save memory", changes="rounding"
    )
    cuda_graph: bool = flag(
        False, "sample through a CUDA graph of the token step: one launch for all its kernels", changes="rounding"
    )
    workers: int = flag(
        1, "processes that decode videos ahead of the update; 0: decode in line", low=0, changes="nothing"
    )
    video_timeout: float = flag(60.0, "seconds that decoding one video may take", above=0, changes="nothing")
    max_bad_videos: float = flag(
        0.01, "stop when more than this share of the training videos fail", low=0, high=1, changes="nothing"
    )
    frame_cache: str | None = flag(None, "folder that keeps decoded frames for the next epochs", changes="nothing")
    frame_cache_gib: float = flag(50.0, "GiB that the frame cache may fill", above=0, changes="nothing")

    def __post_init__(self):
        for field in dataclasses.fields(self):
            check_bounds(field, getattr(self, field.name))
        if self.motion == "none" and self.slowfast:
            raise ValueError("--motion none: goes without --slowfast")
        if self.motion == "none" and self.motion_clips:
            raise ValueError("--motion none: goes without --motion-clips")
        if self.lora_alpha is not None and not self.lora_rank:
            raise ValueError(f"--lora-alpha {self.lora_alpha}: goes with --lora-rank")
        if self.lora_rank and self.freeze:
            raise ValueError(f"--freeze {self.freeze}: goes without --lora-rank, which freezes what has no adapter")
        if self.lora_rank and self.parallel != "ddp":
            raise ValueError(f"--parallel {self.parallel}: goes without --lora-rank, whose frozen weights stay whole")
        if self.shard_optimizer and self.parallel != "ddp":
            raise ValueError("--shard-optimizer: goes with --parallel ddp; fsdp shares the optimizer's state anyway")
        if self.world_size is not None and not self.dry_run:
            raise ValueError(f"--world-size {self.world_size}: goes with --dry-run; torchrun sets the size of a run")
        if self.allow_changed and not self.resume:
            raise ValueError(f"--allow-changed {self.allow_changed}: goes with --resume")
        for name in sorted(set(self.allowed) - {field.name for field in dataclasses.fields(self)}):
            raise ValueError(f"--allow-changed {self.allow_changed}: there is no flag {option(name)}")
        inspected_steps(self.inspect, self.steps)
        for name in ("labels", "videos"):
            if not (getattr(self, name) or self.dry_run):
                raise ValueError(f"--{name} is needed with --preset {self.preset}")

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @property
    def allowed(self) -> list[str]:
        """The fields that --allow-changed names."""
        return self.allow_changed.replace("-", "_").split(",") if self.allow_changed else []

    def inspects(self, step: int) -> bool:
        """Whether --inspect names this step."""
        return step in inspected_steps(self.inspect, self.steps)

    def compare(self, saved: dict) -> list[str]:
        """What differs from the settings of the run that is resumed and can change its rounding only, in words.

        saved: those settings, by field; a flag that they lack is newer than they are and had its default. Raises
        ValueError naming the flags that differ, change results, and are not among those allowed to.
        """
        found = {"nothing": {}, "rounding": {}, "results": {}}
        for field in dataclasses.fields(self):
            was, now = saved.get(field.name, field.default), getattr(self, field.name)
            if was != now:
                found[field.metadata["changes"]][field.name] = f"{option(field.name)} was {was}, is {now}"
        refused = {name: text for name, text in found["results"].items() if name not in self.allowed}
        if refused:
            names = ",".join([*self.allowed, *refused]).replace("_", "-")
            raise ValueError(
                f"--resume {self.resume}: {'; '.join(refused.values())}: this changes results; "
                f"set back what is not meant, and allow the rest with --allow-changed {names}"
            )
        return list(found["rounding"].values())


def option(name: str) -> str:
    return "--" + name.replace("_", "-")


def inspected_steps(text: str | None, steps: int) -> Collection[int]:
    """The steps that --inspect means, of a run of so many. Raises ValueError naming it for what is no step of the run.

    >>> list(inspected_steps("every:3", 7)), inspected_steps("4,2", 7), inspected_steps(None, 7)
    ([3, 6], [4, 2], [])
    """
    every, _, number = (text or "").rpartition(":")
    numbers = [] if text is None else number.split(",")
    for piece in numbers:
        if every not in ("", "every") or (every and len(numbers) > 1) or not re.fullmatch("[1-9][0-9]*", piece):
            raise ValueError(f"--inspect {text}: write steps with commas, 1,10,100, or every:50")
        if int(piece) > steps:
            raise ValueError(f"--inspect {text}: there is no step {piece}, --steps is {steps}")
    return range(int(number), steps + 1, int(number)) if every else [int(piece) for piece in numbers]


def check_bounds(field: dataclasses.Field, value) -> None:
    bounds, name = field.metadata, option(field.name)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} {value}: not a finite number")
    if bounds["choices"] and value not in (field.default, *bounds["choices"]):
        raise ValueError(f"{name} {value}: choose one of {', '.join(bounds['choices'])}")
    if value is None:
        return
    if bounds["low"] is not None and value < bounds["low"]:
        raise ValueError(f"{name} {value}: must be at least {bounds['low']}")
    if bounds["high"] is not None and value > bounds["high"]:
        raise ValueError(f"{name} {value}: must be at most {bounds['high']}")
    if bounds["above"] is not None and value <= bounds["above"]:
        raise ValueError(f"{name} {value}: must be above {bounds['above']}")


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors: the usage of forty flags is for --help."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse_config(arguments: list[str], prog: str = "train.py") -> Config:
    """Flags over preset over defaults. Wrong input ends the program with one line and exit code 2."""
    parser = Parser(
        prog=prog,
        description="Train a video-quality model with GRPO from mean opinion scores. No argument: the demo.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    fields = dataclasses.fields(Config)
    for field in fields:
        kind = {bool: None, int: int, int | None: int, float: float}.get(field.type, str)
        valued = {"type": kind, "metavar": metavar(field)}
        shape = {"action": argparse.BooleanOptionalAction} if kind is None else valued
        parser.add_argument(option(field.name), help=help_text(field), **shape)
    given, unknown = parser.parse_known_args(arguments)
    if unknown:
        names = [option(field.name) for field in fields]
        near = difflib.get_close_matches(unknown[0].split("=")[0], names, n=1)
        parser.error(f"unknown argument {unknown[0]}" + (f"; did you mean {near[0]}?" if near else ""))
    given = vars(given)
    preset = given.get("preset", "tiny")
    try:
        return Config(**{**PRESETS.get(preset, {}), **given})
    except ValueError as error:
        parser.error(str(error))


def help_text(field: dataclasses.Field) -> str:
    """What a flag means, its default, and the InternVL3 presets' value with its source."""
    values = f"default: {field.default}"
    if field.name in RELEASED:
        value, source = RELEASED[field.name]
        values += f"; internvl3: {value}, {source}"
    return f"{field.metadata['help']} ({values})"


def metavar(field: dataclasses.Field) -> str:
    if field.metadata["choices"]:
        return "|".join(field.metadata["choices"])
    return {int: "N", int | None: "N", float: "X"}.get(field.type, field.name.split("_")[-1].upper())
