"""How the cost of a step grows with G, F, T and N: tests/benchmarks/step_time.py along each of them.

    python -m tests.benchmarks.scaling --out runs/scaling            # about half an hour on one core
    python -m tests.benchmarks.scaling --out runs/scaling --table    # the table of what is there

One size varies, the others stay at BASE. Beside each measured ratio (plain / ours) of times stands that of the
floating-point operations, as torch counts them. Beside the memory of our update stands what `models.footprint` says. A
case that has its file is not measured again.
"""

import argparse
import json
from pathlib import Path

from models.footprint import Network, Step, inventory
from tests.benchmarks import step_time
from tests.benchmarks.shapes import SHAPES

BASE = {"group": 8, "frames": 6, "new_tokens": 64, "videos": 1}
ALONG = {
    "group": (2, 4, 8, 16, 32),
    "frames": (4, 6, 12, 24),
    "new_tokens": (32, 64, 128, 256, 512),
    "videos": (1, 2, 4, 8),
}
LETTERS = {"group": "G", "frames": "F", "new_tokens": "T", "videos": "N"}


def cases(along: dict[str, tuple[int, ...]]) -> list[dict[str, int]]:
    """Each size along its values, the others at BASE; each case once.

    >>> cases({"group": (4, 8), "videos": (1,)})[0]
    {'group': 4, 'frames': 6, 'new_tokens': 64, 'videos': 1}
    """
    every = [{**BASE, name: value} for name, values in along.items() for value in values]
    return [case for k, case in enumerate(every) if case not in every[:k]]


def file_of(case: dict[str, int], out: Path) -> Path:
    return out / ("-".join(f"{LETTERS[name]}{value}" for name, value in case.items()) + ".json")


def measure(case: dict[str, int], rounds: int) -> dict:
    words = [word for name, value in case.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return step_time.measure(step_time.parse_arguments([*words, "--model", "small", "--rounds", str(rounds)]))


def predicted_gib(case: dict[str, int], P: int) -> float:
    """What our update should need beyond weights and AdamW's moments."""
    config = SHAPES["small"]()
    step = Step(
        videos=case["videos"],
        copies=1,
        micro_batch=case["videos"],
        frames=case["frames"],
        side=config.vision_config.image_size[0],
        prompt=P,
        answers=case["group"],
        tokens=case["new_tokens"],
        precision="float32",
        checkpointing=False,
        reference=False,
        processes=1,
    )
    moments = Network(config, None, inventory(config, None, []), step).moments()
    needs = [bytes_ for (phase, _), bytes_ in moments.items() if phase in ("update", "optimizer step")]
    return max(sum(bytes_.values()) - bytes_["weights"] - bytes_["optimizer"] for bytes_ in needs) / 2**30


def table(found: list[tuple[dict[str, int], dict]]) -> str:
    """Markdown, a row a case."""
    lines = [
        "| G | F | T | N | P | step, s | rollout | counted | update | counted | step | update, MiB | counted | plain |",
        "|" + 14 * "---|",
    ]
    for case, result in found:
        ratio = {name: f"{result['ratio'][name]['median']:.1f}x" for name in ("rollout", "update", "step")}
        flop = {p: f"{result['flop']['plain'][p] / result['flop']['ours'][p]:.1f}x" for p in ("rollout", "update")}
        memory = [result["update_gib"]["ours"], predicted_gib(case, result["P"]), result["update_gib"]["plain"]]
        cells = [*case.values(), result["P"], f"{result['seconds']['ours']['step']:.2f}", ratio["rollout"]]
        cells += [flop["rollout"], ratio["update"], flop["update"], ratio["step"], *(f"{x * 1024:.0f}" for x in memory)]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the cases' JSON files")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of a case (default: 3)")
    parser.add_argument("--only", choices=ALONG, help="along this size alone")
    parser.add_argument("--values", type=int, nargs="+", help="with --only: its values")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    args = parser.parse_args(arguments)
    if args.values and not args.only:
        parser.error("--values goes with --only")
    along = {args.only: tuple(args.values or ALONG[args.only])} if args.only else ALONG
    args.out.mkdir(parents=True, exist_ok=True)
    for case in () if args.table else cases(along):
        if not file_of(case, args.out).exists():
            file_of(case, args.out).write_text(json.dumps(measure(case, args.rounds)))
    there = [case for case in cases(along) if file_of(case, args.out).exists()]
    print(table([(case, json.loads(file_of(case, args.out).read_text())) for case in there]))


if __name__ == "__main__":
    main()
