import dataclasses
import itertools

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from data.prompts import PROMPTS
from models import policy as policy_module
from models import sampling
from models.loading import ATTENTION, load_policy, save_policy
from models.policy import Policy, Videos
from models.sampling import Completions, inverse_cdf
from models.slowfast import CLIPS
from tests.helpers import (
    generator,
    gradients,
    motion_policy,
    plain_model,
    relative,
    some_ids,
    some_videos,
    tiny_policy,
)

N, G, T = 2, 3, 6


def uniforms(N=N, G=G, T=T, seed=0):
    return torch.rand(N, G, T, generator=generator(seed))


def repeated(policy, videos, ids):
    """What plain transformers takes for the same answers: the prompt and its pixels once per answer."""
    G = ids.shape[1]
    prompts = videos.prompt_ids.repeat_interleave(G, dim=0)
    frames = list(videos.frames.repeat_interleave(G, dim=0).flatten(0, 1))
    pixels = policy.image_processor(frames, return_tensors="pt").pixel_values
    return torch.cat([prompts, ids.flatten(0, 1)], dim=1), pixels


def words(logits, model):
    """Logits of all tokens but the image token, which no answer can have."""
    return logits.index_fill(-1, torch.tensor(model.config.image_token_id), -torch.inf)


def picked(logits, ids, temperature):
    """(N, G, T) log-probs of `ids` and entropies from logits (N * G, P + T, V) of the whole sequences."""
    N, G, T = ids.shape
    logprobs = (logits[:, -T - 1 : -1] / temperature).log_softmax(-1).view(N, G, T, -1)
    return logprobs.gather(-1, ids[..., None])[..., 0], torch.special.entr(logprobs.exp()).sum(-1)


# ---- forward: the prompt once


@pytest.mark.parametrize("T", [6, 1])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_log_probs_and_gradients_equal_plain_transformers_with_the_prompt_repeated(
    T, attention, checkpointing, tmp_path
):
    save_policy(tiny_policy(), tmp_path)
    policy = load_policy(str(tmp_path), temperature=0.8, gradient_checkpointing=checkpointing)
    videos, ids = some_videos(policy, N), some_ids(policy, N, G, T)
    plain = plain_model(policy, attention).train()
    input_ids, pixels = repeated(policy, videos, ids)
    logits = words(plain(input_ids=input_ids, pixel_values=pixels).logits, plain)
    expected, entropy = picked(logits, ids, 0.8)
    calls = []
    policy.model.model.language_model.layers[0].self_attn.register_forward_pre_hook(lambda *_: calls.append(1))

    out = policy(videos, ids)
    torch.testing.assert_close(out.logprobs, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.entropy, entropy.detach(), rtol=1e-5, atol=1e-5)
    assert not out.entropy.requires_grad

    direction = torch.randn(ids.shape, generator=generator(1))
    (out.logprobs * direction).sum().backward()
    (expected * direction).sum().backward()
    gradients = {name: parameter.grad for name, parameter in plain.named_parameters()}
    for name, parameter in policy.model.named_parameters():
        assert relative(parameter.grad, gradients[name]) < 1e-5, name
    assert len(calls) == 1 + checkpointing  # the backward pass really recomputes


def test_every_parameter_gets_a_gradient():
    policy = tiny_policy()
    policy(some_videos(policy, 1), some_ids(policy, 1, 2, 3)).logprobs.sum().backward()
    assert [name for name, parameter in policy.named_parameters() if not parameter.grad.any()] == []


def test_siblings_and_other_videos_do_not_matter():
    policy = tiny_policy()
    videos, ids = some_videos(policy, N), some_ids(policy, N, G, T)
    together = policy(videos, ids).logprobs
    for n, g in itertools.product(range(N), range(G)):
        alone = policy(videos[n : n + 1], ids[n : n + 1, g : g + 1]).logprobs
        torch.testing.assert_close(alone[0, 0], together[n, g], rtol=1e-5, atol=1e-5)


