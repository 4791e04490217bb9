"""The page of an inspected step: every number recomputed, on steps of every kind; and driven in a browser."""

import json
import math
import re
from importlib.util import find_spec
from itertools import pairwise

import pytest

from tests.browser import opened
from tests.inspected import N, all_answers, check_numbers, lines, read, rewarded, run, write_clips, written_page
from tests.media import write_video
from tests.pages import Page, check, chromium

HOSTILE = "\"><img src=x onerror=alert(1)>'&amp;{{ 7 * 7 }}</span>"
RUNS = {  # weights, and other flags
    "three passes": (
        {"regression": 2, "ranking": 1, "temporal": 0.5, "format": 1},
        "--steps 2 --inspect 2,1 --inner-epochs 3 --grad-clip 0.01",
    ),
    "hot": (
        {"tests.inspected:Length": 0.5, "ranking": 1, "temporal": 1, "regression": 0},
        "--steps 2 --inspect every:1 --beta 0 --inner-epochs 2 --precision bfloat16 --temperature 1.9 "
        "--max-new-tokens 36",
    ),
    "no copies": ({"format": 1, "regression": 0.5}, "--steps 2 --inspect 2 --clip-high 0.3"),
    "lora": (
        {"regression": 1, "ranking": 1, "temporal": 1, "format": 1},
        "--steps 2 --inspect 2 --lora-rank 4 --inner-epochs 2 --lr 2e-3 --ranking-opponents one",
    ),
}


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """One of them has a single picture, so nothing can be perturbed."""
    folder = tmp_path_factory.mktemp("data") / "clips"
    flags = write_clips(folder)
    write_video(folder / "train" / "00002.mp4", frames=1, size=(96, 96))
    return flags


@pytest.fixture(scope="module")
def runs(clips, tmp_path_factory):
    """Folder of each of RUNS by its name, made when it is asked for."""
    made = {}

    def of(name):
        if name not in made:
            weights, flags = RUNS[name]
            flags += " --rewards " + ",".join(f"{term}={weight}" for term, weight in weights.items())
            made[name] = run(clips, tmp_path_factory.mktemp("runs") / "run", flags)
        return made[name]

    return of


@pytest.fixture(scope="module")
def inspected(runs):
    return runs("three passes")


@pytest.fixture(scope="module")
def page(inspected):
    page = Page(inspected / "inspect" / "step_000002.html")
    check(page)
    return page


needs_peft = pytest.mark.skipif(find_spec("peft") is None, reason="needs peft: pip install 'vqathinker[lora]'")


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("three passes", 1),
        ("three passes", 2),
        ("hot", 1),
        ("hot", 2),
        ("no copies", 2),
        pytest.param("lora", 2, marks=needs_peft),
    ],
)
def test_every_number_on_the_page_follows_from_texts_and_log_probs(runs, name, step):
    folder = runs(name)
    page = Page(folder / "inspect" / f"step_{step:06d}.html")
    check(page)
    check_numbers(read(folder, step), page, RUNS[name][0], json.loads((folder / "config.json").read_text()))


def test_the_numbers_in_the_json_follow_too(runs):
    for name, step in (("three passes", 2), ("hot", 1)):
        found = read(runs(name), step)
        for video, (terms, rewards, mean, std, advantages, copies, _) in zip(
            found["videos"], rewarded(found, RUNS[name][0])
        ):
            assert [answer["rewards"] for answer in video["answers"]] == [pytest.approx(x, abs=1e-4) for x in terms]
            assert [answer["reward"] for answer in video["answers"]] == pytest.approx(rewards, abs=2e-4)
            assert [answer["advantage"] for answer in video["answers"]] == pytest.approx(advantages, abs=2e-3)
            assert video["group"] == pytest.approx({"mean": mean, "std": std}, abs=1e-4)
            found_copies = [copy["terms"] for copy in video["perturbed_answers"]]
            assert found_copies == [pytest.approx(x, abs=1e-4) for x in copies]


