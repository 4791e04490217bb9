"""The label files of the field as rows: one reader a format, chosen by content.

Readers are strict and never stop at a fault: rows and faults come back side by side, and the caller decides. A line
holds one record in every text format, so a fault always names its line. Needs no torch.
"""

import codecs
import csv
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any, NamedTuple

REQUIRED = ("path", "mos", "mos_range", "dataset", "split")
NAME_COLUMNS = ("name", "path", "filename", "video")
SCORE_COLUMNS = ("mos", "MOS", "score")
VIDEO_SUFFIXES = (".mp4", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mpeg", ".mpg", ".ts", ".webm", ".wmv", ".y4m")

BYTE_ORDER_MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)  # float() also takes "nan", "1_000", "١"
SPACE = r"[ \t\n\r]*"


@dataclass(frozen=True)
class Row:
    """One labelled video as its file has it.

    `place` is the line it starts on, 1 first, followed by its index where the file is one JSON value; `mos` is on the
    file's own scale. Only this project's format states a range, a data set and a split; elsewhere they are None.
    """

    place: str
    path: str
    mos: float
    extra: dict
    mos_range: tuple[float, float] | None = None
    dataset: str | None = None
    split: str | None = None


class Fault(NamedTuple):
    """What is wrong at one place of a label file."""

    place: str
    reason: str
    duplicate: bool = False


@dataclass(frozen=True)
class LabelFormat:
    """One format: `looks` shows it to people, `misfit(text)` says why a text is not in it (None: it is),
    `items(content)` gives places and raw items, and `fields(item)` the fields of a Row, or a ValueError.

    An item may be a ValueError itself: a fault that no single item has.
    """

    looks: str
    misfit: Callable[[str], str | None]
    items: Callable[[bytes], Iterator[tuple[str, Any]]]
    fields: Callable[[Any], dict]


def open_labels(file: str | Path, label_format: str | None = None) -> tuple[str, bytes]:
    """The format of a label file, `label_format` if given, and its content.

    Raises ValueError naming the file: it cannot be read, or not exactly one format fits; then with each one's reason.
    """
    try:
        content = Path(file).read_bytes()
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from error
    if label_format is not None:
        return label_format, content
    if content.startswith(BYTE_ORDER_MARKS):
        raise ValueError(f"{file}:1: starts with a byte order mark (BOM); save the file as UTF-8 without one")
    reasons = misfits(content)
    fitting = [name for name, reason in reasons.items() if reason is None]
    if not fitting:
        tried = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise ValueError(f"{file}: no known label format fits ({tried})")
    if len(fitting) > 1:
        raise ValueError(f"{file}: several formats fit, name one with --label-format: {', '.join(fitting)}")
    return fitting[0], content


def misfits(content: bytes) -> dict[str, str | None]:
    """For every format, by name, why the content is not in it; None if it is."""
    text = content.decode(errors="replace")
    return {name: label_format.misfit(text) for name, label_format in FORMATS.items()}


def read_rows(
    label_format: str,
    content: bytes,
    mos_range: tuple[float, float] | None = None,
    videos: str | Path | None = None,
) -> tuple[list[Row], list[Fault]]:
    """All good rows and all faults, each in file order.

    A score outside `mos_range` is a fault. With the folder `videos`, the names of a csv get the extension of their
    file there.
    """
    rows: list[Row] = []
    faults: list[Fault] = []
    seen: dict[PurePath, str] = {}
    for place, item in FORMATS[label_format].items(content):
        try:
            if isinstance(item, ValueError):
                raise item
            row = Row(place, **FORMATS[label_format].fields(item))
            _check_path(row.path)
            _check_extra(row.extra)
            if mos_range is not None and not mos_range[0] <= row.mos <= mos_range[1]:
                raise ValueError(f"mos {row.mos} is outside the stated range {list(mos_range)}")
            if label_format == "csv" and videos is not None:
                row = replace(row, path=_complete(row.path, Path(videos)))
        except (ValueError, RecursionError) as error:
            faults.append(Fault(place, str(error)))
            continue
        path = PurePath(row.path)
        if path in seen:
            faults.append(Fault(place, f"path {row.path!r} is already on line {seen[path]}", duplicate=True))
        else:
            seen[path] = place
            rows.append(row)
    return rows, faults


# ---- What every format shares: texts, numbers, paths.


