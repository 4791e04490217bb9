"""The tasks of `evaluate.py --task`: attribution, description and comparison. See docs/understanding.md.

It wires rooms together, like models/scorer.py: nothing imports it but evaluate.py and its tests.
"""

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from itertools import groupby, islice
from pathlib import Path
from typing import NamedTuple

import torch

from data.items import LETTERS, Item, read_items
from data.judge import GRADING, Judge, JudgeRefuses, parse_score
from data.labels import Clip, read_labels
from data.prompts import Prompt
from data.read_ahead import read_ahead
from data.recipe import Recipe
from data.samplers import frames_and_clips
from data.understanding import asking, choice_question, draw_pairs, pair_item, severities
from grpo import distributed
from models.choices import Watched, candidate_ids, candidate_logprobs, show
from models.policy import Policy
from models.scorer import load_scorer
from rewards.choice import accuracy, parse_choice
from rewards.mentions import Synonyms, mention_scores
from rewards.parse import parse_answer


class Question(NamedTuple):
    """One prompt about one video or two; `texts` are those whose likelihood behind it is wanted.

    write: an answer is wanted too.
    """

    videos: tuple[str, ...]
    words: Prompt
    texts: tuple[str, ...] = ()
    write: bool = True


class Reply(NamedTuple):
    """What became of a question: the text written, the texts' mean log-probabilities, or why a video is unreadable."""

    text: str | None = None
    logprobs: list[float] | None = None
    unreadable: str | None = None


WAYS = ("likelihood", "generated")  # of choosing a candidate
Ask = Callable[[Sequence[Question]], Iterator[tuple[int, Reply]]]  # the place of a question, and its reply
Finish = Callable[[Ask, Callable[[dict], None]], dict]  # asks, hands over a row for each thing finished, gives metrics