def test_a_hot_step_has_all_that_goes_wrong(runs):
    """What the run of that name is for: without these its pages would prove little."""
    videos = [video for step in (1, 2) for video in read(runs("hot"), step)["videos"]]
    assert any(video["perturbation"] is None for video in videos)
    assert {bool(video["scores"]["count"]) for video in videos} == {True, False}
    answers = [(answer, cut) for video in videos for answer, cut in zip(video["answers"], video["truncated"])]
    assert {cut for _, cut in answers} == {True, False}
    assert any(any(ord(letter) > 127 for letter in answer["text"]) for answer, _ in answers)
    for answer, cut in answers:
        assert (answer["tokens"]["text"][-1] != "<|im_end|>") == cut
        assert answer["tokens"].keys().isdisjoint({"kl", "reference", "kl_signal"})


@needs_peft
def test_an_adapter_has_gradients_where_it_is(runs):
    found = read(runs("lora"), 2)
    assert {name for name, norm in found["gradients"].items() if norm is None} == {"vision", "projector"}
    assert all(norm > 0 for name, norm in found["gradients"].items() if name in ("language", "motion"))
    row = lines(runs("lora") / "metrics.jsonl")[-1]
    assert math.hypot(*filter(None, found["gradients"].values())) == pytest.approx(row["grad_norm"], rel=1e-4)
    assert any(answer["before"] != answer["after"] for _, answer in all_answers(found))
    assert found["loss"]["kl"] > 0  # the reference is the network without its adapter


def test_tokens_are_coloured_by_their_numbers(inspected, page):
    found = read(inspected, 2)
    spans = [(attributes["class"].split(), text) for attributes, text in page.elements["span"] if "class" in attributes]
    shown = iter(spans)
    legend = [next(shown)[1] for _ in range(6 + 7 + 6 + 7 + 7)]
    signals = [x for _, answer in all_answers(found) for x in answer["tokens"]["signal"]]
    most, seen = max(map(abs, signals)), set()
    bounds = [f"{share * most:.3g}" for share in (-0.5, -0.2, -0.02, 0.02, 0.2, 0.5)]
    between = [f"{a} to {b}" for a, b in pairwise(bounds)]
    assert legend[19:26] == [f"below {bounds[0]}", *between, f"{bounds[-1]} or more"]
    around = [0.8, 0.9, 0.99, 1.01, 1.1, 1.2]
    for _, answer in all_answers(found):
        tokens = answer["tokens"]
        for t, text in enumerate(tokens["text"]):
            classes, piece = next(shown)
            change = math.exp(tokens["after"][t] - tokens["before"][t])
            levels = {
                "probability": (math.exp(tokens["before"][t]), [0.05, 0.2, 0.5, 0.9, 0.99]),
                "ratio": (tokens["ratio"][t], around),
                "kl": (tokens["kl"][t], [1e-6, 1e-3, 1e-2, 0.1, 1]),
                "signal": (tokens["signal"][t] / most, [-0.5, -0.2, -0.02, 0.02, 0.2, 0.5]),
                "change": (change, around),
            }
            expected = [f"{name}-{sum(value >= b for b in bounds)}" for name, (value, bounds) in levels.items()]
            assert classes == expected + ["clipped"] * bool(tokens["clipped"][t])
            assert piece == text.strip()
            seen |= set(expected)
    assert next(shown, None) is None and len(seen) > 9 and {"signal-0", "signal-6"} & seen
    (style,) = page.texts("style")
    for name in seen:
        view = name.split("-")[0]
        assert f":root:has(#by-{view}:checked) .{name} {{ background: color-mix(" in style
    inputs = page.of("input")
    assert [x["id"] for x in inputs] == [f"by-{view}" for view in ("probability", "ratio", "kl", "signal", "change")]
    assert {(x["type"], x["name"]) for x in inputs} == {("radio", "view")} and sum("checked" in x for x in inputs) == 1
    assert len(page.texts("label")) == len(page.texts("legend")) + 4 == 5


