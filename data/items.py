"""Items of multiple choice about videos, and the files that they are read from and written to. Needs no torch.

The layout is that of Q-Bench-Video (arXiv 2409.20063), as public scripts that evaluate on it read it; see
docs/understanding.md.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath

LETTERS = "ABCDEFGH"
PAIR_MARK = "_cat_"  # Q-Bench-Video's name of a pair: FIRST_cat_SECOND and an extension of its own
OPEN_ENDED = "open-ended"
SPACE = re.compile(r"[ \t\r\n]*")
# Our names of an item's fields, and others that are read as the same.
NAMES = {
    "videos": ("videos", "video", "video_name"),
    "question": ("question",),
    "candidates": ("candidates", "answers", "options"),
    "answer": ("answer", "correct_choice", "correct_ans"),
    "question_type": ("question_type",),
    "concern": ("concern", "question_concern"),
}


@dataclass(frozen=True)
class Item:
    """One question with lettered candidates about one video, or about a pair of them.

    `videos` are paths below the video folder, `answer` is the place of the right candidate, 0 first.
    """

    videos: tuple[str, ...]
    question: str
    candidates: tuple[str, ...]
    answer: int
    question_type: str = ""
    concern: str = ""


def read_items(file: str | Path) -> tuple[list[Item], int]:
    """The items of a JSON array or of JSON lines, and how many open-ended questions were left out.

    Raises ValueError `FILE:LINE: ...` for the first item that breaks a rule of docs/understanding.md, and naming
    --items for a file that cannot be read or has no item.
    """
    try:
        text = Path(file).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--items {file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"--items {file}: not UTF-8: {error.reason} at byte {error.start}") from error
    items, open_ended = [], 0
    for line, entry in _entries(file, text):
        try:
            json.dumps(entry, ensure_ascii=False).encode()  # a lone surrogate is no text, and names no file
            if not isinstance(entry, dict):
                raise ValueError(f"an item must be a JSON object, got {entry!r}")
            if _words(entry, "question_type").replace("_", "-") == OPEN_ENDED:
                open_ended += 1
            else:
                items.append(_item(entry))
        except ValueError as error:
            raise ValueError(f"{file}:{line}: {error}") from error
    if not items:
        raise ValueError(f"--items {file} has no multiple choice item ({open_ended} open-ended ones)")
    return items, open_ended


def _entries(file: str | Path, text: str) -> Iterator[tuple[int, object]]:
    """(line, value) of each item; lines count from 1, and an item of an array is on the line where it starts."""
    start = SPACE.match(text).end()
    if not text.startswith("[", start):
        for line, content in enumerate(text.split("\n"), 1):
            if content.strip():
                yield line, _decoded(file, line, content, 0, len(content.rstrip()))[0]
        return
    place, more = SPACE.match(text, start + 1).end(), True
    if text.startswith("]", place):
        place, more = place + 1, False
    while more:
        line = text.count("\n", 0, place) + 1
        entry, place = _decoded(file, line, text, place)
        yield line, entry
        place = SPACE.match(text, place).end()
        more = text.startswith(",", place)
        if not (more or text.startswith("]", place)):
            raise ValueError(f"{file}:{text.count(chr(10), 0, place) + 1}: expected ',' or ']' behind an item")
        place = SPACE.match(text, place + 1).end()
    if text[place:].strip():
        raise ValueError(f"{file}:{text.count(chr(10), 0, place) + 1}: something stands behind the array")


def _decoded(file: str | Path, line: int, text: str, place: int, must_end: int | None = None) -> tuple[object, int]:
    """The JSON value at `place` and where it ends."""
    try:
        entry, end = json.JSONDecoder().raw_decode(text, SPACE.match(text, place).end())
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{file}:{line}: not JSON: {getattr(error, 'msg', 'nested too deeply')}") from error
    if must_end not in (None, end):
        raise ValueError(f"{file}:{line}: something stands behind the item")
    return entry, end


def _item(entry: dict) -> Item:
    videos = _field(entry, "videos")
    if isinstance(videos, str):
        first, mark, second = videos.partition(PAIR_MARK)
        videos = [first, os.path.splitext(second)[0]] if mark else [videos]
    if not (isinstance(videos, list) and len(videos) in (1, 2) and all(isinstance(path, str) for path in videos)):
        raise ValueError(f"videos must be a path or two, got {videos!r}")
    for path in videos:
        parts = PurePath(path).parts
        if not parts or PurePath(path).is_absolute() or ".." in parts or "\0" in path:
            raise ValueError(f"a video must be a path below the video folder, got {path!r}")
    candidates = _field(entry, "candidates")
    if not (isinstance(candidates, list) and 2 <= len(candidates) <= len(LETTERS)):
        raise ValueError(f"candidates must be a list of 2 to {len(LETTERS)}, got {candidates!r}")
    if not all(isinstance(text, str) and text.strip() for text in candidates):
        raise ValueError(f"candidates must be texts, got {candidates!r}")
    candidates = [text.strip() for text in candidates]
    if len(set(candidates)) < len(candidates):
        raise ValueError(f"a candidate comes twice in {candidates!r}")
    question = _field(entry, "question")
    if not (isinstance(question, str) and question.strip()):
        raise ValueError(f"question must be a text, got {question!r}")
    answer = _answer(_field(entry, "answer"), candidates)
    kinds = _words(entry, "question_type"), _words(entry, "concern")
    return Item(tuple(videos), question.strip(), tuple(candidates), answer, *kinds)


def _field(entry: dict, name: str):
    found = [key for key in NAMES[name] if key in entry]
    if len(found) != 1:
        raise ValueError(f"{name}: needs exactly one of the keys {', '.join(NAMES[name])}; found {found or 'none'}")
    return entry[found[0]]


def _words(entry: dict, name: str) -> str:
    """An optional category, a text or a list of texts."""
    if not any(key in entry for key in NAMES[name]):
        return ""
    value = _field(entry, name)
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name} must be a text, got {value!r}")
    return ", ".join(text.strip() for text in texts)


def _answer(value: object, candidates: list[str]) -> int:
    """The place that an answer means: a letter, with or without a full stop, or a candidate word for word."""
    text = value.strip() if isinstance(value, str) else None
    if text in candidates:
        return candidates.index(text)
    letters = LETTERS[: len(candidates)]
    if text and text.removesuffix(".") in list(letters):
        return letters.index(text[0])
    raise ValueError(f"answer must be one of {', '.join(letters)} or a candidate, got {value!r}")


def write_items(items: Iterable[Item], file: str | Path) -> None:
    """Write items so that `read_items` gives them back. Raises FileExistsError: nothing is overwritten."""
    with open(file, "x", encoding="utf-8") as out:
        for item in items:
            row = asdict(item) | {"videos": list(item.videos), "answer": LETTERS[item.answer]}
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
