"""Runs that inspect steps, and what a page has to show: from texts, targets and log-probs alone, in plain Python."""

import json
import math
import re
import shlex
import statistics

import pytest
import torch
from torch import nn

import train
from data import synthetic
from grpo.config import parse_config
from grpo.inspect_page import write_inspection
from rewards.format import well_formed
from rewards.parse import parse_answer
from tests.pages import Page, check, tables
from tests.test_rewards_explain import arithmetic

N, G = 4, 3
SMALL = f"--videos-per-step {N} --group-size {G} --workers 0 --eval-every 0 --micro-batch 3 --warmup-steps 0 --lr 2e-4"
NUMBER = r"([-+]?\d[\d.]*(?:e[-+]?\d+)?)"


class Length(nn.Module):
    """A reward of somebody's own."""

    def forward(self, answers):
        return torch.tensor([[own_reward(text) for text in group] for group in answers.texts])


def own_reward(text):
    return len(text) % 7 / 8


def write_clips(folder):
    """The flags of a few clips that are made in `folder`."""
    labels = synthetic.write_clips(folder, {"train": 9, "test": 3}, seed=11)
    return ["--labels", str(labels), "--videos", str(folder)]


def run(clips, output, flags):
    assert train.main(parse_config([*shlex.split(f"{SMALL} {flags}"), *clips, "--output", str(output)])) == 0
    return output


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def read(output, step):
    return json.loads((output / "inspect" / f"step_{step:06d}.json").read_text())


def written_page(found, folder):
    """The page of what a JSON file holds, which has no pictures."""
    none = {"thumbnails": [], "of": 0}
    videos = [video | {"pictures": {"frames": none, "perturbed": none}} for video in found["videos"]]
    write_inspection(folder, {**found, "videos": videos})
    page = Page(folder / f"step_{found['step']:06d}.html")
    check(page)
    return page


def all_answers(found):
    return [(video, answer) for video in found["videos"] for answer in video["answers"]]


# ---- rewards from their definitions


def spread(values):
    return statistics.variance(values) if len(values) > 1 else 0.0


def scores_of(answers):
    return [read.score for read in (parse_answer(answer["text"]) for answer in answers) if read.score is not None]


def opponents(siblings, place, videos, one=False):
    """Of the video at a place: those with a readable answer, mean score and deviation of the difference, the truth."""
    target, found = videos[place]["target"], []
    for other in [(place + 1) % len(videos)] if one else range(len(videos)):
        theirs = scores_of(videos[other]["answers"])
        if other != place and theirs:
            deviation = math.sqrt(max(0.04, spread(scores_of(siblings)) + spread(theirs)))
            above, below = target > videos[other]["target"], target < videos[other]["target"]
            found.append((other, statistics.mean(theirs), deviation, 0.5 + 0.5 * (above - below)))
    return found


def compared(score, mean, deviation, truth):
    """The probability that the score is above, and its fidelity to the truth."""
    win = (1 + math.erf((score - mean) / deviation / math.sqrt(2))) / 2
    return win, math.sqrt(win * truth + 1e-6) + math.sqrt((1 - win) * (1 - truth) + 1e-6)


def base_rewards(text, siblings, place, videos, one):
    """Ranking and regression of an answer."""
    read, target = parse_answer(text), videos[place]["target"]
    if read.score is None:
        return {"ranking": 0.0, "regression": 0.0}
    against = [compared(read.score, *other)[1] for _, *other in opponents(siblings, place, videos, one)]
    bell = math.exp(-((read.score - target) ** 2) / (2 * 0.5**2)) * (0.8 if read.decimals < 2 else 1)
    return {"ranking": statistics.mean(against) if against else 0.0, "regression": bell}


