import torch

from grpo.rollout import Groups, answer_uniforms, sample_groups
from tests.helpers import some_videos, tiny_policy

KEY = {"seed": 3, "step": 5, "clip": 7, "G": 4, "T": 6, "copy": "raw"}


def test_uniforms_depend_on_their_key_alone():
    first = answer_uniforms(**KEY)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert torch.equal(answer_uniforms(**KEY), first)
    assert torch.equal(torch.get_rng_state(), state)  # and leave the global stream alone


def test_every_part_of_the_key_matters():
    changed = [KEY, *(KEY | {name: KEY[name] + 1} for name in ("seed", "step", "clip")), KEY | {"copy": "perturbed"}]
    streams = [answer_uniforms(**key) for key in changed]
    assert len({tuple(stream.flatten().tolist()) for stream in streams}) == len(streams)
    # Neighbouring digits must not run together: step 1 of clip 11 is not step 11 of clip 1.
    assert not torch.equal(answer_uniforms(0, 1, 11, 2, 3), answer_uniforms(0, 11, 1, 2, 3))


def test_uniforms_are_uniform():
    draws = torch.cat([answer_uniforms(0, step, clip, 8, 16).flatten() for step in range(8) for clip in range(8)])
    assert draws.min() >= 0 and draws.max() < 1
    counts = torch.histc(draws, bins=16, min=0, max=1)
    expected = len(draws) / 16
    assert ((counts - expected).square() / expected).sum() < 37.7  # chi-squared with 15 degrees: one in a thousand


def test_groups_are_what_the_policy_sampled():
    policy = tiny_policy(ends=[*range(7, 40)])
    videos = some_videos(policy, 3)
    uniforms = torch.stack([answer_uniforms(0, 1, clip, 4, 9) for clip in range(3)])
    groups = sample_groups(policy, videos, uniforms)
    completions = policy.sample(policy.encode(videos), uniforms)
    for name, value in completions._asdict().items():
        assert torch.equal(getattr(groups, name), value), name
    assert groups.texts == policy.texts(completions)
    assert not groups.logprobs.requires_grad


def test_rows_of_groups_keep_their_parts_together():
    N, G, T = 4, 2, 3
    ids = torch.arange(N * G * T).view(N, G, T)
    texts = [[f"{n} {g}" for g in range(G)] for n in range(N)]
    groups = Groups(ids, ids > 5, -ids.float(), ids[..., 0] > 9, texts)
    behind = groups[3:]
    assert torch.equal(behind.ids, ids[3:]) and torch.equal(behind.mask, ids[3:] > 5)
    assert torch.equal(behind.logprobs, -ids[3:].float()) and behind.truncated.tolist() == [[True, True]]
    assert behind.texts == [["3 0", "3 1"]]
