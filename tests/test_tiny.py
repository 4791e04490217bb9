"""The committed tiny checkpoint is what its page says it is, and its script makes one like it."""

import re
from pathlib import Path

import pytest

from data import synthetic
from data.labels import read_labels
from data.prompts import PROMPTS
from data.recipe import Recipe
from evaluate import correlations, score_videos
from grpo.config import TINY_MODEL
from models.loading import load_policy
from models.tiny import pretrain


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """Labels of 100 clips that the model never saw, and its greedy answers."""
    folder = tmp_path_factory.mktemp("data") / "clips"
    clips = read_labels(synthetic.write_clips(folder, {"test": 100}, seed=5))
    policy = load_policy(TINY_MODEL).eval()
    return clips, score_videos(policy, [clip.path for clip in clips], folder, Recipe.of(TINY_MODEL), video_timeout=60)


def test_it_is_small_and_holds_safetensors_only():
    files = list(Path(TINY_MODEL).iterdir())
    assert sum(file.stat().st_size for file in files) <= 2_000_000
    assert {file.suffix for file in files} <= {".json", ".safetensors", ".jinja"}
    assert sum(p.numel() for p in load_policy(TINY_MODEL).parameters()) == pytest.approx(470_000, rel=0.02)


def test_it_speaks_the_format_in_readable_words(answered):
    words = r"(severely|clearly|mildly) (blurry|noisy|blocky|badly exposed|stuttering)"
    sentence = rf"The video is (clean and sharp|{words}( and {words})?)\. [A-Z][a-z, ]+\."
    assert all(prediction.status == "ok" for prediction in answered[1])
    readable = sum(bool(re.fullmatch(sentence, prediction.reasoning)) for prediction in answered[1])
    assert readable >= 98


def test_it_names_what_it_sees(answered):
    for name, word in pretrain.NAMES.items():
        shown = [(name in clip.extra["severities"], word in answer.reasoning) for clip, answer in zip(*answered)]
        hit = sum(there and named for there, named in shown) / sum(there for there, _ in shown)
        false = sum(named and not there for there, named in shown) / sum(not there for there, _ in shown)
        assert hit >= 0.4 and false <= 0.15 and hit >= 4 * false, name


def test_its_scores_mean_next_to_nothing(answered):
    found = correlations([answer.score for answer in answered[1]], [clip.target for clip in answered[0]])
    assert found["srcc"] is None or found["srcc"] <= 0.4


def test_captions_say_what_they_are_given_and_the_tokenizer_keeps_them():
    tokenizer = pretrain.make_tokenizer()
    for severities in ({}, {"blur": 0.2}, {"stutter": 0.95, "exposure": 0.5}):
        text = pretrain.caption(severities, 2.5)
        assert text.endswith("</think><answer>2.50</answer>")
        assert all((word in text) == (name in severities) for name, word in pretrain.NAMES.items())
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    for prompt in PROMPTS.values():
        text = prompt.system + prompt.user_text(["é", "中"])
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_frequency_filters_are_whitening_cosines():
    filters = pretrain.frequency_filters(64, 16)
    assert filters.shape == (64, 3, 16, 16)
    flat = filters.flatten(2)
    grey = (flat[:52, 0] - flat[:52, 1]).abs().amax(1) + (flat[:52, 0] - flat[:52, 2]).abs().amax(1)
    assert grey.max() < 1e-6, "the luminance filters weigh the three channels alike"
    assert flat[52:].sum(1).abs().max() < 1e-6, "the colour filters do not see grey"
    assert flat[1:52].sum(-1).abs().max() < 1e-4, "all but the first luminance filter do not see a flat patch"
    norms = flat[:52].norm(dim=(1, 2))
    assert (norms[1:] >= norms[:-1] - 1e-4).all(), "gain rises with frequency"


def test_the_script_writes_a_checkpoint_that_has_learned_and_repeats_itself_closely(tmp_path):
    """Not to the bit: the libraries under torch round differently from run to run."""
    for name in ("a", "b"):
        pretrain.pretrain(tmp_path / name, clips=4, vision_steps=2, caption_steps=2)
    a, b = (load_policy(str(tmp_path / name)).state_dict() for name in ("a", "b"))
    start = pretrain.make_policy(pretrain.make_tokenizer(), 0).state_dict()
    apart = sum((a[key].float() - b[key].float()).abs().sum() for key in a)
    moved = sum((a[key].float() - start[key].float()).abs().sum() for key in a)
    assert moved > 0 and apart < 0.2 * moved
