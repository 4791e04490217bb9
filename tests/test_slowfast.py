"""SlowFast against functional calls, explicit loops and, where they are at hand, the released network's numbers.

Legend: N videos, F frames, C channels, T time steps, H and W height and width in pixels.
"""

import json
import os
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from models.slowfast import CLIPS, SlowFast, SlowFastConfig, load_released, load_slowfast, pool, slow_indices
from tests.benchmarks.slowfast import plain_features
from tests.parity import fill

ASSETS = os.environ.get("VQA_TEST_ASSETS")
needs_assets = pytest.mark.skipif(
    not ASSETS, reason="VQA_TEST_ASSETS names no folder with the released network's numbers"
)

NARROW = SlowFastConfig(slow_width=6, fast_width=2, depths=(2, 1, 2, 1), pool_side=2)
TINY = SlowFastConfig(slow_width=4, fast_width=1, depths=(1,), pool_frames=(2, 5), pool_side=2, temporal_repeat=1)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_frames(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed))


def network(config=NARROW, seed=0):
    """Random weights, and BatchNorm statistics, scales and offsets of a trained kind."""
    torch.manual_seed(seed)
    model = SlowFast(config)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm3d):
            for value, centre in zip((layer.weight, layer.bias, layer.running_mean, layer.running_var), (1, 0, 0, 1)):
                value.copy_(centre + 0.3 * torch.rand(len(value)))
    return model


