"""models/scorer.py and models/expected.py: scores against transformers' own model, and what must not change them."""

import doctest
import json
import math
import random
import shutil
from collections import Counter
from dataclasses import replace
from statistics import fmean, stdev

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

import models as room
from data import synthetic
from data.recipe import Recipe
from data.video_files import video_files
from grpo.config import TINY_MODEL
from models import expected, load_scorer
from models import scorer as scorer_module
from models.expected import NUMBERS, expectation, number_logprobs, number_tokens, up_to_the_tag
from models.loading import load_policy
from models.policy import Policy
from models.scorer import Score, Scorer, of_answers
from tests.helpers import generator, motion_policy, plain_model, some_videos, tiny_policy, tokenizer

BROKEN = "test/broken.mp4"


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A folder with 16 good clips, a file that is no video, and one that is not even called one."""
    folder = tmp_path_factory.mktemp("data") / "clips"
    synthetic.write_clips(folder, {"test": 16}, seed=3)
    (folder / BROKEN).write_bytes(b"not a video")
    (folder / "test" / "notes.txt").write_text("no video")
    return folder


@pytest.fixture(scope="module")
def scorer():
    return load_scorer(TINY_MODEL, device="cpu")


def ways(scorer):
    """The same policy, asked in each way."""
    return {"greedy": scorer, "samples": replace(scorer, samples=4), "expected": replace(scorer, score="expected")}


@pytest.mark.parametrize("way", ["greedy", "samples", "expected"])
def test_no_score_depends_on_its_batch_or_on_the_order(clips, scorer, way):
    """float32 on the CPU: the same values to the last bit, and the same words."""
    asked = ways(scorer)[way]
    paths = [str(path) for path in video_files(clips)]
    alone = {score.path: score for score in replace(asked, batch=1).scores(paths)}
    assert len({score.value for score in alone.values()}) > 4
    for batch, order in [(16, paths[::-1]), (4, random.Random(0).sample(paths, len(paths)))]:
        assert list(replace(asked, batch=batch).scores(order)) == [alone[path] for path in order]


def test_a_file_gives_a_score_and_several_give_a_list(clips, scorer, tmp_path):
    files = sorted((clips / "test").glob("0000?.mp4"))
    one = scorer(files[0])
    assert isinstance(one, Score) and one.status == "ok" and 1 <= one.value <= 5 and one.reasoning
    assert (one.path, one.mos_range, one.higher_is_better) == (str(files[0]), (1.0, 5.0), True)
    assert scorer(files[:3]) == [scorer(str(file)) for file in files[:3]]
    assert [score.path for score in scorer(str(clips / "test" / "0000?.mp4"))] == list(map(str, files))
    every = scorer(clips)  # and the folders in it
    assert [score.path for score in every] == sorted(str(path) for path in (clips / "test").glob("*.mp4"))
    shutil.copy(files[0], tmp_path / "[a] *.MP4")
    assert scorer(tmp_path / "[a] *.MP4").value == one.value  # a file of that name is no pattern
    assert [score.value for score in scorer(tmp_path)] == [one.value]
    for nothing in (tmp_path / "*.avi", clips / "test" / "*.txt"):
        with pytest.raises(ValueError, match="no video file there"):
            scorer(nothing)


def test_a_bad_file_has_its_reason_and_ends_no_other(clips, scorer):
    good = str(clips / "test" / "00000.mp4")
    missing = str(clips / "nowhere.mp4")
    for batch in (1, 16):
        scores = replace(scorer, batch=batch)([str(clips / BROKEN), good, missing, good])
        assert [(score.status, score.value is None) for score in scores] == [
            ("unreadable", True), ("ok", False), ("unreadable", True), ("ok", False)
        ]  # fmt: skip
        assert scores[2].reason == "missing" and scores[0].reason and scores[1] == scores[3] == scorer(good)


def test_a_video_outside_the_folder_is_refused(clips, scorer):
    (score,) = scorer.scores(["../clips/test/00000.mp4"], clips)
    assert (score.status, score.reason) == ("unreadable", "refused")


def test_an_answer_without_a_number_is_unparsed(clips, scorer):
    short = replace(scorer, recipe=scorer.recipe.but(max_new_tokens=4))
    for asked in ways(short).values():
        score = asked(clips / "test" / "00000.mp4")
        assert (score.value, score.status, score.reason) == (None, "unparsed", "no_answer")
    assert replace(short, samples=4)(clips / "test" / "00000.mp4").answers == (None,) * 4


def test_greedy_texts_are_those_of_transformers_generate(clips):
    """One video at a time, every token attending to the whole prompt, through transformers' own attention."""
    scorer = Scorer(load_policy(TINY_MODEL, motion="none").eval(), Recipe.of(TINY_MODEL))
    policy, plain = scorer.policy, plain_model(scorer.policy, "eager").eval()
    seen = []
    policy.greedy = lambda prefix, T: seen.append(Policy.greedy(policy, prefix, T)) or seen[-1]
    watched, encode = [], policy.encode
    policy.encode = lambda videos: watched.append(videos) or encode(videos)
    scorer([str(path) for path in sorted((clips / "test").glob("0*.mp4"))[:6]])
    (videos,), (completions,) = watched, seen
    for n in range(6):
        ids = videos.prompt_ids[n : n + 1]
        pixels = policy.pixels(videos.frames[n])
        out = plain.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=pixels,
            max_new_tokens=40,
            do_sample=False,
            eos_token_id=policy.end_ids.tolist(),
            pad_token_id=policy.pad_id,
        )
        ours = completions.ids[n, 0][completions.mask[n, 0]]
        assert out[0, ids.shape[1] :].tolist() == ours.tolist()