def test_an_image_token_in_an_answer_disturbs_no_other_token():
    policy = tiny_policy()
    plain = plain_model(policy)
    videos, ids = some_videos(policy, 1), some_ids(policy, 1, 1, T)
    ids[0, 0, [1, 3]] = policy.model.config.image_token_id
    embeddings = plain.get_input_embeddings()(torch.cat([videos.prompt_ids, ids[0]], dim=1))
    visual = plain.get_image_features(repeated(policy, videos, ids)[1], return_dict=True).pooler_output
    embeddings[:, :-T][videos.prompt_ids == plain.config.image_token_id] = visual.flatten(0, 1)
    hidden = plain.model.language_model(inputs_embeds=embeddings).last_hidden_state
    expected, _ = picked(words(plain.lm_head(hidden), plain), ids, 1.0)
    others = [0, 2, 4, 5]
    actual = policy(videos, ids).logprobs
    torch.testing.assert_close(actual[..., others], expected[..., others], rtol=1e-5, atol=1e-5)


def test_the_image_token_is_never_drawn_however_likely_the_model_finds_it():
    policy = tiny_policy()
    videos = some_videos(policy, 1)
    image, plain = policy.model.config.image_token_id, plain_model(policy)
    pixels = repeated(policy, videos, torch.zeros(1, 1, 1, dtype=torch.long))[1]
    hidden = plain.model(input_ids=videos.prompt_ids, pixel_values=pixels).last_hidden_state[0, -1]
    with torch.no_grad():
        for model in (policy.model, plain):
            model.lm_head.weight[image] = 30 * hidden / hidden.square().sum()  # its logit is 30
    assert plain(input_ids=videos.prompt_ids, pixel_values=pixels).logits[0, -1].softmax(-1)[image] > 0.99
    prefix = policy.encode(videos)
    assert prefix.logprobs.exp().sum().item() == pytest.approx(1, abs=1e-5) and prefix.logprobs[0, image] < -1e30
    drawn = policy.sample(prefix, uniforms(1, 64, 2))
    assert not (drawn.ids == image).any() and not (policy.greedy(prefix, 2).ids == image).any()
    out = policy(videos, drawn.ids)
    assert out.logprobs.isfinite().all() and out.entropy.isfinite().all() and (out.logprobs > -30).all()
    out.logprobs.sum().backward()
    assert all(p.grad.isfinite().all() for p in policy.parameters() if p.grad is not None)


# ---- sampling


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_samplers_log_probs_are_the_trainers(checkpointing, tmp_path):
    save_policy(tiny_policy(ends=[*range(7, 40)]), tmp_path)
    policy = load_policy(str(tmp_path), temperature=0.7, gradient_checkpointing=checkpointing)
    videos = some_videos(policy, N)
    ids, mask, logprobs, _ = policy.sample(policy.encode(videos), uniforms(T=12))
    assert mask.any() and not mask.all()
    torch.testing.assert_close(logprobs, policy(videos, ids).logprobs.where(mask, 0), rtol=0, atol=1e-4)


def test_a_video_gets_the_same_answers_alone_and_in_a_batch():
    policy = tiny_policy()
    videos, draws = some_videos(policy, 3), uniforms(3, 4, 12)
    together = policy.sample(policy.encode(videos), draws).ids
    for n, g in itertools.product(range(3), range(4)):
        alone = policy.sample(policy.encode(videos[n : n + 1]), draws[n : n + 1, g : g + 1]).ids
        assert torch.equal(alone[0, 0], together[n, g, : alone.shape[-1]])


