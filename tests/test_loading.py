import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from models.loading import PRECISIONS, check_checkpoint, load_policy, save_policy
from tests.helpers import motion_policy, plain_model, some_ids, some_videos, tiny_policy


@pytest.fixture
def saved(tmp_path):
    """A checkpoint folder, for a test to look at or to break."""
    save_policy(tiny_policy(), tmp_path)
    return tmp_path


def test_what_is_saved_is_what_is_loaded(saved):
    policy, loaded = tiny_policy(), load_policy(str(saved))
    before, after = policy.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    videos, ids = some_videos(policy, 2), some_ids(policy, 2, 3, 5)
    assert torch.equal(some_videos(loaded, 2).prompt_ids, videos.prompt_ids)
    assert torch.equal(loaded(videos, ids).logprobs, policy(videos, ids).logprobs)
    assert (loaded.end_ids.tolist(), loaded.pad_id) == (policy.end_ids.tolist(), policy.pad_id)
    assert loaded.training and {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}


def test_end_tokens_survive_saving(tmp_path):
    save_policy(tiny_policy(ends=[2, 7, 9]), tmp_path)
    assert load_policy(str(tmp_path)).end_ids.tolist() == [2, 7, 9]


def test_plain_transformers_loads_what_is_saved(saved):
    policy = tiny_policy()
    model, report = AutoModelForImageTextToText.from_pretrained(saved, dtype="auto", output_loading_info=True)
    assert not any(report.values()) and model.dtype == torch.float32
    videos = some_videos(policy, 1)
    pixels = policy.image_processor(list(videos.frames[0]), return_tensors="pt").pixel_values
    inputs = {"input_ids": videos.prompt_ids, "pixel_values": pixels}
    torch.testing.assert_close(model.eval()(**inputs).logits, plain_model(policy, "sdpa").eval()(**inputs).logits)


def test_half_precision_weights_become_float32_unless_asked_otherwise(saved):
    weights = {name: value.bfloat16() for name, value in load_file(saved / "model.safetensors").items()}
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    assert PRECISIONS.keys() == {"float32", "mixed", "bfloat16"}
    for precision, (dtype, autocast) in PRECISIONS.items():
        policy = load_policy(str(saved), precision=precision)
        assert {parameter.dtype for parameter in policy.parameters()} == {dtype}
        assert policy.autocast_dtype == autocast


def edit_weights(folder, edit):
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def refused(folder, *fragments):
    with pytest.raises(ValueError, match="--model") as error:
        load_policy(str(folder))
    for fragment in (str(folder), *fragments):
        assert fragment in str(error.value)


def test_a_missing_key_is_refused(saved):
    name = next(name for name in load_file(saved / "model.safetensors") if name.endswith("mlp.up_proj.weight"))
    edit_weights(saved, lambda weights: weights.pop(name))
    refused(saved, "missing keys", name.split("layers")[-1])


def test_a_key_that_is_left_over_is_refused(saved):
    edit_weights(saved, lambda weights: weights.update({"motion_mlp.weight": torch.zeros(2)}))
    refused(saved, "unexpected keys", "motion_mlp.weight")


def test_a_key_of_another_shape_is_refused(saved):
    def cut(weights):
        name = next(name for name in weights if name.endswith("embed_tokens.weight"))
        weights[name] = weights[name][:-1].clone()

    edit_weights(saved, cut)
    refused(saved, "embed_tokens")


def test_another_architecture_is_refused(saved):
    (saved / "config.json").write_text('{"model_type": "qwen2"}')
    refused(saved, "model_type is 'qwen2'")


def test_the_released_layout_is_refused_with_the_command_that_converts_it(saved):
    (saved / "config.json").write_text('{"model_type": "internvl_chat"}')
    refused(saved, f"python -m models.checkpoints convert {saved} FOLDER")


@pytest.mark.parametrize("size", [0, 1000])
def test_weights_that_are_cut_short_are_refused(saved, size):
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    refused(saved)


def test_a_folder_without_a_model_is_refused_before_anything_is_loaded(saved, monkeypatch):
    monkeypatch.setattr("models.loading.PreTrainedConfig", None)
    refused(saved / "nowhere", "no such folder")
    (saved / "a-file").write_text("")
    refused(saved / "a-file", "no such folder")
    (saved / "empty").mkdir()
    refused(saved / "empty", "config.json")
    (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
    refused(saved, "safetensors")


@pytest.mark.parametrize("name", ["./nowhere", "~/nowhere", "runs/tiny-1/best"])
def test_what_looks_like_a_path_is_never_taken_for_a_hub_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"--model {name}: no such folder"):
        check_checkpoint(name)


def test_hub_names_are_left_to_transformers():
    check_checkpoint("OpenGVLab/InternVL3-1B-hf")


# ---- motion


def test_a_motion_token_survives_saving_and_can_be_left_out(tmp_path):
    policy = motion_policy()
    save_policy(policy, tmp_path)
    for motion in (None, "slowfast"):
        loaded = load_policy(str(tmp_path), motion=motion)
        before, after = policy.state_dict(), loaded.state_dict()
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
        assert loaded.has_motion and loaded.training and not loaded.model.model.slowfast.training
        assert not any(p.requires_grad for p in loaded.model.model.slowfast.parameters())
    plain = load_policy(str(tmp_path), motion="none")
    assert not plain.has_motion and plain.model.config.model_type == "internvl"
    assert plain.state_dict().keys() == {n for n in before if "slowfast" not in n and "motion_projector" not in n}
    videos, ids = some_videos(plain, 2), some_ids(plain, 2, 3, 5)
    assert torch.equal(plain(videos, ids).logprobs, tiny_policy()(videos, ids).logprobs)


def test_the_settings_for_dense_clips_are_saved_with_the_model(tmp_path):
    save_policy(motion_policy(), tmp_path / "frames")
    save_policy(load_policy(str(tmp_path / "frames"), motion_clips=True), tmp_path / "clips")
    before, after = (load_policy(str(tmp_path / name)).model.model.slowfast.config for name in ("frames", "clips"))
    assert (before.slow_stride, before.temporal_repeat) == (2, 2)
    assert dataclasses.replace(before, slow_stride=4, temporal_repeat=1) == after


def test_wrong_motion_is_named(saved, tmp_path):
    for flags, says in [
        ({"motion": "slowfast"}, f"--motion slowfast: --model {saved} has no motion token"),
        ({"motion": "none", "slowfast": "x"}, "--motion none: goes without --slowfast"),
        ({"motion_clips": True}, f"--motion-clips: --model {saved} has no motion token"),
        ({"slowfast": str(tmp_path / "nowhere.pyth")}, "--slowfast .*nowhere.pyth: no such file: download https://"),
    ]:
        with pytest.raises(ValueError, match=says):
            load_policy(str(saved), **flags)
