"""Train a video-quality model with GRPO, from mean opinion scores alone.

    torchrun --standalone --nproc-per-node 1 train.py                      # the demo: tiny model, synthetic clips
    torchrun --standalone --nproc-per-node 8 train.py --preset internvl3-1b --slowfast FILE --labels L --videos DIR

The loop in `train` is the algorithm; docs/algorithm.md has its equations. Only `update` computes gradients.

Legend: N videos of this process in a step, G answers per video, T answer tokens, F frames, P prompt tokens.
"""

import sys

from grpo.config import Config, parse_config

if __name__ == "__main__":
    CONFIG = parse_config(sys.argv[1:])  # answers --help and refuses wrong flags before torch is loaded

import itertools
import json
import os
import resource
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import av
import torch
import transformers
from torch import Tensor
from tqdm import tqdm

from data import synthetic
from data.dataset import Batch, ClipDataset, ClipLoader, Failure, NoReadableClip, StepBatches
from data.frame_cache import FrameCache, check_cacheable
from data.labels import Clip, missing_videos, read_labels, write_labels
from data.perturb import RandomPerturbation
from data.prompts import Prompt
from data.recipe import Recipe
from data.samplers import SAMPLERS
from data.splits import split_validation
from data.tables import replacing, write_csv
from evaluate import score_over_ranks
from grpo import checkpoint, distributed, tensorboard
from grpo.advantages import group_advantages, zero_variance
from grpo.bad_steps import BadSteps, TooManyBadSteps
from grpo.bad_videos import BadVideos, TooManyBadVideos
from grpo.health import Health
from grpo.inspect import Inspector
from grpo.master_weights import MasterAdamW
from grpo.page import strip
from grpo.rollout import Groups, answer_uniforms, sample_groups
from grpo.run_report import PAGE, write_run_report
from grpo.runlog import JsonLines, Phases
from grpo.schedule import learning_rate
from grpo.signals import Stopped, StopSignals
from grpo.update import freeze, update
from models import lora
from models.dry_run import report
from models.loading import check_checkpoint, load_policy, save_policy
from models.policy import PARTS, Policy, TokenLogprobs, Videos, check_parts
from models.scorer import Scorer
from models.shapes import check_motion
from rewards import Answers, Opponents, RankingReward, RegressionReward, RewardTable, TemporalReward, parse_rewards
from rewards.explain import explain
from rewards.metrics import correlations
from rewards.table import Scored

SPLITS = ("train", "val", "test")
PICTURES = 12  # of a video, on the page of an inspected step
SPLIT_FILE = "split.jsonl"  # of a run with --val-fraction: a label file


