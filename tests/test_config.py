import dataclasses
import doctest
import json
import subprocess
import sys

import pytest

from grpo import config
from grpo.config import PRESETS, RELEASED, Config, parse_config

FIELDS = dataclasses.fields(Config)

# Every flag there is. Adding one is a decision: it has to be added here too.
FLAGS = [
    "--preset", "--model", "--motion", "--slowfast", "--motion-clips", "--dry-run", "--world-size",
    "--output", "--resume", "--allow-changed", "--seed",
    "--labels", "--videos", "--mos-mapping", "--val-fraction",
    "--steps", "--videos-per-step", "--group-size", "--frames", "--sampler", "--image-side",
    "--system", "--prompt",
    "--rewards", "--sigma", "--coarse-factor", "--variance-floor", "--ranking-opponents",
    "--temporal-bonus", "--temporal-scope",
    "--temperature", "--top-p", "--max-new-tokens",
    "--advantage-std", "--clip-low", "--clip-high", "--beta", "--kl", "--loss-mean", "--inner-epochs", "--micro-batch",
    "--lr", "--warmup-steps", "--schedule", "--weight-decay", "--grad-clip", "--max-bad-steps",
    "--lora-rank", "--lora-alpha", "--freeze",
    "--eval-every", "--save-every", "--keep-checkpoints", "--inspect", "--tensorboard",
    "--device", "--dist-timeout", "--precision", "--parallel", "--shard-optimizer", "--gradient-checkpointing",
    "--cuda-graph", "--workers", "--video-timeout", "--max-bad-videos", "--frame-cache", "--frame-cache-gib",
]  # fmt: skip

# A value just outside the bounds of every flag that has any.
OUTSIDE = {
    "--preset": ["huge"],
    "--motion": ["raft"],
    "--motion-clips": ["-1"],
    "--world-size": ["0"],
    "--mos-mapping": ["log"],
    "--val-fraction": ["-0.1", "0.51"],
    "--seed": ["-1"],
    "--steps": ["0"],
    "--videos-per-step": ["0"],
    "--group-size": ["1"],
    "--frames": ["0"],
    "--image-side": ["0"],
    "--sampler": ["Uniform"],
    "--prompt": ["mine"],
    "--sigma": ["0", "-1"],
    "--coarse-factor": ["-0.1", "1.1"],
    "--variance-floor": ["0"],
    "--ranking-opponents": ["some"],
    "--temporal-bonus": ["-0.1"],
    "--temporal-scope": ["rank"],
    "--temperature": ["0", "inf"],
    "--top-p": ["0", "1.01"],
    "--max-new-tokens": ["0"],
    "--clip-low": ["-0.1", "1.1"],
    "--clip-high": ["-0.1", "nan"],
    "--beta": ["-0.1", "nan"],
    "--kl": ["k4"],
    "--loss-mean": ["median"],
    "--inner-epochs": ["0"],
    "--micro-batch": ["0"],
    "--lr": ["0", "nan", "inf"],
    "--warmup-steps": ["-1"],
    "--schedule": ["linear"],
    "--weight-decay": ["-0.1"],
    "--grad-clip": ["0"],
    "--max-bad-steps": ["0"],
    "--lora-rank": ["-1"],
    "--lora-alpha": ["0"],
    "--eval-every": ["-1"],
    "--save-every": ["-1"],
    "--keep-checkpoints": ["0"],
    "--device": ["tpu"],
    "--dist-timeout": ["0", "inf"],
    "--precision": ["float16"],
    "--parallel": ["zero"],
    "--workers": ["-1"],
    "--video-timeout": ["0", "inf"],
    "--max-bad-videos": ["-0.1", "1.1", "nan"],
    "--frame-cache-gib": ["0"],
}


def option(field):
    return "--" + field.name.replace("_", "-")


