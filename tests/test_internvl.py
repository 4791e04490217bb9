"""VQAThinker against transformers' InternVL, functional calls and, if at hand, the released network's numbers.

Legend: N videos, F frames, t visual tokens per frame, P prompt tokens, G answers per video, T answer tokens.
"""

import copy
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import InternVLConfig, InternVLForConditionalGeneration

import models
from models.internvl import VQAThinker, VQAThinkerConfig, load_vqathinker
from models.loading import ATTENTION
from models.shared_prefix import packed_positions
from models.slowfast import SlowFast, SlowFastConfig
from tests.parity import fill

ASSETS = os.environ.get("VQA_TEST_ASSETS")
needs_assets = pytest.mark.skipif(
    not ASSETS, reason="VQA_TEST_ASSETS names no folder with the released network's numbers"
)

IMAGE = 40
MOTION = {"slow_width": 4, "fast_width": 1, "depths": [1], "pool_frames": [2, 5], "pool_side": 2, "temporal_repeat": 1}
OTHER_MOTION = {"slow_width": 3, "fast_width": 2, "depths": [1, 2], "slow_stride": 4, "pool_frames": [6, 20]}
N = 2


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def settings(side=56, hidden=24, layers=2):
    return {
        "vision_config": {
            "hidden_size": 16,
            "num_hidden_layers": layers,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "image_size": [side, side],
            "patch_size": [14, 14],
            "layer_scale_init_value": 1.0,
        },
        "text_config": {
            "model_type": "qwen2",
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 40,
            "vocab_size": 50,
            "tie_word_embeddings": False,
        },
        "image_token_id": IMAGE,
        "tie_word_embeddings": False,
    }


def randomise(model):
    """Weights large enough for every token to depend visibly on all that it attends to."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.2)
            elif name.endswith("bias") or "position" in name:
                parameter.normal_(std=0.1)
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm3d):
                layer.running_var.uniform_(0.7, 1.3)
    return model.eval()


def network(motion=MOTION, seed=0, **sizes):
    torch.manual_seed(seed)
    return randomise(VQAThinker(VQAThinkerConfig(motion=motion, **settings(**sizes))))


def random_slowfast(motion=MOTION, seed=1):
    torch.manual_seed(seed)
    return SlowFast(SlowFastConfig(**motion))


def plain(model):
    """transformers' own class with the weights that it knows."""
    fields = {name: value for name, value in model.config.to_dict().items() if name not in ("motion", "model_type")}
    native = InternVLForConditionalGeneration(InternVLConfig(**fields)).eval()
    report = native.load_state_dict(model.state_dict(), strict=False)
    assert not report.missing_keys
    assert {key.split(".")[1] for key in report.unexpected_keys} <= {"slowfast", "motion_projector"}
    return native


def pixels(N=N, F=6, side=56, seed=0):
    return torch.randn(N, F, 3, side, side, generator=generator(seed))


def prompts(slots, seed=0):
    """(N, P) ids, each row with as many image slots, in places of its own before some text."""
    total = 12 + max(slots)
    ids = torch.randint(IMAGE, (len(slots), total), generator=generator(seed))
    for row, count in zip(ids, slots):
        row[torch.randperm(total - 3, generator=generator(seed + count + int(row[0])))[:count]] = IMAGE
    return ids


def seen_by_decoder(model, *args):
    """What the decoder takes in, (N, P, hidden)."""
    seen = {}
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    model(*args)
    hook.remove()
    return seen["inputs_embeds"]


def motion_token(model, frames):
    """(hidden,) of one video's frames (F, 3, H, W), by functional calls."""
    norm, first, _, last = model.model.motion_projector
    feature = model.model.slowfast(frames[None])
    hidden = F.linear(F.layer_norm(feature, feature.shape[1:], norm.weight, norm.bias), first.weight, first.bias)
    return F.linear(F.gelu(hidden), last.weight, last.bias)[0]


# ---- the forward pass