def test_a_prefix_can_be_continued_more_than_once():
    policy = tiny_policy()
    prefix = policy.encode(some_videos(policy, N))
    first, other, again = (
        policy.sample(prefix, uniforms(G=answers, seed=s)) for answers, s in ((3, 0), (5, 1), (3, 0))
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert other.ids.shape[1] == 5 and not torch.equal(other.ids[:, :3], first.ids)


def test_answers_follow_the_uniforms_through_the_trainers_distribution():
    """Each token is where its uniform number falls in the cumulative sum of plain transformers' probabilities."""
    policy = tiny_policy(temperature=1.3)
    plain = plain_model(policy)
    videos, draws = some_videos(policy, N), uniforms()
    ids, mask, _, _ = policy.sample(policy.encode(videos), draws)
    for n, g in itertools.product(range(N), range(G)):
        answer = ids[n : n + 1, g : g + 1]
        input_ids, pixels = repeated(policy, videos[n : n + 1], answer)
        logits = words(plain(input_ids=input_ids, pixel_values=pixels).logits, plain)[0, -answer.shape[-1] - 1 : -1]
        cdf = (logits.double() / 1.3).softmax(-1).cumsum(-1)
        for t in range(int(mask[n, g].sum())):
            token = int(answer[0, 0, t])
            low = cdf[t, token - 1] if token else 0.0
            assert low - 1e-6 <= draws[n, g, t] <= cdf[t, token] + 1e-6


def test_top_p_reaches_the_sampler():
    policy = tiny_policy()
    prefix = policy.encode(some_videos(policy, N))
    assert torch.equal(policy.sample(prefix, uniforms(), top_p=1e-9).ids[:, :1], policy.greedy(prefix, T).ids)


@pytest.mark.parametrize("ends", [[2], [2, *range(7, 60)]])
def test_greedy_equals_transformers_own_generate(ends):
    policy = tiny_policy(ends=ends).eval()
    plain = plain_model(policy).eval()
    videos = some_videos(policy, 4)
    ids, mask, _, truncated = policy.greedy(policy.encode(videos), 15)
    for n in range(4):
        input_ids, pixels = repeated(policy, videos[n : n + 1], ids[n : n + 1, :, :0])
        written = plain.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            pixel_values=pixels,
            max_new_tokens=15,
            do_sample=False,
            eos_token_id=ends,
            pad_token_id=policy.pad_id,
        )[0, input_ids.shape[1] :]
        assert torch.equal(ids[n, 0][mask[n, 0]], written)
        assert truncated[n, 0] == (written[-1].item() not in ends)


def test_answers_end_with_their_first_end_token():
    ends = [2, *range(7, 30)]
    policy = tiny_policy(ends=ends)
    draws = uniforms(4, 6, 20)
    ids, mask, logprobs, truncated = policy.sample(policy.encode(some_videos(policy, 4)), draws)
    lengths = []
    for n, g in itertools.product(range(4), range(6)):
        answer = ids[n, g].tolist()
        ended = [t for t, token in enumerate(answer) if token in ends]
        length = ended[0] + 1 if ended else 20
        lengths.append(length)
        assert truncated[n, g] == (not ended)
        assert mask[n, g].tolist() == [t < length for t in range(len(answer))]
        assert set(answer[length:]) <= {policy.pad_id} and logprobs[n, g, length:].eq(0).all()
        assert logprobs[n, g, :length].lt(0).all()
    assert ids.shape[-1] == max(lengths) and 1 in lengths and truncated.any() and not truncated.all()


def test_sampling_stops_when_every_answer_has_ended():
    policy = tiny_policy(ends=[*range(300)])
    completions = policy.sample(policy.encode(some_videos(policy, N)), uniforms())
    assert completions.ids.shape == (N, G, 1) and completions.mask.all() and not completions.truncated.any()


@pytest.mark.parametrize(("configured", "expected"), [(None, [2]), (5, [2, 5]), ([9, 2, 7], [2, 7, 9])])
def test_end_tokens_are_the_tokenizers_and_the_generation_configs(configured, expected):
    made = tiny_policy()
    made.model.generation_config.eos_token_id = configured
    assert Policy(made.model, made.tokenizer, made.image_processor).end_ids.tolist() == expected


# ---- drawing a token


def test_frequencies_on_a_grid_of_uniforms_are_the_probabilities():
    probabilities = torch.tensor([0.0, 0.125, 0.25, 0.0, 0.0625, 0.5625, 0.0], dtype=torch.float64)
    grid = (torch.arange(1600) + 0.5) / 1600
    drawn = inverse_cdf(probabilities.log().expand(1600, -1), grid)
    assert (drawn.bincount(minlength=7) / 1600).tolist() == probabilities.tolist()


def test_the_ends_of_the_unit_interval_draw_no_impossible_token():
    logprobs = torch.tensor([0.0, 0.3, 0.7, 0.0]).log().expand(2, -1)
    assert inverse_cdf(logprobs, torch.tensor([0.0, 1 - 2**-24])).tolist() == [1, 2]
    assert inverse_cdf(logprobs, torch.tensor([0.0, 1 - 2**-24]), top_p=0.5).tolist() == [2, 2]