def refusal(capsys, *arguments):
    """The one line that refused arguments leave behind."""
    with pytest.raises(SystemExit) as exit_:
        parse_config([*arguments])
    assert exit_.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("train.py: error: ") and message.count("\n") == 1
    return message


def test_the_flags_are_these():
    assert sorted(map(option, FIELDS)) == sorted(FLAGS)


def test_every_flag_has_help(capsys):
    with pytest.raises(SystemExit) as exit_:
        parse_config(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert exit_.value.code == 0
    for field in FIELDS:
        assert option(field) in text
        assert len(field.metadata["help"]) > 10 and field.metadata["help"] in text


@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_help_answers_without_torch(script):
    probe = (
        "import runpy, sys\n"
        f"sys.argv = [{script!r}, '--help']\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as exit_: print('code', exit_.code, 'torch', 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("code 0 torch False\n") and "--model" in done.stdout


def another(field):
    """A valid value that is not the default."""
    choices, default = field.metadata["choices"], field.default
    if field.name == "inspect":
        return "every:2"
    if choices:
        return next(choice for choice in choices if choice != default and choice not in PRESETS)
    if isinstance(default, bool):
        return not default
    if field.type == int | None:
        return 56
    if isinstance(default, int):
        return default + 1
    return default * 0.5 + 0.01 if isinstance(default, float) else "some/where"


def test_flags_set_their_fields():
    wanted = {field.name: another(field) for field in FIELDS if field.name != "preset"} | {"allow_changed": "lr,steps"}
    assert wanted["motion"] == "slowfast" and wanted["parallel"] == "fsdp"
    wanted["shard_optimizer"] = False  # not with fsdp
    apart = {"preset", "lora_rank", "lora_alpha"}  # not with fsdp and --freeze
    wanted = {name: value for name, value in wanted.items() if name not in apart}
    arguments = []
    for field in (field for field in FIELDS if field.name not in apart):
        value = wanted[field.name]
        if isinstance(value, bool):
            arguments.append(option(field) if value else option(field).replace("--", "--no-"))
        else:
            arguments += [option(field), str(value)]
    assert parse_config(arguments) == Config(**wanted)
    assert parse_config([]) == Config()
    assert parse_config(["--lora-rank", "8", "--lora-alpha", "4"]) == Config(lora_rank=8, lora_alpha=4)


def test_what_is_saved_is_the_config(tmp_path):
    config = parse_config(["--lr", "3e-5", "--no-advantage-std", "--kl", "k1"])
    config.save(tmp_path / "config.json")
    assert Config(**json.loads((tmp_path / "config.json").read_text())) == config


def test_every_bound_is_tried_below():
    bounded = [f for f in FIELDS if any(f.metadata[key] is not None for key in ("choices", "low", "high", "above"))]
    assert sorted(map(option, bounded)) == sorted(OUTSIDE)


@pytest.mark.parametrize(("flag", "value"), [(flag, value) for flag, values in OUTSIDE.items() for value in values])
def test_values_out_of_bounds_are_refused_by_name(capsys, flag, value):
    message = refusal(capsys, f"{flag}={value}")
    assert f"{flag} {value}" in message or f"{flag} {float(value)}" in message


@pytest.mark.parametrize(
    ("flag", "values"),
    {
        "--group-size": ["2"],
        "--motion-clips": ["0"],
        "--clip-low": ["0", "1"],
        "--coarse-factor": ["0", "1"],
        "--top-p": ["1"],
        "--beta": ["0"],
        "--eval-every": ["0"],
        "--workers": ["0"],
        "--val-fraction": ["0", "0.5"],
        "--max-bad-videos": ["0", "1"],
    }.items(),
)
def test_bounds_themselves_are_allowed(flag, values):
    for value in values:
        parse_config([flag, value])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--group-size", "two"], ["--group-size", "'two'"]),
        (["--steps"], ["--steps"]),
        (["--grup-size", "4"], ["--grup-size", "did you mean --group-size?"]),
        (["--clip-hi=0.3"], ["--clip-hi", "did you mean --clip-high?"]),  # no silent abbreviation
        (["--qqq", "4"], ["unknown argument --qqq"]),
        (["stray"], ["unknown argument stray"]),
    ],
)
def test_wrong_arguments_are_refused_by_name(capsys, arguments, named):
    message = refusal(capsys, *arguments)
    assert all(name in message for name in named)
    assert ("did you mean" in message) == any("did you mean" in name for name in named)