@pytest.mark.parametrize(
    ("sizes", "motion", "frames", "tokens"),
    [({}, MOTION, 6, 4), ({"side": 112, "hidden": 32, "layers": 1}, OTHER_MOTION, 4, 16)],
)
def test_each_slot_holds_the_token_that_belongs_there(sizes, motion, frames, tokens):
    model = network(motion, **sizes)
    native, videos = plain(model), pixels(F=frames, side=sizes.get("side", 56))
    ids = prompts([frames * tokens + 1] * N)
    embeddings = seen_by_decoder(model, ids, videos.flatten(0, 1))
    expected = native.get_input_embeddings()(ids)
    for n in range(N):
        slots = (ids[n] == IMAGE).nonzero()[:, 0]
        features = native.get_image_features(videos[n], return_dict=True).pooler_output
        assert features.shape[:2] == (frames, tokens)
        expected[n, slots[:-1]] = features.flatten(0, 1)
        expected[n, slots[-1]] = motion_token(model, videos[n])
    torch.testing.assert_close(embeddings, expected, rtol=1e-5, atol=1e-5)
    logits = model(ids, videos.flatten(0, 1)).logits
    torch.testing.assert_close(logits, native(inputs_embeds=expected).logits, rtol=1e-4, atol=1e-4)
    visual = model.model.visual_tokens(videos)
    assert visual.shape == (N, frames * tokens + 1, model.config.text_config.hidden_size)
    assert torch.equal(visual.flatten(0, 1), embeddings[ids == IMAGE])


def test_a_video_knows_only_itself_and_its_order():
    model, videos = network(), pixels()
    visual = model.model.visual_tokens(videos)
    torch.testing.assert_close(visual[1:], model.model.visual_tokens(videos[1:]), rtol=1e-5, atol=1e-5)
    assert (visual[0, -1] - visual[1, -1]).abs().max() > 1e-3
    backwards = model.model.visual_tokens(videos.flip(1))
    frames, order = visual[:, :-1].unflatten(1, (6, 4)), backwards[:, :-1].unflatten(1, (6, 4))
    torch.testing.assert_close(order, frames.flip(1), rtol=1e-5, atol=1e-5)
    assert (backwards[:, -1] - visual[:, -1]).abs().max() > 1e-3


def test_without_motion_it_is_internvl_bit_for_bit():
    model = network(motion=None)
    native, videos, ids = plain(model), pixels(F=3).flatten(0, 1), prompts([12] * N)
    assert model.state_dict().keys() == native.state_dict().keys()
    out, expected = (network(ids, videos, torch.ones_like(ids), labels=ids) for network in (model, native))
    assert torch.equal(out.logits, expected.logits) and torch.equal(out.loss, expected.loss)
    assert torch.equal(
        model(ids, videos, vision_feature_layer=1).logits, native(ids, videos, vision_feature_layer=1).logits
    )
    assert model.model.visual_tokens(videos.unflatten(0, (N, 3))).shape == (N, 12, 24)


@pytest.mark.parametrize("motion", [MOTION, None])
@pytest.mark.parametrize("wrong", [(-1, -1), (1, 1), (1, -1), (0, 1), (-24, -24)])
def test_a_row_with_other_slots_than_visual_tokens_is_refused(motion, wrong):
    model, right = network(motion), 25 if motion else 24
    slots = [max(0, right + difference) for difference in wrong]
    with pytest.raises(
        ValueError, match=rf"rows with \[{slots[0]}, {slots[1]}\] image slots for {right} visual tokens"
    ):
        model(prompts(slots), pixels().flatten(0, 1))


@pytest.mark.parametrize("motion", [MOTION, None])
def test_frames_that_do_not_make_videos_are_refused(motion):
    with pytest.raises(ValueError, match="11 frames for 2 rows"):
        network(motion)(prompts([25, 25]), pixels().flatten(0, 1)[1:])


def test_pixels_without_ids_are_refused():
    with pytest.raises(ValueError, match="input_ids"):
        network()(inputs_embeds=torch.zeros(N, 40, 24), pixel_values=pixels().flatten(0, 1))


