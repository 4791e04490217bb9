"""The estimate of memory against the bytes that the real code has alive: a small random model, a whole step."""

import gc
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    GenerationConfig,
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLModel,
)

from grpo.config import Config
from grpo.master_weights import MasterAdamW
from grpo.rollout import Groups
from grpo.update import freeze, update
from models import policy as policy_module
from models.footprint import Network, Step, inventory, peaks
from models.loading import ATTENTION
from models.lora import Adapter
from models.policy import Policy, Videos
from models.shapes import network
from models.slowfast import SlowFastConfig
from tests.helpers import motion_policy, some_videos, tokenizer
from tests.memory import LiveBytes

VOCABULARY = 5000


def small_config() -> InternVLConfig:
    return InternVLConfig(
        vision_config={
            "hidden_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 256,
            "image_size": 112,
            "patch_size": 14,
            "attention_bias": True,
        },
        text_config={
            "model_type": "qwen2",
            "hidden_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 384,
            "vocab_size": VOCABULARY,
            "tie_word_embeddings": False,
        },
        image_token_id=tokenizer().convert_tokens_to_ids("<IMG_CONTEXT>"),
        tie_word_embeddings=False,
    )


def small_policy(precision: str, checkpointing: bool, frozen: list[str], lora_rank: int = 0) -> Policy:
    torch.manual_seed(0)
    model = InternVLForConditionalGeneration._from_config(small_config(), attn_implementation=ATTENTION)
    model.generation_config = GenerationConfig(eos_token_id=VOCABULARY - 1, pad_token_id=0)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    pixels = GotOcr2ImageProcessor(size={"height": 112, "width": 112}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    policy = Policy(model, tokenizer(), pixels, autocast=torch.bfloat16 if precision == "mixed" else None).train()
    if precision == "bfloat16":
        policy.model.bfloat16()
    policy.freeze(frozen)
    if lora_rank:
        policy.adapter = Adapter(policy.model, "base", lora_rank, 8)
    return policy


def one_step(policy: Policy, reference: Callable | None, step: Step, frozen: list[str]) -> dict[str, int]:
    """Most bytes alive in each phase of a step that is not the first: gradients and moments are there."""
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    adam = MasterAdamW(trained, lr=1e-4)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    adam.step()
    N, G, T = step.videos, step.answers, step.tokens
    videos = some_videos(policy, N * step.copies, step.frames)
    policy.end_ids.fill_(-1)  # answers of full length
    held = [value for state in adam.state.values() for value in state.values()]
    held += [master for _, master in adam.pairs()]
    known = [*policy.parameters(), *policy.buffers(), videos.frames, *held]
    known += [p.grad for p in trained if p.grad is not None]
    known += reference.parameters() if isinstance(reference, Policy) else []
    live, peak = LiveBytes(known), {}
    del known

    @contextmanager
    def phase(name):
        gc.collect()
        live.restart()
        yield
        name = {"forward": "update", "backward": "update", "optimizer": "optimizer step"}.get(name, name)
        peak[name] = max(peak.get(name, 0), live.peak)

    config = Config(group_size=G, videos_per_step=N, max_new_tokens=T, micro_batch=step.micro_batch)
    with live:
        with phase("rollout"):
            seen = policy.watch(videos)
            answers = policy.sample(policy.encode(seen), torch.rand(len(videos), G, T))
        groups = Groups(*answers, [[""] * G] * len(videos))[:N]
        seen = seen[:N]
        with phase("reference"):
            batch = freeze(seen, groups, torch.randn(N, G), policy, reference, config)
        update(policy, adam, batch, 1e-4, config, phase)
    return peak


def compared(
    precision,
    checkpointing,
    videos,
    micro_batch,
    answers,
    tokens,
    frames,
    motion=None,
    frozen=(),
    beta=True,
    lora_rank=0,
):
    """{phase: (estimated, real bytes, those of the states)}."""
    frozen = list(frozen)
    policy = small_policy(precision, checkpointing, frozen, lora_rank)
    reference = None
    if beta:
        other = small_policy(precision, checkpointing, [])
        reference = policy.without_adapter if lora_rank else other.requires_grad_(False)
    prompt = some_videos(policy, 1, frames).prompt_ids.shape[1]
    step = Step(
        videos=videos,
        copies=2,
        micro_batch=micro_batch,
        frames=frames,
        side=112,
        prompt=prompt,
        answers=answers,
        tokens=tokens,
        precision=precision,
        checkpointing=checkpointing,
        reference=beta,
        processes=1,
        lora=lora_rank > 0,
    )
    counts = inventory(small_config(), None, frozen, lora_rank)
    estimated = {peak.phase: peak.total for peak in peaks(small_config(), None, counts, step)}
    real = one_step(policy, reference, step, frozen)
    network_ = Network(small_config(), None, counts, step)
    states = network_.states()
    used_up = states["gradients"] - network_.gradients_between_steps()  # before there are new ones
    states = {phase: sum(states.values()) - used_up * (phase in ("rollout", "reference")) for phase in estimated}
    return {phase: (size, real[phase], states[phase]) for phase, size in estimated.items()}


@pytest.fixture(autouse=True)
def one_thread():
    """Operations as small as these are slower on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def check(found: dict[str, tuple[float, float, float]]) -> None:
    """States and all within 5 %, and what a phase adds to them, if anything, within 40 %: they weigh more here."""
    for phase, (estimated, real, states) in found.items():
        assert estimated == pytest.approx(real, rel=0.05), phase
        assert estimated - states == pytest.approx(real - states, rel=0.4, abs=1e-3 * states), phase


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("precision", ["float32", "mixed", "bfloat16"])
def test_a_step_needs_what_was_estimated(precision, checkpointing):
    check(compared(precision, checkpointing, videos=2, micro_batch=1, answers=4, tokens=16, frames=2))


@pytest.mark.parametrize(("precision", "checkpointing"), [("float32", False), ("mixed", True), ("bfloat16", False)])
def test_long_answers_of_one_micro_batch(precision, checkpointing):
    check(compared(precision, checkpointing, videos=2, micro_batch=2, answers=8, tokens=48, frames=2))


@pytest.mark.parametrize("precision", ["float32", "mixed", "bfloat16"])
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_logits_in_chunks(monkeypatch, precision, micro_batch):
    monkeypatch.setattr(policy_module, "LOGITS_AT_ONCE", 100 * VOCABULARY)
    check(compared(precision, True, videos=2, micro_batch=micro_batch, answers=8, tokens=48, frames=2))


def test_many_frames_frozen_parts_and_no_reference():
    case = {"videos": 1, "micro_batch": 1, "answers": 2, "tokens": 8, "frames": 6}
    check(compared("mixed", False, **case, frozen=["vision"], beta=False))


@pytest.mark.parametrize(("precision", "checkpointing"), [("float32", True), ("mixed", False), ("bfloat16", True)])
def test_adapters(precision, checkpointing):
    pytest.importorskip("peft", reason="needs peft: pip install 'vqathinker[lora]'")
    case = {"videos": 2, "micro_batch": 1, "answers": 4, "tokens": 16, "frames": 2}
    found = compared(precision, checkpointing, **case, lora_rank=8)
    estimated, real, _ = found.pop("optimizer step")  # some activations are still there beside the small states
    assert estimated == pytest.approx(real, rel=0.05)
    check(found)


def test_the_adapters_parameters_are_the_real_ones():
    pytest.importorskip("peft", reason="needs peft: pip install 'vqathinker[lora]'")
    policy = motion_policy()
    counts = inventory(policy.model.config, SlowFastConfig(**policy.model.config.motion), [], 8)
    policy.adapter = Adapter(policy.model, "base", 8, 8)
    assert counts.parameters["LoRA"] == sum(p.numel() for name, p in policy.named_parameters() if ".lora_" in name)
    assert sum(counts.trained.values()) == sum(p.numel() for p in policy.parameters() if p.requires_grad)
    extra = counts.parameters["motion projector"]  # as it was, for the reference
    assert sum(counts.parameters.values()) + extra == sum(p.numel() for p in policy.parameters())


@pytest.mark.parametrize(("answers", "tokens", "checkpointing"), [(8, 512, False), (8, 512, True), (4, 2048, True)])
def test_forward_and_backward_of_the_1b_shape(monkeypatch, answers, tokens, checkpointing):
    """The real code on tensors without memory; slots and masks, which depend on values, are left out."""
    config, _ = network("OpenGVLab/InternVL3-1B-hf")
    monkeypatch.setattr(InternVLModel, "get_placeholder_mask", lambda self, ids, *_: (ids == 151667)[..., None])
    pixels = GotOcr2ImageProcessor(size={"height": 448, "width": 448}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = InternVLForConditionalGeneration._from_config(config, attn_implementation=ATTENTION)
        model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        policy = Policy(model, tokenizer(), pixels, autocast=torch.bfloat16).train()
        frames = torch.empty(1, 6, 3, 448, 448, dtype=torch.uint8)
        videos = Videos(frames, torch.zeros(1, 1736, dtype=torch.long))
        with LiveBytes([*policy.parameters(), frames]) as live:
            policy(videos, torch.zeros(1, answers, tokens, dtype=torch.long)).logprobs.sum().backward()
    alone = {"videos": 1, "copies": 1, "reference": False, "processes": 1}
    step = replace(STEP, **alone, answers=answers, tokens=tokens, checkpointing=checkpointing)
    counts = inventory(config, None, [])
    found = Network(config, None, counts, step)
    moments = [found.moments()["update", moment] | {"optimizer": 0} for moment in found.update(1)]
    assert max(sum(moment.values()) for moment in moments) == pytest.approx(live.peak, rel=0.03)


STEP = Step(
    videos=4,
    copies=2,
    micro_batch=1,
    frames=6,
    side=448,
    prompt=1736,
    answers=4,
    tokens=2048,
    precision="mixed",
    checkpointing=True,
    reference=True,
    processes=8,
)


def estimate(**changes):
    """The peaks by phase of the 8B model as released, on 8 processes."""
    model, motion = network("OpenGVLab/InternVL3-8B-hf", "slowfast")
    frozen = changes.pop("frozen", [])
    counts = inventory(model, motion, frozen)
    return {peak.phase: peak for peak in peaks(model, motion, counts, replace(STEP, **changes))}, counts


def test_frozen_parts_have_no_gradients_and_no_moments():
    whole, all_ = estimate()
    part, fewer = estimate(frozen=["vision", "projector", "motion"])
    assert sum(all_.parameters.values()) == sum(fewer.parameters.values())
    less = sum(all_.parameters[name] for name in ("vision tower", "projector", "motion projector"))
    assert sum(all_.trained.values()) - sum(fewer.trained.values()) == less
    for component, bytes_ in {"gradients": 4, "optimizer": 8, "weights": 0, "reference": 0}.items():
        phase = "optimizer step"
        assert whole[phase].components[component] - part[phase].components[component] == bytes_ * less


def test_the_kv_cache_by_hand():
    found, _ = estimate()
    token = 28 * 2 * 4 * 128 * 2  # layers, keys and values, heads, channels, bytes
    assert found["rollout"].components["KV cache"] == 8 * (1736 + 4 * 2048) * token


def test_the_logits_by_hand():
    model, motion = network("OpenGVLab/InternVL3-8B-hf", "slowfast")
    counts = inventory(model, motion, [])
    for tokens, at_once in ((2048, 442), (100, 400)):  # 2**26 numbers; all of 4 answers
        assert Network(model, motion, counts, replace(STEP, tokens=tokens)).logits(1) == 4 * at_once * 151674


def test_adapters_have_no_second_network_and_small_states():
    model, motion = network("OpenGVLab/InternVL3-8B-hf", "slowfast")
    counts = inventory(model, motion, [], 16)
    step = replace(STEP, precision="bfloat16", lora=True)
    states = Network(model, motion, counts, step).states()
    h, kv, m, L, C = 3584, 512, 18944, 28, 2304
    lora = 16 * L * ((h + h) + 2 * (h + kv) + (h + h) + 3 * (h + m))
    projector = 2 * C + (C + 1) * h + (h + 1) * h
    assert counts.trained == dict.fromkeys(counts.trained, 0) | {"motion projector": projector, "LoRA": lora}
    assert states["optimizer"] == 12 * (lora + projector) and states["gradients"] == 2 * (lora + projector)
    assert states["reference"] == 2 * projector
    assert max(peak.total for peak in peaks(model, motion, counts, step)) < 24 * 2**30
    step = replace(step, precision="mixed", checkpointing=False)  # autograd keeps the copies of frozen matrices
    copies = Network(model, motion, counts, step).update(1)["last decoder layer"]["bfloat16 copies of weights"]
    matrices = L * (2 * h * h + 2 * h * kv + 3 * h * m)
    assert copies == pytest.approx(2 * (matrices + lora + projector), rel=1e-3)


def test_what_the_settings_change():
    base, all_ = estimate()
    assert "reference" not in estimate(reference=False)[0]
    assert estimate(checkpointing=False)[0]["update"].total > base["update"].total
    assert estimate(copies=1)[0]["rollout"].total < base["rollout"].total
    assert (
        estimate(precision="float32")[0]["rollout"].components["KV cache"] == 2 * base["rollout"].components["KV cache"]
    )
    half, slowfast = estimate(precision="bfloat16")[0], 4 * all_.parameters["SlowFast"]
    weights = [found["update"].components["weights"] - slowfast for found in (half, base)]
    assert 2 * weights[0] == weights[1]


def test_what_processes_share_and_what_they_gather():
    whole, counts = estimate(precision="bfloat16")
    every, slowfast = sum(counts.parameters.values()), counts.parameters["SlowFast"]
    one, _ = estimate(precision="bfloat16", shard_optimizer=True)
    all_, _ = estimate(precision="bfloat16", parallel="fsdp")
    states = {"weights": 4 * slowfast, "reference": 4 * slowfast, "gradients": 0, "optimizer": 0}  # and what is whole
    for name, kept in states.items():
        sizes = [found["optimizer step"].components[name] - kept for found in (whole, one, all_)]
        assert sizes == [sizes[0], sizes[0] / (8 if name == "optimizer" else 1), sizes[0] / 8]
    assert all_["rollout"].components["gathered weights"] == 2 * (every - slowfast)
    assert 0 < all_["reference"].components["gathered weights"] < 0.25 * 2 * (every - slowfast)
    assert max(peak.total for peak in all_.values()) < 0.4 * max(peak.total for peak in whole.values())
    assert "gathered weights" not in {name for name, size in whole["rollout"].components.items() if size}


def test_one_process_has_nobody_to_share_with():
    plain, *others = (
        {phase: peak.total for phase, peak in estimate(processes=1, **changes)[0].items()}
        for changes in ({}, {"parallel": "fsdp"}, {"shard_optimizer": True})
    )
    assert others == [plain, plain]