# ---- samples


def test_samples_are_a_function_of_seed_name_and_number(clips, scorer, tmp_path):
    file = clips / "test" / "00003.mp4"
    four = replace(scorer, samples=4)(file)
    assert len(set(four.answers)) > 1
    assert replace(scorer, samples=7)(file).answers[:4] == four.answers
    shutil.copy(file, tmp_path / "00003.mp4")
    assert replace(scorer, samples=4)(tmp_path / "00003.mp4").answers == four.answers
    shutil.copy(file, tmp_path / "other.mp4")
    assert replace(scorer, samples=4)(tmp_path / "other.mp4").answers != four.answers
    assert replace(scorer, samples=4, seed=1)(file).answers != four.answers


def test_samples_are_drawn_from_the_policys_distribution(clips, scorer):
    """The share of first digits among 600 answers against their exact probability, behind the most likely reasoning."""
    file = clips / "test" / "00005.mp4"
    sampled = replace(scorer, samples=600)(file)
    reasoning = scorer(file).reasoning
    drawn = Counter(int(answer) for answer in sampled.answers if answer is not None)
    videos = watched_by(scorer, file)
    begun = torch.tensor(scorer.policy.tokenizer(f"<think>{reasoning}</think><answer>").input_ids)
    logprobs = number_logprobs(scorer.policy, videos, begun, number_tokens(scorer.policy.tokenizer))
    exact = [logprobs[[k for k, n in enumerate(NUMBERS) if n[0] == digit]].exp().sum().item() for digit in "12345"]
    assert max(exact) > 0.3
    for digit, share in zip(range(1, 6), exact):  # digits hardly depend on the reasoning, which differs between answers
        assert abs(drawn[digit] / 600 - share) < 0.1


def watched_by(scorer, file):
    """One video as the scorer gives it to the policy."""
    seen, encode = [], scorer.policy.encode
    scorer.policy.encode = lambda videos, *begun: seen.append(videos) or encode(videos, *begun)
    try:
        scorer(file)
    finally:
        del scorer.policy.encode
    return seen[0]


def test_a_low_temperature_draws_the_greedy_answer(clips):
    recipe = Recipe.of(TINY_MODEL)
    cold = load_scorer(TINY_MODEL, "cpu", recipe=recipe.but(temperature=1e-3), samples=3)(clips / "test" / "00001.mp4")
    greedy = load_scorer(TINY_MODEL, "cpu")(clips / "test" / "00001.mp4")
    assert cold.answers == (greedy.value,) * 3 and cold.spread == 0 and cold.reasoning == greedy.reasoning


def test_the_mean_and_the_spread_are_of_the_answers_that_can_be_read():
    texts = ["4.00", "<answer>2.00</answer>", "<think>b</think><answer>3.50</answer>", "<answer>9</answer>"]
    found = of_answers(texts)
    assert found == {
        "answers": (None, 2.0, 3.5, None),
        "value": fmean([2.0, 3.5]),
        "spread": stdev([2.0, 3.5]),
        "reasoning": "",
    }
    assert of_answers(texts[:2])["spread"] is None
    none = of_answers(["x", "<answer>9</answer>", "y"])
    assert (none["value"], none["status"], none["reason"]) == (None, "unparsed", "no_answer")