def test_generate_never_leaves_motion_out():
    ids = prompts([25] * N)
    with pytest.raises(ValueError, match=r"\[25, 25\] image slots for 24 visual tokens"):
        network().generate(input_ids=ids, pixel_values=pixels().flatten(0, 1), max_new_tokens=1)
    model, ids, videos = network(motion=None), prompts([24] * N), pixels().flatten(0, 1)
    written = model.generate(input_ids=ids, pixel_values=videos, max_new_tokens=1, do_sample=False)
    assert torch.equal(written[:, -1], model(ids, videos).logits[:, -1].argmax(-1))


def test_another_image_size_interpolates_the_position_embeddings():
    """As the released test recipe: 560 pixels for a network of 448."""
    model, large = network(), network(side=84)
    weights = model.state_dict()
    name = "model.vision_tower.embeddings.position_embeddings"
    grid = weights[name][:, 1:].reshape(1, 4, 4, 16).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(6, 6), mode="bicubic", align_corners=False)
    weights[name] = torch.cat([weights[name][:, :1], grid.flatten(2).mT], dim=1)
    large.load_state_dict(weights)
    visual = model.model.visual_tokens(pixels(side=84))
    assert visual.shape == (N, 6 * 9 + 1, 24)
    torch.testing.assert_close(visual, large.model.visual_tokens(pixels(side=84)), rtol=1e-5, atol=1e-5)


def test_slowfast_keeps_its_precision_under_autocast():
    model, features = network(), []
    model.model.slowfast.register_forward_hook(lambda module, args, out: features.append(out))
    model.model.visual_tokens(pixels())
    with torch.autocast("cpu", torch.bfloat16):
        visual = model.model.visual_tokens(pixels())
    assert visual.dtype == torch.bfloat16 and features[1].dtype == torch.float32
    assert torch.equal(*features)


def test_slowfast_is_loaded_as_float32(tmp_path):
    network().save_pretrained(tmp_path)
    loaded = VQAThinker.from_pretrained(tmp_path, dtype=torch.bfloat16)
    dtypes = {(name.startswith("model.slowfast."), value.dtype) for name, value in loaded.named_parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}
    watched = {value.dtype for value in loaded.model.slowfast.buffers()}
    assert watched == {torch.float32, torch.int64}  # BatchNorm's statistics, and its count


def test_half_precision():
    model = network()
    exact, half = model.model.visual_tokens(pixels()), model.bfloat16().model.visual_tokens(pixels())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), exact, rtol=0.1, atol=0.1)


def test_shared_prefix_attention():
    """Answers behind one prompt have the logits that they have behind prompts of their own."""
    G, T, model = 3, 5, network()
    packed = VQAThinker._from_config(copy.deepcopy(model.config), attn_implementation=ATTENTION)
    packed.load_state_dict(model.state_dict())
    ids, videos = prompts([25] * N), pixels()
    answers = torch.randint(IMAGE, (N, G, T), generator=generator(3))
    rows = torch.cat([ids.repeat_interleave(G, 0), answers.flatten(0, 1)], dim=1)
    expected = model(rows, videos.repeat_interleave(G, 0).flatten(0, 1)).logits[:, -T:].unflatten(0, (N, G))
    P, table = ids.shape[1], packed.get_input_embeddings()
    prompt, visual = table(ids), packed.model.visual_tokens(videos)
    prompt = prompt.masked_scatter(packed.model.get_placeholder_mask(ids, prompt, visual), visual)
    hidden = packed.model.language_model(
        inputs_embeds=torch.cat([prompt, table(answers).flatten(1, 2)], dim=1),
        attention_mask={"full_attention": None},
        position_ids=packed_positions(P, G, T),
        packed=(G, T),
    ).last_hidden_state
    logits = packed.lm_head(hidden[:, P:]).unflatten(1, (G, T))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


# ---- training


