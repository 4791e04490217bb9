"""evaluate.py --task: items, letters, mentions, likelihoods against slow versions; a judge on this machine; the CLI."""

import csv
import doctest
import itertools
import json
import math
import random
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from scipy import stats

from data import judge, synthetic, understanding
from data.items import Item, read_items, write_items
from data.judge import GRADING, Judge
from data.labels import Clip, read_labels, write_labels
from data.prompts import PROMPTS
from data.understanding import MARGIN, VISIBLE, asking, choice_question, draw_pairs, pair_item, synthetic_items
from models.choices import Watched, candidate_ids, candidate_logprobs, show
from models.policy import Videos
from models.understanding import accuracies, right_by_score
from rewards import choice
from rewards.choice import accuracy, parse_choice, wilson
from rewards.mentions import Synonyms, mention_scores
from tests.helpers import generator, motion_policy, tiny_policy
from tests.test_evaluate import run

ROOT = Path(__file__).resolve().parents[1]
SYNONYMS = Synonyms.read(ROOT / "docs" / "synonyms.json")


@pytest.mark.parametrize("module", [choice, judge, understanding], ids=lambda module: module.__name__)
def test_examples_in_docstrings(module):
    done = doctest.testmod(module)
    assert done.attempted and not done.failed


# ---- items

QUESTION = {"video_name": "a.mp4", "question": "Sharp?", "answers": ["Yes", "No"], "correct_choice": "B."}


def written(tmp_path, text):
    path = tmp_path / "items.json"
    path.write_text(text, encoding="utf-8")
    return path


def test_q_bench_videos_layout_is_read(tmp_path):
    """An array over many lines, pairs by name, letters with a full stop, open-ended questions among them."""
    pair = QUESTION | {"video_name": "x/b.mp4_cat_c.avi.mp4", "correct_choice": "A", "question_type": "what/how"}
    text = json.dumps(
        [QUESTION, {"question_type": "open_ended", "question": "Why?"}, pair | {"concern": "Temporal"}], indent=1
    )
    found, open_ended = read_items(written(tmp_path, text))
    assert open_ended == 1
    assert found == [
        Item(("a.mp4",), "Sharp?", ("Yes", "No"), 1),
        Item(("x/b.mp4", "c.avi"), "Sharp?", ("Yes", "No"), 0, "what/how", "Temporal"),
    ]