def train(
    config: Config,
    run: Path,
    clips: dict[str, list[Clip]],
    table: RewardTable,
    policy: Policy,
    reference: Callable[..., TokenLogprobs] | None,
    resume: Path | None,
) -> dict:
    """The whole run: measure, train, measure; returns its summary.

    Raises CannotResume before anything is written, and Stopped, TooManyBadVideos or TooManyBadSteps after a save.
    """
    device = policy.device
    module = distributed.wrap(policy)  # the same network; its gradients are averaged over processes
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = MasterAdamW(trained, config.shard_optimizer, lr=config.lr, weight_decay=config.weight_decay)
    state = {"step": 0, "before": None, "best": None, "train_seconds": 0.0, "bad_videos": []}
    if resume:
        checkpoint.load_optimizer(resume, optimizer)
        state = checkpoint.read_state(resume)
        state["best"] = distributed.from_main(lambda: checkpoint.read_best(run, warn), device)
    state |= {"settings": asdict(config), "processes": distributed.world_size()}
    write_settings(config, run, clips)
    log, rollouts, bad = (
        JsonLines(run / f"{name}.jsonl", state["step"]) for name in ("metrics", "rollouts", "bad_videos")
    )
    events = tensorboard.Events(run / "tensorboard", state["step"], config)
    health = Health(log.rows())

    sampler = "uniform" if SAMPLERS[config.sampler].random else config.sampler  # evaluation never draws frames
    kept = ("frames", "prompt", "max_new_tokens", "mos_mapping", "image_side", "system", "motion_clips", "temperature")
    recipe = Recipe(sampler=sampler, **{name: getattr(config, name) for name in kept})
    scorer = Scorer(policy, recipe, workers=max(1, config.workers), video_timeout=config.video_timeout)
    prompt_ids = policy.prompt_ids(recipe.words.system, recipe.words.user_text, config.frames)

    def measure(split: str, file: Path | None = None) -> dict | None:
        if not clips[split]:
            return None
        paths = [clip.path for clip in clips[split]]
        with distributed.gathered(policy):
            scores = [score.value for score in score_over_ranks(scorer, paths, config.videos)]
        if file and distributed.is_main():
            write_csv(file, ("path", "target", "score"), predictions(clips[split], scores))
        return correlations(scores, [clip.target for clip in clips[split]])

    def save_model(weights: dict[str, Tensor], folder: Path) -> None:
        save_policy(policy, folder, weights)
        recipe.save(folder)

    def save() -> None:
        weights, moments = distributed.whole(policy.weights()), distributed.whole(optimizer.state_dict())
        if distributed.is_main():
            for file in (log, rollouts, bad, events):  # a resumed run counts on the lines of every step that is done
                file.flush()
            checkpoint.save_checkpoint(run, state, partial(save_model, weights), moments, config.keep_checkpoints)

    def save_best() -> None:
        weights = distributed.whole(policy.weights())
        if distributed.is_main():
            checkpoint.write_folder(run / "best", state["best"], partial(save_model, weights))

    parts = {name: policy.part(name) for name in PARTS if name != "motion" or policy.has_motion}
    decode = policy.tokenizer.decode
    inspector = Inspector(run / "inspect", config, module, optimizer, parts, decode, decode(prompt_ids))
    first = state["step"] + 1
    batches = training_batches(config, clips["train"], state["bad_videos"], first, policy, table.needs_perturbed)
    if state["before"] is None:
        state["before"] = measure("test")
        tell(f"before training: {shown(state['before'])}")
    bad_videos = BadVideos(state["bad_videos"], bad, config.max_bad_videos, len(clips["train"]))
    bad_steps = BadSteps(config.max_bad_steps, run)
    progress = tqdm(total=config.steps, initial=state["step"], unit="step", disable=not distributed.is_main())
    phases = Phases(torch.cuda.synchronize if device.type == "cuda" else None)
    clock = time.perf_counter() - state["train_seconds"]

    with StopSignals() as signals, distributed.lost_processes_told(), log, rollouts, bad, events:
        for step in range(first, config.steps + 1):
            with phases("data"):
                try:
                    batch = next_batch(batches, bad_videos, signals, step, device)
                except (Stopped, TooManyBadVideos):
                    save()
                    raise
                videos, uniforms = step_inputs(batch, prompt_ids, step, config, device)
            with phases("sample"), distributed.gathered(policy):
                videos = policy.watch(videos)
                groups = sample_groups(policy, videos, uniforms, config.top_p)
            with phases("reward"):
                N = len(batch.clips)  # the rows behind N are the perturbed copies: scored, never trained on
                videos, groups, perturbed = videos[:N], groups[:N], groups[N:]
                judged = to_judge(table, groups, perturbed, batch, device)
                answers, scored = judged["answers"], table(**judged)
                advantages = group_advantages(scored.total, config.advantage_std)
            with phases("reference"):
                frozen = freeze(videos, groups, advantages, module, reference, config)
            rate = learning_rate(step - 1, config)
            with inspector.watching(step) as watched:
                metrics = update(module, optimizer, frozen, rate, config, phases)

            with phases("log"):
                metrics |= step_metrics(groups, answers, scored, advantages)
                rows = rollout_rows(step, batch, groups, answers, scored, advantages)
                rollouts.write(distributed.gather_rows(rows, device))
            if watched:
                with phases("inspect"):
                    seen = inspected_videos(batch, table, judged, groups)
                    inspector.write(step, frozen, watched, seen, rows, {**metrics, "lr": rate})
            with phases("validate"):
                validation = measure("val") if config.eval_every and step % config.eval_every == 0 else None
            with phases("save"):
                changed = metrics["skipped"] < config.inner_epochs
                done = step if changed else state["step"]  # what changed no weight is tried again by a resumed run
                state |= {"step": done, "train_seconds": time.perf_counter() - clock}
                if better(validation, state["best"]):
                    state["best"] = {"step": step, **validation}
                    save_best()
            seconds = phases.take()
            speed = metrics["tokens"] / sum(seconds.values())
            row = {"step": step, **metrics, "bad_videos": len(bad_videos), "lr": rate, "tokens_per_s": speed}
            row |= {"phase_s": seconds, "val": validation}
            log.write([row])
            events.write([row])
            for warning in health.add(row):
                warn(f"warning: {warning}")
            if bad_steps.too_many(not changed):
                save()
                bad_steps.end(step, rows, module, frozen, groups.logprobs, config.micro_batch)
            if step == config.steps or (config.save_every and step % config.save_every == 0):
                with phases("save"):  # counts for the next line: this one has to be there before the checkpoint
                    save()
            progress.set_postfix_str(progress_text(metrics, state["best"]))
            progress.update()

    progress.close()
    if state["best"] is None:  # no validation split, or no validation with a defined SRCC: the last model is the best
        save_best()
    distributed.barrier()  # rank 0 has written what every process reads now
    restore(config, policy, run / "best")
    after = {"after": measure("test", run / "predictions.csv"), "after_step": (state["best"] or state)["step"]}
    return {**state, **after, "health": health.found}