@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.8, 0.99])
def test_top_p_equals_the_slow_version(top_p):
    logprobs = (2 * torch.randn(4, 12, generator=generator(0))).log_softmax(-1)
    grid = (torch.arange(500) + 0.5) / 500
    for row in logprobs:
        probabilities = [value.exp().item() for value in row.double()]
        kept, mass = set(), 0.0
        for token in sorted(range(12), key=lambda token: -probabilities[token]):
            if mass < top_p:
                kept.add(token)
                mass += probabilities[token]
        expected = []
        for u in grid.tolist():
            total = 0.0
            for token in sorted(kept):
                total += probabilities[token] / mass
                if u < total:
                    break
            expected.append(token)
        assert inverse_cdf(row.expand(500, -1), grid, top_p).tolist() == expected


# ---- words and tokens


def test_prompts_hold_one_slot_per_visual_token():
    policy = tiny_policy()
    ids = policy.prompt_ids("Judge.", lambda images: " and ".join(images), frames=3)
    assert int((ids == policy.model.config.image_token_id).sum()) == 3 * policy.tokens_per_frame == 3 * 9
    text = policy.tokenizer.decode(ids)
    assert text.startswith("<|im_start|>system\nJudge.<|im_end|>\n<|im_start|>user\n<img><IMG_CONTEXT>")
    assert text.endswith("</img><|im_end|>\n<|im_start|>assistant\n") and text.count("</img> and <img>") == 2


def test_a_wrong_number_of_slots_is_refused():
    policy = tiny_policy()
    with pytest.raises(ValueError, match="19 image slots of 2 frames x 9 tokens"):
        policy.prompt_ids("", lambda images: "".join(images) + "<IMG_CONTEXT>", frames=2)
    videos = some_videos(policy, 1)
    with pytest.raises(ValueError, match="Image features and image tokens do not match"):
        policy.encode(Videos(videos.frames[:, :1], videos.prompt_ids))
    policy.model.config.image_token_id = 8
    with pytest.raises(ValueError, match="0 image slots"):
        policy.prompt_ids("", "".join, frames=2)


def test_texts_leave_out_the_end_token_and_what_is_behind_it():
    policy = tiny_policy()
    words = ["clear <answer>4.50</answer>", "größer"]
    answers = policy.tokenizer([f"{text}<|im_end|>" for text in words], padding=True, padding_side="right")
    ids, mask = torch.tensor([answers.input_ids]), torch.tensor([answers.attention_mask]).bool()
    ids[~mask] = policy.tokenizer("x").input_ids[0]
    nothing = torch.zeros(1, 2)
    assert policy.texts(Completions(ids, mask, logprobs=nothing, truncated=nothing)) == [words]


# ---- training in parts


@pytest.mark.parametrize(
    ("parts", "prefixes"),
    [
        (["vision"], ["model.vision_tower."]),
        (["projector", "vision"], ["model.vision_tower.", "model.multi_modal_projector."]),
        (["language"], ["model.language_model.", "lm_head."]),
    ],
)
def test_frozen_parts_get_no_gradient_and_the_others_do(parts, prefixes):
    policy = tiny_policy()
    policy.freeze(parts)
    policy(some_videos(policy, N), some_ids(policy, N, G, T)).logprobs.sum().backward()
    for name, parameter in policy.model.named_parameters():
        frozen = name.startswith(tuple(prefixes))
        assert (parameter.grad is None) == frozen and parameter.requires_grad != frozen, name


def test_a_wrong_part_and_nothing_left_to_train_are_named():
    with pytest.raises(ValueError, match="--freeze head: choose among vision, projector, language, motion"):
        tiny_policy().freeze(["vision", "head"])
    with pytest.raises(ValueError, match="--freeze language,vision,projector: leaves nothing to train"):
        tiny_policy().freeze(["language", "vision", "projector"])


# ---- answers that end leave the batch