def rewarded(found, weights, one=False):
    """For each video: terms and reward of its answers, mean and deviation of the group, advantages, terms of copies."""
    videos, made = found["videos"], []
    bases = [name for name in ("ranking", "regression") if name in weights]
    for place, video in enumerate(videos):
        groups = (video["answers"], video["perturbed_answers"])
        raw, worse = ([base_rewards(x["text"], group, place, videos, one) for x in group] for group in groups)
        terms = [values | {"temporal": 0.0} for values in raw]
        means = {}
        for name, threshold in ((name, {"ranking": 0.5, "regression": 0.9}[name]) for name in bases if worse):
            means[name] = [statistics.mean(values[name] for values in group) for group in (raw, worse)]
            if video["perturbation"] and means[name][0] > means[name][1] + 1e-6:
                for values, own in zip(terms, raw):
                    values["temporal"] += 0.3 * (own[name] > threshold)
        for values, answer in zip(terms, video["answers"]):
            values["format"] = float(well_formed(answer["text"]))
            values["tests.inspected:Length"] = own_reward(answer["text"])
        terms = [{name: values[name] for name in weights} for values in terms]
        rewards = [sum(weights[name] * values[name] for name in weights) for values in terms]
        mean, deviation = statistics.mean(rewards), statistics.stdev(rewards)
        flat = max(rewards) - min(rewards) < 1e-9
        advantages = [0.0 if flat else (reward - mean) / (deviation + 1e-4) for reward in rewards]
        copies = [{name: values[name] for name in bases} for values in worse]
        made.append((terms, rewards, mean, deviation, advantages, copies, means))
    return made


# ---- the loss, token by token


def token_parts(answer, A, config, t):
    """Of a token: weight, ratio, side of the clip, KL, parts of the loss, minus their slopes by log p and the logit."""
    tokens, beta = answer["tokens"], config["beta"]
    weight, ratio = 1 / (N * G * len(tokens["ids"])), tokens["ratio"][t]
    log_p = tokens["before"][t] + math.log(ratio)
    clip = (ratio > 1 + config["clip_high"] and A > 0) - (ratio < 1 - config["clip_low"] and A < 0)
    held = min(max(ratio, 1 - config["clip_low"]), 1 + config["clip_high"])
    part = {"weight": weight, "ratio": ratio, "clip": clip, "policy": -weight * min(ratio * A, held * A)}
    part["by policy"] = 0.0 if clip else weight * ratio * A
    part["kl"] = part["by KL"] = None
    if beta:
        gap = tokens["reference"][t] - log_p
        part["kl"], part["by KL"] = math.expm1(gap) - gap, beta * weight * math.expm1(gap)
    slope = part["by policy"] + (part["by KL"] or 0.0)
    return part | {"signal": slope * -math.expm1(log_p) / config["temperature"]}


# ---- what a page shows


def fixed(x, digits=3):
    """A number with so many digits behind the point, None as a dash."""
    if x is None:
        return "–"
    near = pytest.approx(x, rel=2e-4, abs=0.6 * 10**-digits)
    return lambda cell: re.fullmatch(rf"[-+]?\d+\.\d{{{digits}}}", cell) and float(cell) == near


def short(x, off=1e-9):
    if x is None:
        return "–"
    return lambda cell: cell != "-0" and float(cell) == pytest.approx(x, rel=2e-3, abs=off)


def says(template, *numbers, off=6e-4):
    """A text with numbers where the template has {}."""
    pattern = re.escape(template).replace(r"\{\}", NUMBER)

    def holds(text):
        match = re.fullmatch(pattern, text)
        return match and [float(x) for x in match.groups()] == pytest.approx(numbers, rel=2e-3, abs=off)

    return holds