def window_averages(features, repeat, kernel):
    """`pool` for each window of each channel by itself."""
    features = torch.stack([features[:, :, t // repeat] for t in range(features.shape[2] * repeat)], dim=2)
    starts = [range(size - window + 1) for size, window in zip(features.shape[2:], kernel)]
    t, h, w = kernel
    windows = [features[:, :, i : i + t, j : j + h, k : k + w].mean((2, 3, 4)) for i, j, k in product(*starts)]
    return sum(windows) / len(windows)


# ---- the forward pass


@pytest.mark.parametrize(
    ("slow_stride", "temporal_repeat", "slow_index", "height", "width"),
    [(3, 6, [0, 5], 64, 64), (4, 4, [0, 5, 11], 70, 100)],
    ids=["training recipe", "testing recipe"],
)
def test_features_are_those_of_functional_calls(slow_stride, temporal_repeat, slow_index, height, width):
    model = network(replace(NARROW, slow_stride=slow_stride, temporal_repeat=temporal_repeat))
    frames = random_frames(2, {3: 6, 4: 12}[slow_stride], 3, height, width)
    maps = plain_features(
        model.state_dict(), *(frames[:, index].transpose(1, 2) for index in (slow_index, slice(None)))
    )
    expected = [window_averages(x, temporal_repeat, (t, 2, 2)) for x, t in zip(maps, (8, 32))]
    features = model(frames)
    assert features.shape == (2, 6 * 32 + 2 * 32) == (2, model.config.channels)
    torch.testing.assert_close(features, torch.cat(expected, 1), rtol=1e-4, atol=1e-5)
    assert (features[0] - features[1]).abs().max() > 0.1


def test_fewer_stages():
    model = network(replace(NARROW, depths=(1, 2), pool_side=8))
    frames = random_frames(1, 6, 3, 60, 60)
    maps = plain_features(model.state_dict(), frames[:, [0, 5]].transpose(1, 2), frames.transpose(1, 2))
    assert [x.shape for x in maps] == [(1, 48, 2, 8, 8), (1, 16, 6, 8, 8)]
    expected = [window_averages(x, 6, (t, 8, 8)) for x, t in zip(maps, (8, 32))]
    torch.testing.assert_close(model(frames), torch.cat(expected, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("frames", "slow_stride", "index"),
    [
        (6, 3, [0, 5]),
        (12, 4, [0, 5, 11]),
        (12, 3, [0, 3, 7, 11]),
        (8, 4, [0, 7]),
        (4, 4, [0]),
        (32, 4, [0, 4, 8, 13, 17, 22, 26, 31]),
    ],
)
def test_slow_path_indices(frames, slow_stride, index):
    assert slow_indices(frames, slow_stride).tolist() == index


@pytest.mark.parametrize(
    ("shape", "repeat", "kernel"),
    [
        ((2, 3, 4, 6), 6, (8, 3, 3)),
        ((6, 2, 3, 4), 6, (32, 2, 2)),
        ((3, 5, 5, 2), 1, (2, 4, 2)),
        ((1, 1, 1, 1), 4, (4, 1, 1)),
    ],
)
def test_pools_are_explicit_loops_and_the_libraries(shape, repeat, kernel):
    steps, height, width, channels = shape
    features = torch.randn(2, channels, steps, height, width, generator=generator(), dtype=torch.float64)
    pooled = pool(features, repeat, kernel)
    assert pooled.shape == (2, channels)
    torch.testing.assert_close(pooled, window_averages(features, repeat, kernel))
    windows = nn.functional.avg_pool3d(features.repeat_interleave(repeat, 2), kernel, stride=1)
    torch.testing.assert_close(pooled, nn.functional.adaptive_avg_pool3d(windows, 1).flatten(1))


def test_inner_frames_count_more_than_outer_ones():
    """Five windows of 32 over six frames repeated six times: frame 0 has 6, 5, 4, 3, 2 of its six steps in them."""
    pooled = pool(torch.eye(6)[None, :, :, None, None], 6, (32, 1, 1))[0] * 5 * 32
    torch.testing.assert_close(pooled, torch.tensor([20.0, 30.0, 30.0, 30.0, 30.0, 20.0]))


def test_videos_do_not_see_each_other():
    model, frames = network(), random_frames(3, 6, 3, 64, 64)
    alone = torch.cat([model(video[None]) for video in frames])
    torch.testing.assert_close(model(frames), alone, rtol=1e-4, atol=1e-5)


def test_a_feature_of_random_weights_keeps_the_scale():
    """A chain of 3 x 5 layers of any other gain would end far off."""
    torch.manual_seed(0)
    features = SlowFast(NARROW)(random_frames(2, 6, 3, 64, 64))
    assert 0.3 < features.std() < 30 and (features[0] - features[1]).abs().mean() > 0.03


def test_a_bfloat16_copy():
    model, frames = network(), random_frames(2, 6, 3, 64, 64)
    exact, rounded = model(frames), network().bfloat16()(frames)
    assert rounded.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        autocast = model(frames)
    assert max((rounded - exact).norm(), (autocast - exact).norm()) < 0.02 * exact.norm()


# ---- frozen


def test_no_gradient():
    model = network()
    features = model(random_frames(1, 6, 3, 64, 64).requires_grad_())
    assert not features.requires_grad and not any(parameter.requires_grad for parameter in model.parameters())


def test_a_script_that_trains_slowfast_gets_gradients():
    model, frames = network().requires_grad_(True), random_frames(1, 6, 3, 64, 64)
    features = model.features(frames)
    assert features.equal(model(frames))
    features.sum().backward()
    assert all(parameter.grad.any() for parameter in model.parameters())


def test_evaluation_mode_outlives_train():
    model, frames = network(), random_frames(1, 6, 3, 64, 64)
    before, features = {name: value.clone() for name, value in model.state_dict().items()}, model(frames)
    assert model.train() is model
    policy = nn.ModuleList([model, nn.BatchNorm3d(1)]).train()
    assert policy.training and not any(module.training for module in model.modules())
    assert torch.equal(model(frames), features)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# ---- settings


@pytest.mark.parametrize(
    ("size", "changes", "message", "remedy"),
    [
        ((12, 64, 64), {}, r"slow_stride 3: of 12 frames the slow path has 4, .* 3: use slow_stride 4$",
         {"slow_stride": 4}),
        ((5, 64, 64), {"slow_stride": 6}, r"slow_stride 6: of 5 frames the slow path has 0, .* 2: use slow_stride 2$",
         {"slow_stride": 2, "temporal_repeat": 7}),
        ((3, 64, 64), {"slow_stride": 1}, r"use slow_stride 2 or slow_stride 3$",
         {"slow_stride": 2, "temporal_repeat": 11}),
        ((15, 64, 64), {}, "use another number of frames", None),
        ((0, 64, 64), {}, "of 0 frames", None),
        ((6, 64, 64), {"temporal_repeat": 3}, r"temporal_repeat 3: 2 frames of the slow path make 6 .* 8 .* use 4 or",
         None),
        ((6, 64, 64), {"temporal_repeat": 4}, r"temporal_repeat 4: 6 frames of the fast path make 24 .* 32 .* use 6",
         {"temporal_repeat": 6}),
        ((6, 64, 64), {"temporal_repeat": 1}, "smaller pool_frames", {"pool_frames": (2, 6)}),
        ((6, 32, 64), {}, r"pool_side 2: the last feature maps of 32 x 64 pixels .* 1: use 33 pixels or more",
         {"pool_side": 1}),
        ((6, 64, 192), {"pool_side": 7}, r"pool_side 7: .* 64 x 192 .* 2: use 193 pixels or more", {"pool_side": 2}),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named_with_what_to_change(size, changes, message, remedy):
    config, (count, height, width) = replace(NARROW, **changes), size
    with pytest.raises(ValueError, match=message):
        network(config)(random_frames(1, count, 3, height, width))
    if remedy:
        assert network(replace(config, **remedy))(random_frames(1, count, 3, height, width)).isfinite().all()


def test_the_released_recipes_fit():
    SlowFastConfig().check_input(6, 448, 448)
    SlowFastConfig(slow_stride=4, temporal_repeat=4).check_input(12, 560, 560)
    SlowFastConfig().check_input(6, 193, 193)


@pytest.mark.parametrize("pool_frames", [(8, 32), (4, 6), (1, 1), (2, 9), (3, 12), (1, 8), (5, 1)])
def test_a_dense_clip_is_the_shortest_that_its_settings_allow(pool_frames):
    config = replace(NARROW, pool_frames=pool_frames, **CLIPS)

    def fits(frames):
        try:
            config.check_input(frames, 64, 64)
        except ValueError:
            return False
        return True

    assert config.clip_frames == next(frames for frames in range(1, 99) if fits(frames))
    assert SlowFastConfig().clip_frames == SlowFastConfig(**CLIPS).clip_frames == 32  # PySlowFast's DATA.NUM_FRAMES


def test_what_is_refused_is_what_would_fail(monkeypatch):
    """Each size is tried on a network of one stage that does not check it."""
    outcomes = []
    for count, side, slow_stride, repeat in product(range(1, 9), (4, 5), (1, 2, 3, 4), (1, 2)):
        config = replace(TINY, slow_stride=slow_stride, temporal_repeat=repeat)
        try:
            config.check_input(count, side, 8)
            fits = True
        except ValueError:
            fits = False
        with monkeypatch.context() as patch:
            patch.setattr(SlowFastConfig, "check_input", lambda *args: None)
            model = SlowFast(config)
            if fits:
                assert model(random_frames(1, count, 3, side, 8)).shape == (1, 20)
            else:
                with pytest.raises((RuntimeError, ValueError)):
                    model(random_frames(1, count, 3, side, 8))
        outcomes.append(fits)
    assert 10 < sum(outcomes) < len(outcomes) - 10


@pytest.mark.parametrize("config", [SlowFastConfig(), NARROW, TINY])
def test_settings_survive_json(config):
    assert SlowFastConfig(**json.loads(json.dumps(asdict(config)))) == config


@pytest.mark.parametrize(
    "wrong",
    [
        {"slow_stride": 0},
        {"temporal_repeat": -1},
        {"fast_width": 0},
        {"pool_frames": (8, 0)},
        {"depths": ()},
        {"pool_side": 0},
    ],
)
def test_settings_below_one_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SlowFastConfig(**wrong)


def test_more_than_four_stages_are_refused():
    with pytest.raises(ValueError, match="depths"):
        SlowFastConfig(depths=(1, 1, 1, 1, 1))


# ---- weights


def test_sizes_of_slowfast_r50():
    """34.57 million parameters in pytorchvideo's model zoo, 2304 x 400 + 400 of them in its classifier."""
    model = SlowFast()
    assert model.config.channels == 2304
    assert round(sum(map(torch.Tensor.numel, model.parameters())) / 1e6 + (2304 * 400 + 400) / 1e6, 2) == 34.57


def released(model):
    return {f"slowfast_model.{name}": value for name, value in model.state_dict().items()}


def public(model):
    """As pytorchvideo names them, with its classifier."""
    classifier = {
        "blocks.6.proj.weight": torch.zeros(400, model.config.channels),
        "blocks.6.proj.bias": torch.zeros(400),
    }
    return {n.replace("feature_extraction", "blocks"): value for n, value in model.state_dict().items()} | classifier


def assert_same(model, other):
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in other.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.parameters()) and not model.training


def test_released_weights():
    model, other = network(seed=1), network(seed=2)
    load_released(model, released(other))
    assert_same(model, other)


@pytest.mark.parametrize("suffix", [".pyth", ".safetensors"])
def test_public_weights(tmp_path, suffix):
    other, file = network(), tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(public(other), file)
    else:
        torch.save({"model_state": public(other)}, file)
    assert_same(load_slowfast(file, NARROW), other)


def test_half_precision_weights_become_float32(tmp_path):
    other = network()
    torch.save({"model_state": public(other.half())}, tmp_path / "a.pyth")
    model = load_slowfast(tmp_path / "a.pyth", NARROW)
    assert_same(model, other)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


STEM = "0.multipathway_blocks.1.conv.weight"


def test_all_that_does_not_match_is_listed_and_nothing_loaded(tmp_path):
    weights = public(network())
    missing = "blocks.4.multipathway_blocks.0.res_blocks.0.branch1_norm.running_var"
    del weights[missing]
    weights["blocks.7.more"] = weights["feature_extraction.0.more"] = torch.zeros(1)
    weights[f"blocks.{STEM}"] = torch.zeros(2, 3, 1, 7, 7)
    torch.save({"model_state": weights}, tmp_path / "a.pyth")
    with pytest.raises(ValueError) as error:
        load_slowfast(tmp_path / "a.pyth", NARROW)
    assert str(error.value) == (
        f"--slowfast {tmp_path / 'a.pyth'}: 1 missing keys: ['{missing}']; "
        "2 unexpected keys: ['blocks.7.more', 'feature_extraction.0.more']; "
        f"1 mismatched keys: ['blocks.{STEM} (2, 3, 1, 7, 7), not (2, 3, 5, 7, 7)']"
    )


@pytest.mark.parametrize("edit", ["missing", "unexpected", "mismatched"])
def test_released_weights_that_do_not_match_are_refused_and_nothing_loaded(edit):
    model, weights, name = network(seed=1), released(network(seed=2)), f"slowfast_model.feature_extraction.{STEM}"
    if edit == "missing":
        del weights[name]
    elif edit == "unexpected":
        name = "motion_mlp.0.weight"
        weights[name] = torch.zeros(1)
    else:
        weights[name] = weights[name][:1]
    with pytest.raises(ValueError, match=rf"^slowfast_model: 1 {edit} keys: \['{name}[^,]*('|, 3, 5, 7, 7\), not \(2)"):
        load_released(model, weights)
    assert_same(model, network(seed=1))


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    file, touched = tmp_path / "a.pyth", tmp_path / "touched"
    torch.save({"model_state": public(network()), "more": Payload(touched)}, file)
    with pytest.raises(ValueError, match=f"--slowfast {file}: neither"):
        load_slowfast(file, NARROW)
    assert not touched.exists()
    torch.load(file, weights_only=False)
    assert touched.exists()  # the payload works


@pytest.mark.parametrize(
    "content", [{"state": {}}, {"model_state": {f"blocks.{STEM}": 3}}, {"model_state": [1]}, [1], 1]
)
def test_a_pickle_of_something_else_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "a.pyth")
    with pytest.raises(ValueError, match=r"--slowfast .*: neither"):
        load_slowfast(tmp_path / "a.pyth", NARROW)


@pytest.mark.parametrize("suffix", [".pyth", ".safetensors"])
@pytest.mark.parametrize("kept", [0, 100, 5000])
def test_a_damaged_file_is_refused(tmp_path, suffix, kept):
    file = tmp_path / f"a{suffix}"
    if suffix == ".safetensors":
        save_file(public(network()), file)
    else:
        torch.save({"model_state": public(network())}, file)
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match=f"--slowfast {file}: neither"):
        load_slowfast(file, NARROW)


@pytest.mark.parametrize("name", ["nowhere.pyth", "."])
def test_a_missing_file_says_what_to_download(tmp_path, name):
    with pytest.raises(ValueError, match=r"--slowfast .*: no such file: download https://.*/SLOWFAST_8x8_R50\.pyth"):
        load_slowfast(tmp_path / name)


# ---- the released network


@needs_assets
def test_keys_shapes_and_features_of_the_released_network():
    recipe = json.loads((Path(ASSETS) / "parity" / "train_recipe.json").read_text())
    shapes = {name: tuple(shape) for name, shape in recipe["keys"].items() if name.startswith("slowfast_model.")}
    model, side = SlowFast(), recipe["size"]
    assert {name: tuple(value.shape) for name, value in released(model).items()} == shapes
    load_released(model, {name: fill(name, shape) for name, shape in shapes.items()})
    coarse = torch.randn(2 * recipe["frames"], 3, side // 4, side // 4, generator=generator(7))
    frames = nn.functional.interpolate(coarse, scale_factor=4, mode="nearest").unflatten(0, (2, -1))
    with np.load(Path(ASSETS) / "parity" / "train_recipe.npz") as arrays:
        motion = torch.from_numpy(arrays["motion"])
    torch.testing.assert_close(model(frames), motion, rtol=1e-4, atol=1e-4 * float(motion.std()))