def test_written_items_are_read_back(tmp_path):
    made = [
        Item(("a.mp4", "ä.mp4"), "Well?", ("No", "Yes, »so«"), 1, "t", "c"),
        Item(("b",), "?", tuple("uvwxyzab"), 7),
    ]
    write_items(made, tmp_path / "out.jsonl")
    assert read_items(tmp_path / "out.jsonl") == (made, 0)
    with pytest.raises(FileExistsError):
        write_items(made, tmp_path / "out.jsonl")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"correct_choice": "C"}, "answer must be one of A, B"),
        ({"correct_choice": "b"}, "answer must be"),
        ({"correct_choice": 1}, "answer must be"),
        ({"answers": ["Yes"]}, "2 to 8"),
        ({"answers": ["Yes", " "]}, "must be texts"),
        ({"answers": ["Yes", "Yes "]}, "comes twice"),
        ({"video_name": "../a.mp4"}, "below the video folder"),
        ({"video_name": "/a.mp4"}, "below the video folder"),
        ({"video_name": "a.mp4_cat_"}, "below the video folder"),
        ({"video_name": ["a", "b", "c"]}, "a path or two"),
        ({"question": ""}, "question must be a text"),
        ({"answer": "A"}, "exactly one of the keys"),
        ({"concern": 3}, "concern must be a text"),
        ({"question": "\ud800"}, "surrogates"),
    ],
)
@pytest.mark.parametrize("array", [True, False])
def test_a_faulty_item_is_named_by_line(tmp_path, change, said, array):
    rows = [json.dumps(QUESTION), json.dumps(QUESTION | change)]
    text = "[\n" + ",\n".join(rows) + "\n]\n" if array else "\n".join(rows)
    path = written(tmp_path, text)
    with pytest.raises(ValueError, match=rf"items\.json:{3 if array else 2}: ") as error:
        read_items(path)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no multiple choice item"),
        ("[]", "no multiple choice item"),
        ("[3]", ":1: an item must be a JSON object"),
        ("\n{", ":2: not JSON"),
        ("[\n{}\n{}]", ":2: videos: needs exactly one"),
        (f"[{json.dumps(QUESTION)}\n{json.dumps(QUESTION)}]", ":2: expected"),
        (f"[{json.dumps(QUESTION)},]", ":1: not JSON"),
        (f"[{json.dumps(QUESTION)}", ":1: expected"),
        (f"[{json.dumps(QUESTION)}]\nmore", ":2: something stands behind"),
        (f"{json.dumps(QUESTION)} {json.dumps(QUESTION)}", ":1: something stands behind"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_a_file_that_is_no_list_of_items_is_refused(tmp_path, text, said):
    with pytest.raises(ValueError) as error:
        read_items(written(tmp_path, text))
    assert said in str(error.value)


# ---- items of labelled clips, pairs


def clip(path, mos=3.0, **extra):
    return Clip(path, mos, (1.0, 5.0), "d", "test", extra)


def test_synthetic_items_ask_only_about_what_is_clear():
    rng = random.Random(0)
    names = list(synthetic.IMPACT)
    clips = []
    for k in range(80):
        suffers = {name: round(rng.uniform(0.1, 1), 3) for name in rng.sample(names, rng.choice([0, 1, 2]))}
        clips.append(clip(f"{k:02d}.mp4", severities=suffers))
    made = synthetic_items([*clips, clip("unlabelled.mp4")], seed=5)
    assert made == synthetic_items(clips, seed=5) != synthetic_items(clips, seed=6)
    by_path = {c.path: c.extra["severities"] for c in clips}
    adjectives = {word: name for name, word in understanding.ADJECTIVES.items()}
    asked = [item.videos[0] for item in made if item.question_type == "what-how"]
    clear = []
    for path, suffers in by_path.items():
        ranked = sorted([*suffers.values(), 0, 0])
        if ranked[-1] >= VISIBLE and ranked[-1] - ranked[-2] >= MARGIN:
            clear.append(path)
    assert asked == clear and 20 < len(clear) < 80
    orders = set()
    for item in made:
        suffers, right = by_path[item.videos[0]], item.candidates[item.answer]
        if item.question_type == "what-how":
            orders.add(item.candidates)
            assert all(suffers[adjectives[right]] >= value for value in suffers.values())
        else:
            assert (suffers[item.concern] >= VISIBLE) if right == "Yes" else item.concern not in suffers
    assert len(orders) > 10
    for name in names:
        rights = [
            item.candidates[item.answer] for item in made if (item.question_type, item.concern) == ("yes-no", name)
        ]
        assert rights.count("Yes") == rights.count("No") > 0


def test_faulty_severities_are_told():
    for wrong in ([1], {"blur": "much"}, {"blur": 1.5}, {"blur": 0}):
        with pytest.raises(ValueError, match=r"a\.mp4: severities must be"):
            synthetic_items([clip("a.mp4", severities=wrong)])
    with pytest.raises(ValueError, match="vignette: not of"):
        synthetic_items([clip("a.mp4", severities={"vignette": 0.5})])


@pytest.mark.parametrize("difference", [0.0, 0.5, 1.0])
def test_pairs_are_drawn_from_all_that_differ_enough(difference):
    rng = random.Random(1)
    clips = [clip(f"{k}.mp4", rng.choice([1.0, 1.5, 2.0, 2.25, 3.0, 4.5])) for k in range(14)]
    every = {
        frozenset((a.path, b.path))
        for a, b in itertools.combinations(clips, 2)
        if abs(a.target - b.target) >= difference and a.target != b.target
    }
    drawn = draw_pairs(clips, len(every), difference, seed=2)
    assert {frozenset((pair.first.path, pair.second.path)) for pair in drawn} == every and len(drawn) == len(every)
    assert draw_pairs(clips, 5, difference, seed=2) == draw_pairs(clips, 5, difference, seed=2)
    answers = [pair_item(pair).answer for pair in drawn]
    assert 0.2 < sum(answers) / len(answers) < 0.8  # the better one comes first about as often as second
    for pair, answer in zip(drawn, answers):
        assert max(pair, key=lambda clip: clip.target) is pair[answer]
    with pytest.raises(ValueError, match=f"--pairs {len(every) + 1}: only {len(every)} pairs"):
        draw_pairs(clips, len(every) + 1, difference)


# ---- prompts


def test_a_prompt_with_another_question_keeps_the_frames_words():
    words = PROMPTS["released-train"]
    item = Item(("a.mp4",), "Is it sharp?", ("Yes", "No"), 0)
    text = asking(words, choice_question(item)).user_text(["[1]", "[2]"], "[m]")
    assert text.startswith("Now you will receive a video:\nFrame1:[1]\nFrame2:[2]\nMotion Feature:[m]\n")
    assert "Is it sharp?\nA. Yes\nB. No\n" in text and "rating" not in text
    pair = asking(PROMPTS["released-test"], "Which?", 2).user_text(["[1]", "[2]", "[3]", "[4]"], "[m]")
    assert pair == (
        "Now you will receive two videos:\nVideo 1:\nFrame1: [1]\nFrame2: [2]\nVideo 2:\nFrame1: [3]\nFrame2: [4]\n"
        "Motion Feature: [m]\nWhich?"
    )


# ---- letters, intervals


@pytest.mark.parametrize(
    ("text", "index", "reason"),
    [
        ("<think>A or B?</think><answer>B</answer>", 1, None),
        ("<think>A</think> <answer> (C). </answer>", None, "not_a_letter"),
        ("<think>A</think> <answer> (C) </answer>", 2, None),
        ("<answer>B: fog</answer>", 1, None),
        ("<answer>B: rain</answer>", None, "not_a_letter"),
        ("<think>Hm.</think>A", 0, None),
        ("A.", 0, None),
        ("<think>A", None, "no_answer"),
        ("A B", None, "not_a_letter"),
        ("rain", None, "not_a_letter"),
        ("And", None, "not_a_letter"),
        ("<answer>A</answer><answer>A</answer>", None, "several_answers"),
        ("<think><answer>A</answer></think>", None, "inside_think"),
        ("<answer>A", None, "no_answer"),
        ("A</answer>", None, "no_answer"),
        ("<answer></answer>", None, "empty"),
        ("", None, "empty"),
        ("<answer>D</answer>", None, "no_such_letter"),
        ("<answer>3.50</answer>", None, "not_a_letter"),
        ("Ａ", None, "not_a_letter"),
    ],
)
def test_letters(text, index, reason):
    found = parse_choice(text, ["rain", "fog", "snow"])
    assert (found.index, found.reason) == (index, reason)


def test_wilson_solves_its_quadratic():
    """Its ends are the shares p from which `right` of n is 1.96 standard errors away; checked against scipy too."""
    for right, n in ((0, 7), (3, 10), (12.5, 50), (160, 160)):
        low, high = wilson(right, n)
        for p in (low, high):
            assert abs(right / n - p) == pytest.approx(1.959964 * math.sqrt(p * (1 - p) / n), abs=1e-9)
        assert 0 <= low <= right / n <= high <= 1 and high > low
        if right == int(right):
            other = stats.binomtest(int(right), n).proportion_ci(method="wilson")
            assert (low, high) == pytest.approx((other.low, other.high), abs=1e-6)


def test_accuracy_counts_ties_half():
    assert accuracy([1.0, 0.5, 0.0, 0.0])["accuracy"] == 0.375
    assert accuracy([]) == {"accuracy": None, "n": 0, "low": None, "high": None}
    assert [right_by_score(a, b, 1) for a, b in ((1, 2), (2, 1), (2, 2), (None, 2), (2, None))] == [1, 0, 0.5, 0, 0]
    assert [right_by_score(a, b, 0) for a, b in ((1, 2), (2, 1), (2, 2))] == [0, 1, 0.5]


def test_chance_and_majority():
    rows = [
        {"question": q, "candidates": c, "answer": a, "likelihood": "A"}
        for q, c, a in (
            ("p", ["x", "y"], "A"),
            ("p", ["y", "x"], "B"),
            ("p", ["x", "y"], "B"),
            ("q", list("wxyz"), "C"),
        )
    ]
    found = accuracies(rows, ["likelihood"])
    assert found["chance"] == (3 * 0.5 + 0.25) / 4
    assert found["majority"] == 3 / 4  # x, x, y to p: two of three; and one of one to q
    assert found["likelihood"]["accuracy"] == 0.25
    assert accuracies(rows[2:], ["likelihood"])["majority"] is None


# ---- mentions


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The video is severely blurry and mildly noisy.", "blur noise"),
        ("Grain dances over flat areas; the motion freezes and jumps.", "noise stutter"),
        ("BLURRED, out-of-focus and over-exposed", "blur exposure"),
        ("Snow falls on a nosy walker with a blurb, unblocked.", ""),
        ("There is no visible noise.", ""),
        ("There is no visible noise, blur or blocking.", ""),
        ("There is no noise, the picture is blurry.", "blur"),
        ("No noise. Blur everywhere.", "blur"),
        ("It isn’t blurry, but it stutters.", "stutter"),
        ("Noise is not visible; compression artifacts are.", "compression"),
        ("A noise-free picture, free of flicker.", ""),
        ("The noise is heavy and the blur is not.", "blur noise"),
        ("Not only blurry but also noisy.", "blur noise"),
        ("It lacks sharpness.", "blur"),
        ("It is not sharp.", "blur"),
        ("It does not lack sharpness.", ""),
        ("Shaky without being noisy, although frames were dropped: frame drops.", "shake stutter"),
        ("Without blur\nheavy banding", "banding"),
        ("The video is clean and sharp. Motion is smooth.", ""),
        ("", ""),
    ],
)
def test_mentions(text, expected):
    assert SYNONYMS.mentions(text) == set(expected.split())