def load(config: Config, model: str, device: torch.device) -> Policy:
    """The policy of a checkpoint as the flags want it; with fsdp this process's share, so all have to load it.

    With --lora-rank it is --model with an adapter, a new one or that of the checkpoint.
    """
    if config.lora_rank and model != config.model:
        policy = load(config, config.model, device)
        policy.adapter.load(model)
        return policy
    slowfast = config.slowfast if model == config.model else None  # what was trained here has it already
    network = {"motion": config.motion, "slowfast": slowfast, "image_side": config.image_side}
    network |= {"motion_clips": config.motion_clips > 0, "cuda_graph": config.cuda_graph}
    policy = load_policy(model, config.temperature, config.precision, device, config.gradient_checkpointing, **network)
    if config.lora_rank:
        alpha = config.lora_alpha or 2 * config.lora_rank
        policy.adapter = lora.Adapter(policy.model, model, config.lora_rank, alpha, config.seed, bool(slowfast))
    return distributed.shard(policy, policy.layers(), policy.autocast_dtype) if config.parallel == "fsdp" else policy


def load_reference(config: Config, policy: Policy) -> Callable[..., TokenLogprobs]:
    """The initial policy's `forward`: a frozen network of its own, or the policy without its adapter."""
    if policy.adapter:
        return policy.without_adapter
    return load(config, config.model, policy.device).requires_grad_(False)


def restore(config: Config, policy: Policy, folder: Path) -> None:
    """Give the policy the weights of a checkpoint of this run."""
    if policy.adapter:
        policy.adapter.load(folder)
    else:
        policy.load_state_dict(load(config, str(folder), policy.device).state_dict())


# ---- what a step is made of


def training_batches(
    config: Config, clips: list[Clip], known_bad: list[dict], first: int, policy: Policy, perturb: bool
) -> Iterator[Batch]:
    """The batches of this process from step `first` (counted from 1) on, decoded ahead by `--workers` processes."""
    dataset = ClipDataset(
        clips,
        config.videos,
        Recipe(config.frames, config.sampler, motion_clips=config.motion_clips).make_sampler(policy.clip_frames),
        policy.image_side,
        RandomPerturbation() if perturb else None,
        config.seed,
        config.video_timeout,
        FrameCache(config.frame_cache, int(config.frame_cache_gib * 2**30)) if config.frame_cache else None,
        [Failure(**row) for row in known_bad],
    )
    rank, world_size = distributed.rank(), distributed.world_size()
    order = StepBatches(len(clips), config.videos_per_step, config.seed, config.steps, first - 1, rank, world_size)
    return iter(ClipLoader(dataset, order, config.workers, pin_memory=policy.device.type == "cuda"))