# ---- expected


def slow_number_logprobs(policy, videos, begun, numbers, tokens=None):
    """Every number by itself: prompt, beginning and number through transformers' own model, no cache, no sharing."""
    plain = plain_model(policy).eval()
    found = []
    for number in numbers:
        own = (tokens or policy.tokenizer)(number, add_special_tokens=False).input_ids
        ids = torch.cat([videos.prompt_ids[0], begun, torch.tensor(own)])[None]
        with torch.no_grad():
            logits = plain(input_ids=ids, pixel_values=policy.pixels(videos.frames[0]), use_cache=False).logits[0]
        logits = logits.double() / policy.temperature
        logits[:, policy.model.config.image_token_id] = -torch.inf
        logprobs = logits.log_softmax(-1)[-len(own) - 1 : -1]
        found.append(sum(row[token].item() for row, token in zip(logprobs, own)))
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_probability_of_each_number_is_that_of_transformers(temperature):
    policy = tiny_policy(temperature=temperature).eval()
    videos = some_videos(policy, 1)
    begun = torch.tensor(policy.tokenizer("<think>Why not.</think><answer>").input_ids)
    found = number_logprobs(policy, videos, begun, number_tokens(policy.tokenizer))
    some = [0, 1, 57, 99, 100, 237, 399, 400]
    expected = slow_number_logprobs(policy, videos, begun, [NUMBERS[k] for k in some])
    torch.testing.assert_close(found[some], expected, rtol=1e-4, atol=1e-4)
    assert found.std() > 0.5  # and they differ
    assert found.exp().sum() < 1


def test_a_motion_token_is_seen_too():
    policy = motion_policy().eval()
    videos = some_videos(policy, 2)
    begun, numbers = torch.tensor(policy.tokenizer("<answer>").input_ids), number_tokens(policy.tokenizer)
    found = number_logprobs(policy, videos[:1], begun, numbers)
    expected = slow_number_logprobs(policy, videos[:1], begun, NUMBERS[:3])
    torch.testing.assert_close(found[:3], expected, rtol=1e-4, atol=1e-4)


def test_the_expectation_is_the_mean_over_valid_numbers():
    logprobs = torch.randn(401, generator=generator(0), dtype=torch.float64) * 2 - 9
    found = expectation(logprobs)
    weights = [math.exp(x) for x in logprobs.tolist()]
    mass = math.fsum(weights)
    mean = math.fsum(w * float(n) for w, n in zip(weights, NUMBERS)) / mass
    variance = math.fsum(w * (float(n) - mean) ** 2 for w, n in zip(weights, NUMBERS)) / mass
    assert found == pytest.approx((mean, math.sqrt(variance), mass))
    assert expectation(logprobs - 900).value == pytest.approx(mean)  # probabilities too small for a float


def test_an_expected_score_stands_behind_the_greedy_reasoning(clips, scorer):
    file = clips / "test" / "00002.mp4"
    score, greedy = replace(scorer, score="expected")(file), scorer(file)
    begun = torch.tensor(scorer.policy.tokenizer(f"<think>{greedy.reasoning}</think><answer>").input_ids)
    numbers = number_tokens(scorer.policy.tokenizer)
    found = expectation(number_logprobs(scorer.policy, watched_by(scorer, file), begun, numbers))
    assert (score.value, score.spread, score.mass) == tuple(found)
    assert score.reasoning == greedy.reasoning and score.value != greedy.value
    assert 0.5 < score.mass <= 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<think>a</think>3.20", "no_answer"),
        ("<think>a <answer>3.20</answer>", "inside_think"),
        ("</answer><answer>3.20</answer>", "several_answers"),
        ("<think>a</think><answer>none</answer>", None),
        ("<think>a</think><answer></answer>", None),
        ("<think>a</think><answer> 9", None),
    ],
)
def test_an_expected_score_needs_a_place_where_a_number_would_be_an_answer(scorer, text, reason):
    asked, policy = replace(scorer, score="expected"), scorer.policy
    videos = some_videos(policy, 1, F=6)
    ids = policy.tokenizer(text, return_tensors="pt").input_ids[0]
    found = asked._expected(videos, ids, text)
    assert found.get("reason") == reason and (found["value"] is None) == (reason is not None)


