"""HTML pages taken apart by the standard library, and opened by Chromium where there is one."""

import shutil
import subprocess
from collections.abc import Collection
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

VOID = {"meta", "img", "br", "input"}
SHAPES = {"path", "rect"}  # written <path .../>


class Page(HTMLParser):
    """tags: (name, attributes) of all start tags; elements: name -> [(attributes, text inside)]; tables by caption."""

    def __init__(self, file: Path):
        super().__init__()
        self.source = file.read_text(encoding="utf-8")
        self.tags, self.elements, self.open = [], {}, []
        self.feed(self.source)
        self.close()
        assert self.open == [], "not closed"

    def handle_starttag(self, tag, attributes):
        assert len(dict(attributes)) == len(attributes), f"{tag}: an attribute twice"
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append((tag, dict(attributes), []))

    def handle_startendtag(self, tag, attributes):
        assert tag in SHAPES, f"{tag} cannot close itself"
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        name, attributes, text = self.open.pop()
        assert name == tag, f"<{name}> ended by </{tag}>"
        self.elements.setdefault(tag, []).append((attributes, "".join(text).strip()))

    def handle_data(self, data):
        for *_, text in self.open:
            text.append(data)

    def of(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]

    def texts(self, tag: str) -> list[str]:
        return [text for _, text in self.elements.get(tag, [])]


def check(page: Page, links: Collection[str] = ()) -> None:
    """What holds for every page: nothing is loaded or run, and everybody can find their way.

    links: to files beside the page, which it may have, and has.
    """
    assert page.of("script") == page.of("link") == page.of("iframe") == page.of("object") == []
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("src", "href", "srcset", "xlink:href", "action", "data", "poster"):
            value = attributes.get(name, "#")
            beside = tag == "a" and name == "href" and value in links
            assert beside or value.startswith(("#", "data:image/jpeg;base64,")), (tag, value)
        assert "style" not in attributes
    (style,) = page.texts("style")
    assert "url(" not in style and "@import" not in style
    (policy,) = [meta["content"] for meta in page.of("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")
    assert any(meta.get("name") == "viewport" for meta in page.of("meta"))
    assert page.of("html") == [{"lang": "en"}] and len(page.of("main")) == len(page.of("title")) - len(page.of("svg"))
    assert all(image["alt"] and image["width"] and image["height"] for image in page.of("img"))
    assert all(drawing["role"] == "img" for drawing in page.of("svg"))
    inside = page.source.split("<svg")[1:]
    assert all(part.split(">", 1)[1].strip().startswith("<title>") for part in inside)
    levels = [int(tag[1]) for tag, _ in page.tags if tag in ("h1", "h2", "h3", "h4")]
    assert levels[0] == 1 and levels.count(1) == 1 and all(b - a <= 1 for a, b in pairwise(levels))
    assert all(heading["scope"] in ("row", "col") for heading in page.of("th"))
    names = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(names)) == len(names)
    targets = [link["href"] for link in page.of("a")]
    assert set(links) <= set(targets)
    used = [target[1:] for target in targets if target not in links] + [
        part["aria-labelledby"] for part in page.of("section")
    ]
    assert set(used) <= set(names)


def tables(page: Page) -> dict[str, list[list[str]]]:
    """The rows of each table, header first, by caption."""
    found = {}
    for part in page.source.split("<table>")[1:]:
        rows = Rows()
        rows.feed(part.split("</table>")[0])
        found.setdefault(rows.caption, rows.rows)
    return found


class Rows(HTMLParser):
    def __init__(self):
        super().__init__()
        self.caption, self.rows, self.inside = "", [], ""

    def handle_starttag(self, tag, attributes):
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
        if tag in ("th", "td", "caption"):
            self.inside = tag

    def handle_endtag(self, tag):
        self.inside = "" if tag == self.inside else self.inside

    def handle_data(self, data):
        if self.inside == "caption":
            self.caption += data
        elif self.inside:
            self.rows[-1][-1] += data


def chromium() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


def console(file: Path, folder: Path, width: int = 1000) -> tuple[list[str], bytes]:
    """What Chromium writes to the console when it opens the page, and its picture (PNG)."""
    picture = folder / "screen.png"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    flags += ["--enable-logging=stderr", "--virtual-time-budget=2000", f"--window-size={width},1200"]
    command = [chromium(), *flags, f"--screenshot={picture}", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line], picture.read_bytes()
