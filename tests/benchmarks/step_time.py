"""Time of a GRPO step, phase by phase: the plain way (tests/plain.py) and ours in turn, in one process.

    python -m tests.benchmarks.step_time --model small --group 8
    python -m tests.benchmarks.step_time --model tiny --group 4 --videos 2 --rounds 5 --threads 2
    python -m tests.benchmarks.step_time --model internvl3-1b-shape --device cuda --precision bfloat16 \
        --gradient-checkpointing --ours-only --videos 4 --new-tokens 200

Random frames and answers of full length; the step is that of train.py, from frames to new weights. A round runs both,
after a first one that does not count and in which their numbers must agree. Prints one JSON object: median seconds of
each phase, the median and the range of the rounds' ratios (plain / ours), tokens a second, FLOP a second as a share of
what a matrix product reaches on this machine, for our token loop bytes a second as a share of what a copy reaches, and
peak memory: that of the update beyond weights and moments, and on CUDA with --ours-only that of the whole step beside
the estimate of `models.footprint`. "decode" is the frames of N short clips by one thread, the same for both and in
neither's step: the loader's processes do it meanwhile.

Legend: N videos, G answers per video, F frames, P prompt tokens, T answer tokens.
"""

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import GenerationConfig, GotOcr2ImageProcessor, InternVLForConditionalGeneration

from data.prompts import PROMPTS
from data.samplers import UniformSampler
from data.video import read_frames, resize_square
from grpo.config import TINY_MODEL, Config
from grpo.master_weights import MasterAdamW
from grpo.rollout import sample_groups
from grpo.runlog import Phases
from grpo.update import freeze, update
from models.footprint import Step, inventory, peaks
from models.loading import ATTENTION, PRECISIONS, load_policy
from models.policy import Policy, Videos
from models.tiny.pretrain import make_tokenizer
from tests.benchmarks.arithmetic import Sizes
from tests.benchmarks.decode import clip
from tests.benchmarks.shapes import SHAPES
from tests.memory import LiveBytes
from tests.plain import PlainPolicy

ROLLOUT, UPDATE = ("vision", "prefill", "token loop"), ("forward", "backward", "optimizer")
PHASES = (*ROLLOUT, "reference", *UPDATE)
MODELS = ("tiny", *SHAPES)
CLIP = {"seconds": 4, "gop": 100, "size": (640, 360)}  # what is decoded


def make_policy(name: str, precision: str, checkpointing: bool, device: torch.device) -> Policy:
    """The tiny checkpoint without its motion token, or random weights in one of SHAPES; answers never end."""
    if name == "tiny":
        policy = load_policy(TINY_MODEL, precision=precision, motion="none", device=device)
    else:
        torch.manual_seed(0)
        dtype, autocast = PRECISIONS[precision]
        tokenizer, config = make_tokenizer(), SHAPES[name]()
        config.image_token_id = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
        with torch.device(device):
            model = InternVLForConditionalGeneration._from_config(config, attn_implementation=ATTENTION, dtype=dtype)
        model.generation_config = GenerationConfig(eos_token_id=0, pad_token_id=0)
        side = config.vision_config.image_size[0]
        pixels = GotOcr2ImageProcessor(size={"height": side, "width": side}, image_mean=[0.5] * 3, image_std=[0.25] * 3)
        policy = Policy(model, tokenizer, pixels, autocast=autocast).to(device)
    if checkpointing:
        policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    policy.end_ids.fill_(policy.model.config.image_token_id)  # which is never drawn
    return policy


@dataclass
class Work:
    """What both ways are given: the same videos, random numbers and advantages."""

    videos: Videos
    uniforms: Tensor
    advantages: Tensor
    config: Config


def make_work(policy: Policy, N: int, G: int, F: int, T: int, micro_batch: int, device: torch.device) -> Work:
    generator = torch.Generator().manual_seed(1)
    shape = (N, F, 3, policy.image_side, policy.image_side)
    frames = torch.randint(256, shape, dtype=torch.uint8, generator=generator).to(device)
    prompt = PROMPTS["released-train"]
    ids = policy.prompt_ids(prompt.system, prompt.user_text, F).expand(N, -1).to(device)
    uniforms = torch.rand(N, G, T, generator=generator).to(device)
    advantages = torch.randn(N, G, generator=generator).to(device)
    config = Config(videos_per_step=N, group_size=G, max_new_tokens=T, micro_batch=micro_batch, lr=1e-6)
    return Work(Videos(frames, ids), uniforms, advantages, config)


