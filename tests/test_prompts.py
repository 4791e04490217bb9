"""The prompt's wording, letter by letter where the released code fixes it."""

import pytest

from data.prompts import PROMPTS
from data.recipe import Recipe


def test_training_wording_has_newlines_and_a_space_before_the_instruction():
    text = PROMPTS["released-train"].user_text(["<A>", "<B>"])
    assert text.startswith("Now you will receive a video:\nFrame1:<A>\nFrame2:<B>\nYou are doing the video quality")
    assert "5 representing excellent quality. First output the thinking process in <think> </think> tags and" in text
    assert text.endswith("then output the final answer in <answer> </answer> tags.")


def test_test_wording_has_no_newline_and_a_space_behind_the_frame_number():
    text = PROMPTS["released-test"].user_text(["<A>", "<B>"])
    assert text.startswith("Now you will receive a video:Frame1: <A>Frame2: <B>You are doing")
    assert "\n" not in text and "quality.First output" in text


def test_motion_comes_behind_the_frames():
    train = PROMPTS["released-train"].user_text(["<A>", "<B>"], "<M>")
    assert train.startswith("Now you will receive a video:\nFrame1:<A>\nFrame2:<B>\nMotion Feature:<M>\nYou are doing")
    test = PROMPTS["released-test"].user_text(["<A>", "<B>"], "<M>")
    assert "Frame2: <B>Motion Feature: <M>You are doing" in test


def test_the_system_message_is_a_setting():
    assert Recipe(system="You judge.").words.system == "You judge." and Recipe(system="").words.system == ""
    assert Recipe().words == PROMPTS["released-test"] and Recipe(system="x").words.closing == Recipe().words.closing


def test_recipe_is_saved_beside_a_model_and_read_back(tmp_path):
    recipe = Recipe(frames=5, sampler="dense", prompt="released-train", max_new_tokens=7)
    recipe.save(tmp_path)
    assert Recipe.of(str(tmp_path)) == recipe
    assert recipe.make_sampler()(100).shape == (5,)
    assert recipe.but(frames=6, prompt=None) == Recipe(6, "dense", "released-train", 7)
    assert Recipe.of(str(tmp_path / "elsewhere")) == Recipe()


@pytest.mark.parametrize(
    "text",
    ["{", '{"frame": 3}', '{"sampler": "none"}', '{"prompt": "none"}', '{"frames": 0}', '{"temperature": 0}'],
)
def test_a_recipe_that_is_none_is_named(tmp_path, text):
    (tmp_path / "recipe.json").write_text(text)
    with pytest.raises(ValueError, match=r"recipe\.json"):
        Recipe.of(str(tmp_path))