def test_the_bell_is_drawn_around_the_mos_with_the_answers_on_it(inspected, page):
    found = read(inspected, 2)
    drawings = page.source.split("<svg")[1:]
    assert len(drawings) == N
    for video, drawing in zip(found["videos"], drawings):
        high = re.search(r'class="line stroke-0" stroke-dasharray="none" d="M([^"]+)"', drawing)[1].split("L")
        points = [tuple(map(float, point.split())) for point in high]
        assert all(b[0] > a[0] for a, b in pairwise(points))
        for x, y in points:
            score, reward = 1 + (x - 60) / (350 - 60) * 4, (208 - y) / (208 - 10) * 1.1
            assert reward == pytest.approx(math.exp(-((score - video["target"]) ** 2) / 0.5), abs=0.01)
        low = re.search(r'class="line stroke-0" stroke-dasharray="2 3" d="M([^"]+)"', drawing)[1].split("L")
        heights = [[208 - float(point.split()[1]) for point in curve] for curve in (low, high)]
        assert heights[0] == pytest.approx([0.8 * height for height in heights[1]], abs=0.2)
        dots = re.findall(r'class="dot stroke-1" d="M([\d.]+) ([\d.]+)h0"', drawing)
        places = [(1 + (float(x) - 60) / 290 * 4, (208 - float(y)) / 198 * 1.1) for x, y in dots]
        answers = [(answer["score"], answer["rewards"]["regression"]) for answer in video["answers"]]
        assert places == [pytest.approx(answer, abs=0.01) for answer in answers if answer[0] is not None]
        check_labels(
            re.findall(r'<text x="([\d.]+)" y="[\d.]+" text-anchor="middle">([\d ]+)</text>', drawing), answers
        )


def check_labels(found, answers):
    """Each answer's number is written once, near its dot, and no number on another."""
    labels = [(float(x), list(map(int, text.split()))) for x, text in found][5:]  # behind the ticks, 1 to 5
    assert sorted(number for _, numbers in labels for number in numbers) == [
        k for k, (score, _) in enumerate(answers, 1) if score is not None
    ]
    for x, numbers in labels:
        dots = [60 + (answers[k - 1][0] - 1) / 4 * 290 for k in numbers]
        assert numbers == sorted(numbers) and x == pytest.approx(sum(dots) / len(dots), abs=0.1)
    ends = [(x - 5 * len(numbers), x + 5 * len(numbers)) for x, numbers in sorted(labels)]
    assert all(left[1] <= right[0] for left, right in pairwise(ends))


def test_frames_of_video_and_copy_are_shown(inspected, page):
    found = read(inspected, 2)
    alts = [image["alt"] for image in page.of("img")]
    expected = []
    for video in found["videos"]:
        for title in [video["path"], f"the copy of {video['path']}"]:
            expected += [f"frame {k} of 6 of {title}" for k in range(1, 7)]
    assert alts == expected
    sources = [image["src"] for image in page.of("img")]
    changed = 0
    for k, video in enumerate(found["videos"]):
        frames, copies = sources[12 * k : 12 * k + 6], sources[12 * k + 6 : 12 * k + 12]
        changed += frames != copies
        assert video["perturbation"] is not None or frames == copies
        if video["perturbation"] == "reverse":
            assert copies == frames[::-1]
        assert len(set(copies) - set(frames)) <= (video["perturbation"] == "drop")  # one more picture, the black one
    assert changed > N / 2


def test_text_from_outside_stays_text(inspected, tmp_path):
    found = read(inspected, 2)
    video = found["videos"][0]
    video["path"] = found["prompt"] = HOSTILE
    for answer in [*video["answers"], *video["perturbed_answers"]]:
        answer["text"] = HOSTILE
    video["answers"][0]["tokens"]["text"][0] = HOSTILE
    page = written_page(found, tmp_path)
    assert page.of("img") == [] and page.texts("blockquote") == [HOSTILE] and HOSTILE in page.texts("span")
    assert HOSTILE in page.texts("h2") and json.loads((tmp_path / "step_000002.json").read_text())["prompt"] == HOSTILE


@pytest.mark.parametrize("advantage_std", [True, False])
def test_equal_rewards_are_said_to_teach_nothing(runs, tmp_path, advantage_std):
    found = read(runs("no copies"), 2)
    found["settings"]["advantage_std"] = advantage_std
    for answer in found["videos"][0]["answers"]:
        answer["advantage"] = 0.0
    flat = [not any(answer["advantage"] for answer in video["answers"]) for video in found["videos"]]
    assert flat[0] and not all(flat)
    assert written_page(found, tmp_path).source.count("All rewards are equal: the group teaches nothing.") == sum(flat)


# ---- in a browser

