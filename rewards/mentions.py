"""Which distortions a text says it sees, by a table of synonyms; and how often such texts are right.

The table is docs/synonyms.json and the rule is in docs/understanding.md: whole words, and a mention that is negated in
its clause does not count.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

LISTS = ("negations_before", "negations_behind", "not_negations", "clause_starts", "verbs")
TOKEN = re.compile(r"[^\W_]+(?:'[^\W_]+)*|[.,;:!?\n]")  # a word, or a mark that may end a clause; a hyphen parts words
ENDS = frozenset(".;:!?\n")

Words = tuple[str, ...]


def tokens(text: str) -> Words:
    return tuple(TOKEN.findall(text.lower().replace("’", "'")))


def find(phrases: Iterable[Words], words: Sequence[str]) -> list[tuple[int, int]]:
    """(start, end) of each occurrence of a phrase among the words."""
    every = [(start, start + len(phrase), phrase) for phrase in phrases for start in range(len(words))]
    return [(start, end) for start, end, phrase in every if tuple(words[start:end]) == phrase]


@dataclass(frozen=True)
class Synonyms:
    """`distortions`: phrases by name, and LISTS: the other phrases of the rule; all as words."""

    distortions: dict[str, list[Words]]
    lists: dict[str, list[Words]]

    @classmethod
    def read(cls, file: str | Path) -> "Synonyms":
        """The table in `file`. Raises ValueError naming --synonyms and what is wrong."""
        try:
            table = json.loads(Path(file).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"--synonyms {file} cannot be read: {error}") from error
        if not (isinstance(table, dict) and table.keys() == {"distortions", *LISTS}):
            raise ValueError(f"--synonyms {file}: must have the keys distortions, {', '.join(LISTS)}")
        lists = {key: value for key, value in table.items() if key in LISTS}
        if not isinstance(table["distortions"], dict):
            raise ValueError(f"--synonyms {file}: distortions must be an object of lists")
        for key, phrases in {**table["distortions"], **lists}.items():
            if not (isinstance(phrases, list) and all(isinstance(p, str) and tokens(p) for p in phrases)):
                raise ValueError(f"--synonyms {file}: {key} must be a list of phrases")
        parsed = [{key: [tokens(p) for p in value] for key, value in x.items()} for x in (table["distortions"], lists)]
        return cls(*parsed)

    @cached_property
    def starts(self) -> frozenset[str]:
        return frozenset(word for (word,) in self.lists["clause_starts"])

    @cached_property
    def verbs(self) -> frozenset[str]:
        return frozenset(word for (word,) in self.lists["verbs"])

    def clauses(self, text: str) -> list[list[str]]:
        """The text's words in clauses.

        A clause ends at . ; : ! ? and a new line, and before a word of `clause_starts`. At a comma it ends only if a
        word of `verbs` stands before the next comma or end: a list of nouns goes on.
        """
        pieces, marks = [[]], []
        for word in tokens(text):
            if word in ENDS or word == ",":
                marks.append(word)
                pieces.append([])
            elif word in self.starts:
                marks.append(word)
                pieces.append([word])
            else:
                pieces[-1].append(word)
        clauses = [pieces[0]]
        for mark, piece in zip(marks, pieces[1:]):
            if mark == "," and not self.verbs & set(piece):
                clauses[-1] += piece
            else:
                clauses.append(piece)
        return clauses

    def mentions(self, text: str) -> set[str]:
        """The distortions that the text says are there.

        A mention is negated if a word or phrase of `negations_before` stands before it in its clause, or one of
        `negations_behind` directly behind it; those of `not_negations` do not negate.
        """
        found = set()
        for words in self.clauses(text):
            exempt = {k for start, end in find(self.lists["not_negations"], words) for k in range(start, end)}
            before = [s for s, _ in find(self.lists["negations_before"], words) if s not in exempt]
            behind = {start for start, _ in find(self.lists["negations_behind"], words)}
            for name, phrases in self.distortions.items():
                spans = find(phrases, words)
                if any(end not in behind and not any(s < start for s in before) for start, end in spans):
                    found.add(name)
        return found


def mention_scores(mentioned: Sequence[set[str]], present: Sequence[set[str]], names: Sequence[str]) -> dict:
    """Precision, recall and F1 of mentions over texts: for each of `names`, and `micro`, over all of them together.

    Other names count neither way. Precision is None where nothing is mentioned, recall where nothing is present, and F1
    where neither is.
    """
    counts = {}
    for name in names:
        pairs = [(name in said, name in there) for said, there in zip(mentioned, present, strict=True)]
        counts[name] = [pairs.count(case) for case in ((True, True), (True, False), (False, True))]
    counts["micro"] = [sum(column) for column in zip(*counts.values())] if counts else [0, 0, 0]
    return {name: _scores(*count) for name, count in counts.items()}


def _scores(hits: int, false: int, missed: int) -> dict:
    """From true positives, false positives and false negatives."""
    return {
        "precision": hits / (hits + false) if hits + false else None,
        "recall": hits / (hits + missed) if hits + missed else None,
        "f1": 2 * hits / (2 * hits + false + missed) if hits + false + missed else None,
        "mentioned": hits + false,
        "present": hits + missed,
    }