@pytest.mark.parametrize("sync_every", [1, 5])
def test_ended_answers_leave_the_batch_and_change_nothing(monkeypatch, sync_every):
    policy = tiny_policy(ends=list(range(12))).eval()
    videos, drawn = some_videos(policy, N=4), uniforms(4, 8, 60, seed=2)
    sizes = []
    policy.model.model.language_model.register_forward_hook(
        lambda module, args, kwargs, out: sizes.append(kwargs["inputs_embeds"].shape[:2].numel()), with_kwargs=True
    )
    monkeypatch.setitem(sampling.SYNC_EVERY, "cpu", sync_every)
    prefix = policy.encode(videos)
    del sizes[:]
    shrinking, tokens = policy.sample(prefix, drawn), sizes.copy()
    assert sorted(tokens, reverse=True) == tokens and tokens[0] == 32 and tokens[-1] <= 4
    alive = shrinking.mask.sum((0, 1))[1:]  # at each of the decoder's steps
    assert all(size >= count for size, count in zip(tokens, alive.tolist()))
    monkeypatch.setattr(sampling, "remaining", lambda alive: None)
    for _ in range(2):  # the prefix has all its prompts still
        del sizes[:]
        whole = policy.sample(prefix, drawn)
        assert set(sizes) == {32}
        for one, other in zip(shrinking[:2] + shrinking[3:], whole[:2] + whole[3:]):
            assert torch.equal(one, other)
        torch.testing.assert_close(shrinking.logprobs, whole.logprobs, rtol=1e-5, atol=1e-5)
    assert sum(tokens) < 0.75 * sum(sizes)


# ---- memory


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        made = [out] if isinstance(out, Tensor) else [value for value in out or () if isinstance(value, Tensor)]
        self.elements = max([self.elements, *(value.numel() for value in made)])
        return out


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_logits_in_chunks_change_memory_and_nothing_else(monkeypatch, autocast):
    policy = tiny_policy()
    policy.autocast_dtype = autocast
    policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    videos, ids = some_videos(policy, N=2, F=1), some_ids(policy, N=2, G=3, T=40)
    V, found = policy.model.config.text_config.vocab_size, []
    for at_once in (policy_module.LOGITS_AT_ONCE, 7 * V + 3):
        monkeypatch.setattr(policy_module, "LOGITS_AT_ONCE", at_once)
        policy.zero_grad()
        hidden = torch.randn(2, 3, 40, 96, generator=generator(1), requires_grad=True)
        with Largest() as largest, policy.autocast():
            chunked = policy.score_tokens(hidden, ids)
            chunked.logprobs.square().sum().backward()
        whole = policy(videos, ids)
        whole.logprobs.square().sum().backward()
        found.append([*chunked, *whole, hidden.grad, *gradients(policy).values()])
        assert largest.elements == (2 * 3 * 40 * V if len(found) == 1 else max(7 * V, V * 96))
    for one, chunks in zip(*found):
        assert relative(chunks, one) < (1e-5 if autocast is None else 2e-2)


# ---- the motion token


@pytest.mark.parametrize("frames", [2, 6])
def test_motion_fills_the_last_slot_of_the_prompt(frames):
    policy = motion_policy(frames=frames)
    videos, ids = some_videos(policy, 2, F=frames), some_ids(policy, 2, 2, T)
    slots = (videos.prompt_ids == policy.model.config.image_token_id).sum(-1)
    assert slots.tolist() == [frames * policy.tokens_per_frame + 1] * 2
    text = policy.tokenizer.decode(videos.prompt_ids[0])
    assert text.count("<img>") == frames + 1 and "<img><IMG_CONTEXT></img>. Well?" in text
    plain = plain_model(policy).train()
    input_ids, pixels = repeated(policy, videos, ids)
    expected, _ = picked(words(plain(input_ids=input_ids, pixel_values=pixels).logits, plain), ids, 1.0)
    out = policy(videos, ids)
    torch.testing.assert_close(out.logprobs, expected, rtol=1e-5, atol=1e-5)

    direction = torch.randn(ids.shape, generator=generator(1))
    (out.logprobs * direction).sum().backward()
    (expected * direction).sum().backward()
    gradients = {name: parameter.grad for name, parameter in plain.named_parameters()}
    for name, parameter in policy.model.named_parameters():
        if "slowfast" not in name:
            assert relative(parameter.grad, gradients[name]) < 1e-4, name


def test_with_motion_the_samplers_log_probs_are_the_trainers():
    policy = motion_policy()
    videos = some_videos(policy, N)
    drawn = policy.sample(policy.encode(videos), uniforms())
    out = policy(videos, drawn.ids)
    torch.testing.assert_close(drawn.logprobs[drawn.mask], out.logprobs[drawn.mask], rtol=1e-4, atol=1e-4)