def run_task(args) -> int:
    """Run the task of the arguments (`data.task_flags`) into OUTPUT/TASK.jsonl and metrics.json; the exit status."""
    try:
        if distributed.world_size() > 1:
            raise ValueError(f"--task {args.task}: runs in one process, not in {distributed.world_size()}")
        output = Path(args.output)
        if (output / "metrics.json").exists() and not (output / f"{args.task}.jsonl").exists():
            raise ValueError(f"--output {output}: has the metrics.json of something else; choose another folder")
        clips_off = 0 if args.motion_recipe else None
        recipe = Recipe.of(args.model)
        recipe = recipe.but(frames=args.frames, image_side=args.image_side, motion_clips=clips_off)
        questions, finish = TASKS[args.task](args, recipe)
        check_videos(questions, Path(args.videos))
        how = {"recipe": recipe, "motion_recipe": args.motion_recipe}
        policy = load_scorer(args.model, distributed.setup(args.device), args.precision, **how).policy
        check_lengths(policy, questions, recipe)
    except (ValueError, OSError) as error:
        print(f"evaluate.py: error: {error}", file=sys.stderr)
        return 2

    unreadable = 0
    output.mkdir(parents=True, exist_ok=True)
    (output / "metrics.json").unlink(missing_ok=True)  # of an earlier run: there is none until this one has ended

    def ask(asked: Sequence[Question]) -> Iterator[tuple[int, Reply]]:
        nonlocal unreadable
        for k, reply in replies(policy, asked, recipe, args):
            unreadable += reply.unreadable is not None
            yield k, reply

    with open(output / f"{args.task}.jsonl", "w", encoding="utf-8", buffering=1) as file:
        try:
            metrics = finish(ask, lambda row: file.write(json.dumps(row, allow_nan=False) + "\n"))
        except JudgeRefuses as error:
            print(f"evaluate.py: error: {error}", file=sys.stderr)
            return 2
    metrics |= {"unreadable_questions": unreadable, "model": args.model, "recipe": asdict(recipe)}
    (output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    for line in shown(metrics):
        print(line)
    print(f"{unreadable} of {len(questions)} questions about an unreadable video; {output / 'metrics.json'}")
    return int(args.strict and unreadable > 0)


def shown(metrics: dict, name: str = "") -> Iterator[str]:
    """A line for each accuracy over all and for the F1 over all distortions, wherever in the metrics they are."""
    if metrics.get("n") and metrics["accuracy"] is not None:
        share = f"{metrics['accuracy']:.3f} [{metrics['low']:.3f}, {metrics['high']:.3f}]"
        yield f"{name}: accuracy {share} of {metrics['n']}"
    elif metrics.get("f1") is not None:
        yield f"mentions: F1 {metrics['f1']:.3f} over {metrics['present']} distortions"
    for key in ("by_score", "asked", "all", *WAYS, "mentions", "micro"):
        if isinstance(metrics.get(key), dict):
            yield from shown(metrics[key], key)


# ---- the tasks: what is asked, and what is made of the replies


def attribution(args, recipe: Recipe) -> tuple[list[Question], Finish]:
    """Multiple choice: the likeliest candidate, and the letter that is written."""
    items, open_ended = read_items(args.items)
    if args.scoring_prompt:
        if pair := next((item for item in items if len(item.videos) > 1), None):
            raise ValueError(f"--scoring-prompt: asks about one video, not about {' and '.join(pair.videos)}")
        texts = [candidate_texts(item, args) for item in items]
        questions = [Question(item.videos, recipe.words, text, False) for item, text in zip(items, texts)]
    else:
        questions = [item_question(item, args, recipe) for item in items]

    def finish(ask: Ask, write: Callable[[dict], None]) -> dict:
        rows = []
        for k, reply in ask(questions):
            rows.append(choice_row(items[k], reply))
            write(rows[-1])
        setting = {"by": args.by, "answer_form": args.answer_form, "scoring_prompt": args.scoring_prompt}
        ways = WAYS[:1] if args.scoring_prompt else WAYS
        return {**choice_metrics(rows, ways), "open_ended_left_out": open_ended, **setting}

    return questions, finish


def compare(args, recipe: Recipe) -> tuple[list[Question], Finish]:
    """Which of two videos is better: by the scores that each gets alone, and asked about both at once."""
    clips = read_labels(args.labels, args.split, recipe.mos_mapping)
    seed = args.seed or 0
    pairs = draw_pairs(clips, args.pairs, args.min_difference, seed)
    paths = sorted({clip.path for pair in pairs for clip in pair})
    alone = [Question((path,), recipe.words) for path in paths]
    items = [pair_item(pair) for pair in pairs]
    together = [item_question(item, args, recipe) for item in items]

    def finish(ask: Ask, write: Callable[[dict], None]) -> dict:
        scores = {paths[k]: parse_answer(reply.text or "").score for k, reply in ask(alone)}
        rows = []
        for k, reply in ask(together):
            first, second = pairs[k]
            row = choice_row(items[k], reply) | {"mos": [first.target, second.target]}
            row["scores"] = [scores[clip.path] for clip in pairs[k]]
            row["right_by_score"] = right_by_score(*row["scores"], answer=items[k].answer)
            rows.append(row)
            write(row)
        by_score = accuracy([row["right_by_score"] for row in rows])
        by_score["ties"] = sum(row["right_by_score"] == 0.5 for row in rows)
        by_score["unscored"] = sum(None in row["scores"] for row in rows)
        setting = {"min_difference": args.min_difference, "seed": seed, "by": args.by}
        return {"by_score": by_score, "asked": choice_metrics(rows, WAYS), **setting, "answer_form": args.answer_form}

    return [*alone, *together], finish


def describe(args, recipe: Recipe) -> tuple[list[Question], Finish]:
    """Free descriptions, or the reasoning before a score: the distortions mentioned, and a judge's grade if asked."""
    synonyms = Synonyms.read(args.synonyms)
    clips = read_labels(args.labels, args.split, recipe.mos_mapping)
    try:
        present = [present_in(clip, synonyms) for clip in clips]
    except ValueError as error:
        raise ValueError(f"--labels {args.labels}: {error}") from error
    words = recipe.words if args.scoring_prompt else asking(recipe.words, args.prompt_text)
    questions = [Question((clip.path,), words) for clip in clips]
    judge = None
    if args.judge_url:
        judge = Judge(args.judge_url, args.judge_model, Path(args.output) / "judge", args.judge_timeout)

    def finish(ask: Ask, write: Callable[[dict], None]) -> dict:
        rows = []
        for k, reply in ask(questions):
            text = reply.text
            if args.scoring_prompt and text is not None:
                text = parse_answer(text).reasoning
            row = {"path": clips[k].path, "text": text, "unreadable": reply.unreadable}
            row["mentioned"] = None if text is None else sorted(synonyms.mentions(text))
            row["present"] = None if present[k] is None else sorted(present[k])
            if judge is not None and text is not None and present[k] is not None:
                row["judge_reply"] = judge.ask(GRADING.format(reference=reference(clips[k]), description=text))
                row["judge_score"] = None if row["judge_reply"] is None else parse_score(row["judge_reply"])
            rows.append(row)
            write(row)
        metrics = describe_metrics(rows, any("description" in clip.extra for clip in clips), synonyms)
        metrics |= {"scoring_prompt": args.scoring_prompt, "prompt_text": words.closing}
        return metrics | ({"judge": judge_metrics(rows, judge, args.judge_price)} if judge else {})

    return questions, finish


TASKS = {"attribution": attribution, "compare": compare, "describe": describe}

# ---- multiple choice


def candidate_texts(item: Item, args) -> tuple[str, ...]:
    """The texts whose likelihood is compared: a letter or a candidate, in the form of an answer."""
    named = LETTERS[: len(item.candidates)] if args.by == "letter" else item.candidates
    return tuple(args.answer_form.replace("{}", name) for name in named)


def item_question(item: Item, args, recipe: Recipe) -> Question:
    words = asking(recipe.words, choice_question(item), len(item.videos))
    return Question(item.videos, words, candidate_texts(item, args))


def choice_row(item: Item, reply: Reply) -> dict:
    """A line of the output; `likelihood` and `generated` are letters, or None."""
    row = asdict(item) | {"videos": list(item.videos), "answer": LETTERS[item.answer], "unreadable": reply.unreadable}
    row |= {"likelihood": None, "logprobs": reply.logprobs, "generated": None, "reason": None, "text": reply.text}
    if reply.logprobs is not None:
        row["likelihood"] = LETTERS[max(range(len(item.candidates)), key=reply.logprobs.__getitem__)]
    if reply.text is not None:
        choice = parse_choice(reply.text, item.candidates)
        row["generated"] = None if choice.index is None else LETTERS[choice.index]
        row["reason"] = choice.reason
    return row


def choice_metrics(rows: list[dict], ways: Sequence[str]) -> dict:
    """Accuracy of each way of choosing, over all rows and by category, beside chance and the most frequent answers.

    A question without a readable answer, or about an unreadable video, counts as wrong.
    """
    told = [row | {"videos": {1: "single", 2: "pair"}[len(row["videos"])]} for row in rows]
    metrics = {"all": accuracies(rows, ways)}
    for key in ("question_type", "concern", "videos"):
        names = sorted({row[key] for row in told})
        metrics[key] = {name: accuracies([row for row in told if row[key] == name], ways) for name in names}
    metrics["letters"] = {way: dict(sorted(Counter(row[way] for row in rows if row[way]).items())) for way in ways}
    if "generated" in ways:
        metrics["unreadable_answers"] = dict(Counter(row["reason"] for row in rows if row["reason"]))
    return metrics


def accuracies(rows: list[dict], ways: Sequence[str]) -> dict:
    """`chance`, `majority`, and the accuracy of each way.

    majority: of giving each question (its words) its most frequent right candidate; None if none comes twice.
    """
    right = defaultdict(Counter)
    for row in rows:
        right[row["question"]][row["candidates"][LETTERS.index(row["answer"])]] += 1
    majority = sum(max(counts.values()) for counts in right.values()) / len(rows) if len(right) < len(rows) else None
    chance = sum(1 / len(row["candidates"]) for row in rows) / len(rows)
    every = {way: accuracy([float(row[way] == row["answer"]) for row in rows]) for way in ways}
    return {"chance": chance, "majority": majority, **every}


def right_by_score(first: float | None, second: float | None, answer: int) -> float:
    """1 if the better video has the higher score, 0.5 if both have the same, else 0, and 0 without both scores."""
    if first is None or second is None:
        return 0.0
    return 0.5 if first == second else float((second > first) == bool(answer))


# ---- descriptions


def present_in(clip: Clip, synonyms: Synonyms) -> set[str] | None:
    """The distortions that a label line says are there; None if it says nothing of them.

    By its key `severities` (names and numbers), `distortions` (names) or `description` (a text, read by the synonyms).
    Raises ValueError naming the clip for other content, and for a name that the synonyms do not have.
    """
    named = severities(clip)
    named = clip.extra.get("distortions") if named is None else named
    if named is None:
        text = clip.extra.get("description")
        if not isinstance(text, str | None):
            raise ValueError(f"{clip.path}: description must be a text, got {text!r}")
        return None if text is None else synonyms.mentions(text)
    if not (isinstance(named, dict | list) and all(isinstance(name, str) for name in named)):
        raise ValueError(f"{clip.path}: distortions must be a list of names, got {named!r}")
    if unknown := set(named) - synonyms.distortions.keys():
        raise ValueError(f"{clip.path}: --synonyms has no {', '.join(sorted(unknown))}")
    return set(named)


def reference(clip: Clip) -> str:
    """What a judge compares with: the description, or the distortions by name."""
    if (text := clip.extra.get("description")) is not None:
        return text
    named = severities(clip)
    if named is None:
        named = dict.fromkeys(clip.extra["distortions"])
    listed = ", ".join(name if value is None else f"{name} ({value:.2f})" for name, value in named.items())
    return f"Distortions, with severities from 0 to 1 where known: {listed or 'none'}."


def describe_metrics(rows: list[dict], described: bool, synonyms: Synonyms) -> dict:
    """Mention scores over the rows that say what is present; an unreadable video mentions nothing.

    Names that occur in no line are left out, but for lines with a description, which could have any.
    """
    known = [row for row in rows if row["present"] is not None]
    names = {name for row in known for name in row["present"]}
    names = [name for name in synonyms.distortions if name in names or described]
    sets = ([set(row[key] or ()) for row in known] for key in ("mentioned", "present"))
    return {"described": len(rows), "with_reference": len(known), "mentions": mention_scores(*sets, names)}


def judge_metrics(rows: list[dict], judge: Judge, price: list[float] | None) -> dict:
    """The mean of the grades 0, 1 and 2 that could be read, what could not, and what this run's requests used."""
    grades = [row["judge_score"] for row in rows if row.get("judge_score") is not None]
    malformed = sum(row.get("judge_reply") is not None and row["judge_score"] is None for row in rows)
    told = {"model": judge.model, "mean": sum(grades) / len(grades) if grades else None, "graded": len(grades)}
    told |= {"malformed": malformed, **judge.counts}
    if price is not None:
        told["cost"] = (judge.counts["prompt_tokens"] * price[0] + judge.counts["completion_tokens"] * price[1]) / 1e6
    return told


# ---- asking the policy


def check_videos(questions: list[Question], root: Path) -> None:
    """Tell of missing files. Raises ValueError naming --videos if the folder or all of them are missing."""
    if not root.is_dir():
        raise ValueError(f"--videos {root} is not a folder")
    paths = sorted({path for question in questions for path in question.videos})
    missing = [path for path in paths if not (root / path).exists()]
    if len(missing) == len(paths):
        raise ValueError(f"--videos {root} has none of the {len(paths)} files asked about (first: {paths[0]})")
    if missing:
        print(f"{len(missing)} of {len(paths)} videos are missing, {missing[0]} first", file=sys.stderr)


def check_lengths(policy: Policy, questions: list[Question], recipe: Recipe) -> None:
    """Raise a ValueError if a prompt with an answer is longer than the text decoder has positions for."""
    for words, videos, texts in {(q.words, len(q.videos), q.texts) for q in questions}:
        longest = candidate_ids(policy, [texts])[0].shape[-1] if texts else 0
        policy.check_length(words, videos * recipe.frames, max(recipe.max_new_tokens, longest))


def replies(policy: Policy, questions: Sequence[Question], recipe: Recipe, args) -> Iterator[tuple[int, Reply]]:
    """The reply to each question and its place; neighbours whose prompts have one shape are asked together."""
    sampler = recipe.make_sampler(policy.clip_frames)
    paths = [path for question in questions for path in question.videos]
    how = (args.video_timeout, args.workers, 2 * args.batch, args.videos)
    frames = {question.words: len(question.videos) * recipe.frames for question in questions}
    ids = {words: policy.prompt_ids(words.system, words.user_text, count) for words, count in frames.items()}

    def shape(k: int) -> tuple:
        question = questions[k]
        return len(question.videos), len(ids[question.words]), len(question.texts), question.write

    with closing(read_ahead(paths, sampler, policy.image_side, *how)) as files:
        for run in batches(questions, shape, args.batch):
            watched = {}
            for k in run:
                seen = list(islice(files, len(questions[k].videos)))
                if lost := next((file for file in seen if file.pixels is None), None):
                    yield k, Reply(unreadable=f"{lost.path}: {lost.reason}")
                else:
                    watched[k] = [Watched(*frames_and_clips(file.pixels, sampler)) for file in seen]
            if watched:
                asked = [questions[k] for k in watched]
                videos = show(policy, list(watched.values()), torch.stack([ids[q.words] for q in asked]))
                logprobs, texts = [None] * len(asked), [None] * len(asked)
                if asked[0].texts:
                    logprobs = candidate_logprobs(policy, videos, [q.texts for q in asked]).tolist()
                if asked[0].write:
                    prefix = policy.encode(videos)
                    texts = [text for (text,) in policy.texts(policy.greedy(prefix, recipe.max_new_tokens))]
                yield from ((k, Reply(text, row)) for k, text, row in zip(watched, texts, logprobs))


def batches(questions: Sequence[Question], shape: Callable[[int], tuple], most: int) -> Iterator[list[int]]:
    """Places of the questions in order, `most` neighbours of one shape at a time."""
    for _, run in groupby(range(len(questions)), key=shape):
        while batch := list(islice(run, most)):
            yield batch