CONTRAST = """(() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
  const drawn = (...colours) => {
    for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map(x => x / 255);
  };
  const light = colour => colour.map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4)
    .reduce((sum, x, k) => sum + x * [0.2126, 0.7152, 0.0722][k], 0);
  const body = getComputedStyle(document.body);
  return [...document.querySelectorAll(".tokens span, .key span")].filter(x => x.checkVisibility()).map(x => {
    const paper = light(drawn(body.backgroundColor, getComputedStyle(x).backgroundColor));
    const ink = light(drawn(getComputedStyle(x).color));
    return (Math.max(paper, ink) + 0.05) / (Math.min(paper, ink) + 0.05);
  });
})()"""
COLOURS = '[...document.querySelectorAll(".tokens span")].map(x => [x.className, getComputedStyle(x).backgroundColor])'
LEGENDS = '[...document.querySelectorAll(".key")].filter(x => x.checkVisibility()).map(x => x.ariaLabel)'
VIEWS = {
    "probability": "probability before the update",
    "ratio": "ratio in the loss",
    "kl": "KL to the reference",
    "signal": "gradient signal",
    "change": "probability after the update over before",
}


@pytest.fixture(scope="module")
def browser(inspected, tmp_path_factory):
    if chromium() is None:
        pytest.skip("no Chromium here")
    with opened(inspected / "inspect" / "step_000002.html", tmp_path_factory.mktemp("browser")) as page:
        yield page
        assert page.said == []


def test_the_keyboard_chooses_the_colouring(browser):
    """Arrow keys go round the choices; of each the tokens have its colours, one for a level, and its legend shows."""
    browser.tab_to('x.type == "radio"')
    for view, title in [*VIEWS.items(), next(iter(VIEWS.items()))]:
        assert browser.ask("document.activeElement.checked && document.activeElement.id") == f"by-{view}"
        assert browser.ask("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        assert browser.ask(LEGENDS) == [title]
        levels = {}
        for classes, colour in browser.ask(COLOURS):
            levels.setdefault(re.search(rf"{view}-(\d)", classes)[0], set()).add(colour)
        assert all(len(colours) == 1 for colours in levels.values())
        assert len(set.union(*levels.values())) == len(levels) > 1
        browser.press("Right")


def test_the_keyboard_opens_and_closes_what_is_folded(browser):
    opened = "document.activeElement.parentNode.open"
    shows = 'document.activeElement.parentNode.querySelector("table").checkVisibility()'
    for title in ("Ranking of", "Tokens of answer 1"):
        browser.tab_to(f'x.tagName == "SUMMARY" && x.textContent.startsWith("{title}")')
        assert browser.ask(f"{opened} || {shows}") is False
        browser.press("Enter")
        assert browser.ask(f"{opened} && {shows}") is True
        browser.press("Tab")  # to the table, which can be scrolled by arrow keys
        assert browser.ask('document.activeElement.getAttribute("aria-label")').startswith(title)
        browser.ask("document.activeElement.parentNode.querySelector('summary').focus()")
        browser.press("Enter")
        assert browser.ask(f"{opened} || {shows}") is False


@pytest.mark.parametrize("dark", [False, True])
def test_tokens_can_be_read_on_their_colours(browser, dark):
    browser.dark(dark)
    papers = set()
    for view in VIEWS:
        browser.ask(f'document.getElementById("by-{view}").click()')
        contrasts = browser.ask(CONTRAST)
        assert len(contrasts) > 100 and min(contrasts) >= 4.5
        papers.add(browser.ask("getComputedStyle(document.body).backgroundColor"))
    (paper,) = papers
    assert (max(map(int, re.findall(r"\d+", paper))) < 64) == dark
    browser.dark(False)


def test_a_screen_reader_finds_names_for_all_that_it_meets(browser):
    nodes = browser.send("Accessibility.getFullAXTree")["nodes"]
    named = {}
    for node in nodes:
        if not node["ignored"]:
            named.setdefault(node["role"]["value"], []).append(node["name"]["value"])
    assert named["radio"] == list(VIEWS.values()) and "Colour the tokens by" in named["group"]
    for role in ("table", "image", "link", "heading", "region", "columnheader", "rowheader", "DisclosureTriangle"):
        assert named[role] and all(named[role]), role
    assert named["heading"][:2] == ["Step 2 of 2", "The update"]
    assert len([name for name in named["heading"] if name.startswith("Answer ")]) == N * 3