def next_batch(
    batches: Iterator[Batch], bad_videos: BadVideos, signals: StopSignals, step: int, device: torch.device
) -> Batch:
    """This process's next batch. Every process hears of every replaced video and of every signal; all stop together."""
    try:
        batch = next(batches)
        failures, stop = batch.failures, False
    except NoReadableClip as error:
        failures, stop = error.failures, True
    row = {"signal": signals.number, "stop": stop, "failures": [asdict(failure) for failure in failures]}
    rows = distributed.gather_rows([row], device)
    signals.check(*(row["signal"] for row in rows))
    every = {failure["index"]: failure for row in rows for failure in row["failures"]}
    bad_videos.add(step, [every[index] for index in sorted(every)], stop=any(row["stop"] for row in rows))
    return batch


def step_inputs(
    batch: Batch, prompt_ids: Tensor, step: int, config: Config, device: torch.device
) -> tuple[Videos, Tensor]:
    """Videos and uniforms (N, G, T) of a step; 2N of them, the perturbed copies behind, if the batch has copies."""
    copies = {"raw": (batch.frames, batch.motion_clips)}
    if batch.perturbed is not None:
        copies["perturbed"] = (batch.perturbed, batch.perturbed_motion_clips)
    frames, clips = (joined(pixels, device) for pixels in zip(*copies.values()))
    shape = (config.group_size, config.max_new_tokens)
    keys = [(step, clip, *shape, name) for name in copies for clip in batch.index.tolist()]
    uniforms = [answer_uniforms(config.seed, *key) for key in keys]
    videos = Videos(frames, prompt_ids.expand(len(frames), -1), motion_clips=clips)
    return videos, torch.stack(uniforms)


def joined(parts: Sequence[Tensor | None], device: torch.device) -> Tensor | None:
    return None if parts[0] is None else torch.cat([part.to(device, non_blocking=True) for part in parts])


def to_judge(table: RewardTable, groups: Groups, perturbed: Groups, batch: Batch, device: torch.device) -> dict:
    """The arguments of `RewardTable.forward`, by name; ranking sees the videos of all processes."""
    mos = batch.targets.to(device)
    answers = Answers.from_texts(groups.texts, mos)
    return {
        "answers": answers,
        "perturbed": Answers.from_texts(perturbed.texts, mos) if table.needs_perturbed else None,
        "opponents": Opponents(*map(distributed.gather, Opponents.from_answers(answers))),
        "own": distributed.rank() * len(mos) + torch.arange(len(mos), device=device),
        "perturbed_ok": batch.perturbed_ok.to(device),
        "sum_over_ranks": distributed.total,
    }


# ---- what a step writes down


def step_metrics(groups: Groups, answers: Answers, scored: Scored, advantages: Tensor) -> dict:
    """One line of metrics.jsonl, over all processes: rewards before weights, advantages, answers, memory."""
    rewards = {name: distributed.gather(value) for name, value in {**scored.terms, "total": scored.total}.items()}
    total, advantages = rewards.pop("total"), distributed.gather(advantages)
    length = distributed.gather(groups.mask.sum(-1).float())
    truncated = distributed.gather(groups.truncated)
    unparsed = distributed.total_of_each(answers.failures(), total.device)
    return {
        "rewards": {name: spread(value) for name, value in rewards.items()},
        "reward": spread(total),
        "advantage": spread(advantages) | {"min": advantages.min().item(), "max": advantages.max().item()},
        "zero_variance": zero_variance(total).float().mean().item(),
        "score_std": std_of_finite(distributed.gather(answers.mean())),
        "unparsed": {reason: int(count) for reason, count in unparsed.items()},
        "length": length.mean().item(),
        "truncated": truncated.float().mean().item(),
        "peak_memory_mib": peak_memory_mib(total.device),
    }


