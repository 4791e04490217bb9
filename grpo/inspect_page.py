"""The page about a step of GRPO, and the same numbers as JSON. Colours are classes, chosen by radio inputs and CSS."""

import json
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from grpo.charts import Axes
from grpo.page import write_page
from grpo.tables import NONE, Table

NUMBER_WIDTH = 12  # of the number of an answer beside another, in units of a drawing
UP, DOWN = 0, 1  # --series-0 and --series-1 of base.html
RISING = [(UP, percent) for percent in (0, 9, 18, 27, 36, 45)]  # share of the colour in the background of a token
DIVERGING = [(DOWN, 45), (DOWN, 30), (DOWN, 15), (UP, 0), (UP, 15), (UP, 30), (UP, 45)]


@dataclass(frozen=True)
class View:
    """A way to colour tokens: a class of the name and the level, which is how many of the `bounds` a value reaches."""

    name: str
    title: str
    bounds: Sequence[float]
    shades: Sequence[tuple[int, int]]  # of each level: series, percent

    def level(self, value: float | str) -> int | None:
        return None if isinstance(value, str) else bisect_right(self.bounds, value)

    def legend(self) -> list[str]:
        """What each level means."""
        low, *_, high = texts = [f"{bound:.3g}" for bound in self.bounds]
        return [f"below {low}", *(f"{a} to {b}" for a, b in pairwise(texts)), f"{high} or more"]


