"""Folders as train.py leaves them, with made-up numbers, and what a chart of a page says when it is read back."""

import dataclasses
import json
import random
import re
from pathlib import Path

from grpo.config import Config
from tests.pages import Page

TERMS = ("regression", "mine")
PHASES = ("data", "sample", "forward", "save")


def line(step: int, terms=TERMS, **fields) -> dict:
    """A line of metrics.jsonl with random numbers, those of a share between 0 and 1."""
    rng = random.Random(step)
    spread = {name: {"mean": rng.gauss(0.5, 0.1), "std": rng.uniform(0.1, 0.2)} for name in (*terms, "total")}
    found = {"step": step, "loss": rng.gauss(0, 1), "kl": rng.lognormvariate(-3, 1), "entropy": rng.uniform(0.2, 0.3)}
    found |= {"clipped_low": rng.random() / 9, "clipped_high": rng.random() / 9, "grad_norm": rng.lognormvariate(0, 1)}
    found |= {"tokens": 960, "length": 30.0, "unparsed": {"empty": rng.randrange(3), "no_answer": rng.randrange(3)}}
    found |= {"reward": spread.pop("total"), "rewards": spread, "zero_variance": rng.random(), "skipped": 0}
    found |= {"score_std": rng.uniform(0.2, 0.8), "truncated": rng.random() / 9, "lr": 1e-4 / step}
    found |= {"tokens_per_s": rng.uniform(50, 90), "phase_s": {name: rng.random() for name in PHASES}, "val": None}
    return found | fields


def validation(srcc: float | None, plcc: float | None, **fields) -> dict:
    return {"srcc": srcc, "plcc": plcc, "undefined": {}, "scored": 9, "listed": 9} | fields


def answers(step: int, path: str, mos: float, number: int = 5, terms=TERMS) -> list[dict]:
    """Lines of rollouts.jsonl: a group's; the answers differ in length, and one has no score."""
    rng, found = random.Random(f"{step} {path}"), []
    for g in range(number):
        score = None if g == 3 else round(rng.uniform(1, 5), 2)
        row = {"step": step, "video": path, "mos": mos, "text": f"{path} at {step}: " + "so so, " * rng.randrange(20)}
        row |= {"score": score, "unparsed": None if score else "not_a_number"}
        row |= {"rewards": {name: rng.random() for name in terms}, "reward": rng.random(), "advantage": rng.gauss(0, 1)}
        found.append(row)
    return found


def write_run(folder: Path, rows=(), rollouts=(), summary=None, bad_videos=(), **config) -> Path:
    """A run with settings as flags give them; `summary`: what summary.json has beside them, None: it is not there."""
    folder.mkdir(parents=True)
    settings = dataclasses.asdict(Config(**config))
    (folder / "config.json").write_text(json.dumps(settings))
    for name, lines in (("metrics", rows), ("rollouts", rollouts), ("bad_videos", bad_videos)):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in lines)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    if summary is not None:
        found = {"before": None, "after": None, "best": None, "settings": settings, "processes": 1, "after_step": 1}
        found |= {"command": "python train.py", "versions": {"torch": "2.15"}} | summary
        (folder / "summary.json").write_text(json.dumps(found))
    return folder


class Drawing:
    """A chart, read as a person does: ticks say where numbers lie. lines: points by the name in the legend, or ''."""

    def __init__(self, svg: str, legend: list[str]):
        ticks = re.findall(r'<text x="([-\d.]+)" y="([-\d.]+)" text-anchor="(end|middle)">([-+\d.e]+)</text>', svg)
        rows = [(float(y) - 4, float(text)) for _, y, anchor, text in ticks if anchor == "end"]
        columns = [(float(x), float(text)) for x, _, anchor, text in ticks if anchor == "middle"]
        self.scales = [scale(columns), scale(rows)]
        drawn = re.findall(r'class="line [^>]* d="M([^"]+)"', svg)
        self.lines = dict(zip(legend or [""], (self.points(d.split("L")) for d in drawn), strict=True)) if drawn else {}
        specks = re.findall(r'class="specks [^>]* d="([^"]+)"', svg)
        self.dots = [self.points(re.findall(r"M([^h]+)h0", d)) for d in specks]
        areas = re.findall(r'class="fill-\d" d="M([^V]+)V', svg)
        self.areas = dict(zip(legend, (self.points(d.split("L")) for d in areas), strict=True)) if areas else {}
        self.ends = (rows[0][1], rows[-1][1])  # of the numbers upwards: axes end at ticks
        self.unit = [abs(per_unit) for _, per_unit in self.scales]  # of the data, for a unit of the drawing

    def points(self, texts: list[str]) -> list[tuple[float, float]]:
        pairs = [map(float, text.split()) for text in texts]
        return [tuple(zero + per_unit * z for z, (zero, per_unit) in zip(pair, self.scales)) for pair in pairs]


def scale(ticks: list[tuple[float, float]]) -> tuple[float, float]:
    """The number at 0 of the drawing, and the numbers for each of its units."""
    (a, low), (b, high) = ticks[0], ticks[-1]
    return low - a * (high - low) / (b - a), (high - low) / (b - a)


def drawings(page: Page) -> dict[str, Drawing]:
    """The charts of a run's page by title."""
    found = {}
    for part in page.source.split("<figure>")[1:]:
        part = part.split("</figure>")[0]
        svg, _, rest = part.partition("</svg>")
        legend = re.findall(r"</svg>\s*([^<]+?)</li>", rest)
        found[re.search("<strong>(.*?)</strong>", part)[1]] = Drawing(svg, legend)
    return found