def _decode(content: bytes) -> str:
    if content.startswith(BYTE_ORDER_MARKS):
        raise ValueError("starts with a byte order mark (BOM); save the file as UTF-8 without one")
    return content.decode()


def _parse_number(text: str, key: str) -> float:
    if not NUMBER.fullmatch(text) or not math.isfinite(float(text)):
        raise ValueError(f"{key} must be a finite number, got {text!r}")
    return float(text)


def _is_number(value: object) -> bool:
    """A finite int or float. `True` is an int to Python and 1e400 is inf; neither is a score."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an int too large for a float
        return False


def _check_score(value: object) -> float:
    if not _is_number(value):
        raise ValueError(f"mos must be a number, got {value!r}")
    return float(value)


def _check_path(path: object) -> None:
    if not (isinstance(path, str) and PurePath(path).parts and "\0" not in path):
        raise ValueError(f"path must be a file name, got {path!r}")
    path.encode()  # JSON's \ud800 makes a text that no file system and no CSV file takes
    if PurePath(path).is_absolute() or ".." in PurePath(path).parts:
        raise ValueError(f"path must stay under the video folder, got {path!r}")


def _check_extra(extra: dict) -> None:
    """Raise ValueError for what a label line of this project could not hold."""
    if taken := [key for key in REQUIRED if key in extra]:
        raise ValueError(f"{', '.join(taken)}: the label line has a meaning of its own for that name; rename it")
    if extra:
        json.dumps(extra, ensure_ascii=False, allow_nan=False).encode()


def _complete(path: str, videos: Path) -> str:
    """`path`, with the extension of the one video of that name under `videos`; .mp4 comes first."""
    if path.lower().endswith(VIDEO_SUFFIXES):
        return path
    found = [path + suffix for suffix in VIDEO_SUFFIXES if os.path.isfile(videos / (path + suffix))]
    if len(found) > 1 and not found[0].endswith(".mp4"):
        raise ValueError(f"several files match the name {path!r}: {', '.join(found)}")
    return found[0] if found else path


# ---- JSON, one object a line.


def _lines(content: bytes) -> Iterator[tuple[str, bytes]]:
    return ((str(number), line) for number, line in enumerate(content.split(b"\n"), start=1) if line.strip())


def _parse_object(line: bytes) -> dict:
    try:
        entry = json.loads(_decode(line), parse_constant=_not_json)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} (column {error.colno})") from error
    if not isinstance(entry, dict):
        raise ValueError("expected a JSON object")
    return entry


def _not_json(constant: str) -> float:
    raise ValueError(f"{constant} is not a JSON number")


def _take(entry: object, *keys: str) -> list:
    """Remove `keys` from a JSON object and return their values."""
    if not isinstance(entry, dict):
        raise ValueError("expected a JSON object")
    if absent := [key for key in keys if key not in entry]:
        raise ValueError(f"no {', '.join(absent)}")
    return [entry.pop(key) for key in keys]


def _project_fields(line: bytes) -> dict:
    entry = _parse_object(line)
    path, mos, mos_range, dataset, split = _take(entry, *REQUIRED)
    for key, value in (("dataset", dataset), ("split", split)):
        if not (isinstance(value, str) and value):
            raise ValueError(f"{key} must be a text, got {value!r}")
        value.encode()
    if not (isinstance(mos_range, list) and len(mos_range) == 2 and all(map(_is_number, mos_range))):
        raise ValueError(f"mos_range must be [low, high], two numbers, got {mos_range!r}")
    low, high = map(float, mos_range)
    if not low < high:
        raise ValueError(f"mos_range must have low < high, got {mos_range!r}")
    if not low <= _check_score(mos) <= high:
        raise ValueError(f"mos {mos} is outside mos_range {mos_range}")
    return {
        "path": path,
        "mos": float(mos),
        "extra": entry,
        "mos_range": (low, high),
        "dataset": dataset,
        "split": split,
    }


def _released_train_fields(line: bytes) -> dict:
    image, conversations, dataset_name = _take(_parse_object(line), "image", "conversations", "dataset_name")
    if not (isinstance(image, list) and len(image) == 1):
        raise ValueError(f"image must be a list of one file name, got {image!r}")
    turns = conversations if isinstance(conversations, list) else []
    answers = [turn.get("value") for turn in turns if isinstance(turn, dict) and turn.get("from") == "gpt"]
    if len(answers) != 1:
        raise ValueError(f"conversations must hold one answer from 'gpt', got {len(answers)}")
    return {"path": image[0], "mos": _check_score(answers[0]), "extra": {"dataset_name": dataset_name}}


def _first_object(text: str) -> dict:
    """The first line that is a JSON object, parsed; {} if none is."""
    for line in text.split("\n"):
        if line.lstrip().startswith("{"):
            try:
                return json.loads(line)
            except (ValueError, RecursionError):
                continue
    return {}


def _not_project(text: str) -> str | None:
    return None if {"path", "mos"} & _first_object(text).keys() else "no line is a JSON object with path or mos"


def _not_released_train(text: str) -> str | None:
    return None if "conversations" in _first_object(text) else "no line is a JSON object with conversations"


# ---- JSON, one value.


def _json_list(opening: str, closing: str, name: str) -> Callable[[bytes], Iterator[tuple[str, Any]]]:
    """Items of the JSON list between two patterns, decoded one after another so that their lines are known."""
    start, comma, end = (re.compile(SPACE + mark + SPACE) for mark in (opening, ",", closing))

    def items(content: bytes) -> Iterator[tuple[str, Any]]:
        line, counted, index = 1, 0, 0
        try:
            text = _decode(content)
            separator = start.match(text)
            if separator is None:
                raise ValueError("does not start as this format does")
            empty = end.fullmatch(text, separator.end())
            while separator and not empty:
                line += text.count("\n", counted, separator.end())
                counted = separator.end()
                item, at = json.JSONDecoder().raw_decode(text, counted)
                yield f"{line}: {name}[{index}]", item
                index += 1
                separator = comma.match(text, at)
                if separator is None and not end.fullmatch(text, at):
                    at = len(text) - len(text[at:].lstrip())
                    raise json.JSONDecodeError("Expecting ',' or the end of the list", text, at)
        except json.JSONDecodeError as error:
            yield str(error.lineno), ValueError(f"not JSON: {error.msg} (column {error.colno})")
        except UnicodeDecodeError as error:
            yield str(content.count(b"\n", 0, error.start) + 1), error
        except (ValueError, RecursionError) as error:
            yield str(line), ValueError(str(error))

    return items


def _released_test_fields(item: Any) -> dict:
    path, kind, score = _take(item, "image_id", "ann_type", "score")
    if kind != "score":
        raise ValueError(f"ann_type must be 'score', got {kind!r}")
    if not isinstance(score, str):
        raise ValueError(f"score must be a text, got {score!r}")
    return {"path": path, "mos": _parse_number(score, "score"), "extra": item}


def _score_list_fields(item: Any) -> dict:
    (score,) = _take(item, "gt_score")
    names = [key for key in ("img_path", "image") if key in item]
    if len(names) != 1:
        raise ValueError(f"expected one of img_path and image, got {' and '.join(names) or 'neither'}")
    return {"path": item.pop(names[0]), "mos": _check_score(score), "extra": item}


ANNOTATIONS = r'\{[ \t\n\r]*"annotations"[ \t\n\r]*:[ \t\n\r]*\['


def _not_released_test(text: str) -> str | None:
    return None if re.match(SPACE + ANNOTATIONS, text) else 'does not start with {"annotations": ['


def _not_score_list(text: str) -> str | None:
    return None if re.match(SPACE + r"\[", text) and '"gt_score"' in text else "not a JSON list with gt_score"


# ---- Comma-separated text.


def _cells(line: bytes | str) -> list[str]:
    text = _decode(line) if isinstance(line, bytes) else line
    try:
        return next(csv.reader([text], skipinitialspace=True, strict=True))
    except csv.Error as error:
        raise ValueError(f"not comma-separated text: {error}") from error


def _columns(line: bytes, count: int) -> list[str]:
    cells = _cells(line)
    if len(cells) != count:
        raise ValueError(f"expected {count} columns, got {len(cells)}")
    return cells


def _name_x_y_mos_fields(line: bytes) -> dict:
    path, x, y, mos = _columns(line, 4)
    if {x.strip(), y.strip()} != {"-1"}:
        raise ValueError(f"columns 2 and 3 must be -1, got {x!r} and {y!r}")
    return {"path": path, "mos": _parse_number(mos.strip(), "mos"), "extra": {}}


def _name_seconds_fps_mos_fields(line: bytes) -> dict:
    path, *texts = _columns(line, 4)
    keys = ("seconds", "fps", "mos")
    values = {key: _parse_number(text.strip(), key) for key, text in zip(keys, texts)}
    for key in keys[:2]:
        if values[key] <= 0:
            raise ValueError(f"{key} must be above 0, got {values[key]}")
    return {"path": path, "mos": values.pop("mos"), "extra": values}


class _Header(NamedTuple):
    columns: list[str]
    name: str
    score: str


def _parse_header(cells: list[str]) -> _Header:
    """The columns of a csv. Raises ValueError unless one has the names, one the scores, and none comes twice."""
    columns = [cell.strip() for cell in cells]
    chosen = []
    for what, known in (("file name", NAME_COLUMNS), ("score", SCORE_COLUMNS)):
        found = [column for column in columns if column in known]
        if len(found) != 1:
            candidates = f"{len(found)} candidates: {', '.join(found)}" if found else f"none of {', '.join(known)}"
            raise ValueError(f"the header must have one column for the {what}, it has {candidates}")
        chosen += found
    if twice := sorted({column for column in columns if columns.count(column) > 1}):
        raise ValueError(f"the header has a column twice: {', '.join(twice)}")
    return _Header(columns, *chosen)


def _csv_items(content: bytes) -> Iterator[tuple[str, Any]]:
    lines = _lines(content)
    for place, line in lines:
        try:
            header = _parse_header(_cells(line))
        except ValueError as error:
            yield place, error
            return
        yield from ((place, (header, line)) for place, line in lines)


def _csv_fields(item: tuple[_Header, bytes]) -> dict:
    header, line = item
    entry = dict(zip(header.columns, _columns(line, len(header.columns))))
    mos = _parse_number(entry.pop(header.score).strip(), header.score)
    return {"path": entry.pop(header.name), "mos": mos, "extra": entry}


def _first_cells(text: str) -> list[str]:
    try:
        return _cells(text.lstrip().split("\n", 1)[0])
    except ValueError:
        return []


def _not_name_x_y_mos(text: str) -> str | None:
    cells = [cell.strip() for cell in _first_cells(text)]
    if len(cells) != 4:
        return f"the first line has {len(cells)} comma-separated columns, not 4"
    return None if cells[1:3] == ["-1", "-1"] else "columns 2 and 3 of the first line are not -1"


def _not_name_seconds_fps_mos(text: str) -> str | None:
    cells = [cell.strip() for cell in _first_cells(text)]
    if len(cells) != 4:
        return f"the first line has {len(cells)} comma-separated columns, not 4"
    positive = all(NUMBER.fullmatch(cell) and float(cell) > 0 for cell in cells[1:3])
    return None if positive else "columns 2 and 3 of the first line are not positive numbers"


def _not_csv(text: str) -> str | None:
    columns = {cell.strip() for cell in _first_cells(text)}
    for what, known in (("name", NAME_COLUMNS), ("score", SCORE_COLUMNS)):
        if not columns & set(known):
            return f"the first line has no {what} column ({', '.join(known)})"
    return None


FORMATS = {
    "project": LabelFormat(
        "JSONL with path, mos, mos_range, dataset, split",
        _not_project,
        _lines,
        _project_fields,
    ),
    "released-train": LabelFormat(
        "JSONL with image and conversations, as in the released training list",
        _not_released_train,
        _lines,
        _released_train_fields,
    ),
    "released-test": LabelFormat(
        'JSON {"annotations": [{"image_id", "ann_type", "score"}]}, as in the released test lists',
        _not_released_test,
        _json_list(ANNOTATIONS, r"\][ \t\n\r]*\}", "annotations"),
        _released_test_fields,
    ),
    "score-list": LabelFormat(
        'JSON [{"img_path" or "image", "gt_score"}]',
        _not_score_list,
        _json_list(r"\[", r"\]", "list"),
        _score_list_fields,
    ),
    "name-x-y-mos": LabelFormat("'name, x, y, MOS' text", _not_name_x_y_mos, _lines, _name_x_y_mos_fields),
    "name-seconds-fps-mos": LabelFormat(
        "'name, seconds, fps, MOS' text",
        _not_name_seconds_fps_mos,
        _lines,
        _name_seconds_fps_mos_fields,
    ),
    "csv": LabelFormat("csv with a header", _not_csv, _csv_items, _csv_fields),
}