def test_every_phrase_of_the_table_is_a_mention_and_is_negated():
    for name, phrases in SYNONYMS.distortions.items():
        for phrase in map(" ".join, phrases):
            assert name in SYNONYMS.mentions(f"I see {phrase} here."), phrase
            if not phrase.startswith(("lack", "not")):
                assert name not in SYNONYMS.mentions(f"I see no {phrase} here."), phrase


def test_the_table_knows_the_demos_distortions():
    assert set(synthetic.IMPACT) <= set(SYNONYMS.distortions)


def test_mention_scores_against_counting():
    rng = random.Random(0)
    names = ["a", "b", "c"]
    said = [{name for name in [*names, "other"] if rng.random() < 0.4} for _ in range(50)]
    there = [{name for name in names if rng.random() < 0.5} for _ in range(50)]
    found = mention_scores(said, there, names)
    hits = sum(len(s & t) for s, t in zip(said, there))
    assert found["micro"]["precision"] == hits / sum(len(s - {"other"}) for s in said)
    assert found["micro"]["recall"] == hits / sum(map(len, there))
    for name in names:
        p, r = found[name]["precision"], found[name]["recall"]
        both = sum(name in s and name in t for s, t in zip(said, there))
        assert (p, r) == (both / sum(name in s for s in said), both / sum(name in t for t in there))
        assert found[name]["f1"] == pytest.approx(2 * p * r / (p + r))
    nothing = mention_scores([set()], [set()], ["a"])["a"]
    assert nothing["precision"] is nothing["recall"] is nothing["f1"] is None