def test_the_projector_learns_and_slowfast_does_not(tmp_path):
    network().save_pretrained(tmp_path)
    model = load_vqathinker(tmp_path)
    assert not any(module.training for module in model.modules())
    model.train()
    assert model.model.training and model.model.vision_tower.training
    assert not any(module.training for module in model.model.slowfast.modules())
    before = {name: value.clone() for name, value in model.model.slowfast.state_dict().items()}
    ids = prompts([25] * N)
    model(ids, pixels().flatten(0, 1), labels=ids).loss.backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without == {name for name, _ in model.named_parameters() if name.startswith("model.slowfast.")}
    assert without == {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert all(parameter.grad.any() for parameter in model.model.motion_projector.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.model.slowfast.state_dict().items())


# ---- a new motion token


def save_plain(folder, seed=0):
    native = plain(network(seed=seed))
    native.save_pretrained(folder)
    return native


def added(folder, seed=0):
    slowfast = random_slowfast()
    torch.manual_seed(seed)
    with pytest.warns(UserWarning, match=f"--model {folder}: the motion projector is new"):
        return load_vqathinker(folder, slowfast)


def test_training_starts_at_the_base_model(tmp_path):
    """Which reads the image token's own embedding in the motion slot."""
    native = save_plain(tmp_path)
    model, ids, videos = added(tmp_path), prompts([25] * N), pixels()
    embeddings = native.get_input_embeddings()(ids)
    for n in range(N):
        slots = (ids[n] == IMAGE).nonzero()[:-1, 0]
        embeddings[n, slots] = native.get_image_features(videos[n], return_dict=True).pooler_output.flatten(0, 1)
    logits, expected = model(ids, videos.flatten(0, 1)).logits, native(inputs_embeds=embeddings).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.1
    other = model.model.visual_tokens(pixels(seed=1))
    assert torch.equal(other[:, -1], model.get_input_embeddings().weight[IMAGE].expand(N, -1))


def test_a_new_projector_learns_from_the_first_step(tmp_path):
    save_plain(tmp_path)
    model, ids = added(tmp_path).train(), prompts([25] * N)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        model(ids, pixels().flatten(0, 1), labels=ids).loss.backward()
        optimizer.step()
    assert all(parameter.grad.any() for parameter in model.model.motion_projector.parameters())
    tokens = model.model.visual_tokens(pixels())[:, -1]
    assert (tokens[0] - tokens[1]).abs().max() > 1e-4


def test_a_new_projector_is_the_same_whatever_the_seed(tmp_path):
    save_plain(tmp_path)
    one, other = (added(tmp_path, seed=seed).state_dict() for seed in (1, 2))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    first = one["model.motion_projector.1.weight"]
    assert first.std() * first.shape[1] ** 0.5 == pytest.approx(1, abs=0.1)


def test_slowfast_has_the_weights_it_was_given(tmp_path):
    save_plain(tmp_path)
    model, slowfast = added(tmp_path), random_slowfast()
    assert asdict(slowfast.config) == model.config.motion
    assert all(torch.equal(value, model.model.slowfast.state_dict()[n]) for n, value in slowfast.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.model.slowfast.parameters())


def test_a_plain_checkpoint_stays_plain(tmp_path):
    native, ids, videos = save_plain(tmp_path), prompts([24] * N), pixels().flatten(0, 1)
    model = load_vqathinker(tmp_path)
    assert model.config.motion is None and model.state_dict().keys() == native.state_dict().keys()
    assert torch.equal(model(ids, videos).logits, native(ids, videos).logits)


# ---- checkpoints


@pytest.mark.parametrize("motion", [MOTION, None])
@pytest.mark.parametrize("load", [VQAThinker.from_pretrained, load_vqathinker])
def test_saving_and_loading_changes_nothing(tmp_path, motion, load):
    model = network(motion)
    model.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    again = load(tmp_path)
    assert again.config.motion == model.config.motion and type(again.config) is VQAThinkerConfig
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "vqathinker"
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    ids, videos = prompts([25 if motion else 24] * N), pixels().flatten(0, 1)
    assert torch.equal(again(ids, videos).logits, model(ids, videos).logits)


def test_names_of_parameters():
    names = network().state_dict()
    assert {n.split(".", 2)[2] for n in names if n.startswith("model.motion_projector.")} == {
        f"{layer}.{kind}" for layer in (0, 1, 3) for kind in ("weight", "bias")
    }
    assert {n for n in names if n.startswith("model.slowfast.")} == {
        f"model.slowfast.{n}" for n in random_slowfast().state_dict()
    }


@pytest.mark.parametrize("prefix", ["", "model."])
def test_old_and_new_names_of_internvl_are_read(tmp_path, prefix):
    """transformers still writes `vision_tower.*`; in memory it has `model.vision_tower.*`."""
    model = network()
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    assert "vision_tower.embeddings.cls_token" in load_file(file)
    if prefix:
        save_file(model.state_dict(), file, metadata={"format": "pt"})
    again = load_vqathinker(tmp_path)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_plain_transformers_reads_the_internvl_part(tmp_path):
    model, text = network(), torch.randint(IMAGE, (N, 9), generator=generator())
    model.save_pretrained(tmp_path)
    native, report = InternVLForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["mismatched_keys"]
    ours = ("model.slowfast.", "model.motion_projector.")
    assert report["unexpected_keys"] == {name for name in model.state_dict() if name.startswith(ours)}
    assert torch.equal(native(text).logits, model(text).logits)


@pytest.mark.parametrize(
    "name",
    ["model.motion_projector.3.bias", "model.slowfast.feature_extraction.0.multipathway_blocks.1.norm.running_var",
     "vision_tower.embeddings.cls_token"],
)  # fmt: skip
@pytest.mark.parametrize("edit", ["missing", "unexpected", "mismatched"])
def test_keys_that_do_not_match_are_refused_and_listed(tmp_path, name, edit):
    network().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    if edit == "missing":
        del weights[name]
    elif edit == "unexpected":
        name = f"{name}s"
        weights[name] = torch.zeros(1)
    else:
        weights[name] = torch.zeros(7)
    save_file(weights, file, metadata={"format": "pt"})
    shapes = r" \(7,\), not \(\d+,.*\)" if edit == "mismatched" else ""
    with pytest.raises(ValueError, match=rf"^--model {tmp_path}: 1 {edit} keys: \['[a-z.]*{name}{shapes}'\]$"):
        load_vqathinker(tmp_path)


def test_another_architecture_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(ValueError, match=r"--model .* model_type is 'qwen2'"):
        load_vqathinker(tmp_path)


def test_what_slowfast_is_for(tmp_path):
    network().save_pretrained(tmp_path / "with")
    with pytest.raises(ValueError, match=r"--slowfast: --model .* has its own"):
        load_vqathinker(tmp_path / "with", slowfast=random_slowfast())
    save_plain(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"--slowfast: --model .* has no motion token"):
        load_vqathinker(tmp_path / "plain", motion={"slow_stride": 4})


def test_motion_settings_can_be_replaced(tmp_path):
    model = network()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="slow_stride 3"):
        model.model.visual_tokens(pixels(F=12))
    again = load_vqathinker(tmp_path, motion={"slow_stride": 4})
    assert again.config.motion == {**model.config.motion, "slow_stride": 4}
    assert again.model.visual_tokens(pixels(F=12)).shape == (N, 12 * 4 + 1, 24)