def spread(values: Tensor) -> dict[str, float]:
    return {"mean": values.mean().item(), "std": values.std().item()}


def std_of_finite(values: Tensor) -> float | None:
    """None of fewer than two. Of the videos' mean scores it falls towards 0 when every video gets the same score."""
    values = values[values.isfinite()]
    return values.std().item() if len(values) > 1 else None


def rollout_rows(
    step: int, batch: Batch, groups: Groups, answers: Answers, scored: Scored, advantages: Tensor
) -> list[dict]:
    """One row of rollouts.jsonl per answer; `rewards` are before weights."""
    return [
        {
            "step": step,
            "video": clip.path,
            "mos": clip.target,
            "text": groups.texts[n][g],
            "score": parsed.score,
            "unparsed": parsed.reason,
            "rewards": {name: value[n, g].item() for name, value in scored.terms.items()},
            "reward": scored.total[n, g].item(),
            "advantage": advantages[n, g].item(),
        }
        for n, clip in enumerate(batch.clips)
        for g, parsed in enumerate(answers.parsed[n])
    ]


def inspected_videos(batch: Batch, table: RewardTable, judged: dict, groups: Groups) -> list[dict]:
    """What an inspected step shows of each video: itself, its perturbed copy, and what its rewards were made of."""
    explained = explain(table, **judged)
    copies = [None] * len(batch.clips) if batch.perturbed is None else batch.perturbed
    return [
        {
            "path": clip.path,
            "mos": clip.mos,
            "mos_range": list(clip.mos_range),
            "target": clip.target,
            "perturbation": kind,
            "truncated": truncated,
            "pictures": {"frames": strip(frames, PICTURES), "perturbed": strip(copy, PICTURES)},
            **of_rewards,
        }
        for clip, kind, frames, copy, truncated, of_rewards in zip(
            batch.clips, batch.kinds, batch.frames, copies, groups.truncated.tolist(), explained
        )
    ]


def predictions(clips: list[Clip], scores: list[float | None]) -> Iterator[dict]:
    """A row for each clip: its MOS as `target`, 1..5, and its score, empty if it has none."""
    for clip, score in zip(clips, scores):
        yield {"path": clip.path, "target": f"{clip.target:.4f}", "score": score}


def peak_memory_mib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def better(validation: dict | None, best: dict | None) -> bool:
    """Whether a validation beats the best so far by SRCC; one without a defined SRCC never does."""
    if validation is None or validation["srcc"] is None:
        return False
    return best is None or validation["srcc"] > best["srcc"]


def shown(measured: dict | None) -> str:
    if measured is None:
        return "not measured, the label file has no such split"
    values = {name: measured[name] for name in ("srcc", "plcc")}
    return "  ".join(f"{name.upper()} {'undefined' if v is None else f'{v:.3f}'}" for name, v in values.items())


def progress_text(metrics: dict, best: dict | None) -> str:
    terms = " ".join(f"{name} {value['mean']:.2f}" for name, value in metrics["rewards"].items())
    skipped = " STEP SKIPPED, gradient not finite" if metrics["skipped"] else f" kl {metrics['kl']:.3f}"
    return terms + skipped + (f" | val SRCC {best['srcc']:.2f}" if best else "")


def tell(message: str, file=None) -> None:
    """Print once, whatever the number of processes, above the progress bar."""
    if distributed.is_main():
        tqdm.write(message, file=file)


def warn(message: str) -> None:
    tell(message, sys.stderr)


# ---- before and after


