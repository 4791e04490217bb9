"""Time of a GRPO step: TRL's GRPOTrainer and ours in turn, in one process, on the same model, prompt, frames, reward.

    pip install -e '.[bench]'
    python -m tests.benchmarks.trl_step --group 4 8 16
    python -m tests.benchmarks.trl_step --model small --group 8 --videos 2 --rounds 5

Random frames and answers of full length. TRL's step is all that lies between its trainer's `on_step_begin` and
`on_step_end`: prompt and images to tensors, answers, reference, update; its data loader, log and checkpoints are left
out. Ours is that of step_time.py with the reward. A round runs both, TRL first, after a first one that does not count
and in which both must have read the same prompt and pixels and must agree about the log-probs of the same answers.
Prints one JSON object: for each G, median seconds of each phase and of the step, CPU seconds of the step ("cpu", which
other programs disturb less), the median and the range of the rounds' ratios (TRL / ours), and P in both.

Legend: N videos, G answers per video, F frames, P prompt tokens, T answer tokens.
"""

import argparse
import importlib.util
import json
import tempfile
import time
from collections.abc import Callable
from functools import wraps
from statistics import median

import torch
import transformers
from huggingface_hub import constants
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, InternVLProcessor, InternVLVideoProcessor, PrinterCallback, TrainerCallback

from data.prompts import PROMPTS
from grpo.advantages import group_advantages
from grpo.runlog import Phases
from models.loading import save_policy
from models.policy import Policy
from rewards import Answers, RewardTable
from tests.benchmarks.step_time import Way, Work, make_policy, make_work

MISSING = "trl_step: error: TRL is not installed; it is in the optional extra: pip install -e '.[bench]'"
PHASES = ("rollout", "reference", "forward", "backward", "other")  # "other": all else that a step does
WHOLE = ("step", "cpu")  # seconds on the clock, and of CPU time
TABLE = RewardTable({"regression": 1.0, "format": 1.0})  # needs one video, and no perturbed copy of it
SLOT = "<IMG_CONTEXT>"
CHAT_TEMPLATE = """{% for message in messages %}<|im_start|>{{ message['role'] }}
{% for part in message['content'] %}{{ '<IMG_CONTEXT>' if part['type'] == 'image' else part['text'] }}{% endfor %}\
<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def rewards(texts: list[list[str]]) -> Tensor:
    """(N, G) rewards of N lists of G texts; every video has a mean opinion score of 3."""
    return TABLE(Answers.from_texts(texts, torch.full((len(texts),), 3.0))).total


class Ours(Way):
    """The step of step_time.py with advantages from the answers just sampled."""

    def advantages(self, work: Work) -> Tensor:
        return group_advantages(rewards(self.groups.texts))


def make_processor(folder: str, policy: Policy) -> InternVLProcessor:
    """What turns messages and images into tensors for TRL, with the words of our chat template."""
    names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": SLOT}
    names["video_token"] = "<video>"
    tokenizer = AutoTokenizer.from_pretrained(folder, extra_special_tokens=names, padding_side="left")
    return InternVLProcessor(
        policy.image_processor,
        tokenizer,
        InternVLVideoProcessor(),  # it is never used, but a processor needs one
        image_seq_length=policy.tokens_per_frame,
        chat_template=CHAT_TEMPLATE,
    )


def make_rows(work: Work) -> list[dict]:
    """A row for each video: the messages, with a part for each frame among the text, and the frames as images."""
    prompt, F = PROMPTS["released-train"], work.videos.frames.shape[1]
    first, *others = prompt.user_text([SLOT] * F).split(SLOT)
    content = [{"type": "text", "text": first}]
    for text in others:
        content += [{"type": "image"}, {"type": "text", "text": text}]
    system = {"role": "system", "content": [{"type": "text", "text": prompt.system}]}
    messages = [system, {"role": "user", "content": content}]
    videos = work.videos.frames.permute(0, 1, 3, 4, 2).numpy()
    return [{"prompt": messages, "images": [Image.fromarray(frame) for frame in video]} for video in videos]


def timed(function: Callable, phases: Phases, name: str) -> Callable:
    @wraps(function)
    def run(*args, **kwargs):
        with phases(name):
            return function(*args, **kwargs)

    return run


class Clock:
    """Both times of a step, from here on."""

    def __init__(self):
        self.step, self.cpu = time.perf_counter(), time.process_time()

    def seconds(self) -> dict[str, float]:
        return {"step": time.perf_counter() - self.step, "cpu": time.process_time() - self.cpu}


class Turns(TrainerCallback):
    """Times each of TRL's steps and then runs one of ours; `rounds` has the seconds of both, by phase."""

    def __init__(self, trainer, ours: Ours, work: Work):
        self.ours, self.work, self.rounds, self.phases = ours, work, [], Phases()
        self.read = {}  # what TRL's reference was given and gave
        trainer.ref_model.register_forward_hook(self.keep, with_kwargs=True)
        verbs = {"rollout": (trainer.model, "generate"), "reference": (trainer.ref_model, "forward")}
        verbs |= {"forward": (trainer, "compute_loss"), "backward": (trainer.accelerator, "backward")}
        for name, (owner, verb) in verbs.items():
            setattr(owner, verb, timed(getattr(owner, verb), self.phases, name))

    def keep(self, module, args, kwargs, out) -> None:
        self.read = {**kwargs, "log_probs": out.log_probs}

    def on_step_begin(self, *args, **kwargs) -> None:
        self.clock = Clock()

    def on_step_end(self, *args, **kwargs) -> None:
        theirs = {**self.clock.seconds(), **self.phases.take()}
        if not self.rounds:
            agree(self.read, self.ours, self.work)
        clock = Clock()
        self.ours.step(self.work)
        ours = {**clock.seconds(), **self.ours.phases.take()}
        for seconds in (theirs, ours):
            seconds["other"] = seconds["step"] - sum(seconds[name] for name in PHASES[:-1])
        self.rounds.append({"trl": theirs, "ours": ours})


