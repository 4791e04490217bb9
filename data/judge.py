"""A judge behind an OpenAI-compatible address: text in, text out, and what it cost. Standard library only.

Answers are kept on disk under the hash of what was asked, so that a second run costs nothing. Frames are never sent:
the judge sees texts alone. The key comes from the environment variable JUDGE_API_KEY and goes nowhere else.
"""

import hashlib
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Callable
from pathlib import Path

KEY = "JUDGE_API_KEY"
ATTEMPTS = 5
LONGEST_WAIT = 60.0  # seconds
LARGEST_REPLY = 2**22  # bytes
SCORE = re.compile(r"\s*(?:Score:\s*)?([012])\.?\s*")

GRADING = (
    "You grade a description of a video's quality against a reference. Reply with one digit and nothing else: 2 if the "
    "description says what the reference says and nothing that contradicts it, 1 if it says a part of it, 0 if it says "
    "none of it or contradicts it.\n\nReference: {reference}\n\nDescription: {description}"
)


class JudgeRefuses(ValueError):
    """No use in asking on: the address does not answer, or does not take the request."""


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected request would carry the key to another address."""

    def redirect_request(self, *_):
        return None


def check_judge(url: str) -> None:
    """Raise a ValueError naming --judge-url for what is not http(s)."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"--judge-url {url}: must start with http:// or https:// and name a host")


def parse_score(text: str) -> int | None:
    """The judge's 0, 1 or 2; None for any other reply.

    >>> [parse_score(text) for text in ("2", " Score: 1 ", "0.", "3", "2 out of 2", "")]
    [2, 1, 0, None, None, None]
    """
    found = SCORE.fullmatch(text)
    return int(found[1]) if found else None


class Judge:
    """Asks `model` at `url`, the address that ends before /chat/completions.

    cache: folder of replies. timeout_s: of one request. sleep: how to wait before the next attempt, for tests.
    `counts`: requests answered (`asked`), answers from disk (`cached`), attempts repeated (`retried`), no usable reply
    (`failed`), and the tokens of the requests answered in this run, as the address reports them.
    """

    def __init__(
        self, url: str, model: str, cache: Path, timeout_s: float = 60.0, sleep: Callable[[float], None] = time.sleep
    ):
        check_judge(url)
        self.url, self.model, self.cache, self.timeout_s, self.sleep = url, model, cache, timeout_s, sleep
        self.counts = Counter(asked=0, cached=0, retried=0, failed=0, prompt_tokens=0, completion_tokens=0)
        self.opener = urllib.request.build_opener(NoRedirect)

    def ask(self, text: str) -> str | None:
        """The reply to one message; None if there is none, or it is not the API's JSON. Raises as `reply`."""
        body = json.dumps({"model": self.model, "messages": [{"role": "user", "content": text}]}).encode()
        place = self.cache / f"{hashlib.sha256(self.url.encode() + b' ' + body).hexdigest()}.json"
        kept = content_of(place.read_bytes()) if place.is_file() else None
        if kept is not None:
            self.counts["cached"] += 1
            return kept
        reply = self.reply(body)
        content = None if reply is None else content_of(reply)
        if content is None:
            self.counts["failed"] += 1
            return None
        self.counts["asked"] += 1
        self.counts.update(usage_of(reply))
        self.cache.mkdir(parents=True, exist_ok=True)
        partial = place.with_suffix(f".partial-{os.getpid()}")
        partial.write_bytes(reply)
        partial.replace(place)
        return content

    def reply(self, body: bytes) -> bytes | None:
        """What comes back with status 200; None if nothing has after ATTEMPTS.

        Status 429 and 5xx, timeouts and broken connections are tried again after 1, 2, 4, ... seconds, or as long as
        `Retry-After` says, LONGEST_WAIT at most. Raises JudgeRefuses naming --judge-url for any other status, and if
        attempts are used up before anything was ever answered.
        """
        for attempt in range(ATTEMPTS):
            wait = float(2**attempt)
            try:
                return self.post(body)
            except urllib.error.HTTPError as error:
                if error.code != 429 and error.code < 500:
                    raise JudgeRefuses(f"--judge-url {self.url}: HTTP status {error.code} {error.reason}") from error
                after, reason = error.headers.get("Retry-After", ""), error
                wait = min(float(after), LONGEST_WAIT) if after.isdecimal() else wait
            except (OSError, http.client.HTTPException) as error:  # no connection, broken off, timed out
                reason = error
            if attempt + 1 < ATTEMPTS:
                self.counts["retried"] += 1
                self.sleep(wait)
        if not self.counts["asked"]:
            raise JudgeRefuses(f"--judge-url {self.url}: no reply in {ATTEMPTS} attempts, the last: {reason}")
        return None

    def post(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{self.url.rstrip('/')}/chat/completions", body, headers)
        with self.opener.open(request, timeout=self.timeout_s) as response:
            return response.read(LARGEST_REPLY)


def content_of(reply: bytes) -> str | None:
    """The first message of a chat completion; None if the reply is not one."""
    try:
        content = json.loads(reply)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        return None
    return content if isinstance(content, str) else None


def usage_of(reply: bytes) -> dict[str, int]:
    """Tokens of a chat completion; those that the address does not report are left out."""
    usage = json.loads(reply).get("usage")
    names = ("prompt_tokens", "completion_tokens")
    return {n: usage[n] for n in names if isinstance(usage.get(n), int)} if isinstance(usage, dict) else {}