@pytest.mark.parametrize("content", ["[]", "{", '{"distortions": {}}', None])
def test_a_table_that_is_none_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "s.json").write_text(content)
    with pytest.raises(ValueError, match="--synonyms"):
        Synonyms.read(tmp_path / "s.json")
    table = json.loads((ROOT / "docs" / "synonyms.json").read_text())
    (tmp_path / "s.json").write_text(json.dumps(table | {"verbs": ["is", "-"]}))
    with pytest.raises(ValueError, match="verbs must be"):
        Synonyms.read(tmp_path / "s.json")


# ---- likelihoods


def random_rows(policy, N, V, F):
    shape = (N, V, F, 3, policy.image_side, policy.image_side)
    frames = torch.randint(256, shape, dtype=torch.uint8, generator=generator(3))
    return [[Watched(video, None) for video in row] for row in frames]


def slow_logprob(policy, frames, prompt_ids, text, shared):
    """Token by token: each is read off a forward pass of its own, behind all before it."""
    ids = policy.tokenizer(text, add_special_tokens=False).input_ids
    total = 0.0
    for t in range(shared, len(ids)):
        known = torch.tensor([[ids[: t + 1]]])
        total += policy(Videos(frames[None], prompt_ids[None]), known).logprobs[0, 0, t].item()
    return total / (len(ids) - shared)


