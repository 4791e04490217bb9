"""Scores of video files: a checkpoint as one callable object.

    from models import load_scorer

    scorer = load_scorer("runs/demo/best")
    scorer("clip.mp4")                 # a Score
    scorer(["a.mp4", "b.mp4"])         # a list of them; a folder or a glob pattern gives one too

It is what evaluate.py and the validation of train.py score with. Unlike the rest of this room it knows the others that
it wires together: files and frames (data), the network, and how an answer is read (rewards).

Legend: N videos, K answers per video, T answer tokens.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path, PurePath
from statistics import fmean, stdev

import torch
from torch import Tensor

from data.dataset import seeded_generator
from data.read_ahead import ReadFile, read_ahead
from data.recipe import Recipe
from data.samplers import Sampler, frames_and_clips
from data.video_files import video_files
from models.expected import (
    CLOSING,
    NUMBERS,
    OPENING,
    NumberTokens,
    expectation,
    number_logprobs,
    number_tokens,
    up_to_the_tag,
)
from models.loading import load_policy
from models.policy import Policy, Videos
from models.slowfast import RECIPES
from rewards.parse import Parsed, parse_answer

SCORES = ("greedy", "expected")


@dataclass(frozen=True)
class Score:
    """What became of one video.

    value: in `mos_range`, the higher the better; None with `status` 'unreadable' (the file gives no frames) or
    'unparsed' (no answer can be read), and `reason`. reasoning: in words; of several answers that of the first that can
    be read. flags: what is unusual about the file, separated by spaces; see `data.video.Frames`.

    With K samples: `answers`, their numbers, None for one that cannot be read; `value` is the mean of the others, and
    `spread` their standard deviation (unbiased; None for fewer than two). With score 'expected': `spread` and `mass` as
    in `models.expected`.
    """

    path: str
    value: float | None
    reasoning: str = ""
    mos_range: tuple[float, float] = (1.0, 5.0)
    higher_is_better: bool = True
    spread: float | None = None
    status: str = "ok"
    reason: str = ""
    flags: str = ""
    answers: tuple[float | None, ...] = ()
    mass: float | None = None

    def row(self) -> dict:
        """For JSON: all fields, `value` by the name of `score`."""
        fields = asdict(self)
        path, value = fields.pop("path"), fields.pop("value")
        return {"path": path, "score": value, **fields}

    @classmethod
    def from_row(cls, row: dict) -> "Score":
        """The Score of a `row`, also of one that has been JSON."""
        fields = {"value" if name == "score" else name: value for name, value in row.items()}
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})


@dataclass(frozen=True, eq=False)
class Scorer:
    """A policy and how it is asked. Which videos share a batch does not change a score; see docs/evaluation.md.

    Args:
        recipe: frames, words and length of answer.
        score: 'greedy', the number of the most likely answer, token by token; 'expected', see `models.expected`.
        samples: K answers to draw instead, at the policy's temperature; 0 for none.
        seed: what is drawn is a function of it, the file's name without its folder, and the answer's number.
        batch: videos per forward pass. workers: files decoded at a time. video_timeout: seconds that one may take.

    Raises ValueError naming --samples or --score where they do not go together or with the tokenizer.
    """

    policy: Policy
    recipe: Recipe
    score: str = "greedy"
    samples: int = 0
    seed: int = 0
    batch: int = 16
    workers: int = 2
    video_timeout: float = 60.0

    def __post_init__(self):
        if self.score not in SCORES:
            raise ValueError(f"--score {self.score}: choose one of {', '.join(SCORES)}")
        if self.score == "expected":
            if self.samples:
                raise ValueError(f"--samples {self.samples}: goes without --score expected")
            _ = self.numbers  # refuses a tokenizer that it does not go with

    @cached_property
    def prompt_ids(self) -> Tensor:
        words = self.recipe.words
        return self.policy.prompt_ids(words.system, words.user_text, self.recipe.frames)

    @cached_property
    def numbers(self) -> NumberTokens:
        return number_tokens(self.policy.tokenizer)

    def __call__(self, videos: str | os.PathLike | Iterable[str | os.PathLike]) -> Score | list[Score]:
        """The Score of one file; a list of them for several files, a folder or a glob pattern (`video_files`).

        A file without a score says why in it; nothing is raised for it. Raises ValueError for a folder or a pattern
        without a video.
        """
        if not isinstance(videos, str | os.PathLike):
            return list(self.scores(map(str, videos)))
        path = Path(videos)
        if path.is_dir() or (not path.exists() and set("*?[") & set(str(videos))):
            return list(self.scores(map(str, video_files(videos))))
        (score,) = self.scores([str(videos)])
        return score

    def scores(self, paths: Iterable[str], root: str | Path | None = None) -> Iterator[Score]:
        """A Score for each path, in order, while the next files are being decoded.

        root: the folder that the paths start from and may not lead out of.
        """
        sampler = self.recipe.make_sampler(self.policy.clip_frames)
        how = (self.video_timeout, self.workers, 2 * self.batch, root)
        with closing(read_ahead(paths, sampler, self.policy.image_side, *how)) as files:
            while batch := list(islice(files, self.batch)):
                yield from self._of_batch(batch, sampler)

    def _of_batch(self, files: list[ReadFile], sampler: Sampler) -> Iterator[Score]:
        seen = [file for file in files if file.pixels is not None]
        found = iter(self._answer(seen, sampler) if seen else ())
        for file in files:
            if file.pixels is None:
                yield Score(file.path, None, status="unreadable", reason=file.reason)
            else:
                yield Score(file.path, flags=" ".join(sorted(file.flags)), **next(found))

    @torch.no_grad()
    def _answer(self, files: list[ReadFile], sampler: Sampler) -> list[dict]:
        """Of files that gave frames, the fields of their Scores that answers decide."""
        frames, clips = zip(*(frames_and_clips(file.pixels, sampler) for file in files))
        clips = torch.stack(clips) if self.recipe.motion_clips else None
        videos = Videos(torch.stack(frames), self.prompt_ids.expand(len(files), -1), motion_clips=clips)
        prefix, T = self.policy.encode(videos), self.recipe.max_new_tokens
        if self.samples:
            uniforms = torch.stack([self.uniforms(file.path) for file in files])
            return [of_answers(texts) for texts in self.policy.texts(self.policy.sample(prefix, uniforms))]
        completions = self.policy.greedy(prefix, T)
        texts = [text for (text,) in self.policy.texts(completions)]
        if self.score == "greedy":
            return [of_answers([text], single=True) for text in texts]
        return [
            self._expected(videos[n : n + 1], completions.ids[n, 0][completions.mask[n, 0]], text)
            for n, text in enumerate(texts)
        ]

    def uniforms(self, path: str) -> Tensor:
        """(K, T) numbers in [0, 1), a function of seed, file name and answer."""
        key = (self.seed, "score", PurePath(path).name)
        T = self.recipe.max_new_tokens
        return torch.stack([torch.rand(T, generator=seeded_generator(*key, k)) for k in range(self.samples)])

    def _expected(self, video: Videos, ids: Tensor, text: str) -> dict:
        """From the greedy answer to one video; alone, so that no other video's length or rounding has a part in it."""
        before, tag, _ = text.partition(OPENING)
        parsed = parse_answer(before + tag + NUMBERS[0] + CLOSING if tag else text)
        if parsed.reason:  # no tag, or one inside a thought: no number behind it would be an answer
            return unparsed([parsed])
        begun = torch.tensor(up_to_the_tag(self.policy.tokenizer, ids.tolist()))
        value, spread, mass = expectation(number_logprobs(self.policy, video, begun, self.numbers))
        return {"value": value, "reasoning": parsed.reasoning, "spread": spread, "mass": mass}