def agree(read: dict[str, Tensor], ours: Way, work: Work) -> None:
    """TRL must have read what we read, and its reference must say of its answers what ours says of them."""
    videos, (N, G, T) = work.videos, work.uniforms.shape
    ids = read["input_ids"]
    assert torch.equal(ids[:, :-T], videos.prompt_ids.repeat_interleave(G, dim=0)), "another prompt"
    pixels = ours.policy.pixels(videos.frames).repeat_interleave(G, dim=0).flatten(0, 1)
    torch.testing.assert_close(read["pixel_values"], pixels, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        logprobs = ours.reference(videos, ids[:, -T:].unflatten(0, (N, G))).logprobs
    # The tolerance is for the probability of the image token, which TRL leaves in the softmax that it scores with.
    torch.testing.assert_close(read["log_probs"][:, -T:].unflatten(0, (N, G)), logprobs, rtol=1e-3, atol=1e-3)


def make_trainer(folder: str, policy: Policy, work: Work, steps: int):
    """A GRPOTrainer for the InternVL in `folder`, set to do the work of ours in as many steps."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    N, G, T = work.uniforms.shape

    def reward(completions: list[list[dict]], completion_ids: list[list[int]], **kwargs) -> list[float]:
        assert all(len(ids) == T for ids in completion_ids)
        texts = [answer[-1]["content"] for answer in completions]
        return rewards([texts[start : start + G] for start in range(0, N * G, G)]).flatten().tolist()

    # What is not named here is TRL's default.
    config = GRPOConfig(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=N * G,  # all answers of a step at once, as in ours
        num_generations=G,
        max_completion_length=T,
        generation_kwargs={"min_new_tokens": T},  # no end token before that
        beta=work.config.beta,
        epsilon=work.config.clip_low,
        loss_type="grpo",
        use_bias_correction_kl=False,
        max_grad_norm=work.config.grad_clip,
        learning_rate=work.config.lr,
        lr_scheduler_type="constant",
        shuffle_dataset=False,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        model=folder,
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list(make_rows(work)),
        processing_class=make_processor(folder, policy),
    )
    trainer.remove_callback(PrinterCallback)  # it would print amid the JSON
    return trainer


def measure_group(args: argparse.Namespace, G: int) -> dict:
    cpu = torch.device("cpu")
    policy, reference = (make_policy(args.model, "float32", False, cpu) for _ in range(2))
    work = make_work(policy, args.videos, G, args.frames, args.new_tokens, args.videos, cpu)
    with tempfile.TemporaryDirectory() as folder:
        save_policy(policy, folder)
        trainer = make_trainer(folder, policy, work, 1 + args.rounds)
        turns = Turns(trainer, Ours(policy, reference, lambda: None), work)
        trainer.add_callback(turns)
        trainer.train()
    rounds = turns.rounds[1:]
    P = {"trl": turns.read["input_ids"].shape[1] - args.new_tokens, "ours": work.videos.prompt_ids.shape[1]}
    result = {"G": G, "P": P, "seconds": {}, "ratio": {}}
    for way in ("trl", "ours"):
        result["seconds"][way] = {name: median(times[way][name] for times in rounds) for name in (*PHASES, *WHOLE)}
    for name in (*PHASES, *WHOLE):
        ratios = [times["trl"][name] / times["ours"][name] for times in rounds]
        result["ratio"][name] = {"median": median(ratios), "low": min(ratios), "high": max(ratios)}
    return result


def measure(args: argparse.Namespace) -> dict:
    import trl

    constants.HF_HUB_DISABLE_TELEMETRY = True  # TRL would tell of every trainer that is made
    torch.set_num_threads(args.threads)
    versions = {module.__name__: module.__version__ for module in (torch, transformers, trl)}
    return {**vars(args), "versions": versions, "groups": [measure_group(args, G) for G in args.group]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("tiny", "small"), default="tiny")
    parser.add_argument("--group", type=int, nargs="+", default=[8], help="G, one or more (default: 8)")
    parser.add_argument("--videos", type=int, default=1, help="N (default: 1)")
    parser.add_argument("--frames", type=int, default=6, help="F (default: 6)")
    parser.add_argument("--new-tokens", type=int, default=64, help="T (default: 64)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count (default: 5)")
    parser.add_argument("--threads", type=int, default=1, help="threads of the CPU (default: 1)")
    args = parser.parse_args()
    if importlib.util.find_spec("trl") is None:
        parser.exit(2, MISSING + "\n")
    print(json.dumps(measure(args), indent=1))


if __name__ == "__main__":
    main()