def test_wrong_motion_settings_are_refused():
    with pytest.raises(ValueError, match="slow_stride"):
        VQAThinkerConfig(motion={"slow_stride": 0})


def test_motion_settings_are_saved_in_full():
    assert VQAThinkerConfig(motion={}).motion == asdict(SlowFastConfig())


# ---- the room


def test_the_room_is_imported_without_torch():
    probe = "import sys, models; assert not {'torch', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", probe], check=True)
    assert models.VQAThinker is VQAThinker and models.VQAThinkerConfig is VQAThinkerConfig
    with pytest.raises(ImportError):
        from models import Nothing  # noqa: F401


# ---- the released network


VISION = {
    "embeddings.class_embedding": "embeddings.cls_token",
    "embeddings.position_embedding": "embeddings.position_embeddings",
    "embeddings.patch_embedding.": "embeddings.patch_embeddings.projection.",
    "encoder.layers.": "encoder.layer.",
    ".attn.proj.": ".attention.projection_layer.",
    ".norm1.": ".layernorm_before.",
    ".norm2.": ".layernorm_after.",
    ".ls1": ".lambda_1",
    ".ls2": ".lambda_2",
}
OTHERS = {
    "mlp1.0.": "model.multi_modal_projector.layer_norm.",
    "mlp1.1.": "model.multi_modal_projector.linear_1.",
    "mlp1.3.": "model.multi_modal_projector.linear_2.",
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
    "motion_mlp.": "model.motion_projector.",
    "slowfast_model.": "model.slowfast.",
}