def of_answers(texts: list[str], single: bool = False) -> dict:
    """The mean of the answers that can be read; without `answers` and `spread` if there is to be a single one.

    >>> of_answers(["<answer>2</answer>", "<answer>3</answer>", "3"])["value"]
    2.5
    """
    parsed = [parse_answer(text) for text in texts]
    read = [answer for answer in parsed if answer.score is not None]
    fields = {} if single else {"answers": tuple(answer.score for answer in parsed)}
    if not read:
        return fields | unparsed(parsed)
    values = [answer.score for answer in read]
    spread = stdev(values) if len(values) > 1 else None
    return fields | {"value": fmean(values), "reasoning": read[0].reasoning, "spread": spread}


def unparsed(parsed: list[Parsed]) -> dict:
    """No score, for the reason that most answers have (the first one of several as frequent)."""
    ((reason, _),) = Counter(answer.reason for answer in parsed).most_common(1)
    return {"value": None, "reasoning": parsed[0].reasoning, "status": "unparsed", "reason": reason}


def load_scorer(
    model: str | os.PathLike,
    device: str | torch.device = "auto",
    precision: str = "float32",
    recipe: Recipe | None = None,
    motion_recipe: str | None = None,
    **how,
) -> Scorer:
    """The Scorer of a checkpoint folder or hub name.

    Args:
        device: 'auto' takes CUDA if there is any.
        precision: see `load_policy`.
        recipe: how to ask it, by default as its own says; `Recipe.of(model).but(frames=12)` changes a part.
        motion_recipe: 'train' or 'test', the released settings of SlowFast, and no dense clips.
        how: `score`, `samples`, `seed`, `batch`, `workers`, `video_timeout` of `Scorer`.

    Raises ValueError naming the flag of evaluate.py at fault.
    """
    model = str(model)
    recipe = (recipe or Recipe.of(model)).but(motion_clips=0 if motion_recipe else None)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    network = {"image_side": recipe.image_side, "motion_clips": recipe.motion_clips > 0}
    network |= {"motion_settings": RECIPES.get(motion_recipe), "temperature": recipe.temperature}
    policy = load_policy(model, device=device, precision=precision, **network).eval().requires_grad_(False)
    policy.check_frames(recipe.frames, recipe.motion_clips)
    policy.check_length(recipe.words, recipe.frames, recipe.max_new_tokens)
    return Scorer(policy, recipe, **how)