CORPUS = ["<answer>3.25</answer>", "<answer>4.50</answer>", "<answer>1.00</answer>"] * 9


def joining(pattern=None, corpus=()):
    """A byte-level BPE that joins what its corpus has together, within the pieces of a pattern."""
    tokenizer = Tokenizer(tokenizer_models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    split = [pre_tokenizers.Split(Regex(pattern), "isolated")] if pattern else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def test_numbers_may_have_tokens_of_several_digits():
    """Then numbers differ in length, or in what they share; each must still be its own tokens."""
    tokens = joining(corpus=CORPUS)
    found = number_tokens(tokens)
    lengths = (found.ids >= 0).sum(1)
    assert 3 == lengths.min() < lengths.max() == 4
    for k, number in enumerate(NUMBERS):
        own = found.ids[k][: lengths[k]].tolist()
        assert tokens.decode(own) == number
        assert found.beginnings[found.beginning[k]][: lengths[k] - 1].tolist() == own[:-1]
    single = number_tokens(tokenizer())
    assert single.ids.shape == (401, 4) and len(single.beginnings) == 41


def test_a_tokenizer_that_joins_numbers_with_tags_is_refused():
    with pytest.raises(ValueError, match=r"--score expected: this tokenizer joins 1\.00 with the tags") as error:
        number_tokens(joining(pattern=r"[^\n]+", corpus=["<answer>1.00</answer>"] * 9))
    assert "\n" not in str(error.value)


def test_numbers_of_unequal_length_have_transformers_probabilities():
    policy = tiny_policy().eval()
    tokens = joining(corpus=CORPUS)
    assert len(tokens) <= policy.model.config.text_config.vocab_size
    videos, begun = some_videos(policy, 1), torch.tensor([5, 6, 7])
    found = number_logprobs(policy, videos, begun, number_tokens(tokens))
    some = [0, 225, 226, 350, 400]
    expected = slow_number_logprobs(policy, videos, begun, [NUMBERS[k] for k in some], tokens)
    torch.testing.assert_close(found[some], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("text", ["<think>b</think><answer>3.2", "<answer>", "x<answer></answer>", "a <answer>\n 2"])
def test_an_answer_is_cut_behind_its_tag(text):
    tokens = tokenizer()
    cut = up_to_the_tag(tokens, tokens(text).input_ids)
    assert tokens.decode(cut) == text[: text.index("<answer>") + 8]
    assert up_to_the_tag(tokens, tokens(text.replace("<answer>", "<answer")).input_ids) is None


def test_an_answer_is_cut_in_a_token_that_has_more_than_the_tags_end():
    tokens = joining(corpus=["x<answer></answer>"] * 9)
    ids = tokens("a<answer></answer>").input_ids
    assert "></" in map(tokens.decode, ids)
    cut = up_to_the_tag(tokens, ids)
    assert tokens.decode(cut) == "a<answer>" and cut == tokens("a<answer>").input_ids


# ---- the room, rows, flags


def test_the_room_exports_the_scorer_on_demand():
    assert room.load_scorer is load_scorer and room.Score is Score
    with pytest.raises(AttributeError, match="nothing"):
        room.nothing  # noqa: B018


def test_a_row_is_json_and_gives_its_score_back():
    score = Score('a, "b" \udce9\n🎬.mp4', 3.1, "x\ny", spread=0.1, answers=(1.0, None), flags="truncated")
    row = json.loads(json.dumps(score.row()))
    assert row["score"] == 3.1 and row["mos_range"] == [1, 5] and row["higher_is_better"] is True
    assert Score.from_row(row) == score


@pytest.mark.parametrize("module", [expected, scorer_module])
def test_doctests(module):
    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0


def test_what_does_not_go_together_is_named(scorer):
    with pytest.raises(ValueError, match="--samples 3: goes without --score expected"):
        replace(scorer, score="expected", samples=3)
    with pytest.raises(ValueError, match="--score best: choose one of greedy, expected"):
        replace(scorer, score="best")
    with pytest.raises(ValueError, match="--model"):
        load_scorer("./nowhere")
