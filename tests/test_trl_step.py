"""The benchmark against TRL: that it runs, where TRL is installed, and what it says where it is not."""

import argparse
import sys

import pytest
import torch

from tests.benchmarks import trl_step

N, G, F, T = 2, 2, 2, 4


def test_a_round_of_both_accounts_for_their_time():
    pytest.importorskip("trl", reason="TRL is not installed; pip install -e '.[bench]'")
    shape = {"videos": N, "group": [G], "frames": F, "new_tokens": T}
    [found] = trl_step.measure(argparse.Namespace(model="tiny", **shape, rounds=1, threads=1))["groups"]
    assert found["G"] == G
    assert found["P"]["trl"] == found["P"]["ours"] > 0
    for seconds in found["seconds"].values():
        assert all(seconds[name] > 0 for name in (*trl_step.PHASES, *trl_step.WHOLE))
        assert sum(seconds[phase] for phase in trl_step.PHASES) == pytest.approx(seconds["step"])
    assert found["ratio"].keys() == {*trl_step.PHASES, *trl_step.WHOLE}


def test_other_work_is_refused():
    cpu = torch.device("cpu")
    policy, reference = (trl_step.make_policy("tiny", "float32", False, cpu) for _ in range(2))
    work = trl_step.make_work(policy, N, G, F, T, N, cpu)
    ours = trl_step.Ours(policy, reference, lambda: None)
    prompts = work.videos.prompt_ids.repeat_interleave(G, dim=0)
    answers = torch.randint(10, 600, (N, G, T), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logprobs = reference(work.videos, answers).logprobs.flatten(0, 1)
    same = {
        "input_ids": torch.cat([prompts, answers.flatten(0, 1)], dim=1),
        "pixel_values": policy.pixels(work.videos.frames).repeat_interleave(G, dim=0).flatten(0, 1),
        "log_probs": torch.cat([torch.zeros(prompts.shape), logprobs], dim=1),
    }
    trl_step.agree(same, ours, work)
    for name in same:
        with pytest.raises(AssertionError):
            trl_step.agree(same | {name: same[name].flip(0)}, ours, work)
    with pytest.raises(AssertionError, match="another prompt"):
        trl_step.agree(same | {"input_ids": same["input_ids"].clone().fill_(5)}, ours, work)


def test_without_trl_one_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.setattr(sys, "argv", ["trl_step"])
    with pytest.raises(SystemExit) as stopped:
        trl_step.main()
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and out == ""
    assert err.count("\n") == 1 and "pip install -e '.[bench]'" in err
