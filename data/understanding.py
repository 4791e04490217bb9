"""What is asked about quality: the words of the questions, and items made from labelled clips. Needs no torch.

    python -m data.understanding clips/demo/labels.jsonl --out clips/items.jsonl

writes questions about clips whose distortions are known. The data sets of VQAThinker's distortion attribution and
quality description are not known to us: questions and thresholds are ours.
"""

import argparse
import random
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple

from data.items import LETTERS, Item, write_items
from data.labels import Clip, read_labels
from data.prompts import INSTRUCTION, Prompt

DESCRIBE = (
    "Describe the quality of this video in one paragraph: name each distortion that you see and say how strong it is."
)
BETTER = "Which of the two videos has the better visual quality?"
STRONGEST = "Which word describes the strongest distortion of this video?"
PAIR_OPENING = "Now you will receive two videos:\n"

ADJECTIVES = {  # of the distortions that `data.synthetic` makes, as the tiny model names them
    "blur": "blurry",
    "noise": "noisy",
    "compression": "blocky",
    "exposure": "badly exposed",
    "stutter": "stuttering",
}
VISIBLE = 0.3  # severity from which a distortion is taken for visible
MARGIN = 0.2  # by which the strongest distortion has to exceed the second


class Pair(NamedTuple):
    """Two clips whose targets differ, in the order in which they are shown."""

    first: Clip
    second: Clip


# ---- asking


@dataclass(frozen=True)
class PairPrompt(Prompt):
    """A prompt with the frames of two videos, those of the first before those of the second."""

    def user_text(self, images: list[str], motion: str | None = None) -> str:
        """As `Prompt.user_text`, with half of `images` for each video; frames count from 1 in both.

        >>> PairPrompt("", "Two:\\n", "Frame{number}:{image}\\n", "", "Well?").user_text(["[A]", "[B]"])
        'Two:\\nVideo 1:\\nFrame1:[A]\\nVideo 2:\\nFrame1:[B]\\nWell?'
        """
        half = len(images) // 2
        bare = Prompt("", "", self.frame, "", "")
        blocks = [f"Video {k + 1}:\n{bare.user_text(images[k * half :][:half])}" for k in range(2)]
        return self.opening + "".join(blocks) + (self.motion.format(image=motion) if motion else "") + self.closing


def asking(words: Prompt, closing: str, videos: int = 1) -> Prompt:
    """The prompt `words` with another question, about one video or two."""
    if videos == 1:
        return replace(words, closing=closing)
    return PairPrompt(words.system, PAIR_OPENING, words.frame.rstrip() + "\n", words.motion.rstrip() + "\n", closing)


def choice_question(item: Item) -> str:
    """What is asked behind the frames: the question, its candidates by letter, and how to answer."""
    lettered = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, item.candidates))
    return f"{item.question}\n{lettered}\n{INSTRUCTION} The final answer is the letter of the right option alone."


# ---- making items


def severities(clip: Clip) -> dict[str, float] | None:
    """The distortions of a label line and their severities, above 0 and up to 1; None if it has no such key.

    Raises ValueError naming the clip for anything else under that key.
    """
    found = clip.extra.get("severities")
    numbers = found.values() if isinstance(found, dict) else []
    if found is not None and not (
        isinstance(found, dict) and all(isinstance(x, int | float) and 0 < x <= 1 for x in numbers)
    ):
        raise ValueError(f"{clip.path}: severities must be numbers above 0 and up to 1 by name, got {found!r}")
    return found


def synthetic_items(clips: Iterable[Clip], seed: int = 0) -> list[Item]:
    """Attribution items for clips with `severities`, their candidates in random order.

    What-how, which distortion is the strongest: for clips where its severity is at least VISIBLE and MARGIN above the
    second. Yes-no, whether one is visible: yes at VISIBLE or more, no where it is absent, as many of each, drawn; a
    severity in between is not asked about. The same clips and seed give the same items. Raises ValueError naming the
    clip for severities of other distortions than `data.synthetic` makes.
    """
    draw = random.Random(seed)
    known = [(clip, severities(clip)) for clip in clips if severities(clip) is not None]
    for clip, suffers in known:
        if unknown := suffers.keys() - ADJECTIVES.keys():
            raise ValueError(f"{clip.path}: severities of {', '.join(sorted(unknown))}: not of data.synthetic")
    items = []
    for clip, suffers in known:
        ranked = [*sorted(suffers.values(), reverse=True), 0.0, 0.0]
        if ranked[0] >= VISIBLE and ranked[0] - ranked[1] >= MARGIN:
            strongest = max(suffers, key=suffers.get)
            candidates = draw.sample(list(ADJECTIVES.values()), len(ADJECTIVES))
            answer = candidates.index(ADJECTIVES[strongest])
            items.append(Item((clip.path,), STRONGEST, tuple(candidates), answer, "what-how", strongest))
    for name in ADJECTIVES:
        yes = [clip for clip, suffers in known if suffers.get(name, 0.0) >= VISIBLE]
        no = [clip for clip, suffers in known if name not in suffers]
        count = min(len(yes), len(no))
        for clip in sorted(draw.sample(yes, count) + draw.sample(no, count), key=lambda clip: clip.path):
            candidates = draw.sample(["Yes", "No"], 2)
            answer = candidates.index("Yes" if clip in yes else "No")
            question = f"Is there visible {name} in this video?"
            items.append(Item((clip.path,), question, tuple(candidates), answer, "yes-no", name))
    return items


def draw_pairs(clips: list[Clip], count: int, min_difference: float, seed: int = 0) -> list[Pair]:
    """`count` different pairs whose targets differ by `min_difference` or more (and are not equal), each as likely.

    min_difference: on the 1..5 scale. Which clip is shown first is drawn too. Raises ValueError naming --pairs if there
    are fewer pairs.
    """
    ordered = sorted(clips, key=lambda clip: clip.target)
    targets = [clip.target for clip in ordered]
    first, j = [], 0  # of clip i, clip first[i] and all behind it are far enough above
    for target in targets:
        while j < len(targets) and (targets[j] - target < min_difference or targets[j] == target):
            j += 1
        first.append(j)
    ends = list(accumulate(len(targets) - j for j in first))
    total = ends[-1] if ends else 0
    if count > total:
        raise ValueError(f"--pairs {count}: only {total} pairs differ by {min_difference:g} or more")
    draw, pairs = random.Random(seed), []
    for number in draw.sample(range(total), count):
        i = bisect_right(ends, number)
        pair = ordered[i], ordered[first[i] + number - (ends[i - 1] if i else 0)]
        pairs.append(Pair(*draw.sample(pair, 2)))
    return pairs


def pair_item(pair: Pair) -> Item:
    """The question which of two videos is better."""
    answer = int(pair.second.target > pair.first.target)
    return Item((pair.first.path, pair.second.path), BETTER, ("Video 1", "Video 2"), answer, "which-better")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m data.understanding", description=__doc__.splitlines()[0])
    parser.add_argument("labels", help="label file whose lines have severities")
    parser.add_argument("--split", default="test", help="split to ask about (default: test)")
    parser.add_argument("--seed", type=int, default=0, help="of the candidates' order and of the clips that answer no")
    parser.add_argument("--out", required=True, help="file to write; it must not exist")
    args = parser.parse_args(arguments)
    try:
        items = synthetic_items(read_labels(args.labels, args.split), args.seed)
        if not items:
            raise ValueError(f"{args.labels}: no clip of split {args.split!r} has severities to ask about")
        write_items(items, args.out)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    print(f"{args.out}: {len(items)} items")


if __name__ == "__main__":
    main()
