"""The flags of `evaluate.py --task`, and which task takes which. Needs no torch, so that wrong ones answer at once."""

import argparse
import math
from pathlib import Path

from data.judge import check_judge
from data.understanding import DESCRIBE

TASKS = ("attribution", "describe", "compare")
SYNONYMS = Path(__file__).with_name("synonyms.json")
OF_SCORES = ("video", "json", "folder", "csv", "suite", "report", "compare", "samples", "temperature")
ANSWER_FORM = "<answer>{}</answer>"
# Flag: the tasks that take it, its value without it, and the rest of its argument.
FLAGS = {
    "items": ("attribution", None, {"help": "questions (docs/understanding.md)"}),
    "by": (
        "attribution compare",
        "letter",
        {"choices": ("letter", "text"), "help": "what a candidate's likelihood is that of (default: letter)"},
    ),
    "answer_form": (
        "attribution compare",
        ANSWER_FORM,
        {"help": f"the answer whose likelihood is taken, {{}} for the candidate (default: {ANSWER_FORM})"},
    ),
    "scoring_prompt": (
        "attribution describe",
        False,
        {"action": "store_true", "help": "ask for a score, as in training, and look at the reasoning before it"},
    ),
    "prompt_text": ("describe", DESCRIBE, {"help": f"the question (default: {DESCRIBE})"}),
    "synonyms": ("describe", str(SYNONYMS), {"help": "table of words for distortions (default: docs/synonyms.json)"}),
    "judge_url": ("describe", None, {"help": "OpenAI-compatible address of a judge, up to /chat/completions"}),
    "judge_model": ("describe", None, {"help": "name of the judge's model"}),
    "judge_price": (
        "describe",
        None,
        {"nargs": 2, "type": float, "metavar": ("IN", "OUT"), "help": "its price for a million tokens read, written"},
    ),
    "judge_timeout": ("describe", 60.0, {"type": float, "help": "seconds that a reply may take (default: 60)"}),
    "pairs": ("compare", 200, {"type": int, "help": "pairs to draw (default: 200)"}),
    "min_difference": ("compare", 0.5, {"type": float, "help": "least difference of MOS on 1..5 (default: 0.5)"}),
}


def add_task_arguments(parser: argparse.ArgumentParser) -> None:
    """`--task` and the flags of its tasks; those not given are None until `task_arguments`."""
    parser.add_argument("--task", choices=TASKS, help="ask other things than a score (docs/understanding.md)")
    group = parser.add_argument_group("with --task")
    for name, (tasks, _, argument) in FLAGS.items():
        text = f"{tasks.replace(' ', ', ')}: {argument['help']}".replace("%", "%%")
        group.add_argument(option(name), default=None, **{**argument, "help": text})


def task_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    """The arguments with defaults filled in, one label file and one folder of videos at most; a flag that does not go
    with the task ends the program, told by name.
    """
    for name, (tasks, _, _) in FLAGS.items():
        if getattr(args, name) is not None and args.task not in tasks.split():
            parser.error(f"{option(name)}: goes with --task {' or '.join(tasks.split())}")
    if args.task is None:
        return args
    given = {name for name in FLAGS if getattr(args, name) is not None}
    defaults = {name: default for name, (_, default, _) in FLAGS.items() if name not in given}
    args = argparse.Namespace(**{**vars(args), **defaults})
    source = "items" if args.task == "attribution" else "labels"
    for name in (source, "videos", "output"):
        if getattr(args, name) is None:
            parser.error(f"--task {args.task}: needs {option(name)}")
    for name in [*sorted({"items", "labels"} - {source}), *OF_SCORES]:
        if getattr(args, name):
            parser.error(f"--task {args.task}: goes without {option(name)}")
    if args.split and args.task == "attribution":
        parser.error(f"--task attribution: goes without --split {args.split}")
    if args.score != "greedy":
        parser.error(f"--task {args.task}: goes without --score {args.score}")
    if args.seed is not None and args.task != "compare":
        parser.error(f"--seed {args.seed}: goes with --samples or --task compare")
    for name in ("labels", "videos"):
        given_names = getattr(args, name) or [None]
        if len(given_names) > 1:
            parser.error(f"--task {args.task}: takes {option(name)} once")
        setattr(args, name, given_names[0])
    if args.answer_form.count("{}") != 1:
        parser.error(f"--answer-form {args.answer_form!r}: must hold {{}} once")
    if args.pairs < 1:
        parser.error(f"--pairs {args.pairs}: must be at least 1")
    if not (math.isfinite(args.min_difference) and args.min_difference >= 0):
        parser.error(f"--min-difference {args.min_difference}: must be a number, 0 or more")
    if not 0 < args.judge_timeout < math.inf:
        parser.error(f"--judge-timeout {args.judge_timeout}: must be a number above 0")
    if (args.judge_url is None) != (args.judge_model is None):
        parser.error("--judge-url and --judge-model go together")
    for name in {"judge_price", "judge_timeout"} & given:
        if args.judge_url is None:
            parser.error(f"{option(name)}: goes with --judge-url")
    if args.judge_price is not None and not all(0 <= price < math.inf for price in args.judge_price):
        parser.error("--judge-price: must be two numbers, 0 or more")
    if args.judge_url is not None:
        try:
            check_judge(args.judge_url)
        except ValueError as error:
            parser.error(str(error))
    if args.scoring_prompt and "prompt_text" in given:
        parser.error("--scoring-prompt: goes without --prompt-text")
    if args.scoring_prompt and args.task == "attribution" and args.by == "letter":
        parser.error("--scoring-prompt: goes with --by text: no letters are shown")
    return args


def option(name: str) -> str:
    return "--" + name.replace("_", "-")