def test_likelihoods_equal_those_of_each_candidate_alone():
    policy = tiny_policy()
    texts = [["<answer>A</answer>", "<answer>B</answer>", "<answer>C</answer>"], ["is a", "is a long one", "is it?"]]
    words = asking(PROMPTS["released-train"], "Well?")
    prompt_ids = policy.prompt_ids(words.system, words.user_text, 2)
    rows = random_rows(policy, 2, 1, 2)
    found = candidate_logprobs(policy, show(policy, rows, prompt_ids.expand(2, -1)), texts)
    tokens = [[policy.tokenizer(text, add_special_tokens=False).input_ids for text in group] for group in texts]
    for n, group in enumerate(texts):
        shared = 0
        while all(len(ids) > shared + 1 for ids in tokens[n]) and len({ids[shared] for ids in tokens[n]}) == 1:
            shared += 1
        assert shared > 0
        slow = [slow_logprob(policy, rows[n][0].frames, prompt_ids, text, shared) for text in group]
        assert found[n].tolist() == pytest.approx(slow, rel=1e-4)
        assert len({round(value, 3) for value in slow}) == len(slow)


def test_a_candidate_that_others_continue_keeps_its_last_token():
    policy = tiny_policy()
    ids, counted = candidate_ids(policy, [["blur", "blur and noise"], ["x", "y"]])
    assert counted.any(-1).all()
    length = len(policy.tokenizer("blur", add_special_tokens=False).input_ids)
    assert counted[0, 0].nonzero()[:, 0].tolist() == [length - 1]
    long = policy.tokenizer("blur and noise", add_special_tokens=False).input_ids
    assert counted[0, 1].nonzero()[:, 0].tolist() == list(range(length - 1, len(long)))
    assert ids[0, 1, : len(long)].tolist() == long


def test_a_pairs_motion_is_the_mean_of_both_videos():
    policy = motion_policy(frames=4).eval()
    words = asking(PROMPTS["released-train"], "Which?", 2)
    prompt_ids = policy.prompt_ids(words.system, words.user_text, 8)
    rows = random_rows(policy, 3, 2, 4)
    shown = show(policy, rows, prompt_ids.expand(3, -1))
    for n, row in enumerate(rows):
        alone = [policy.model.model.motion_features(policy.pixels(video.frames[None])) for video in row]
        assert torch.allclose(shown.motion[n], (alone[0] + alone[1])[0] / 2, atol=1e-6)
        assert torch.equal(shown.frames[n], torch.cat([row[0].frames, row[1].frames]))
    swapped = show(policy, [row[::-1] for row in rows], prompt_ids.expand(3, -1))
    texts = [["<answer>A</answer>", "<answer>B</answer>"]] * 3
    assert not torch.allclose(*(candidate_logprobs(policy, videos, texts) for videos in (shown, swapped)), atol=1e-4)
    prefix = policy.encode(shown)
    assert torch.isfinite(prefix.logprobs).all() and prefix.length == len(prompt_ids)


def test_dense_clips_are_what_slowfast_sees_of_a_pair():
    policy = motion_policy(frames=4).eval()
    words = asking(PROMPTS["released-train"], "Which?", 2)
    prompt_ids = policy.prompt_ids(words.system, words.user_text, 2)
    pictures = random_rows(policy, 2, 2, 1 + 2 * 4)
    rows = [[Watched(x.frames[:1], x.frames[1:].unflatten(0, (2, 4))) for x in row] for row in pictures]
    shown = show(policy, rows, prompt_ids.expand(2, -1))
    for n, row in enumerate(rows):
        every = [policy.model.model.motion_features(policy.pixels(c[None])) for video in row for c in video.clips]
        assert torch.allclose(shown.motion[n], torch.cat(every).mean(0), atol=1e-6)


# ---- the judge