@pytest.mark.parametrize(
    ("given", "steps"),
    {"3": {3}, "1,7,4": {1, 4, 7}, "every:3": {3, 6}, "every:7": {7}, "every:1": set(range(1, 8)), "7,7": {7}}.items(),
)
def test_steps_to_inspect_are_named(given, steps):
    config = parse_config(["--steps", "7", "--inspect", given])
    assert {step for step in range(-1, 20) if config.inspects(step)} == steps
    assert not any(Config().inspects(step) for step in range(300))


@pytest.mark.parametrize(
    "given",
    ["0", "-1", "1.5", "one", "", "1,", ",1", "1, 2", "every", "every:", "every:0", "every:2,4", "each:2", "a:b:1"],
)
def test_what_names_no_step_to_inspect_is_refused(capsys, given):
    assert f"--inspect {given}: write steps with commas, 1,10,100, or every:50" in refusal(capsys, f"--inspect={given}")


def test_doctests():
    result = doctest.testmod(config)
    assert result.attempted > 0 and result.failed == 0


@pytest.mark.parametrize("given", ["8", "1,8", "every:8"])
def test_steps_beyond_the_last_are_not_inspected(capsys, given):
    message = refusal(capsys, "--steps=7", f"--inspect={given}")
    assert f"--inspect {given}: there is no step 8, --steps is 7" in message


def test_presets_fill_and_flags_override():
    data = ["--labels", "labels.jsonl", "--videos", "videos"]
    config = parse_config(["--preset", "internvl3-8b", *data, "--group-size", "8"])
    assert config.model == "OpenGVLab/InternVL3-8B-hf" and config.labels == "labels.jsonl"
    assert (config.group_size, config.lr, config.beta, config.max_new_tokens) == (8, 1e-6, 0.04, 2048)
    assert parse_config([*data, "--group-size", "8", "--preset", "internvl3-8b"]) == config
    assert parse_config(["--preset", "tiny"]) == Config()


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "tiny"])
def test_presets_without_data_ask_for_it(capsys, preset):
    assert "--labels" in refusal(capsys, "--preset", preset)
    assert "--videos" in refusal(capsys, "--preset", preset, "--labels", "labels.jsonl")


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "tiny"])
def test_presets_without_data_do_for_a_dry_run(preset):
    config = parse_config(["--dry-run", "--preset", preset, "--world-size", "8"])
    assert (config.dry_run, config.world_size, config.labels, config.motion) == (True, 8, None, "slowfast")


def test_a_run_does_not_take_its_size_from_a_flag(capsys):
    message = refusal(capsys, "--world-size", "8")
    assert "--world-size 8" in message and "--dry-run" in message and "torchrun" in message


# ---- flags of a run that is resumed

HARMLESS = {
    "preset", "dry_run", "world_size", "output", "resume", "allow_changed", "save_every", "keep_checkpoints",
    "workers", "video_timeout", "max_bad_videos", "max_bad_steps", "dist_timeout", "frame_cache", "frame_cache_gib",
    "inspect", "tensorboard",
}  # fmt: skip
ROUNDING = {"micro_batch", "device", "gradient_checkpointing", "cuda_graph", "parallel", "shard_optimizer"}