def test_slowfast_watches_once_for_every_pass(monkeypatch):
    policy = motion_policy()
    videos, ids = some_videos(policy, N=3), some_ids(policy, N=3, G=2, T=4)
    from_frames = policy(videos, ids).logprobs
    first, sampled = policy.encode(videos).logprobs, policy.sample(policy.encode(videos), torch.full((3, 2, 4), 0.4))
    watched = policy.watch(videos)
    assert watched.motion.shape == (3, policy.model.model.slowfast.config.channels) and not watched.motion.requires_grad
    monkeypatch.delattr(type(policy.model.model.slowfast), "forward")
    torch.testing.assert_close(policy(watched, ids).logprobs, from_frames, atol=0, rtol=0)
    torch.testing.assert_close(policy.encode(watched).logprobs, first, atol=0, rtol=0)
    assert policy.sample(policy.encode(watched), torch.full((3, 2, 4), 0.4)).ids.equal(sampled.ids)
    torch.testing.assert_close(policy(watched[1:], ids[1:]).logprobs, from_frames[1:], atol=1e-5, rtol=1e-5)

    plain = tiny_policy().watch(videos)
    assert plain.motion is None and plain.visual is None and plain.frames is videos.frames


@pytest.mark.parametrize("make", [tiny_policy, motion_policy])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_a_frozen_vision_tower_watches_once_for_every_pass(monkeypatch, make, autocast):
    policy, reference = make(), make()
    policy.autocast_dtype = reference.autocast_dtype = autocast
    videos, ids = some_videos(policy, N=3), some_ids(policy, N=3, G=2, T=4)
    policy.freeze(["vision"])
    assert policy.watch(videos).visual is None  # its projector is trained still
    policy.freeze(["projector"])
    first, expected = policy.encode(videos).logprobs, policy(videos, ids).logprobs
    expected.sum().backward()
    found, watched = gradients(policy), policy.watch(videos)
    assert watched.visual.shape == (3, 2 * policy.tokens_per_frame, 96) and not watched.visual.requires_grad
    policy.zero_grad()
    monkeypatch.delattr(type(policy.model.model.vision_tower), "forward")
    again = policy(watched, ids).logprobs
    again.sum().backward()
    assert torch.equal(again, expected) and torch.equal(policy.encode(watched).logprobs, first)
    assert torch.equal(reference(watched, ids).logprobs, expected)
    assert found.keys() == gradients(policy).keys() and all(found[k].equal(g) for k, g in gradients(policy).items())


def with_clips(policy, videos, clips, seed=5):
    """The videos with dense clips of noise, each of its own strength."""
    shape = (len(videos), clips, policy.clip_frames, *videos.frames.shape[2:])
    g = generator(seed)
    noise = torch.rand(shape, generator=g) * torch.rand(*shape[:2], 1, 1, 1, 1, generator=g)
    return dataclasses.replace(videos, motion_clips=(255 * noise).to(torch.uint8))


@pytest.mark.parametrize("clips", [1, 3])
def test_slowfast_sees_the_dense_clips_instead_of_the_frames_and_its_features_are_averaged(clips):
    policy = motion_policy(**CLIPS)
    slowfast = policy.model.model.slowfast
    videos, ids = with_clips(policy, some_videos(policy, N=3), clips), some_ids(policy, N=3, G=2, T=4)
    expected = torch.zeros(3, slowfast.config.channels)
    for n, k in itertools.product(range(3), range(clips)):
        pixels = (videos.motion_clips[n, k] / 255 - policy.image_mean) / policy.image_std
        expected[n] += slowfast(pixels[None])[0] / clips
    watched = policy.watch(videos)
    torch.testing.assert_close(watched.motion, expected, rtol=1e-5, atol=1e-6)
    assert watched.motion.dtype == torch.float32 and watched.motion_clips is None and watched.frames is videos.frames
    assert torch.equal(policy(videos, ids).logprobs, policy(watched, ids).logprobs)
    assert torch.equal(policy.encode(videos).logprobs, policy.encode(watched).logprobs)
    given = dataclasses.replace(videos, motion=expected, motion_clips=None)
    torch.testing.assert_close(policy(given, ids).logprobs, policy(watched, ids).logprobs, rtol=1e-4, atol=1e-4)
    other = with_clips(policy, videos, clips, seed=6)
    assert not torch.allclose(policy(other, ids).logprobs, policy(watched, ids).logprobs, rtol=0, atol=0.01)
    for n in range(3):
        assert torch.equal(policy.watch(videos[n : n + 1]).motion[0], watched.motion[n])


