"""Ablations: runs of train.py that differ in one setting, over several seeds, and which differences are noise.

    python -m grpo.ablate                                     # all rows, 3 seeds: the demo with a quarter of its work
    python -m grpo.ablate --rows rewards sigma --seeds 0 1    # some of the rows
    python -m grpo.ablate --table                             # of the runs that are there; trains nothing
    python -m grpo.ablate --processes 8 --preset internvl3-1b --labels L --videos DIR     # flags of train.py: your own

Each run has a folder, OUT/ROW-SEED, and a log beside it. What is finished is not trained again, what was stopped goes
on from its last checkpoint, and what fails does not keep the others. OUT/ablation.md and OUT/ablation.svg show it all.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from grpo.config import Parser, option, parse_config
from grpo.differences import BASELINE, drawing, measured, table
from grpo.page import write_page
from grpo.results import read_json
from grpo.tables import as_markdown, as_text

ROWS = {  # by group and name: what it changes in the baseline
    "rewards": {
        "without regression": "--rewards ranking,temporal,format",
        "without ranking": "--rewards regression,temporal,format",
        "without temporal": "--rewards regression,ranking,format",
        "without format": "--rewards regression,ranking,temporal",
        "regression alone": "--rewards regression",
        "ranking alone": "--rewards ranking",
        "temporal alone": "--rewards temporal,regression=0,ranking=0",  # weight 0: what it compares, but not rewarded
        "format alone": "--rewards format",
    },
    "sigma": {"sigma 0.25": "--sigma 0.25", "sigma 1": "--sigma 1"},
    "group": {"G 4": "--group-size 4", "G 16": "--group-size 16"},
    "beta": {"beta 0": "--beta 0", "beta 0.2": "--beta 0.2"},
    "temporal": {"temporal scope batch": "--temporal-scope batch"},
    "ranking": {"one opponent": "--ranking-opponents one", "variance floor 1e-6": "--variance-floor 1e-6"},
    "frames": {"frames 3": "--frames 3", "frames 9": "--frames 9"},
}
DEMO = "--steps 120 --videos-per-step 8 --lr 3e-4 --eval-every 40"  # the demo with a quarter of its work
OURS = ("seed", "output", "resume")  # flags of train.py that this program sets


class Row(NamedTuple):
    """flags: of train.py, the baseline's and its own; module: what `python -m` runs with them."""

    group: str
    name: str
    flags: tuple[str, ...]
    module: tuple[str, ...] = ("train",)


def rows_of(groups: Iterable[str], flags: Sequence[str]) -> list[Row]:
    """The baseline, which has the `flags`, and the rows of ROWS; without those that would be the baseline again.

    A flag that train.py refuses ends the program, as it does there.
    """
    found = [Row("", BASELINE, tuple(flags))]
    for group in groups:
        for name, change in ROWS[group].items():
            row = Row(group, name, (*flags, *change.split()))
            if parse_config([*row.flags]) != parse_config([*flags]):
                found.append(row)
    return found


def folder(out: Path, row: str, seed: int) -> Path:
    return out / f"{row.replace(' ', '-')}-{seed}"


def finished(out: Path, row: str, seed: int) -> bool:
    return (folder(out, row, seed) / "summary.json").exists()


# ---- training


def arguments(out: Path, row: Row, seed: int) -> list[str]:
    return [*row.flags, "--seed", str(seed), "--output", str(folder(out, row.name, seed)), "--resume", "auto"]


def check(out: Path, rows: Sequence[Row], seeds: Sequence[int]) -> None:
    """Raise a ValueError naming a run that is there with other settings than it should have."""
    for row in rows:
        for seed in seeds:
            run = folder(out, row.name, seed)
            if (run / "config.json").exists():
                try:
                    parse_config(arguments(out, row, seed)).compare(read_json(run / "config.json"))
                except ValueError as error:
                    raise ValueError(f"{run}: {error}; or choose another --out") from error