def resumed(saved, **changed):
    """Settings as a checkpoint has them, and the config that goes on from it."""
    config = Config(**{"resume": "auto", **changed})
    return config, json.loads(json.dumps(dataclasses.asdict(saved)))


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_a_flag_that_changes_results_may_not_differ_unless_allowed(field):
    if field.name in ("preset", "dry_run", "world_size", "resume", "allow_changed"):  # they go with others, or alone
        assert field.metadata["changes"] == "nothing"
        return
    value, name = another(field), option(field)
    beside = {"lora_rank": 8} if field.name == "lora_alpha" else {}
    config, saved = resumed(Config(**beside), **{field.name: value}, **beside)
    text = f"{name} was {field.default}, is {value}"
    if field.name in HARMLESS:
        assert config.compare(saved) == []
    elif field.name in ROUNDING:
        assert config.compare(saved) == [text]
    else:
        with pytest.raises(ValueError) as error:
            config.compare(saved)
        assert str(error.value).startswith(f"--resume auto: {text}: ")
        assert str(error.value).endswith(f" --allow-changed {name[2:]}")
        assert dataclasses.replace(config, allow_changed=name[2:]).compare(saved) == []


def test_the_same_flags_differ_in_nothing():
    for arguments in (["--lr", "3e-5", "--freeze", "vision"], ["--preset", "internvl3-1b", "--labels=a", "--videos=b"]):
        saved = parse_config(arguments)
        config, settings = resumed(saved, **{**dataclasses.asdict(saved), "resume": "auto"})
        assert config.compare(settings) == []


def test_every_change_is_named_and_those_that_were_allowed_stay_in_the_advice():
    config, saved = resumed(Config(), lr=1e-3, steps=300, videos_per_step=8, workers=0, allow_changed="lr")
    with pytest.raises(ValueError) as error:
        config.compare(saved)
    message = str(error.value)
    assert "--steps was 250, is 300; --videos-per-step was 16, is 8: " in message and "--lr was" not in message
    assert message.endswith("--allow-changed lr,steps,videos-per-step")
    allowed = dataclasses.replace(config, allow_changed="lr,steps,videos-per-step", micro_batch=4)
    assert allowed.compare(saved) == ["--micro-batch was 16, is 4"]


def test_a_flag_that_is_newer_than_the_checkpoint_had_its_default():
    config, saved = resumed(Config(), top_p=0.9)
    del saved["top_p"], saved["kl"]
    with pytest.raises(ValueError, match=r"--top-p was 1\.0, is 0\.9: "):
        config.compare(saved)
    assert dataclasses.replace(config, top_p=1.0).compare(saved) == []


@pytest.mark.parametrize("names", ["all", "lr,stepz", "lr,", "--lr", "lr, steps"])
def test_only_flags_can_be_allowed_to_differ(capsys, names):
    message = refusal(capsys, "--resume", "auto", f"--allow-changed={names}")
    assert f"--allow-changed {names}: there is no flag --" in message


def test_changes_are_allowed_to_a_run_that_is_resumed(capsys):
    assert "--allow-changed lr: goes with --resume" in refusal(capsys, "--allow-changed", "lr")


def test_help_names_the_source_of_every_preset_value(capsys):
    with pytest.raises(SystemExit):
        parse_config(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "(default: 0.0004; internvl3: 1e-06, released script)" in text
    assert "(default: cosine; internvl3: cosine, our choice)" in text
    for name, (value, source) in RELEASED.items():
        assert f"internvl3: {value}, {source})" in text
        assert source.startswith(("released script", "our choice", "your own"))
        assert all(PRESETS[preset][name] == value for preset in PRESETS if preset != "tiny")


def test_the_released_number_of_steps():
    sequences = 8 * 8 * 2  # GPUs, sequences a GPU, accumulated
    assert RELEASED["videos_per_step"][0] == sequences // RELEASED["group_size"][0] == 32
    assert RELEASED["steps"][0] == 3 * 28056 // 32


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_name_fields(preset):
    Config(**{**PRESETS[preset], "preset": preset, "labels": "x", "videos": "x"})
