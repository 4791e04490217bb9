"""Conversion against released checkpoints made here, key by key, and against a plain forward pass of their weights.

Legend: N videos, F frames, P prompt tokens, t visual tokens per frame.
"""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    InternVLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from models import checkpoints
from models.checkpoints import convert, main
from models.internvl import VQAThinker, VQAThinkerConfig
from models.loading import save_policy
from models.released import config_from_released, layout
from models.slowfast import SlowFast, SlowFastConfig
from tests.helpers import generator, tiny_policy, tokenizer
from tests.parity import fill

ASSETS = os.environ.get("VQA_TEST_ASSETS")
needs_assets = pytest.mark.skipif(
    not ASSETS, reason="VQA_TEST_ASSETS names no folder with the released network's numbers"
)

MOTION = SlowFastConfig(slow_width=4, fast_width=1, depths=(1, 2), pool_side=1)
VISION = {
    "architectures": ["InternVisionModel"],
    "auto_map": {"AutoModel": "modeling_intern_vit.InternVisionModel"},
    "model_type": "intern_vit_6b",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "image_size": 36,
    "patch_size": 6,
    "qkv_bias": True,
    "qk_normalization": False,
    "norm_type": "layer_norm",
    "layer_norm_eps": 1e-6,
    "drop_path_rate": 0.1,
    "initializer_factor": 0.1,
}
LLM = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 310,
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,  # less than the prompts: beyond it the rotary scaling shows
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"},
    "bos_token_id": 0,
    "eos_token_id": 0,
    "sliding_window": None,
    "use_sliding_window": False,
    "use_cache": False,
    "torch_dtype": "bfloat16",
}
CONFIG = {
    "architectures": ["InternVLChatModel"],
    "auto_map": {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"},
    "model_type": "internvl_chat",
    "vision_config": VISION,
    "llm_config": LLM,
    "downsample_ratio": 0.5,
    "force_image_size": 36,
    "ps_version": "v2",
    "select_layer": -1,
    "template": "internvl2_5",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
PLAIN_VIT = {"qkv_bias": False, "qk_normalization": True, "norm_type": "rms_norm"}  # as InternViT-6B


def released_shapes(config=CONFIG, motion=MOTION):
    """Every key of a released checkpoint, as its modelling code names them."""
    vision, llm = config["vision_config"], config["llm_config"]
    d, hidden, width = vision["hidden_size"], vision["intermediate_size"], llm["hidden_size"]
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    shapes = {
        "vision_model.embeddings.class_embedding": (1, 1, d),
        "vision_model.embeddings.position_embedding": (1, patches + 1, d),
        "vision_model.embeddings.patch_embedding.weight": (d, 3, vision["patch_size"], vision["patch_size"]),
        "vision_model.embeddings.patch_embedding.bias": (d,),
        "language_model.model.embed_tokens.weight": (llm["vocab_size"], width),
        "language_model.model.norm.weight": (width,),
        "language_model.lm_head.weight": (llm["vocab_size"], width),
        **{f"mlp1.0.{name}": (4 * d,) for name in ("weight", "bias")},
        **{"mlp1.1.weight": (width, 4 * d), "mlp1.1.bias": (width,)},
        **{"mlp1.3.weight": (width, width), "mlp1.3.bias": (width,)},
    }
    for k in range(vision["num_hidden_layers"]):
        layer = f"vision_model.encoder.layers.{k}."
        shapes |= {layer + "ls1": (d,), layer + "ls2": (d,), layer + "attn.qkv.weight": (3 * d, d)}
        shapes |= {layer + "attn.proj.weight": (d, d), layer + "attn.proj.bias": (d,)}
        shapes |= {layer + "mlp.fc1.weight": (hidden, d), layer + "mlp.fc1.bias": (hidden,)}
        shapes |= {layer + "mlp.fc2.weight": (d, hidden), layer + "mlp.fc2.bias": (d,)}
        shapes |= {layer + f"norm{i}.weight": (d,) for i in (1, 2)}
        if vision["norm_type"] == "layer_norm":
            shapes |= {layer + f"norm{i}.bias": (d,) for i in (1, 2)}
        if vision["qkv_bias"]:
            shapes[layer + "attn.qkv.bias"] = (3 * d,)
        if vision["qk_normalization"]:
            shapes |= {layer + f"attn.{x}_norm.weight": (d,) for x in "qk"}
    narrow = width // llm["num_attention_heads"] * llm["num_key_value_heads"]
    for k in range(llm["num_hidden_layers"]):
        layer = f"language_model.model.layers.{k}."
        for name, size in (("q", width), ("k", narrow), ("v", narrow)):
            shapes |= {layer + f"self_attn.{name}_proj.weight": (size, width)}
            shapes |= {layer + f"self_attn.{name}_proj.bias": (size,)}
        shapes[layer + "self_attn.o_proj.weight"] = (width, width)
        shapes |= {layer + f"mlp.{name}_proj.weight": (llm["intermediate_size"], width) for name in ("gate", "up")}
        shapes[layer + "mlp.down_proj.weight"] = (width, llm["intermediate_size"])
        shapes |= {layer + f"{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
    if motion is not None:
        c = motion.channels
        shapes |= {"motion_mlp.0.weight": (c,), "motion_mlp.0.bias": (c,)}
        shapes |= {"motion_mlp.1.weight": (width, c), "motion_mlp.1.bias": (width,)}
        shapes |= {"motion_mlp.3.weight": (width, width), "motion_mlp.3.bias": (width,)}
        shapes |= {f"slowfast_model.{name}": tuple(v.shape) for name, v in SlowFast(motion).state_dict().items()}
    return shapes


def write_released(folder, config=CONFIG, weights=None, shard_bytes=8000):
    """A released folder of several shards, with its weights as saved."""
    folder.mkdir()
    weights = weights or {name: fill(name, shape) for name, shape in released_shapes(config).items()}
    shards, size = [{}], 0
    for name, value in weights.items():
        if size + value.nbytes > shard_bytes and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = value
        size += value.nbytes
    files = [f"model-{k + 1:05d}-of-{len(shards):05d}.safetensors" for k in range(len(shards))]
    for file, shard in zip(files, shards):
        save_file(shard, folder / file, metadata={"format": "pt"})
    index = {"weight_map": {name: file for file, shard in zip(files, shards) for name in shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer().save_pretrained(folder)
    return weights


def read_weights(folder):
    found = [load_file(file) for file in sorted(folder.glob("*.safetensors"))]
    weights = {name: value for part in found for name, value in part.items()}
    assert len(weights) == sum(map(len, found))
    return weights


def read_config(folder, name="config.json"):
    return json.loads((folder / name).read_text())


def assert_identical(weights, others):
    assert weights.keys() == others.keys()
    for name, value in weights.items():
        assert value.dtype == others[name].dtype and value.shape == others[name].shape, name
        assert torch.equal(value.reshape(-1).view(torch.uint8), others[name].reshape(-1).view(torch.uint8)), name


def load(folder):
    """The network in float32, with not one key missing or left over."""
    model, report = VQAThinker.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values())
    return model.eval()


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(checkpoints, "SHARD_BYTES", 9000)


@pytest.fixture
def released(tmp_path):
    """A released folder, for a test to convert or to break."""
    write_released(tmp_path / "released")
    return tmp_path / "released"


# ---- a plain forward pass of the released weights


def vit_tokens(weights, vision, pixels):
    """(N, 3, H, W) -> (N, t, hidden of the decoder), written after InternViT with its fused q, k and v."""
    heads, eps = vision["num_attention_heads"], vision["layer_norm_eps"]

    def norm(x, name):
        weight, bias = weights[f"{name}.weight"], weights.get(f"{name}.bias")
        if bias is None:
            return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight
        return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-5 if name == "mlp1.0" else eps)

    def linear(x, name):
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    patch = "vision_model.embeddings.patch_embedding"
    x = F.conv2d(pixels, weights[f"{patch}.weight"], weights[f"{patch}.bias"], vision["patch_size"])
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([weights["vision_model.embeddings.class_embedding"].expand(len(x), -1, -1), x], 1)
    x = x + weights["vision_model.embeddings.position_embedding"]
    for k in range(vision["num_hidden_layers"]):
        layer = f"vision_model.encoder.layers.{k}"
        q, k_, v = linear(norm(x, f"{layer}.norm1"), f"{layer}.attn.qkv").split(x.shape[-1], -1)
        if vision["qk_normalization"]:
            q, k_ = norm(q, f"{layer}.attn.q_norm"), norm(k_, f"{layer}.attn.k_norm")
        q, k_, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k_, v))
        seen = (q @ k_.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v
        x = x + linear(seen.transpose(1, 2).flatten(2), f"{layer}.attn.proj") * weights[f"{layer}.ls1"]
        inner = F.gelu(linear(norm(x, f"{layer}.norm2"), f"{layer}.mlp.fc1"))
        x = x + linear(inner, f"{layer}.mlp.fc2") * weights[f"{layer}.ls2"]
    side = vision["image_size"] // vision["patch_size"]
    x = x[:, 1:].unflatten(1, (side, side))
    x = torch.cat([x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)], -1).flatten(1, 2)
    return linear(F.gelu(linear(norm(x, "mlp1.0"), "mlp1.1")), "mlp1.3")


def released_logits(weights, config, ids, frames, image_token):
    """(N, P, vocabulary) logits of `ids` (N, P) and `frames` (N, F, 3, H, W), by the released network's parts."""
    weights = {name: value.float() if value.is_floating_point() else value for name, value in weights.items()}
    visual = vit_tokens(weights, config["vision_config"], frames.flatten(0, 1))
    visual = visual.reshape(len(ids), -1, visual.shape[-1])
    slowfast = {n.removeprefix("slowfast_model."): v for n, v in weights.items() if n.startswith("slowfast_model.")}
    if slowfast:
        network = SlowFast(MOTION)
        network.load_state_dict(slowfast)
        x = network(frames)
        x = F.layer_norm(x, x.shape[-1:], weights["motion_mlp.0.weight"], weights["motion_mlp.0.bias"])
        x = F.gelu(F.linear(x, weights["motion_mlp.1.weight"], weights["motion_mlp.1.bias"]))
        x = F.linear(x, weights["motion_mlp.3.weight"], weights["motion_mlp.3.bias"])
        visual = torch.cat([visual, x[:, None]], 1)
    decoder = Qwen2ForCausalLM(Qwen2Config(**config["llm_config"])).eval()
    own = {n.removeprefix("language_model."): v for n, v in weights.items() if n.startswith("language_model.")}
    decoder.load_state_dict(own)
    embeddings = decoder.get_input_embeddings()(ids)
    embeddings[ids == image_token] = visual.flatten(0, 1)
    return decoder(inputs_embeds=embeddings, use_cache=False).logits


@torch.no_grad()
@pytest.mark.parametrize("motion", [MOTION, None])
@pytest.mark.parametrize("vision", [{}, PLAIN_VIT])
def test_the_converted_network_is_the_released_one(tmp_path, motion, vision):
    config = CONFIG | {"vision_config": VISION | vision}
    weights = {
        name: value * 4 if value.dim() == 2 else value  # far from linear
        for name, value in ((name, fill(name, shape)) for name, shape in released_shapes(config, motion).items())
    }
    write_released(tmp_path / "released", config, weights)
    convert(tmp_path / "released", tmp_path / "ours", motion)
    model = load(tmp_path / "ours")
    image_token = tokenizer().convert_tokens_to_ids("<IMG_CONTEXT>")
    ids = torch.full((2, 6 * 9 + (motion is not None)), image_token)
    ids = torch.cat([torch.tensor([[7, 8], [9, 10]]), ids, torch.tensor([[11, 12], [13, 11]])], 1)
    frames = torch.randn(2, 6, 3, 36, 36, generator=generator(1))
    logits = model(input_ids=ids, pixel_values=frames.flatten(0, 1)).logits
    expected = released_logits(weights, config, ids, frames, image_token)
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_the_native_class_loads_all_but_the_motion_branch(released, tmp_path):
    convert(released, tmp_path / "ours", MOTION)
    _, report = InternVLForConditionalGeneration.from_pretrained(tmp_path / "ours", output_loading_info=True)
    left_over = {name for name in read_weights(tmp_path / "ours") if "slowfast" in name or "motion" in name}
    assert left_over and set(report.pop("unexpected_keys")) == left_over
    assert not any(report.values())


# ---- files


def test_our_folder(released, tmp_path):
    (released / "generation_config.json").write_text('{"eos_token_id": [0, 2], "temperature": 0.7}')
    (released / "modeling_internvl_chat.py").write_text("raise SystemExit")
    settings = read_config(released, "tokenizer_config.json")
    settings["auto_map"] = {"AutoTokenizer": [None, "tokenization.Evil"]}
    (released / "tokenizer_config.json").write_text(json.dumps(settings))
    convert(released, tmp_path / "ours", MOTION)
    config = VQAThinkerConfig.from_pretrained(tmp_path / "ours")
    assert config.motion == asdict(MOTION)
    assert config.image_token_id == tokenizer().convert_tokens_to_ids("<IMG_CONTEXT>")
    assert (config.image_seq_length, config.vision_feature_layer, config.tie_word_embeddings) == (9, -1, False)
    assert config.vision_config.layer_norm_eps == 1e-6 and config.vision_config.layer_scale_init_value == 0.1
    rope = {"rope_type": "dynamic", "rope_theta": 1000000.0, "factor": 2.0}
    assert rope.items() <= config.text_config.rope_parameters.items()
    images = AutoImageProcessor.from_pretrained(tmp_path / "ours")
    assert dict(images.size) == {"height": 36, "width": 36} and list(images.image_mean) == [0.485, 0.456, 0.406]
    words = AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert words.get_vocab() == tokenizer().get_vocab() and words.chat_template == tokenizer().chat_template
    assert read_config(tmp_path / "ours", "generation_config.json") == {"eos_token_id": [0, 2], "temperature": 0.7}
    assert read_config(tmp_path / "ours", "released_config.json") == CONFIG
    texts = [file.read_text() for file in (tmp_path / "ours").glob("*.json") if file.name != "released_config.json"]
    assert not any("auto_map" in text for text in texts)
    assert not list((tmp_path / "ours").glob("*.py"))


def test_what_the_released_code_adds_to_a_tokenizer_is_written_out(released, tmp_path):
    """It builds the chat itself and stops at <|im_end|>, whatever the files say."""
    (released / "chat_template.jinja").unlink()
    (released / "generation_config.json").write_text('{"eos_token_id": 0}')
    convert(released, tmp_path / "ours", MOTION)
    words = AutoTokenizer.from_pretrained(tmp_path / "ours")
    chat = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    text = words.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"
    ends = [0, words.convert_tokens_to_ids("<|im_end|>")]
    assert read_config(tmp_path / "ours", "generation_config.json") == {"eos_token_id": ends}


def test_shards_are_of_a_bounded_size_and_indexed(released, tmp_path):
    convert(released, tmp_path / "ours", MOTION)
    index = read_config(tmp_path / "ours", "model.safetensors.index.json")
    files = {file.name: load_file(file) for file in (tmp_path / "ours").glob("*.safetensors")}
    assert len(files) > 5 and not list((tmp_path / "ours").glob("*.partial"))
    assert index["weight_map"] == {name: file for file, weights in files.items() for name in weights}
    sizes = {file: sum(value.nbytes for value in weights.values()) for file, weights in files.items()}
    assert all(size <= 9000 or len(files[file]) == 1 for file, size in sizes.items())
    in_order = [sizes[file] for file in sorted(sizes)]
    assert all(one + other > 9000 for one, other in pairwise(in_order))  # as few as that
    assert index["metadata"] == {"total_size": sum(sizes.values())}


def test_a_small_checkpoint_is_one_file(released, tmp_path, monkeypatch):
    monkeypatch.undo()
    convert(released, tmp_path / "ours", MOTION)
    assert [file.name for file in (tmp_path / "ours").glob("model*")] == ["model.safetensors"]
    load(tmp_path / "ours")


@pytest.mark.parametrize(("recipe", "expected"), [(None, (3, 6)), ("train", (3, 6)), ("test", (4, 4))])
def test_motion_recipes(tmp_path, recipe, expected, capfd):
    config, motion = CONFIG, SlowFastConfig()
    weights = {
        name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in released_shapes(config, motion).items()
    }
    write_released(tmp_path / "released", config, weights, shard_bytes=10**9)
    flags = ["--motion-recipe", recipe] if recipe else []
    assert main(["convert", str(tmp_path / "released"), str(tmp_path / "ours"), *flags]) == 0
    assert capfd.readouterr() == ("", "")
    written = SlowFastConfig(**read_config(tmp_path / "ours")["motion"])
    assert (written.slow_stride, written.temporal_repeat) == expected


# ---- and back


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tied", ["no", "both kept", "one kept"])
def test_round_trip(tmp_path, dtype, tied):
    config = CONFIG | {"llm_config": LLM | {"tie_word_embeddings": tied != "no"}}
    weights = {name: fill(name, shape) for name, shape in released_shapes(config).items()}
    weights = {
        name: v.to(dtype) if v.is_floating_point() and "slowfast" not in name else v for name, v in weights.items()
    }
    if tied == "both kept":
        weights["language_model.lm_head.weight"] = weights["language_model.model.embed_tokens.weight"].clone()
    if tied == "one kept":
        del weights["language_model.lm_head.weight"]
    write_released(tmp_path / "released", config, weights)
    convert(tmp_path / "released", tmp_path / "ours", MOTION)
    assert read_config(tmp_path / "ours")["dtype"] == str(dtype).removeprefix("torch.")
    model = load(tmp_path / "ours")
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == (tied != "no")
    convert(tmp_path / "ours", tmp_path / "back")
    assert_identical(read_weights(tmp_path / "back"), weights)
    assert read_config(tmp_path / "back") == config
    assert AutoTokenizer.from_pretrained(tmp_path / "back", config=Qwen2Config()).get_vocab() == tokenizer().get_vocab()


def test_a_model_saved_by_transformers_goes_back(released, tmp_path):
    """Under whichever of its names, without the released config: one is made, with the same values."""
    convert(released, tmp_path / "ours", MOTION)
    model = load(tmp_path / "ours")
    model.save_pretrained(tmp_path / "trained")
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        (tmp_path / "trained" / name).write_bytes((tmp_path / "ours" / name).read_bytes())
    convert(tmp_path / "trained", tmp_path / "back")
    assert_identical(read_weights(tmp_path / "back"), read_weights(released))
    made = read_config(tmp_path / "back")
    for part, original in (("vision_config", VISION), ("llm_config", LLM), (None, CONFIG)):
        found = made[part] if part else made
        for name in original.keys() - {"auto_map", "drop_path_rate", "use_cache", "torch_dtype", "rope_scaling"}:
            assert (part is None and name.endswith("_config")) or found[name] == original[name], name
    assert made["torch_dtype"] == "float32" and made["llm_config"]["rope_scaling"]["factor"] == 2
    convert(tmp_path / "back", tmp_path / "again", MOTION)
    expected = read_config(tmp_path / "ours") | {"dtype": "float32"}
    assert read_config(tmp_path / "again") == expected


def test_frames_of_another_size_than_the_vits(tmp_path):
    """As a model that is trained at 560 pixels with the position embeddings of 448."""
    write_released(tmp_path / "released", CONFIG | {"force_image_size": 48})
    convert(tmp_path / "released", tmp_path / "ours", MOTION)
    config = read_config(tmp_path / "ours")
    assert (config["image_seq_length"], config["vision_config"]["image_size"]) == (16, [36, 36])
    assert read_config(tmp_path / "ours", "preprocessor_config.json")["size"] == {"height": 48, "width": 48}
    (tmp_path / "ours" / "released_config.json").unlink()
    convert(tmp_path / "ours", tmp_path / "back")
    config = read_config(tmp_path / "back")
    assert (config["force_image_size"], config["vision_config"]["image_size"]) == (48, 36)


def test_what_a_config_leaves_out_is_the_released_default(tmp_path):
    """Normalised queries and keys, and RMSNorm: the defaults of InternVisionConfig."""
    vision = {k: v for k, v in (VISION | PLAIN_VIT).items() if k not in PLAIN_VIT and k != "initializer_factor"}
    shapes = released_shapes(CONFIG | {"vision_config": VISION | PLAIN_VIT})
    weights = {name: fill(name, shape) for name, shape in shapes.items()}
    write_released(tmp_path / "released", CONFIG | {"vision_config": vision}, weights)
    convert(tmp_path / "released", tmp_path / "ours", MOTION)
    config = read_config(tmp_path / "ours")["vision_config"]
    assert (config["use_qk_norm"], config["norm_type"], config["layer_scale_init_value"]) == (True, "rms_norm", 0.1)


def test_a_plain_internvl_goes_back_and_forth(tmp_path):
    policy = tiny_policy()
    save_policy(policy, tmp_path / "ours")
    (tmp_path / "ours" / "recipe.json").write_text('{"frames": 8}')
    convert(tmp_path / "ours", tmp_path / "released")
    assert read_weights(tmp_path / "released").keys() == (
        released_shapes(read_config(tmp_path / "released"), None).keys() - {"language_model.lm_head.weight"}
    )
    convert(tmp_path / "released", tmp_path / "again")
    assert read_config(tmp_path / "again")["motion"] is None
    assert read_config(tmp_path / "again", "recipe.json") == {"frames": 8}
    assert_identical(dict(load(tmp_path / "again").state_dict()), dict(policy.model.state_dict()))


# ---- the released network


@needs_assets
def test_keys_and_shapes_of_the_released_network():
    recipe = json.loads((Path(ASSETS) / "parity" / "train_recipe.json").read_text())
    shapes = {name: tuple(shape) for name, shape in recipe["keys"].items()}
    assert released_shapes(recipe["config"], SlowFastConfig()) == shapes
    config = config_from_released(recipe["config"])
    assert {name: tuple(s) for name, s in layout(config, SlowFastConfig()).released.items()} == shapes


@needs_assets
@torch.no_grad()
def test_numbers_of_the_released_network(tmp_path, monkeypatch):
    monkeypatch.undo()
    recipe = json.loads((Path(ASSETS) / "parity" / "train_recipe.json").read_text())
    weights = {name: fill(name, shape) for name, shape in recipe["keys"].items()}
    write_released(tmp_path / "released", recipe["config"], weights, shard_bytes=30 * 10**6)
    convert(tmp_path / "released", tmp_path / "ours")
    model, side = load(tmp_path / "ours"), recipe["size"]
    coarse = torch.randn(2 * recipe["frames"], 3, side // 4, side // 4, generator=generator(7))
    frames = F.interpolate(coarse, scale_factor=4, mode="nearest").unflatten(0, (2, -1))
    visual = model.model.visual_tokens(frames)
    with np.load(Path(ASSETS) / "parity" / "train_recipe.npz") as arrays:
        expected = {name: torch.from_numpy(arrays[name]) for name in arrays}
    torch.testing.assert_close(visual[0, :32], expected["vit0"], rtol=1e-5, atol=1e-5)
    model.config.image_token_id = model.model.config.image_token_id = 300  # its tokenizer's
    logits = model(input_ids=expected["ids"].long(), pixel_values=frames.flatten(0, 1)).logits
    torch.testing.assert_close(logits[:, :8], expected["logits_head"], rtol=0, atol=1e-4)
    torch.testing.assert_close(logits[:, -12:], expected["logits_tail"], rtol=0, atol=1e-4)
    convert(tmp_path / "ours", tmp_path / "back")
    assert_identical(read_weights(tmp_path / "back"), weights)
    assert read_config(tmp_path / "back") == recipe["config"]


# ---- memory, and the end of a conversion


def run(code, *arguments):
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)


PEAK = """
import re, sys
from pathlib import Path
from models import checkpoints
checkpoints.SHARD_BYTES = 20 * 10**6
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
checkpoints.convert(sys.argv[1], sys.argv[2] + "-first")
before = peak()
checkpoints.convert(sys.argv[3], sys.argv[2])
checkpoints.convert(sys.argv[2], sys.argv[2] + "-back")
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="no /proc to read the peak memory from")
def test_memory_is_a_few_shards(tmp_path):
    """200 MB there and back by shards of 20 MB, after a tiny conversion has imported all that it takes."""
    save_policy(tiny_policy(), tmp_path / "tiny")
    llm = LLM | {"hidden_size": 512, "intermediate_size": 8000, "num_hidden_layers": 8}
    config = CONFIG | {"llm_config": llm}
    shapes = released_shapes(config, None)
    weights = {name: torch.full(shape, k, dtype=torch.bfloat16) for k, (name, shape) in enumerate(shapes.items())}
    assert sum(value.nbytes for value in weights.values()) > 200e6
    write_released(tmp_path / "released", config, weights, shard_bytes=20e6)
    done = run(PEAK, tmp_path / "tiny", tmp_path / "ours", tmp_path / "released")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 80e6
    assert_identical(read_weights(tmp_path / "ours-back"), weights)


KILLED = """
import os, signal, sys
from models import checkpoints
from models.slowfast import SlowFastConfig
checkpoints.SHARD_BYTES = 9000
save, calls = checkpoints.save_file, []
def save_file(*args, **kwargs):
    calls.append(1)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    save(*args, **kwargs)
checkpoints.save_file = save_file
checkpoints.convert(sys.argv[1], sys.argv[2], SlowFastConfig(4, 1, (1, 2), pool_side=1))
"""


def test_killed_half_way(released, tmp_path):
    done = run(KILLED, released, tmp_path / "ours")
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "ours").exists()
    assert len(list(tmp_path.rglob("*.partial/*.partial"))) == 2  # it was half-way
    convert(released, tmp_path / "ours", MOTION)
    load(tmp_path / "ours")
    assert {path.name for path in tmp_path.iterdir()} == {"released", "ours"}


def test_a_failure_half_way_leaves_nothing(released, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoints, "write_json", full)
    with pytest.raises(OSError):
        convert(released, tmp_path / "ours", MOTION)
    assert [path.name for path in tmp_path.iterdir()] == ["released"]


# ---- bad input


def refused(capfd, source, folder, *fragments, flags=()):
    """Exit code 2, one line that holds all fragments, and nothing written."""
    before = sorted(source.parent.rglob("*"))
    assert main(["convert", str(source), str(folder), *flags]) == 2
    out, error = capfd.readouterr()
    assert out == "" and error.startswith("checkpoints: error: ") and error.count("\n") == 1
    for fragment in fragments:
        assert fragment in error
    assert sorted(source.parent.rglob("*")) == before


def edit_config(folder, **changes):
    """`a__b=value` sets config["a"]["b"]."""
    config = read_config(folder)
    for name, value in changes.items():
        *parts, last = name.split("__")
        part = config
        for key in parts:
            part = part[key]
        part[last] = value
    (folder / "config.json").write_text(json.dumps(config))


def remove_config(folder):
    (folder / "config.json").unlink()


def pickles_only(folder):
    for file in folder.glob("model*"):
        file.unlink()
    torch.save({"a": torch.zeros(1)}, folder / "pytorch_model.bin")


def remove_weights(folder):
    for file in folder.glob("model*"):
        file.unlink()


def first_shard(folder):
    return sorted(folder.glob("*.safetensors"))[0]


def cut_shard(size):
    def cut(folder):
        file = first_shard(folder)
        file.write_bytes(file.read_bytes()[:size])

    return cut


def double_key(folder):
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    save_file(load_file(second) | {"mlp1.0.weight": torch.zeros(64)}, second)
    save_file(load_file(first) | {"mlp1.0.weight": torch.zeros(64)}, first)


def remove_tokens(*tokens):
    def remove(folder):
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            if (folder / name).is_file():
                text = (folder / name).read_text()
                for token in tokens:
                    text = text.replace(f'"{token}"', f'"{token[:-1]}_"')
                (folder / name).write_text(text)

    return remove


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


BAD = {
    "no config": (remove_config, "no config.json in this folder"),
    "config not JSON": (write("config.json", "{"), "config.json: not JSON"),
    "config a list": (write("config.json", "[]"), "config.json: not a JSON object"),
    "unknown type": (write("config.json", '{"model_type": "llava"}'), "config.json: model_type is 'llava'"),
    "no type": (write("config.json", "{}"), "config.json: model_type is None"),
    "no llm": (write("config.json", '{"model_type": "internvl_chat"}'), "config.json: 'llm_config' is missing"),
    "llama": (
        lambda f: edit_config(f, llm_config__model_type="llama"),
        "config.json: llm_config.model_type is 'llama'",
    ),
    "shuffle": (lambda f: edit_config(f, ps_version="v1"), "config.json: ps_version is 'v1'"),
    "no number": (lambda f: edit_config(f, llm_config__hidden_size="24"), "config.json: ", "hidden_size"),
    "heads": (lambda f: edit_config(f, vision_config__num_attention_heads=3), "config.json: ", "num_heads"),
    "image size": (lambda f: edit_config(f, force_image_size=40), "config.json: image size 40: not a multiple", "6"),
    "ViT's size": (lambda f: edit_config(f, vision_config__image_size=37), "config.json: image size 37: not a mult"),
    "odd patches": (lambda f: edit_config(f, force_image_size=42), "config.json: image size 42: 7 patches a side"),
    "pickle": (pickles_only, "pytorch_model.bin: a pickle"),
    "no weights": (remove_weights, "no weights (*.safetensors)"),
    "index not JSON": (write("model.safetensors.index.json", "nil"), "index.json: not JSON"),
    "index empty": (write("model.safetensors.index.json", "{}"), "index.json: no weight_map"),
    "no shard": (lambda f: first_shard(f).unlink(), "index.json: names model-00001-of-", "is not there"),
    "empty shard": (cut_shard(0), "model-00001-of-", "not whole safetensors"),
    "cut header": (cut_shard(20), "model-00001-of-", "not whole safetensors"),
    "cut data": (cut_shard(-1), "model-00001-of-", "not whole safetensors"),
    "doubled key": (double_key, "has mlp1.0.weight, and so has model-00001-of-"),
    "tokens": (remove_tokens("<img>", "<|im_end|>"), "its tokenizer has no <img>, <|im_end|>\n"),
    "other tokens": (remove_tokens("</img>", "<IMG_CONTEXT>"), "its tokenizer has no </img>, <IMG_CONTEXT>\n"),
    "tokenizer": (write("tokenizer.json", "{}"), "its tokenizer cannot be loaded: "),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(tmp_path, case, capfd):
    source = tmp_path / "released"
    weights = {name: fill(name, shape) for name, shape in released_shapes(CONFIG, None).items()}
    write_released(source, CONFIG, weights)
    spoil, *fragments = BAD[case]
    spoil(source)
    refused(capfd, source, tmp_path / "ours", str(source), *fragments)


def test_paths_that_cannot_be(released, tmp_path, capfd):
    refused(capfd, tmp_path / "nowhere", tmp_path / "ours", "nowhere: no such folder")
    (tmp_path / "ours").mkdir()
    refused(capfd, released, tmp_path / "ours", f"{tmp_path / 'ours'}: exists already")


def test_a_motion_recipe_needs_a_released_motion_branch(tmp_path, capfd):
    save_policy(tiny_policy(), tmp_path / "ours")
    flags = ["--motion-recipe", "test"]
    refused(capfd, tmp_path / "ours", tmp_path / "released", "has its own motion recipe", flags=flags)
    convert(tmp_path / "ours", tmp_path / "released")
    refused(capfd, tmp_path / "released", tmp_path / "again", "has no motion branch", flags=flags)


def test_all_that_does_not_match_is_listed(tmp_path):
    weights = {name: fill(name, shape) for name, shape in released_shapes(CONFIG, None).items()}
    missing = sorted(name for name in weights if ".layers.1." in name)
    weights = {name: value for name, value in weights.items() if name not in missing}
    weights["vision_model.more"] = torch.zeros(1)
    weights["mlp1.1.weight"] = weights["mlp1.1.weight"][1:].clone()
    write_released(tmp_path / "released", CONFIG, weights)
    with pytest.raises(ValueError) as error:
        convert(tmp_path / "released", tmp_path / "ours")
    assert len(missing) > 20 and str(error.value) == (
        f"{tmp_path / 'released'}: its weights are not those of its config.json: "
        f"{len(missing)} missing keys: {missing[:20]} and more; 1 unexpected keys: ['vision_model.more']; "
        "1 mismatched keys: ['mlp1.1.weight (23, 64), not (24, 64)']"
    )
    assert not (tmp_path / "ours").exists()


def test_only_a_tied_head_may_be_left_out(released, tmp_path):
    convert(released, tmp_path / "ours", MOTION)
    cases = [(released, "language_model.lm_head.weight", MOTION), (tmp_path / "ours", "lm_head.weight", None)]
    for folder, name, motion in cases:
        for file in folder.glob("*.safetensors"):
            weights = load_file(file)
            if weights.pop(name, None) is not None:
                save_file(weights, file)
        with pytest.raises(ValueError, match=rf"1 missing keys: \['{name}'\]$"):
            convert(folder, tmp_path / "new", motion)


def test_the_frames_of_our_preprocessor_must_fit_the_patches(released, tmp_path):
    convert(released, tmp_path / "ours", MOTION)
    (tmp_path / "ours" / "preprocessor_config.json").write_text('{"size": {"height": 40}}')
    with pytest.raises(ValueError, match=r"preprocessor_config.json: image size 40: not a multiple"):
        convert(tmp_path / "ours", tmp_path / "back")


def test_the_tokenizer_is_checked_on_the_way_back(released, tmp_path):
    convert(released, tmp_path / "ours", MOTION)
    remove_tokens("<img>")(tmp_path / "ours")
    with pytest.raises(ValueError, match=r"its tokenizer has no <img>$"):
        convert(tmp_path / "ours", tmp_path / "back")


@pytest.mark.parametrize("left_out", ["motion_mlp.", "slowfast_model."])
def test_half_a_motion_branch(tmp_path, left_out):
    weights = {name: fill(name, shape) for name, shape in released_shapes().items() if not name.startswith(left_out)}
    write_released(tmp_path / "released", CONFIG, weights)
    with pytest.raises(ValueError, match=f"missing keys: .*{left_out}"):
        convert(tmp_path / "released", tmp_path / "ours", MOTION)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_config__use_mean_pooling": False}, "vision_config.use_mean_pooling is False"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act is 'relu'"),
        ({"vision_config__patch_size": [6, 12]}, "vision_config.patch_size is 6 x 12"),
        ({"text_config__intermediate_size": 37}, "mismatched keys: .*gate_proj.weight .36, 24., not .37, 24."),
        ({"text_config__rms_norm_eps": 1e-5}, "released_config.json: describes another network"),
        ({"motion": None}, "unexpected keys: .*motion_projector"),
        ({"motion": {"slow_width": 0}}, "config.json: slow_width 0"),
        ({"vision_config__image_size": [37, 37]}, "config.json: image size 37"),
    ],
)
def test_ours_that_cannot_go_back(released, tmp_path, changes, message):
    convert(released, tmp_path / "ours", MOTION)
    edit_config(tmp_path / "ours", **changes)
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "ours", tmp_path / "back")
    assert not (tmp_path / "back").exists()