def train(out: Path, row: Row, seed: int, processes: int = 1) -> str | None:
    """One run to its end, by torchrun if processes > 1; one thread each, unless the environment says otherwise.

    Returns what went wrong, or None.
    """
    if finished(out, row.name, seed):
        return None
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", *row.module, *arguments(out, row, seed)]
    log = Path(f"{folder(out, row.name, seed)}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    with log.open("a", encoding="utf-8") as lines:
        status = subprocess.run(command, env=environment, stdout=lines, stderr=subprocess.STDOUT).returncode
    name = f"{row.name}, seed {seed}"
    print(f"{name}: {f'failed, exit status {status}' if status else 'done'}", file=sys.stderr, flush=True)
    return f"{name}: see {log}" if status else None


def train_all(out: Path, rows: Sequence[Row], seeds: Sequence[int], jobs: int = 1, processes: int = 1) -> list[str]:
    """Train what is not finished, so many runs at a time; returns what went wrong.

    Raises ValueError: see `check`; and naming --jobs, --processes or --seeds for what is no such number.
    """
    for flag, number in (("--jobs", jobs), ("--processes", processes)):
        if number < 1:
            raise ValueError(f"{flag} {number}: must be at least 1")
    if len(set(seeds)) < len(seeds):  # two runs at a time would write into one folder
        raise ValueError(f"--seeds {' '.join(map(str, seeds))}: one of them comes twice")
    check(out, rows, seeds)
    with ThreadPoolExecutor(jobs) as pool:  # seed by seed: what is there at any time can be compared
        runs = [pool.submit(train, out, row, seed, processes) for seed in seeds for row in rows]
        try:
            return [problem for done in runs if (problem := done.result())]
        except KeyboardInterrupt:  # the runs under way have heard it too: they end their step and save
            pool.shutdown(cancel_futures=True)
            raise


# ---- results


def results(out: Path, rows: Sequence[Row], seeds: Sequence[int]) -> dict[str, dict[int, dict]]:
    """`measured` by row and seed, of the runs that are finished; a row without one is left out."""
    every = {row.name: [seed for seed in seeds if finished(out, row.name, seed)] for row in rows}
    return {name: {seed: measured(folder(out, name, seed)) for seed in done} for name, done in every.items() if done}


def write(out: Path, rows: Sequence[Row], seeds: Sequence[int], name: str) -> None:
    """The table of what is finished, on the terminal and in OUT/NAME.md, its drawing in OUT/NAME.svg."""
    runs = results(out, rows, seeds)
    if not runs:
        print(f"{out}: no run is finished", file=sys.stderr)
        return
    print(as_text(table(runs)))
    (out / f"{name}.md").write_text(as_markdown(table(runs)) + "\n", encoding="utf-8")
    write_page(out / f"{name}.svg", "ablation.svg", **drawing(runs, {row.name: row.group for row in rows}))


def run(rows: Sequence[Row], args: argparse.Namespace, name: str = "ablation") -> int:
    """Train what is missing, show what is there; returns the exit status."""
    failed = [] if args.table else train_all(args.out, rows, args.seeds, args.jobs, args.processes)
    for problem in failed:
        print(problem, file=sys.stderr)
    write(args.out, rows, args.seeds, name)
    return 1 if failed else 0


def parser(module: str, description: str) -> Parser:
    found = Parser(prog=f"python -m {module}", description=description, allow_abbrev=False)
    out = Path("runs/ablation")
    found.add_argument("--out", type=Path, default=out, help=f"folder of the runs (default: {out})")
    found.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="a run of each row (default: 0 1 2)")
    found.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    found.add_argument(
        "--processes", type=int, default=1, help="processes of a run; more than one by torchrun (default: 1)"
    )
    found.add_argument("--table", action="store_true", help="train nothing, show what is there")
    return found


def main() -> int:
    about = "Ablate settings of train.py, over several seeds. All other flags go to train.py."
    flags = parser("grpo.ablate", about)
    groups = f"groups of rows: {', '.join(ROWS)} (default: all)"
    flags.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="GROUP", help=groups)
    args, given = flags.parse_known_args()
    taken = [name for name in map(option, OURS) if any(word.split("=")[0] == name for word in given)]
    if taken:
        flags.error(f"{taken[0]}: is set for every run; see --seeds and --out")
    try:
        return run(rows_of(args.rows, given or DEMO.split()), args)
    except ValueError as error:
        flags.error(str(error))
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