def read_clips(config: Config, run: Path) -> dict[str, list[Clip]]:
    """The clips of each split; makes the demo's clips if they are what is asked for.

    With --val-fraction the split that the run was begun with, if it was, unless --allow-changed names what it was made
    of. Missing videos are told and left in: training replaces them, evaluation counts them. Raises ValueError if
    --max-bad-videos does not allow so many.
    """
    demo = Config()
    ours = (config.labels, config.videos) == (demo.labels, demo.videos)
    if ours and distributed.is_main() and not Path(config.labels).exists():
        synthetic.write_clips(config.videos, progress=lambda clips: tqdm(clips, desc="writing the demo clips"))
    distributed.barrier()
    anew = not {"labels", "val_fraction"}.isdisjoint(config.allowed)
    if config.val_fraction and (run / SPLIT_FILE).exists() and not anew:
        clips = read_labels(run / SPLIT_FILE, mapping=config.mos_mapping)
    else:
        clips = read_labels(config.labels, mapping=config.mos_mapping)
        clips = split_validation(clips, config.val_fraction, config.seed) if config.val_fraction else clips
    splits = {split: [clip for clip in clips if clip.split == split] for split in SPLITS}
    if not splits["train"]:
        read_labels(config.labels, "train")  # says which splits there are
    missing = missing_videos(clips, config.videos)
    if missing:
        warn(f"{len(missing)} of {len(clips)} labelled videos are missing, {missing[0].path} first")
    lost = [clip for clip in missing if clip.split == "train"]
    if len(lost) > config.max_bad_videos * len(splits["train"]):
        raise ValueError(
            f"--videos {config.videos}: {len(lost)} of {len(splits['train'])} training videos are missing, "
            f"more than --max-bad-videos {config.max_bad_videos:g} allows; {lost[0].path} first"
        )
    return splits


def run_folder(config: Config) -> Path:
    """`--output`, or the next free runs/PRESET-K; refuses a folder that holds a run unless the run is continued."""
    if config.output is None and distributed.max_restarts():
        raise ValueError("--output: torchrun's --max-restarts needs it, to find the run again")
    if config.output is None:
        ends = [path.parent.name.rpartition("-")[2] for path in Path("runs").glob(f"{config.preset}-*/config.json")]
        number = max((int(end) for end in ends if end.isdecimal()), default=0)
        return Path("runs") / f"{config.preset}-{number + (0 if config.resume == 'auto' and number else 1)}"
    run = Path(config.output)
    if (run / "config.json").exists() and config.resume is None and not distributed.restarts():
        raise ValueError(f"--output {run}: holds a run already; choose another folder, or go on with --resume auto")
    return run


def resumed_from(config: Config, run: Path, device: torch.device) -> Path | None:
    """The checkpoint to go on from, the same in all processes: that of --resume; restarted by torchrun, the newest."""

    def find() -> str:
        newest = checkpoint.find_checkpoint("auto", run, warn) if distributed.restarts() else None
        return str(newest or checkpoint.find_checkpoint(config.resume, run, warn) or "")

    found = distributed.from_main(find, device)
    return Path(found) if found else None


def check_resumed(config: Config, state: dict) -> None:
    """Compare the run with how it was begun. Raises ValueError naming flags that change results and are not allowed to.

    What can change no more than rounding is told.
    """
    changes, processes = config.compare(state["settings"]), distributed.world_size()
    if state["processes"] != processes:
        changes.append(f"was {state['processes']} process(es), is {processes}")
    if changes:
        tell(f"resuming: {'; '.join(changes)}: the same results, up to rounding")


def prompt_words(config: Config) -> Prompt:
    return Recipe(prompt=config.prompt, system=config.system).words


def reward_table(config: Config) -> RewardTable:
    return RewardTable(
        parse_rewards(config.rewards),
        regression=RegressionReward(config.sigma, config.coarse_factor),
        ranking=RankingReward(config.variance_floor, config.ranking_opponents),
        temporal=TemporalReward(config.temporal_bonus, config.temporal_scope),
    )


def write_settings(config: Config, run: Path, clips: dict[str, list[Clip]]) -> None:
    if distributed.is_main():
        run.mkdir(parents=True, exist_ok=True)
        config.save(run / "config.json")
        if config.val_fraction:
            write_labels(itertools.chain(*clips.values()), run / SPLIT_FILE)