def native_names(released):
    """The released checkpoint's weights under our names; queries, keys and values are one matrix there."""
    weights = {}
    for name, value in released.items():
        if name.startswith("vision_model."):
            name = name.replace("vision_model.", "model.vision_tower.")
            for old, new in VISION.items():
                name = name.replace(old, new)
            if ".attn.qkv." in name:
                parts = {
                    name.replace("attn.qkv", f"attention.{x}_proj"): part for x, part in zip("qkv", value.chunk(3))
                }
                weights |= parts
                continue
        else:
            old = next(old for old in OTHERS if name.startswith(old))
            name = OTHERS[old] + name.removeprefix(old)
        weights[name] = value
    return weights


def pick(config, *names):
    return {name: config[name] for name in names}


@needs_assets
@torch.no_grad()
def test_logits_of_the_released_network():
    recipe = json.loads((Path(ASSETS) / "parity" / "train_recipe.json").read_text())
    vision, text = recipe["config"]["vision_config"], recipe["config"]["llm_config"]
    shared = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act")
    config = VQAThinkerConfig(
        vision_config=pick(vision, *shared, "image_size", "patch_size", "layer_norm_eps", "norm_type")
        | {"attention_bias": vision["qkv_bias"], "use_qk_norm": vision["qk_normalization"]},
        text_config=pick(text, *shared, "num_key_value_heads", "vocab_size", "rms_norm_eps", "max_position_embeddings")
        | {"model_type": "qwen2", "rope_parameters": {"rope_type": "default", "rope_theta": text["rope_theta"]}}
        | pick(text, "tie_word_embeddings"),
        downsample_ratio=recipe["config"]["downsample_ratio"],
        tie_word_embeddings=text["tie_word_embeddings"],
        image_token_id=300,
        motion={},
    )
    model = VQAThinker(config).eval()
    model.load_state_dict(native_names({name: fill(name, shape) for name, shape in recipe["keys"].items()}))
    frames, side = recipe["frames"], recipe["size"]
    coarse = torch.randn(2 * frames, 3, side // 4, side // 4, generator=generator(7))
    videos = F.interpolate(coarse, scale_factor=4, mode="nearest")
    with np.load(Path(ASSETS) / "parity" / "train_recipe.npz") as arrays:
        expected = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    seen = {}
    for name in ("slowfast", "multi_modal_projector"):
        module = model.model.get_submodule(name)
        module.register_forward_hook(lambda module, args, out, name=name: seen.update({name: out}))
    logits = model(expected["ids"].long(), videos).logits
    frames, motion = seen["multi_modal_projector"], expected["motion"]
    torch.testing.assert_close(frames[0, :32], expected["vit0"], rtol=0, atol=1e-5)
    torch.testing.assert_close(frames[-1, :32], expected["vit_last"], rtol=0, atol=1e-5)
    torch.testing.assert_close(seen["slowfast"], motion, rtol=1e-4, atol=1e-4 * float(motion.std()))
    torch.testing.assert_close(logits[:, :8], expected["logits_head"], rtol=0, atol=1e-4)
    torch.testing.assert_close(logits[:, -12:], expected["logits_tail"], rtol=0, atol=1e-4)