class Way:
    """A policy, its frozen reference and its optimizer; `step` is one GRPO step."""

    def __init__(self, policy: nn.Module, reference: nn.Module, synchronize: Callable[[], None]):
        self.policy, self.reference = policy.train(), reference.train().requires_grad_(False)
        self.optimizer = MasterAdamW(policy.parameters(), lr=1e-6)
        self.phases, self.synchronize = Phases(synchronize), synchronize

    def step(self, work: Work) -> dict[str, float]:
        """Runs a step; returns what it measured (loss, KL, entropy). Times are in `phases`."""
        with self.phases("rollout"), self.parts_of_rollout(work.videos.prompt_ids.shape[1]):
            self.groups = sample_groups(self.policy, work.videos, work.uniforms)
        advantages = self.advantages(work)
        with self.phases("reference"):
            batch = freeze(work.videos, self.groups, advantages, self.policy, self.reference, work.config)
        return update(self.policy, self.optimizer, batch, 1e-6, work.config, self.phases)

    def advantages(self, work: Work) -> Tensor:
        """Given ones, whatever the answers."""
        return work.advantages

    def seconds(self) -> dict[str, float]:
        """Of each phase, and of rollout, update and step, since the last call."""
        seconds = self.phases.take()
        seconds["token loop"] = seconds["rollout"] - seconds["vision"] - seconds["prefill"]
        seconds["update"] = sum(seconds[name] for name in UPDATE)
        seconds["step"] = seconds["rollout"] + seconds["reference"] + seconds["update"]
        return seconds

    @contextmanager
    def parts_of_rollout(self, P: int) -> Iterator[None]:
        """Time the vision tower, and the decoder where it reads P tokens at once."""
        network, hooks = self.policy.model.model, []

        def time_calls(name: str, module: nn.Module, counts: Callable[[dict], bool]) -> None:
            started = []

            def start(module, args, kwargs) -> None:
                if counts(kwargs):  # else no look at the clock: a recorded token step must not wait for the device
                    self.synchronize()
                    started.append(time.perf_counter())

            def end(module, args, kwargs, out) -> None:
                if counts(kwargs):
                    self.synchronize()
                    seconds = time.perf_counter() - started.pop()
                    self.phases.seconds[name] = self.phases.seconds.get(name, 0.0) + seconds

            hooks.append(module.register_forward_pre_hook(start, with_kwargs=True))
            hooks.append(module.register_forward_hook(end, with_kwargs=True))

        time_calls("vision", network.vision_tower, lambda kwargs: True)
        time_calls("prefill", network.language_model, lambda kwargs: kwargs["inputs_embeds"].shape[1] == P)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def decode_seconds(path: Path, work: Work, side: int) -> float:
    """Reading and resizing the frames of N videos from a file, one after the other."""
    N, F = work.videos.frames.shape[:2]
    start = time.perf_counter()
    for _ in range(N):
        resize_square(read_frames(path, UniformSampler(F)).pixels, side)
    return time.perf_counter() - start


def counted(policy: Policy, work: Work) -> Sizes:
    (N, G, T), F, P = work.uniforms.shape, work.videos.frames.shape[1], work.videos.prompt_ids.shape[1]
    dtype = policy.autocast_dtype or next(policy.parameters()).dtype
    return Sizes(policy.model.config, N, G, F, P, T, dtype.itemsize)


def machine_peak(device: torch.device, dtype: torch.dtype, synchronize: Callable[[], None]) -> dict[str, float]:
    """FLOP/s of a large matrix product and bytes/s, read and written, of a large copy: the best of several."""
    side, elements = (8192, 2**28) if device.type == "cuda" else (1536, 2**24)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    source = torch.empty(elements, device=device)
    target = torch.empty_like(source)

    def best(work: Callable[[], object]) -> float:
        times = []
        for _ in range(8):
            start = time.perf_counter()
            work()
            synchronize()
            times.append(time.perf_counter() - start)
        return min(times[1:])

    copied = 2 * source.nbytes
    return {"flop_per_s": 2 * side**3 / best(lambda: a @ b), "bytes_per_s": copied / best(lambda: target.copy_(source))}


def flop_of(way: Way, work: Work) -> dict[str, int]:
    """Floating-point operations of the rollout and of the update, as torch counts them (matrix products, attention)."""
    with FlopCounterMode(display=False) as rollout:
        groups = sample_groups(way.policy, work.videos, work.uniforms)
    batch = freeze(work.videos, groups, work.advantages, way.policy, None, work.config)
    with FlopCounterMode(display=False) as updating:
        update(way.policy, way.optimizer, batch, 1e-6, work.config, Phases())
    return {"rollout": rollout.get_total_flops(), "update": updating.get_total_flops()}


def update_bytes(way: Way, work: Work) -> int:
    """Most bytes alive in the update beyond weights and AdamW's moments: activations and gradients."""
    groups = sample_groups(way.policy, work.videos, work.uniforms)
    batch = freeze(work.videos, groups, work.advantages, way.policy, None, work.config)
    way.optimizer.zero_grad()
    gc.collect()
    moments = [value for state in way.optimizer.state.values() for value in state.values()]
    with LiveBytes([*way.policy.parameters(), *moments]) as live:
        states = live.now
        update(way.policy, way.optimizer, batch, 1e-6, work.config, Phases())
    return live.peak - states