class Api(BaseHTTPRequestHandler):
    """Plays back what the test has lined up: (status, body, headers)."""

    script, seen = [], []

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        Api.seen.append((self.path, self.headers.get("Authorization"), json.loads(body)))
        status, reply, headers = Api.script.pop(0)
        if status is None:
            return  # the connection ends without an answer
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(reply if isinstance(reply, bytes) else json.dumps(reply).encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def api(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv(judge.KEY, "secret")
    Api.script, Api.seen = [], []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Api)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def good(content, used=(7, 1)):
    usage = {"prompt_tokens": used[0], "completion_tokens": used[1]}
    return 200, {"choices": [{"message": {"content": content}}], "usage": usage}, {}


def test_the_judge_waits_tries_again_and_remembers(api, tmp_path):
    waits = []
    asked = Judge(api, "m", tmp_path / "cache", sleep=waits.append)
    Api.script = [(429, b"", {}), (503, b"", {"Retry-After": "7"}), (None, b"", {}), good("2")]
    assert asked.ask("Well?") == "2"
    assert waits == [1.0, 7.0, 4.0]
    assert asked.counts == dict(asked=1, cached=0, retried=3, failed=0, prompt_tokens=7, completion_tokens=1)
    path, key, body = Api.seen[-1]
    assert (path, key) == ("/v1/chat/completions", "Bearer secret")
    assert body == {"model": "m", "messages": [{"role": "user", "content": "Well?"}]}
    assert asked.ask("Well?") == "2" and len(Api.seen) == 4  # from disk
    other = Judge(api, "other", tmp_path / "cache")
    Api.script = [good("1")]
    assert other.ask("Well?") == "1" and other.counts["cached"] == 0  # another model is another request
    assert "secret" not in "".join(file.read_text() for file in (tmp_path / "cache").iterdir())


def test_replies_that_are_none_are_counted_and_asked_again(api, tmp_path):
    asked = Judge(api, "m", tmp_path, sleep=lambda seconds: None)
    for reply in (b"not json", [], {"choices": []}, {"choices": [{"message": {"content": ["1"]}}]}):
        Api.script = [(200, reply, {})]
        assert asked.ask("Well?") is None
    assert asked.counts["failed"] == 4 and asked.counts["asked"] == 0 and not list(tmp_path.iterdir())
    Api.script = [(200, {"choices": [{"message": {"content": "1"}}], "usage": None}, {})]
    assert asked.ask("Well?") == "1" and asked.counts["prompt_tokens"] == 0


def test_a_judge_that_refuses_or_is_away_ends_the_task(api, tmp_path):
    for status, headers in ((401, {}), (302, {"Location": f"{api}/elsewhere"})):
        Api.script = [(status, b"", headers)]
        with pytest.raises(ValueError, match=f"--judge-url .* HTTP status {status}"):
            Judge(api, "m", tmp_path).ask("Well?")
    asked = Judge(api, "m", tmp_path, sleep=lambda seconds: None)
    Api.script = [(500, b"", {})] * judge.ATTEMPTS
    with pytest.raises(ValueError, match="no reply in 5 attempts"):
        asked.ask("Well?")
    Api.script = [good("0"), *[(500, b"", {})] * judge.ATTEMPTS]
    assert (asked.ask("One?"), asked.ask("Two?")) == ("0", None) and asked.counts["failed"] == 1
    slow = Judge("http://127.0.0.1:9", "m", tmp_path, sleep=lambda seconds: None)
    with pytest.raises(ValueError, match="no reply"):
        slow.ask("Well?")
    with pytest.raises(ValueError, match="must start with http"):
        Judge("file:///etc/hosts", "m", tmp_path)


# ---- the command line


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "clips"
    synthetic.write_clips(folder, {"test": 6}, seed=3)
    return folder


def results(folder, task):
    rows = [json.loads(line) for line in (folder / f"{task}.jsonl").read_text().splitlines()]
    return rows, json.loads((folder / "metrics.json").read_text())


def test_attribution(clips, tmp_path, capsys):
    """One question about one video, about a pair, and about a file that is none; both ways; batches change nothing."""
    (clips / "broken.mp4").write_bytes(b"no video")
    one, two, none = "test/00000.mp4", "test/00001.mp4", "broken.mp4"
    made = [
        Item((one,), "Which?", ("blurry", "noisy", "blocky"), 1, "what-how"),
        Item((none,), "Which?", ("blurry", "noisy", "blocky"), 1, "what-how"),
        Item((two,), "Which?", ("blurry", "noisy", "blocky"), 1, "what-how"),
        Item((one, two), "Which is better?", ("Video 1", "Video 2"), 0, "which"),
    ]
    file = tmp_path / "items.jsonl"
    write_items(made, file)
    flags = ["--task", "attribution", "--items", file, "--videos", clips]
    outputs = [tmp_path / "a", tmp_path / "b", tmp_path / "c"]
    assert run(capsys, *flags, "--output", outputs[0])[0] == 0
    assert run(capsys, *flags, "--output", outputs[1], "--batch", "1", "--strict")[0] == 1
    rows, metrics = results(outputs[0], "attribution")
    alone, _ = results(outputs[1], "attribution")
    key = lambda row: row["videos"]  # noqa: E731
    for row, other in zip(sorted(rows, key=key), sorted(alone, key=key)):
        if row["logprobs"]:
            assert row["logprobs"] == pytest.approx(other["logprobs"], abs=1e-4)
            assert row["likelihood"] == "ABC"[row["logprobs"].index(max(row["logprobs"]))]
        assert row["text"] == other["text"]
    broken = next(row for row in rows if row["videos"] == [none])
    assert broken["unreadable"].endswith("broken.mp4: unreadable")
    assert broken["likelihood"] is None and broken["generated"] is None
    assert metrics["unreadable_questions"] == 1 and metrics["all"]["likelihood"]["n"] == 4
    right = sum(row["likelihood"] == row["answer"] for row in rows)
    assert metrics["all"]["likelihood"]["accuracy"] == right / 4
    assert (
        metrics["question_type"]["what-how"]["likelihood"]["n"] == 3
        and metrics["videos"]["pair"]["generated"]["n"] == 1
    )
    unreadable = sum(row["text"] is not None and row["generated"] is None for row in rows)
    assert sum(metrics["unreadable_answers"].values()) == unreadable

    write_items(made[:3], tmp_path / "single.jsonl")
    by_text = ["--by", "text", "--answer-form", "<think>The video is clearly {}", "--scoring-prompt"]
    assert run(capsys, *flags, "--output", outputs[2], *by_text)[0] == 2  # the pair has no such prompt
    flags[3] = tmp_path / "single.jsonl"
    assert run(capsys, *flags, "--output", outputs[2], *by_text)[0] == 0
    rows, metrics = results(outputs[2], "attribution")
    assert all(row["text"] is None for row in rows) and "generated" not in metrics["all"]
    assert metrics["answer_form"] == by_text[3] and metrics["scoring_prompt"]


def test_compare(clips, tmp_path, capsys):
    """Scores are those of evaluate.py without a task."""
    labels = ["--labels", clips / "labels.jsonl", "--videos", clips]
    flags = ["--task", "compare", *labels, "--output", tmp_path / "a", "--pairs", "4", "--min-difference", "0.2"]
    assert run(capsys, *flags)[0] == 0
    rows, metrics = results(tmp_path / "a", "compare")
    run(capsys, *labels, "--output", tmp_path / "scores")
    (file,) = (tmp_path / "scores").glob("*/predictions.csv")
    with file.open(newline="") as lines:
        scores = {row["path"]: float(row["score"]) for row in csv.DictReader(lines)}
    mos = {c.path: c.target for c in read_labels(clips / "labels.jsonl")}
    right = 0
    for row in rows:
        first, second = row["videos"]
        assert row["scores"] == [scores[first], scores[second]]
        assert row["answer"] == ("B" if mos[second] > mos[first] else "A")
        gap = (scores[second] - scores[first]) * (mos[second] - mos[first])
        right += 0.5 if gap == 0 else gap > 0
    assert (
        metrics["by_score"]["accuracy"] == right / 4
        and metrics["by_score"]["n"] == metrics["asked"]["videos"]["pair"]["likelihood"]["n"] == 4
    )
    assert run(capsys, *flags[:-4], "--pairs", "16")[0] == 2
    metrics = (tmp_path / "scores" / "metrics.json").read_text()
    code, _, err = run(capsys, *flags, "--output", tmp_path / "scores")
    assert code == 2 and f"--output {tmp_path / 'scores'}: has the metrics.json of something else" in err
    assert (tmp_path / "scores" / "metrics.json").read_text() == metrics


def test_describe_with_a_judge(clips, tmp_path, capsys, api):
    source = read_labels(clips / "labels.jsonl")
    told = [{"severities": {"blur": 0.5}}, {"distortions": ["noise"]}, {"description": "Grainy, no blur."}, {}]
    write_labels([clip(c.path, **extra) for c, extra in zip(source, told)], tmp_path / "l.jsonl")
    flags = ["--task", "describe", "--labels", tmp_path / "l.jsonl", "--videos", clips, "--output", tmp_path / "out"]
    flags += ["--scoring-prompt", "--judge-url", api, "--judge-model", "m", "--judge-price", "2", "10"]
    Api.script = [good("2"), good("two"), good("Score: 1", used=(9, 3))]
    assert run(capsys, *flags)[0] == 0
    rows, metrics = results(tmp_path / "out", "describe")
    assert [row["present"] for row in rows] == [["blur"], ["noise"], ["noise"], None]
    assert all(row["text"].startswith("The video is") for row in rows)
    assert all(row["mentioned"] == sorted(SYNONYMS.mentions(row["text"])) for row in rows)
    assert [row.get("judge_score") for row in rows] == [2, None, 1, None]
    prompts = [body["messages"][0]["content"] for _, _, body in Api.seen]
    assert prompts[2] == GRADING.format(reference="Grainy, no blur.", description=rows[2]["text"])
    assert "blur (0.50)" in prompts[0] and "noise" in prompts[1]
    graded = metrics["judge"]
    assert (graded["mean"], graded["graded"], graded["malformed"], graded["asked"]) == (1.5, 2, 1, 3)
    assert graded["cost"] == pytest.approx((23 * 2 + 5 * 10) / 1e6)
    assert (metrics["described"], metrics["with_reference"]) == (4, 3)
    before = (tmp_path / "out" / "describe.jsonl").read_text()
    Api.script = [(401, b"", {})]
    code, _, err = run(capsys, *flags[:-4], "other")
    assert code == 2 and "--judge-url" in err and not (tmp_path / "out" / "metrics.json").exists()
    assert run(capsys, *flags)[0] == 0 and not Api.script  # nothing is asked twice
    rows, metrics = results(tmp_path / "out", "describe")
    assert (tmp_path / "out" / "describe.jsonl").read_text() == before
    assert metrics["judge"]["cost"] == 0 and metrics["judge"]["cached"] == 3


LABELS = ["--labels", "l", "--videos", "v", "--output", "o"]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--task", "attribution"], "--items"),
        (["--task", "compare", *LABELS, *LABELS[:4]], "--labels once"),
        (["--task", "describe", *LABELS, "--seed", "3"], "--seed 3"),
        (["--task", "attribution", "--items", "i", *LABELS[2:], "--split", "val"], "--split val"),
        (["--task", "describe", *LABELS, "--samples", "3"], "--samples"),
        (["--task", "describe", *LABELS, "--score", "expected"], "--score expected"),
        (["--task", "describe", *LABELS, "--workers", "0"], "--workers 0"),
        (["--task", "attribution", "--items", "i", "--videos", "v"], "--output"),
        (["--task", "describe", "--items", "i"], "--items"),
        (["--task", "describe", *LABELS, "--video", "x"], "--video"),
        (["--video", "x", "--pairs", "3"], "--pairs"),
        (["--task", "compare", *LABELS, "--pairs", "0"], "--pairs"),
        (["--task", "compare", *LABELS, "--min-difference", "nan"], "--min-diff"),
        (["--task", "compare", *LABELS, "--answer-form", "x"], "--answer-form"),
        (["--task", "attribution", "--items", "i", "--videos", "v", "--output", "o", "--scoring-prompt"], "--by text"),
        (["--task", "describe", *LABELS, "--judge-url", "http://x"], "--judge-m"),
        (["--task", "describe", *LABELS, "--judge-price", "1", "1"], "--judge-p"),
        (["--task", "describe", *LABELS, "--synonyms", "none"], "--synonyms"),
        (["--task", "describe", *LABELS, "--judge-timeout", "9"], "--judge-t"),
        (["--task", "describe", "--scoring-prompt", "--prompt-text", "Well?", *LABELS], "--prompt-text"),
        (["--task", "attribution", "--items", "no.jsonl", "--videos", "v", "--output", "o"], "no.jsonl"),
    ],
)
def test_wrong_flags_are_named_in_one_line(capsys, tmp_path, monkeypatch, flags, named):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, *flags)
    assert code == 2 and named in err and "\n" not in err.strip()
    assert not list(tmp_path.iterdir())


def test_tasks_run_in_one_process(clips, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    flags = ["--task", "compare", "--labels", clips / "labels.jsonl", "--videos", clips, "--output", tmp_path / "out"]
    code, _, err = run(capsys, *flags)
    assert code == 2 and "--task compare: runs in one process" in err


def test_items_of_a_label_file(clips, tmp_path, capsys):
    out = tmp_path / "items.jsonl"
    understanding.main([str(clips / "labels.jsonl"), "--out", str(out)])
    assert read_items(out)[0] == synthetic_items(read_labels(clips / "labels.jsonl", "test"))
    with pytest.raises(SystemExit):
        understanding.main([str(clips / "labels.jsonl"), "--out", str(out)])
    assert "error" in capsys.readouterr().err