def test_what_slowfast_would_see_is_checked_by_its_flag():
    clips, frames, plain = motion_policy(**CLIPS), motion_policy(), tiny_policy()
    clips.check_frames(5, motion_clips=2)
    frames.check_frames(2)
    plain.check_frames(5)
    assert (clips.clip_frames, plain.clip_frames) == (8, 0)
    with pytest.raises(ValueError, match=r"^--frames 5: slow_stride 4: of 5 frames"):
        clips.check_frames(5)
    with pytest.raises(ValueError, match=r"^--motion-clips 1: slow_stride 2: of 8 frames"):
        frames.check_frames(2, motion_clips=1)


def dynamic(policy: Policy) -> Policy:
    """The same network with InternVL3's kind of positions."""
    policy.model.config.text_config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    return policy


def test_dynamic_positions_are_those_of_transformers():
    plain = plain_model(dynamic(tiny_policy()), "sdpa")
    assert plain.model.language_model.rotary_emb.rope_type == "dynamic"
    model = plain_model(dynamic(tiny_policy()), ATTENTION)
    policy = Policy(model, tiny_policy().tokenizer, tiny_policy().image_processor)
    videos, ids = some_videos(policy, N), some_ids(policy, N, G, T)
    input_ids, pixels = repeated(policy, videos, ids)
    expected, _ = picked(words(plain(input_ids=input_ids, pixel_values=pixels).logits, plain), ids, 1.0)
    torch.testing.assert_close(policy(videos, ids).logprobs, expected, rtol=1e-5, atol=1e-5)
    assert policy.model.config.text_config.rope_parameters["rope_type"] == "dynamic"  # as it is saved


def test_more_tokens_than_positions_are_refused():
    policy, words = tiny_policy(), PROMPTS["released-test"]
    P = len(policy.prompt_ids(words.system, words.user_text, 3))
    most = policy.model.config.text_config.max_position_embeddings - P
    policy.check_length(words, 3, most)
    with pytest.raises(
        ValueError, match=rf"^--max-new-tokens {most + 1}: with the prompt's {P}, more than the model's"
    ):
        policy.check_length(words, 3, most + 1)


def test_the_motion_projector_learns_unless_frozen_and_slowfast_never_does():
    for parts in ([], ["motion"], ["vision", "projector", "language"]):
        policy = motion_policy()
        policy.freeze(parts)
        policy(some_videos(policy, N), some_ids(policy, N, G, T)).logprobs.sum().backward()
        learning = {name for name, parameter in policy.model.named_parameters() if parameter.grad is not None}
        assert not any("slowfast" in name for name in learning)
        assert any("motion_projector" in name for name in learning) == ("motion" not in parts)
        assert any("language_model" in name for name in learning) == ("language" not in parts)
    with pytest.raises(ValueError, match="--freeze motion: the model has no motion token"):
        tiny_policy().freeze(["motion"])


# ---- another size of frame


@pytest.mark.parametrize("make", [tiny_policy, motion_policy])
def test_frames_of_another_size_have_other_tokens(make):
    made = make()
    unit = made.image_side // int(made.tokens_per_frame**0.5)
    policy = Policy(made.model, made.tokenizer, made.image_processor, image_side=made.image_side + unit).train()
    assert policy.tokens_per_frame == (policy.image_side // unit) ** 2 > made.tokens_per_frame
    videos, ids = some_videos(policy, 2), some_ids(policy, 2, 2, T)
    plain = plain_model(policy).train()
    input_ids = torch.cat([videos.prompt_ids.repeat_interleave(2, dim=0), ids.flatten(0, 1)], dim=1)
    frames = videos.frames.repeat_interleave(2, dim=0).flatten(0, 1)
    pixels = (frames / 255 - policy.image_mean) / policy.image_std
    expected, _ = picked(words(plain(input_ids=input_ids, pixel_values=pixels).logits, plain), ids, 1.0)
    torch.testing.assert_close(policy(videos, ids).logprobs, expected, rtol=1e-5, atol=1e-5)


def test_a_size_that_visual_tokens_do_not_divide_is_named():
    made = tiny_policy()
    with pytest.raises(ValueError, match=f"--image-side {made.image_side + 1}: must be a multiple of 32"):
        Policy(made.model, made.tokenizer, made.image_processor, image_side=made.image_side + 1)