def write_inspection(folder: Path, found: Mapping) -> None:
    """Write step_000010.json, which is `found` without pictures, and step_000010.html; found: see `Inspector.write`."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"step_{found['step']:06d}.html"
    data = {**found, "videos": [{k: v for k, v in video.items() if k != "pictures"} for video in found["videos"]]}
    file.with_suffix(".json").write_text(json.dumps(data, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    shown = views(found)
    names = [video["path"] for video in found["videos"]]
    videos = [shown_video(video, names, shown, found["settings"]) for video in found["videos"]]
    write_page(file, "inspect.html", **{**found, "videos": videos}, views=shown, tables=step_tables(found))


def views(found: Mapping) -> list[View]:
    """The ways to colour the tokens of a step; the bounds of the signal are shares of the largest in it."""
    settings = found["settings"]
    low, high = settings["clip_low"], settings["clip_high"]
    around = [1 - low, 1 - low / 2, 1 - low / 20, 1 + high / 20, 1 + high / 2, 1 + high]
    answers = [answer for video in found["videos"] for answer in video["answers"]]
    signals = [x for answer in answers for x in answer["tokens"]["signal"]]
    most = max((abs(x) for x in signals if not isinstance(x, str)), default=0.0) or 1.0
    shares = [share * most for share in (-0.5, -0.2, -0.02, 0.02, 0.2, 0.5)]
    kl = [View("kl", "KL to the reference", [1e-6, 1e-3, 1e-2, 1e-1, 1.0], RISING)]
    return [
        View("probability", "probability before the update", [0.05, 0.2, 0.5, 0.9, 0.99], RISING[::-1]),
        View("ratio", "ratio in the loss", around, DIVERGING),
        *(kl if settings["beta"] else []),
        View("signal", "gradient signal", shares, DIVERGING),
        View("change", "probability after the update over before", around, DIVERGING),
    ]


def shown_tokens(tokens: Mapping, views: Sequence[View], title: str) -> dict:
    """The pieces of an answer, `text` and `classes`, and a table of all their numbers."""
    pieces, rows = [], []
    for t, text in enumerate(tokens["text"]):
        of = {name: tokens[name][t] for name in tokens if name not in ("text", "ids")}
        values = {**of, "probability": exp(of["before"]), "change": times_as_likely(of)}
        levels = {view.name: view.level(values[view.name]) for view in views}
        classes = [f"{name}-{level}" for name, level in levels.items() if level is not None]
        classes += ["clipped"] if of["clipped"] else []
        pieces.append({"text": text, "classes": " ".join(classes)})
        clipped = {-1: "low", 0: "", 1: "high"}[of["clipped"]]
        logprobs = (of["before"], of["after"], of.get("reference"))
        cells = [*map(cell, logprobs), cell(of["ratio"], 4), short(of.get("kl")), clipped]
        signals = (of["policy_signal"], of.get("kl_signal"), of["signal"])
        rows.append([repr(text)[1:-1] or "…", *cells, *map(short, signals)])
    header = ("token", "log p", "log p after", "log p of reference", "ratio", "KL", "clipped")
    header += ("by policy part", "by KL part", "signal")
    return {"pieces": pieces, "table": Table(title, header, rows)}


def shown_video(video: Mapping, names: Sequence[str], views: Sequence[View], settings: Mapping) -> dict:
    """What the page shows of a video."""
    path, terms = video["path"], video["terms"]
    tables = [answers_table(video)]
    if "ranking" in terms:
        tables.append(ranking_table(video, names))
    if "temporal" in terms:
        tables.append(temporal_table(video))
    if video["perturbed_answers"]:
        tables.append(copy_table(video))
    answers = [
        answer
        | {"formulas": formulas(video, g, settings)}
        | shown_tokens(answer["tokens"], views, f"Tokens of answer {g + 1} to {path}")
        for g, answer in enumerate(video["answers"])
    ]
    return {**video, "answers": answers, "tables": tables, "bell": bell(video) if "regression" in terms else None}


def formulas(video: Mapping, g: int, settings: Mapping) -> dict[str, str]:
    """Each term, the reward and the advantage of an answer, with the numbers that they are made of."""
    answer, group = video["answers"][g], video["group"]
    told = {name: f"{term['formulas'][g]} = {cell(answer['rewards'][name])}" for name, term in video["terms"].items()}
    told["reward"] = f"{video['totals'][g]} = {cell(answer['reward'])}"
    over = f" / ({cell(group['std'])} + {settings['std_floor']:g})" if settings["advantage_std"] else ""
    told["advantage"] = f"({cell(answer['reward'])} − {cell(group['mean'])}){over} = {answer['advantage']:+.3f}"
    return told


def bell(video: Mapping) -> dict:
    """The bell around the MOS, the lower one of coarse scores, a dot (number, score, reward) for each answer, `labels`.

    labels: (text, score, reward), the numbers of dots beside each other in one.
    """
    term = video["terms"]["regression"]
    coarse = [(score, term["coarse_factor"] * reward) for score, reward in term["curve"]]
    dots = [
        (g, answer["score"], answer["rewards"]["regression"])
        for g, answer in enumerate(video["answers"], 1)
        if answer["score"] is not None
    ]
    scores = [score for score, _ in term["curve"]]
    axes = Axes((math.floor(scores[0]), math.ceil(scores[-1])), (0.0, 1.1))  # with room for the number of a dot at 1
    groups: list[list[tuple]] = []
    for dot in sorted(dots, key=lambda dot: dot[1]):
        last = groups[-1] if groups else []
        if last and axes.px(dot[1]) - axes.px(last[-1][1]) <= NUMBER_WIDTH * (len(last) + 1) / 2:
            last.append(dot)
        else:
            groups.append([dot])
    labels = [
        (" ".join(map(str, sorted(numbers))), sum(scores) / len(scores), max(rewards))
        for numbers, scores, rewards in (zip(*group) for group in groups)
    ]
    return {"axes": axes, "curve": term["curve"], "coarse": coarse, "dots": dots, "labels": labels}


def read(answer: Mapping) -> str:
    """The score of an answer, or why it has none."""
    return answer["unparsed"] if answer["score"] is None else cell(answer["score"], 2)


def answers_table(video: Mapping) -> Table:
    names = list(video["terms"])
    rows = [
        [
            str(g),
            read(answer),
            *(cell(answer["rewards"][name]) for name in names),
            cell(answer["reward"]),
            f"{answer['advantage']:+.3f}",
            cell(answer["before"]),
            cell(answer["after"]),
            cell(times_as_likely(answer)),
        ]
        for g, answer in enumerate(video["answers"], 1)
    ]
    scores, group = video["scores"], video["group"]
    notes = [
        f"Rewards: mean {cell(group['mean'])}, standard deviation {cell(group['std'])}.",
        f"Scores: {scores['count']} were read, mean {cell(scores['mean'])}, variance {cell(scores['variance'])}.",
    ]
    if not any(answer["advantage"] for answer in video["answers"]):
        notes.append("All rewards are equal: the group teaches nothing.")
    header = ("answer", "score", *names, "reward", "advantage", "log p", "log p after", "times as likely")
    return Table(f"Answers to {video['path']}", header, rows, notes)


def ranking_table(video: Mapping, names: Sequence[str]) -> Table:
    """A row for each opponent, the probability that each answer places the video above it, and its fidelity."""
    G = len(video["answers"])
    rows = [
        [
            names[other["video"]],
            cell(other["mos"], 2),
            cell(other["mean"], 2),
            f"{other['truth']:g}",
            *(f"{cell(win, 2)} ({cell(fidelity, 2)})" for win, fidelity in zip(other["win"], other["fidelity"])),
        ]
        for other in video["terms"]["ranking"]["opponents"]
    ]
    header = ("against", "target", "mean score", "truth", *(f"answer {g}" for g in range(1, G + 1)))
    note = "The probability of being placed above, by Eq. (9), and in brackets its fidelity to the truth, Eq. (10)."
    return Table(f"Ranking of {video['path']}", header, rows, [note])


def temporal_table(video: Mapping) -> Table:
    term = video["terms"]["temporal"]
    rows = [
        [name, cell(base["raw"]), cell(base["perturbed"]), "yes" if won(term, base) else "no", f"{base['threshold']:g}"]
        for name, base in term["bases"].items()
    ]
    notes = []
    if term["scope"] == "batch":
        notes = ["Won or lost by all videos of the step together, not by these means."]
    if not term["ok"]:
        notes.append("The clip could not be perturbed: no bonus.")
    header = ("term", "mean of the answers", "mean of the copy's", "won", "threshold of an answer")
    return Table(f"Temporal comparison of {video['path']}", header, rows, notes)


def won(term: Mapping, base: Mapping) -> bool:
    return term["ok"] and base["gain"] > base["margin"]


def copy_table(video: Mapping) -> Table:
    names = list(video["perturbed_answers"][0]["terms"])
    rows = [
        [str(g), read(answer), *(cell(answer["terms"][name]) for name in names), answer["text"]]
        for g, answer in enumerate(video["perturbed_answers"], 1)
    ]
    return Table(f"Answers to the copy of {video['path']}", ("answer", "score", *names, "text"), rows)


def step_tables(found: Mapping) -> list[Table]:
    """The loss in its parts, the gradient by part, and whether good answers became likelier."""
    loss, metrics, settings = found["loss"], found["metrics"], found["settings"]
    divergence = loss["kl"] if settings["beta"] else None
    rows = [["policy", short(loss["policy"])], ["KL", short(divergence)], ["loss", short(loss["total"])]]
    mean = f"Mean KL {short(metrics['kl'])}; beta is {settings['beta']:g}."
    notes = [
        f"Of {metrics['tokens']} tokens {percent(metrics['clipped_low'])} were clipped below, "
        f"{percent(metrics['clipped_high'])} above.",
        mean if settings["beta"] else "No KL: beta is 0, and there is no reference.",
    ]
    if settings["inner_epochs"] == 1:
        notes.append("With one pass the ratio is 1 in value, and the clip never acts.")
    norms = [[name, short(norm)] for name, norm in found["gradients"].items()]
    norms.append(["all", short(metrics["grad_norm"])])
    answers = [answer for video in found["videos"] for answer in video["answers"]]
    signs = {
        "above 0": [answer for answer in answers if answer["advantage"] > 0],
        "0": [answer for answer in answers if answer["advantage"] == 0],
        "below 0": [answer for answer in answers if answer["advantage"] < 0],
    }
    changed = []
    for name, those in signs.items():
        changes = [float(answer["after"]) - float(answer["before"]) for answer in those]
        mean = cell(sum(changes) / len(changes)) if changes else NONE
        changed.append(
            [name, str(len(those)), str(sum(x > 0 for x in changes)), str(sum(x < 0 for x in changes)), mean]
        )
    frozen = [f"{NONE}: frozen, or the step was left out."] if None in found["gradients"].values() else []
    limit = f"Before clipping to a norm of {settings['grad_clip']:g}; the squares add up. "
    limit += f"The learning rate was {short(metrics['lr'])}."
    return [
        Table("The loss in its parts", ("part", "value"), rows, notes),
        Table("Norm of the gradient", ("part of the model", "norm"), norms, [limit, *frozen]),
        Table(
            "Did good answers become likelier?",
            ("advantage", "answers", "likelier", "less likely", "mean change of log p"),
            changed,
            ["log p of a whole answer under the updated policy, less that under the one that sampled it."],
        ),
    ]


# ---- numbers, of which those that are not finite are text


def cell(x: float | str | None, digits: int = 3) -> str:
    return NONE if x is None else x if isinstance(x, str) else f"{round(x, digits) + 0.0:.{digits}f}"  # no -0.000


def short(x: float | str | None) -> str:
    return NONE if x is None else x if isinstance(x, str) else f"{x + 0.0:.4g}"


def percent(x: float | None) -> str:
    return NONE if x is None else f"{100 * x:.1f} %"


def times_as_likely(of: Mapping) -> float | str:
    """The probability after the update over that before, of the log-probs `after` and `before`."""
    after, before = of["after"], of["before"]
    return "nan" if isinstance(after, str) or isinstance(before, str) else exp(after - before)


def exp(x: float | str) -> float | str:
    return x if isinstance(x, str) else math.exp(min(x, 700.0))
