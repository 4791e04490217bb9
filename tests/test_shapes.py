"""The built-in sizes against counts written out by hand, and what is no InternVL refused."""

import json

import pytest

from models.footprint import inventory
from models.released import layout
from models.shapes import INTERNVL3, check_motion, network
from models.slowfast import SlowFastConfig

BILLIONS = {  # as the public model cards say
    "OpenGVLab/InternVL3-1B-hf": 0.94,
    "OpenGVLab/InternVL3-2B-hf": 2.09,
    "OpenGVLab/InternVL3-8B-hf": 7.94,
}


def by_hand(h, layers, heads, kv_heads, m, vocabulary=151674, v=1024, w=4096):
    """Parameters of an InternVL3 by section, from its sizes."""
    kv = h // heads * kv_heads
    layer = h * h + h + 2 * (h * kv + kv) + h * h + 3 * h * m + 2 * h
    language = vocabulary * h + layers * layer + h
    vision_layer = 4 * (v * v + v) + (v * w + w) + (w * v + v) + 2 * 2 * v + 2 * v  # attention, MLP, norms, scales
    vision = (3 * 14 * 14 * v + v) + v + (32 * 32 + 1) * v + 24 * vision_layer
    projector = 2 * 4 * v + (4 * v * h + h) + (h * h + h)
    motion = 2 * 2304 + (2304 * h + h) + (h * h + h)
    return {
        "vision tower": vision,
        "projector": projector,
        "language model": language,
        "lm_head": vocabulary * h,
        "motion projector": motion,
    }


@pytest.mark.parametrize("name", INTERNVL3)
def test_sizes(name):
    counts = inventory(*network(name, "slowfast"), [])
    expected = by_hand(*INTERNVL3[name])
    assert {section: counts.parameters[section] for section in expected} == expected
    assert sum(expected.values()) - expected["motion projector"] == pytest.approx(BILLIONS[name] * 1e9, rel=0.005)
    assert 33e6 < counts.parameters["SlowFast"] < 34e6  # SlowFast-R50 has 34.5 million with its classifier of 0.9
    assert counts.trained["SlowFast"] == 0
    assert counts.trained | {"SlowFast": 0} == counts.parameters | {"SlowFast": 0}


def test_the_layout_is_the_released_one():
    keys = layout(*network("OpenGVLab/InternVL3-8B-hf", "slowfast"))
    assert keys.released["language_model.model.layers.27.mlp.gate_proj.weight"] == (18944, 3584)
    assert keys.released["language_model.lm_head.weight"] == (151674, 3584)
    assert keys.released["vision_model.encoder.layers.23.attn.qkv.bias"] == (3072,)
    assert keys.released["vision_model.embeddings.position_embedding"] == (1, 1025, 1024)
    assert keys.released["mlp1.1.weight"] == (3584, 4096)
    assert keys.released["motion_mlp.1.weight"] == (3584, 2304)


def test_motion_is_as_asked_or_as_in_the_checkpoint(tmp_path):
    name = "OpenGVLab/InternVL3-1B-hf"
    assert network(name)[1] is network(name, "none")[1] is None
    assert network(name, "slowfast")[1] == SlowFastConfig()
    config = network(name)[0].to_dict() | {"model_type": "vqathinker", "motion": {"slow_stride": 4}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert network(str(tmp_path))[1] == network(str(tmp_path), "slowfast")[1] == SlowFastConfig(slow_stride=4)
    assert network(str(tmp_path), "none")[1] is None
    assert network(str(tmp_path))[0].text_config.hidden_size == 896


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "no config.json to be had"),
        ("[]", "model_type is None"),
        ('{"model_type": "bert"}', "model_type is 'bert'"),
        ('{"model_type": "internvl", "text_config": {"hidden_size": "wide"}}', "config.json"),
        ('{"model_type": "vqathinker", "motion": {"speed": 1}}', "speed"),
    ],
)
def test_a_config_that_is_none_is_refused_in_one_line(tmp_path, text, named):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=f"--model {tmp_path}") as raised:
        network(str(tmp_path))
    assert named in str(raised.value) and "\n" not in str(raised.value)


def test_motion_without_weights_is_refused_before_a_model_is_loaded(tmp_path):
    with pytest.raises(ValueError, match=r"--slowfast is needed.*SLOWFAST_8x8_R50.pyth.*--motion none"):
        check_motion("OpenGVLab/InternVL3-8B-hf", "slowfast", None)
    check_motion("OpenGVLab/InternVL3-8B-hf", "slowfast", "file")
    check_motion("OpenGVLab/InternVL3-8B-hf", "none", None)
    check_motion("somebody/else", "slowfast", None)  # not known before it is loaded
    (tmp_path / "config.json").write_text('{"model_type": "vqathinker", "motion": {}}')
    with pytest.raises(ValueError, match="--slowfast is needed"):
        check_motion(str(tmp_path), "slowfast", None)
    (tmp_path / "config.json").write_text('{"model_type": "vqathinker", "motion": {"slow_stride": 3}}')
    check_motion(str(tmp_path), "slowfast", None)
