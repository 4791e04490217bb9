"""A step computed the plain way and ours: the same tokens, log-probs and gradients; and the benchmark of the two."""

import pytest
import torch
from torch.utils.flop_counter import flop_registry

from grpo.loss import grpo_loss
from tests.benchmarks import scaling, step_time
from tests.helpers import generator, gradients, ragged_mask, relative, some_ids, some_videos, tiny_policy
from tests.plain import PlainPolicy

N, G, T = 2, 3, 8


def test_the_same_uniforms_draw_the_same_tokens():
    policy = tiny_policy(ends=list(range(40))).eval()  # so many end tokens that answers differ in length
    plain, videos = PlainPolicy(policy).eval(), some_videos(policy, N)
    for seed in range(5):
        uniforms = torch.rand(N, G, T, generator=generator(seed))
        ours, theirs = (either.sample(either.encode(videos), uniforms) for either in (policy, plain))
        assert torch.equal(ours.ids, theirs.ids) and torch.equal(ours.mask, theirs.mask)
        assert torch.equal(ours.truncated, theirs.truncated)
        torch.testing.assert_close(ours.logprobs, theirs.logprobs, rtol=1e-5, atol=1e-5)
        assert policy.texts(ours) == plain.texts(theirs)
    assert 1 < ours.mask.sum() < ours.mask.numel()


def test_log_probs_entropies_and_gradients_are_equal():
    policy = tiny_policy()
    plain = PlainPolicy(policy)
    videos, ids, mask = some_videos(policy, N), some_ids(policy, N, G, T), ragged_mask(N, G, T)
    old, reference = (-6 + torch.randn(N, G, T, generator=generator(k)) for k in (1, 2))
    advantages, weights = torch.randn(N, G, generator=generator(3)), mask / mask.sum()
    outs = []
    for either in (policy, plain):
        out = either(videos, ids)
        options = {"clip_low": 0.2, "clip_high": 0.2, "beta": 0.04, "kl": "k3"}
        loss, _ = grpo_loss(out.logprobs, old, reference, advantages, mask, weights, **options)
        loss.backward()
        outs.append([out.logprobs.detach(), out.entropy])
    for ours, theirs in zip(*outs):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    mine, others = gradients(policy), gradients(plain)
    assert mine.keys() == others.keys()
    assert max(relative(mine[name], others[name]) for name in mine) < 1e-5


@pytest.mark.parametrize("ours_only", [False, True])
def test_the_benchmark_runs_both_ways_and_accounts_for_their_time(ours_only):
    words = ["--model", "tiny", "--videos", "2", "--group", "2", "--frames", "2", "--new-tokens", "5", "--rounds", "2"]
    found = step_time.measure(step_time.parse_arguments(words + ["--ours-only"] * ours_only))
    assert found["seconds"].keys() == ({"ours"} if ours_only else {"ours", "plain"})
    for seconds in found["seconds"].values():
        assert all(seconds[phase] > 0 for phase in ("decode", *step_time.PHASES))
    assert found["ratio"].keys() == (set() if ours_only else {*step_time.PHASES, "rollout", "update", "step"})
    assert all(0 < share < 2 for shares in found["share_of_peak"].values() for share in shares.values())


def test_bytes_of_the_token_loop_by_hand():
    policy = step_time.make_policy("tiny", "mixed", False, torch.device("cpu"))
    N, G, T = 2, 3, 4
    work = step_time.make_work(policy, N, G, 1, T, N, torch.device("cpu"))
    P, weights = work.videos.prompt_ids.shape[1], 3 * (2 * 96**2 + 2 * 96 * 48 + 3 * 96 * 160)
    weights += len(policy.model.lm_head.weight) * 96
    stored = [N * P + N * G * t for t in (1, 2, 3)]  # tokens, at each of the loop's steps
    expected = 2 * (3 * weights + sum(stored) * 3 * 2 * 48)
    assert step_time.counted(policy, work).token_loop_bytes() == expected


CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@pytest.mark.skipif(CPU_ATTENTION not in flop_registry, reason="this torch does not count attention on the CPU")
@pytest.mark.parametrize("shared", [True, False])
def test_operations_are_those_that_torch_counts(shared):
    device = torch.device("cpu")
    policy = step_time.make_policy("tiny", "float32", False, device)
    work = step_time.make_work(policy, 2, 3, 2, 6, 2, device)
    way = step_time.Way(*(policy if shared else PlainPolicy(policy) for _ in range(2)), lambda: None)
    for parameter in way.policy.parameters():
        parameter.requires_grad_(True)
    found, expected = step_time.flop_of(way, work), step_time.counted(policy, work)
    assert sum(expected.rollout(shared).values()) == pytest.approx(found["rollout"], rel=0.01)
    passes = expected.step(shared, checkpointing=False)
    assert passes["forward"] + passes["backward"] == pytest.approx(found["update"], rel=0.01)


def test_ways_that_compute_different_steps_are_refused():
    numbers = {"loss": 0.1, "kl": 0.0, "entropy": 2.0, "grad_norm": 1.0}
    step_time.agree(numbers, numbers)
    with pytest.raises(AssertionError, match="entropy"):
        step_time.agree(numbers, numbers | {"entropy": 2.1})


def test_the_scaling_table_is_of_each_case_once(tmp_path, capsys, monkeypatch):
    assert len(scaling.cases(scaling.ALONG)) == sum(map(len, scaling.ALONG.values())) - 3  # BASE is in all four
    monkeypatch.setattr(scaling, "BASE", {"group": 3, "frames": 1, "new_tokens": 9, "videos": 1})
    arguments = ["--out", str(tmp_path), "--only", "new_tokens", "--values", "2", "3", "--rounds", "1"]
    scaling.main(arguments)
    header, _, *rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    assert [row[:4] for row in cells] == [["3", "1", "2", "1"], ["3", "1", "3", "1"]]
    assert {len(row) for row in cells} == {len(header.split("|")) - 2}
    for row in cells:
        assert float(row[12]) == pytest.approx(float(row[11]), rel=0.1)  # MiB measured, and counted
        assert float(row[13]) > 2 * float(row[11])
    files = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    scaling.main(arguments)
    assert files == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} and len(files) == 2