def as_read(text):
    """A text as a file is read: with one kind of line end."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def score_cell(text):
    read = parse_answer(text)
    return read.reason if read.score is None else fixed(read.score, 2)


def expected(found, weights, config):
    """The tables by caption, the notes under them in order, and the terms of the lists of formulas, all to be shown."""
    one = config["ranking_opponents"] == "one"
    videos, made = found["videos"], rewarded(found, weights, one)
    parts, changes, shown, notes, formulas = [], [], {}, [], []
    for place, (video, (terms, rewards, mean, deviation, advantages, copies, means)) in enumerate(zip(videos, made)):
        path, answers = video["path"], video["answers"]
        rows = [["answer", "score", *weights, "reward", "advantage", "log p", "log p after", "times as likely"]]
        for g, answer in enumerate(answers):
            tokens, A = answer["tokens"], advantages[g]
            before, after = math.fsum(tokens["before"]), math.fsum(tokens["after"])
            times = fixed(math.exp(after - before))
            values = [*map(fixed, terms[g].values()), fixed(rewards[g]), fixed(A), fixed(before), fixed(after), times]
            rows.append([str(g + 1), score_cell(answer["text"]), *values])
            changes.append((A, after - before))
            formulas.append([*terms[g].items(), ("reward", rewards[g]), ("advantage", A)])
            header = ["token", "log p", "log p after", "log p of reference", "ratio", "KL", "clipped"]
            table = [[*header, "by policy part", "by KL part", "signal"]]
            for t, text in enumerate(tokens["text"]):
                part = token_parts(answer, A, config, t)
                reference = tokens["reference"][t] if config["beta"] else None
                logs = [fixed(x) for x in (tokens["before"][t], tokens["after"][t], reference)]
                clipped = {-1: "low", 0: "", 1: "high"}[part["clip"]]
                ratio = fixed(part["ratio"], 4)
                slopes = [short(part[name], 2e-7) for name in ("by policy", "by KL", "signal")]
                table.append([repr(text)[1:-1] or "…", *logs, ratio, short(part["kl"], 2e-6), clipped, *slopes])
                parts.append(part)
            shown[f"Tokens of answer {g + 1} to {path}"] = table
        shown[f"Answers to {path}"] = rows
        scores = scores_of(answers)
        average = statistics.mean(scores) if scores else None
        notes.append(says("Rewards: mean {}, standard deviation {}.", mean, deviation))
        read = "Scores: {} were read, mean " + ("{}" if scores else "–") + ", variance {}."
        notes.append(says(read, len(scores), *([average] if scores else []), spread(scores)))
        if not any(advantages):
            notes.append(says("All rewards are equal: the group teaches nothing."))
        if "ranking" in weights:
            rows = [["against", "target", "mean score", "truth", *(f"answer {g + 1}" for g in range(G))]]
            for other, *against in opponents(answers, place, videos, one):
                cells = []
                for answer in answers:
                    score = parse_answer(answer["text"]).score
                    cells.append("– (–)" if score is None else says("{} ({})", *compared(score, *against), off=6e-3))
                row = [videos[other]["path"], fixed(videos[other]["target"], 2), fixed(against[0], 2)]
                rows.append([*row, f"{against[2]:g}", *cells])
            shown[f"Ranking of {path}"] = rows
            note = "The probability of being placed above, by Eq. (9), "
            notes.append(says(note + "and in brackets its fidelity to the truth, Eq. (10)."))
        if "temporal" in weights:
            rows = [["term", "mean of the answers", "mean of the copy's", "won", "threshold of an answer"]]
            for name, (own, theirs) in means.items():
                won = "yes" if video["perturbation"] and own > theirs + 1e-6 else "no"
                rows.append([name, fixed(own), fixed(theirs), won, {"ranking": "0.5", "regression": "0.9"}[name]])
            shown[f"Temporal comparison of {path}"] = rows
            if not video["perturbation"]:
                notes.append(says("The clip could not be perturbed: no bonus."))
            rows = [["answer", "score", *copies[0], "text"]]
            for g, (answer, values) in enumerate(zip(video["perturbed_answers"], copies)):
                rows.append(
                    [str(g + 1), score_cell(answer["text"]), *map(fixed, values.values()), as_read(answer["text"])]
                )
            shown[f"Answers to the copy of {path}"] = rows
    policy = math.fsum(part["policy"] for part in parts)
    kl = math.fsum(config["beta"] * part["weight"] * part["kl"] for part in parts) if config["beta"] else None
    rows = [["policy", short(policy, 1e-6)], ["KL", short(kl, 1e-6)], ["loss", short(policy + (kl or 0.0), 1e-6)]]
    shown["The loss in its parts"] = [["part", "value"], *rows]
    low, high = (100 * sum(part["clip"] == side for part in parts) / len(parts) for side in (-1, 1))
    first = [says("Of {} tokens {} % were clipped below, {} % above.", len(parts), low, high, off=0.06)]
    if config["beta"]:
        mean = statistics.mean(part["kl"] for part in parts)
        first.append(says("Mean KL {}; beta is {}.", mean, config["beta"], off=1e-6))
    else:
        first.append(says("No KL: beta is 0, and there is no reference."))
    if config["inner_epochs"] == 1:
        first.append(says("With one pass the ratio is 1 in value, and the clip never acts."))
    norms = {name: x for name, x in found["gradients"].items()}
    squares = math.sqrt(math.fsum(x**2 for x in norms.values() if x is not None))
    rows = [[name, short(x)] for name, x in norms.items()] + [["all", short(squares, 1e-2 * squares)]]
    shown["Norm of the gradient"] = [["part of the model", "norm"], *rows]
    limit = "Before clipping to a norm of {}; the squares add up. The learning rate was {}."
    first.append(says(limit, config["grad_clip"], found["metrics"]["lr"], off=0))
    if None in norms.values():
        first.append(says("–: frozen, or the step was left out."))
    rows = [["advantage", "answers", "likelier", "less likely", "mean change of log p"]]
    for name, sign in (("above 0", 1), ("0", 0), ("below 0", -1)):
        those = [change for A, change in changes if (A > 0) - (A < 0) == sign]
        mean = statistics.mean(those) if those else None
        counts = [len(those), sum(x > 0 for x in those), sum(x < 0 for x in those)]
        rows.append([name, *map(str, counts), fixed(mean)])
    shown["Did good answers become likelier?"] = rows
    first.append(says("log p of a whole answer under the updated policy, less that under the one that sampled it."))
    return shown, first + notes, formulas


def holds(cell, wanted):
    return cell == wanted if isinstance(wanted, str) else wanted(cell)


def check_numbers(found, page, weights, config):
    """Every cell of every table, every note, formula and heading of a page is what texts and log-probs make it."""
    wanted, notes, formulas = expected(found, weights, config)
    shown = tables(page)
    assert shown.keys() == wanted.keys()
    for title, rows in shown.items():
        assert len(rows) == len(wanted[title]), title
        for row, cells in zip(rows, wanted[title]):
            assert len(row) == len(cells) and all(map(holds, row, cells)), (title, row)
    lists = [text for attributes, text in page.elements["ul"] if attributes.get("class") == "note"]
    told = [line for text in lists for line in text.splitlines() if line]
    assert len(told) == len(notes) and all(map(holds, told, notes)), told
    terms = list(zip(page.texts("dt"), page.texts("dd")))
    names = [name for name in found["settings"] if name != "std_floor"]
    assert terms[: len(names) + 1] == [*((name, str(config[name])) for name in names), ("std_floor", "0.0001")]
    terms = iter(terms[len(names) + 1 :])
    for (video, _), of_answer in zip(all_answers(found), formulas):
        for name, value in of_answer:
            label, text = next(terms)
            formula, result = text.rsplit(" = ", 1)
            assert label == name and fixed(value)(result), text
            if formula != "as its module says":
                off = 2e-3 + (3e-3 / max(video["group"]["std"], 1e-3) if name == "advantage" else 0)
                assert arithmetic(formula) == pytest.approx(value, abs=off), text
    assert next(terms, None) is None
    headings = iter(page.texts("h3"))
    for video in found["videos"]:
        for g, answer in enumerate(video["answers"]):
            cut = answer["tokens"]["text"][-1] != "<|im_end|>"
            end = f", cut off after {config['max_new_tokens']} tokens" if cut else ""
            title = f"Answer {g + 1} to {video['path']}: advantage {{}}{end}"
            assert says(title, answer["advantage"])(next(headings))
    about = [" ".join(text.split()) for text in page.texts("p")]
    for video in found["videos"]:
        low, high = video["mos_range"]
        text = f"MOS {{}} on its own scale of {low:g} to {high:g}; the target of the answers is {{}}."
        copy = f"{video['perturbation']}." if video["perturbation"] else "the same, as it could not be perturbed."
        text += f" Its copy: {copy}" if "temporal" in weights else ""
        target = 1 + 4 * (video["mos"] - low) / (high - low)
        assert any(says(text, video["mos"], target, off=6e-3)(line) for line in about), text