def prepare(config: Config) -> dict:
    """The arguments of `train`: checks all that can be checked, then loads the models.

    Raises ValueError naming the flag or the file at fault.
    """
    table = reward_table(config)
    if table.needs_opponents and config.videos_per_step < 2:
        raise ValueError(f"--videos-per-step {config.videos_per_step}: the ranking reward needs at least 2 videos")
    if config.frame_cache:
        check_cacheable(SAMPLERS[config.sampler](config.frames))
    frozen = config.freeze.split(",") if config.freeze else []
    check_parts(frozen)
    if config.lora_rank:
        lora.check_installed(f"--lora-rank {config.lora_rank}")
    if config.tensorboard:
        tensorboard.check_installed()
    check_checkpoint(config.model)
    check_motion(config.model, config.motion, config.slowfast)
    run = run_folder(config)
    device = distributed.setup(config.device, config.dist_timeout)
    resume = resumed_from(config, run, device)
    if resume:
        check_resumed(config, checkpoint.read_state(resume))
    if config.cuda_graph and device.type != "cuda":
        raise ValueError(f"--cuda-graph: goes with a CUDA device, not with {device.type}")
    clips = read_clips(config, run)
    StepBatches(len(clips["train"]), config.videos_per_step, 0, 1, 0, distributed.rank(), distributed.world_size())
    tell(plan(config, run, clips))
    policy = load(config, str(resume or config.model), device)
    policy.freeze(frozen)
    policy.check_frames(config.frames, config.motion_clips)
    policy.check_length(prompt_words(config), config.frames, config.max_new_tokens)
    reference = load_reference(config, policy) if config.beta > 0 else None
    return {"run": run, "clips": clips, "table": table, "policy": policy, "reference": reference, "resume": resume}


def main(config: Config) -> int:
    try:
        if config.dry_run:
            tell(report(config, prompt_words(config), reward_table(config).needs_perturbed))
            return 0
        prepared = prepare(config)
    except ValueError as error:
        warn(f"train.py: error: {error}")
        return 2
    run, clips = prepared["run"], prepared["clips"]
    try:
        summary = train(config, **prepared)
    except Stopped as stopped:
        warn(f"train.py: {stopped}, all steps saved; go on with --output {run} --resume auto")
        try_report(run)
        return stopped.exit_status
    except distributed.LostProcess:
        return 1
    except (TooManyBadVideos, TooManyBadSteps) as error:
        warn(f"train.py: error: {error}")
        try_report(run)
        return 2
    except checkpoint.CannotResume as error:
        warn(f"train.py: error: {error}")
        return 2
    finally:
        distributed.close()
    summary |= {
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, av)},
    }
    if distributed.is_main():
        with replacing(run / "summary.json") as file:
            file.write(json.dumps(summary, indent=2) + "\n")
    try_report(run)
    example = Path(config.videos) / (clips["test"] or clips["train"])[0].path
    took = f"step {summary['after_step']}, {summary['train_seconds']:.0f} s"
    tell(
        f"before training: {shown(summary['before'])}\n"
        f"after training:  {shown(summary['after'])}  ({took})\n"
        f"run folder: {run}, with {PAGE}\n"
        f"next: {os.path.relpath(sys.executable)} evaluate.py --model {run / 'best'} --video {example}"
    )
    return 0


def try_report(run: Path) -> None:
    """The page about the run; without it, for want of space say, nothing else is lost."""
    if distributed.is_main():
        try:
            write_run_report(run)
        except (OSError, ValueError) as error:
            warn(f"no {run / PAGE}: {error}")


def plan(config: Config, run: Path, clips: dict[str, list[Clip]]) -> str:
    """What the flags come to: clips per split, answers per step, what is derived."""
    N, G, W = config.videos_per_step, config.group_size, distributed.world_size()
    counts = ", ".join(f"{len(clips[split])} {split}" for split in SPLITS)
    epochs = config.steps * N / len(clips["train"])
    return (
        f"{run}: clips {counts}\n"
        f"each of {config.steps} steps: {N} videos x {G} answers on {W} process(es), {epochs:.1f} epochs in all; "
        f"rewards {config.rewards}"
    )


if __name__ == "__main__":
    sys.exit(main(CONFIG))