def step_gib(policy: Policy, work: Work, args: argparse.Namespace) -> dict[str, float]:
    """Peak memory of the steps so far, which were ours alone, and what `models.footprint` says of such a step."""
    step = Step(
        videos=args.videos,
        copies=1,
        micro_batch=work.config.micro_batch,
        frames=args.frames,
        side=policy.image_side,
        prompt=work.videos.prompt_ids.shape[1],
        answers=args.group,
        tokens=args.new_tokens,
        precision=args.precision,
        checkpointing=args.gradient_checkpointing,
        reference=True,
        processes=1,
    )
    config = policy.model.config
    worst = peaks(config, None, inventory(config, None, []), step)[0]
    measured = torch.cuda.max_memory_allocated() / 2**30
    return {"measured": measured, "estimated": worst.total / 2**30, "fullest at": f"{worst.phase}: {worst.moment}"}


def agree(plain: dict[str, float], ours: dict[str, float]) -> None:
    """Both ways must compute the same step, or there is nothing to compare."""
    for name in ("loss", "kl", "entropy", "grad_norm"):
        message = partial("{}: {}".format, name)
        torch.testing.assert_close(ours[name], plain[name], rtol=1e-3, atol=1e-5, msg=message)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="small")
    parser.add_argument("--videos", type=int, default=1, help="N (default: 1)")
    parser.add_argument("--group", type=int, default=8, help="G (default: 8)")
    parser.add_argument("--frames", type=int, default=6, help="F (default: 6)")
    parser.add_argument("--new-tokens", type=int, default=64, help="T (default: 64)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count (default: 5)")
    parser.add_argument("--threads", type=int, default=1, help="threads of a CPU (default: 1)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--micro-batch", type=int, help="videos per forward pass of the update (default: N)")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--cuda-graph", action="store_true", help="record our token step")
    parser.add_argument("--ours-only", action="store_true", help="leave out the plain way")
    args = parser.parse_args(arguments)
    if args.cuda_graph and args.device != "cuda":
        parser.error("--cuda-graph goes with --device cuda")
    return args


def measure(args: argparse.Namespace) -> dict:
    device = torch.device(args.device)
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    torch.set_num_threads(args.threads)
    kind = (args.model, args.precision, args.gradient_checkpointing, device)
    policy, reference = (make_policy(*kind) for _ in range(2))
    policy.cuda_graph = args.cuda_graph
    sizes = (args.videos, args.group, args.frames, args.new_tokens, args.micro_batch or args.videos)
    work = make_work(policy, *sizes, device)
    ways = {"ours": Way(policy, reference, synchronize)}
    if not args.ours_only:
        ways["plain"] = Way(PlainPolicy(policy).to(device), PlainPolicy(reference).to(device), synchronize)
    found = {name: way.step(work) for name, way in ways.items()}
    if "plain" in ways:
        assert torch.equal(*(way.groups.ids for way in ways.values()))
        agree(found["plain"], found["ours"])
    for way in ways.values():
        way.seconds()

    rounds: list[dict[str, dict[str, float]]] = []
    with TemporaryDirectory() as folder:
        path = clip(Path(folder), **CLIP)
        for _ in range(args.rounds):
            rounds.append({})
            for name, way in ways.items():
                way.step(work)
                rounds[-1][name] = way.seconds() | {"decode": decode_seconds(path, work, policy.image_side)}

    policy.cuda_graph = False  # what is repeated cannot be counted
    peak = machine_peak(device, next(policy.parameters()).dtype, synchronize)
    shape = {"P": work.videos.prompt_ids.shape[1], "parameters": sum(p.numel() for p in policy.parameters())}
    result = {**vars(args), **shape, "machine": peak}
    result |= {name: {} for name in ("seconds", "ratio", "flop", "share_of_peak", "update_gib")}
    names = (*PHASES, "rollout", "update", "step")
    for name, way in ways.items():
        seconds = {phase: median(times[name][phase] for times in rounds) for phase in ("decode", *names)}
        flop = flop_of(way, work)
        result["seconds"][name] = seconds
        result["flop"][name] = flop
        result["share_of_peak"][name] = {p: flop[p] / seconds[p] / peak["flop_per_s"] for p in flop}
        result["update_gib"][name] = update_bytes(way, work) / 2**30
    bytes_per_s = counted(policy, work).token_loop_bytes() / result["seconds"]["ours"]["token loop"]
    result["share_of_peak"]["ours"]["token loop, bytes"] = bytes_per_s / peak["bytes_per_s"]
    if device.type == "cuda" and args.ours_only:
        result["step_gib"] = step_gib(policy, work, args)
    tokens = work.uniforms.numel()
    result["tokens_per_s"] = {name: tokens / seconds["step"] for name, seconds in result["seconds"].items()}
    for phase in names if "plain" in ways else ():
        ratios = [times["plain"][phase] / times["ours"][phase] for times in rounds]
        result["ratio"][phase] = {"median": median(ratios), "low": min(ratios), "high": max(ratios)}
    return result


if __name__ == "__main__":
    print(json.dumps(measure(parse_arguments()), indent=1))
