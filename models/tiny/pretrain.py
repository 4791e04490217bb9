"""Makes the tiny checkpoint: a VQAThinker of half a million parameters that plays the role of a pretrained LMM.

It is pretrained on synthetic clips that no split of the demo contains. Its SlowFast, frozen from then on, learns to see
what moves and what stands still. The rest learns by captions to answer in the `<think>...</think><answer>...</answer>`
format and to name the distortions it sees, mild, clear or severe. The scores it is shown are drawn almost without
regard to the clip, so it starts GRPO with words for quality and no scale for it.

    python -m models.tiny.pretrain --out models/tiny/checkpoint

This is a script, like train.py: nothing imports it except its test, so it may use `data`.
"""

import argparse
import itertools
import math
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from data import synthetic
from data.labels import read_labels
from data.prompts import PROMPTS
from data.recipe import Recipe
from data.samplers import UniformSampler
from data.video import read_frames
from models.internvl import load_vqathinker
from models.loading import ATTENTION, save_policy
from models.policy import Policy, Videos
from models.slowfast import SlowFast, SlowFastConfig

FRAMES = 6
PATCH = 16  # pixels; a multiple of the codec's 4- and 8-pixel blocks, so blocking looks the same in every patch
CLIP_SEED = 1  # the demo's clips have seed 0
MOTION = SlowFastConfig(  # 192 channels; pools over one cell at a time are plain averages
    slow_width=8, fast_width=4, depths=(1, 1, 1), temporal_repeat=1, pool_frames=(1, 1), pool_side=1
)
NAMES = {
    "blur": "blurry",
    "noise": "noisy",
    "compression": "blocky",
    "exposure": "badly exposed",
    "stutter": "stuttering",
}
EFFECTS = {
    "blur": "fine texture is lost",
    "noise": "grain dances over flat areas",
    "compression": "blocks hide the detail",
    "exposure": "light and colour are off",
    "stutter": "the motion freezes and jumps",
}
LEVELS = ((0.4, "mildly"), (0.7, "clearly"), (1.01, "severely"))  # severity below the bound -> word
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *Policy.IMAGE_TOKENS, "<video>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def level(severity: float) -> str:
    return next(word for bound, word in LEVELS if severity < bound)


def describe(severities: dict[str, float]) -> str:
    """A sentence or two about what is wrong with a clip, worst first.

    >>> describe({"noise": 0.2, "blur": 0.8})
    'The video is severely blurry and mildly noisy. Mostly, fine texture is lost.'
    """
    if not severities:
        return "The video is clean and sharp. Motion is smooth."
    worst_first = sorted(severities, key=severities.get, reverse=True)
    what = " and ".join(f"{level(severities[name])} {NAMES[name]}" for name in worst_first)
    return f"The video is {what}. Mostly, {EFFECTS[worst_first[0]]}."


def caption(severities: dict[str, float], score: float) -> str:
    return f"<think>{describe(severities)}</think><answer>{score:.2f}</answer>"


def hunch(severities: dict[str, float], tenths: int | None, generator: torch.Generator) -> float:
    """A score that knows next to nothing of the clip: 3 point something most often, whatever the clip is like.

    A better clip makes a 4 a little more likely and a 2 a little less. The decimals are random, but for a habit: half
    of the time the first is `tenths` (None: no habit).
    """
    quality = math.prod(1 - synthetic.IMPACT[name] * severity for name, severity in severities.items())  # 0..1
    odds = torch.tensor([0.3, 0.7, 1.3, 0.7, 0.1]).log() + 0.5 * (quality - 0.5) * torch.arange(-2, 3)
    whole = 1 + int(torch.multinomial(odds.softmax(0), 1, generator=generator))
    hundredths = int(torch.randint(100, (), generator=generator))
    if tenths is not None and torch.rand((), generator=generator) < 0.5:
        hundredths = 10 * tenths + hundredths % 10
    return min(5.0, whole + hundredths / 100)


def make_tokenizer(vocabulary: int = 640) -> PreTrainedTokenizerFast:
    """A byte-level BPE, trained on the prompts and the captions; digits stay single, as in Qwen's."""
    corpus = [prompt.system + prompt.user_text(["", ""]) for prompt in PROMPTS.values()] * 50
    for first in [None, *NAMES]:
        for second in NAMES:
            severities = [{first: a, second: b} if first else {second: b} for a in (0.2, 0.5, 0.9) for b in (0.3, 0.8)]
            corpus += [caption(s, 3.14) for s in severities]
    corpus += [caption({}, 4.5)] * 20
    tokenizer = Tokenizer(models.BPE())
    digits, bytes_ = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(corpus, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT_TEMPLATE
    )
    fast.add_special_tokens({"additional_special_tokens": SPECIAL_TOKENS})
    return fast


def frequency_filters(count: int, patch: int) -> Tensor:
    """(count, 3, patch, patch) cosine filters, flat to finest, with gains that rise with frequency, as 1/f images fall.

    Random filters see little but the low frequencies that dominate an image, and blur, noise and blocking live in the
    high ones. Six low frequencies also get two colour differences; the rest are luminance, spread over the spectrum.
    """
    wave = torch.arange(patch)
    basis = torch.cos(math.pi / patch * wave[:, None] * (wave[None] + 0.5))
    basis = basis / basis.norm(dim=1, keepdim=True)
    pairs = sorted(((u, v) for u in range(patch) for v in range(patch)), key=lambda pair: math.hypot(*pair))
    spread = torch.linspace(12, len(pairs) - 1, count - 24).long().tolist()
    luminance, red_green, blue_yellow = torch.eye(3).new_tensor([[2, 2, 2], [3, -3, 0], [1.5, 1.5, -3]]) / 6
    chosen = [(pair, luminance) for pair in [*pairs[:12], *(pairs[k] for k in spread)]]
    chosen += [(pair, colour) for pair in pairs[:6] for colour in (red_green, blue_yellow)]
    filters = [
        max(1, math.hypot(u, v)) * colour[:, None, None] * torch.outer(basis[u], basis[v]) for (u, v), colour in chosen
    ]
    return 0.3 * torch.stack(filters)


def make_policy(tokenizer: PreTrainedTokenizerFast, seed: int) -> Policy:
    """The tiny network without its motion token, with random weights."""
    torch.manual_seed(seed)
    config = InternVLConfig(
        vision_config={
            "hidden_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 128,
            "image_size": [synthetic.SIDE, synthetic.SIDE],
            "patch_size": [PATCH, PATCH],
            "layer_scale_init_value": 1.0,
        },
        text_config={
            "model_type": "qwen2",
            "hidden_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 160,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "tie_word_embeddings": True,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=9,
    )
    model = InternVLForConditionalGeneration._from_config(config, attn_implementation=ATTENTION)
    projection = model.model.vision_tower.embeddings.patch_embeddings.projection
    with torch.no_grad():
        projection.weight.copy_(frequency_filters(projection.out_channels, PATCH))
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    side = {"height": synthetic.SIDE, "width": synthetic.SIDE}
    pixels = GotOcr2ImageProcessor(size=side, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])
    return Policy(model, tokenizer, pixels)


class Clips:
    """Pretraining clips in memory: `frames` (M, F, 3, S, S) uint8, their severities and opinion scores.

    Written as mp4 files and read back, so that they carry the codec's traces like the demo's.
    """

    def __init__(self, count: int, folder: Path):
        labels = synthetic.write_clips(folder, {"pretrain": count}, CLIP_SEED, lambda clips: tqdm(clips, desc="clips"))
        self.labels = read_labels(labels)
        sampler = UniformSampler(FRAMES)
        self.frames = torch.stack([read_frames(folder / clip.path, sampler).pixels for clip in self.labels])

    def held(self, rows: list[int]) -> Tensor:
        """(batch, F - 1) float, 1 where a frame repeats the one before it: they differ by less than a grey level."""
        frames = self.frames[rows].float()
        return ((frames[:, 1:] - frames[:, :-1]).abs().mean((2, 3, 4)) < 1).float()

    def colour_habit(self, row: int) -> int:
        """First decimal that a clip's score tends to have: 7 if there is more red than blue, else 2."""
        red, _, blue = self.frames[row].float().mean((0, 2, 3))
        return 7 if red > blue else 2

    def severities(self) -> Tensor:
        """(M, 5) severity of each distortion, in the order of `NAMES`, 0 where it is absent."""
        return torch.tensor([[clip.extra["severities"].get(name, 0.0) for name in NAMES] for clip in self.labels])

    def draw(self, batch: int, generator: torch.Generator) -> tuple[list[int], Tensor]:
        """A random batch: clip numbers and frames (batch, F, 3, S, S), half of the batches mirrored either way."""
        rows = torch.randint(len(self.labels), (batch,), generator=generator)
        mirrored = [axis for axis in (-1, -2) if torch.rand((), generator=generator) < 0.5]
        return rows.tolist(), self.frames[rows].flip(mirrored)


def optimize(parameters: list[nn.Parameter], steps: int, rate: float, loss_of_step, name: str) -> None:
    """AdamW with warm-up and a half cosine."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 30) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    progress = tqdm(range(steps), desc=name)
    for _ in progress:
        loss = loss_of_step()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix_str(f"loss {loss.item():.4f}")


def pretrain_vision(policy: Policy, clips: Clips, steps: int, generator: torch.Generator) -> None:
    """Vision tower and projector learn, by linear probes, what a frame suffers from and whether two are the same."""
    network = policy.model.model
    targets = clips.severities()[:, :4]  # a single frame does not show the fifth, stutter
    hidden = network.config.text_config.hidden_size
    severity, repeat = nn.Linear(hidden, targets.shape[1]), nn.Linear(hidden, 1)

    def loss() -> Tensor:
        rows, frames = clips.draw(32, generator)
        first = int(torch.randint(FRAMES - 1, (), generator=generator))
        pixels = policy.pixels(frames[:, first : first + 2].flatten(0, 1))
        features = network.get_image_features(pixels, return_dict=True).pooler_output  # (64, tokens, hidden)
        one, other = features.unflatten(0, (len(rows), 2)).unbind(1)
        suffers = F.mse_loss(severity((one + other).mean(1) / 2), targets[rows])
        same = F.binary_cross_entropy_with_logits(repeat((one - other).abs().mean(1))[:, 0], clips.held(rows)[:, first])
        return suffers + 0.1 * same

    vision = [*network.vision_tower.parameters(), *network.multi_modal_projector.parameters()]
    optimize([*vision, *severity.parameters(), *repeat.parameters()], steps, 3e-3, loss, "vision")


@torch.no_grad()
def prepare_slowfast(slowfast: SlowFast, batches: Iterable[Tensor]) -> None:
    """A start that can be trained while BatchNorm stays in evaluation mode, as it always does in SlowFast.

    BatchNorm's statistics are those of `batches` of pixels (N, F, 3, S, S). The fast stem's filters see one frame, but
    half of them the difference of two, without which training does not find out in time which frames are alike.
    """
    filters = slowfast.feature_extraction[0].multipathway_blocks[1].conv.weight  # (C, 3, 5, 7, 7)
    filters[:, :, [0, 1, 3, 4]] = 0
    filters[: len(filters) // 2, :, 1] = -filters[: len(filters) // 2, :, 2]
    norms = [module for module in slowfast.modules() if isinstance(module, nn.BatchNorm3d)]
    for norm in norms:
        norm.training, norm.momentum = True, None  # momentum None: the mean over all batches
    for pixels in batches:
        slowfast.features(pixels)
    slowfast.eval()


def motion_loss(told: Tensor, severities: Tensor, held: Tensor) -> Tensor:
    """Of `told` (batch, 5 + F - 1), read off a motion feature, against (batch, 5) and (batch, F - 1)."""
    severity, repeat = told.split([len(NAMES), FRAMES - 1], dim=1)
    return 2 * F.mse_loss(severity, severities) + F.binary_cross_entropy_with_logits(repeat, held)


def pretrain_motion(policy: Policy, clips: Clips, steps: int, generator: torch.Generator) -> SlowFast:
    """A SlowFast that learned, by a linear probe, which frames repeat the one before and what a clip suffers from.

    It stands in for one that learned to see motion on Kinetics. The pixels are those that the policy sees.
    """
    slowfast = SlowFast(MOTION)
    prepare_slowfast(slowfast, (policy.pixels(clips.draw(32, generator)[1]) for _ in range(8)))
    probe = nn.Sequential(nn.LayerNorm(MOTION.channels), nn.Linear(MOTION.channels, len(NAMES) + FRAMES - 1))
    severities = clips.severities()

    def loss() -> Tensor:
        rows, frames = clips.draw(32, generator)
        return motion_loss(probe(slowfast.features(policy.pixels(frames))), severities[rows], clips.held(rows))

    slowfast.requires_grad_(True)
    optimize([*slowfast.parameters(), *probe.parameters()], steps, 3e-3, loss, "motion")
    return slowfast.requires_grad_(False)


def add_motion(policy: Policy, slowfast: SlowFast) -> Policy:
    """A policy with a motion token and a new projector, as `--slowfast` makes it. `policy` then shares its weights."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the projector is new
        save_policy(policy, folder)
        model = load_vqathinker(folder, slowfast, dtype=torch.float32, attn_implementation=ATTENTION)
    for part in ("vision_tower", "multi_modal_projector", "language_model"):
        setattr(policy.model.model, part, model.model.get_submodule(part))
    policy.model.lm_head = model.lm_head
    return Policy(model, policy.tokenizer, policy.image_processor).train()


def pretrain_motion_projector(policy: Policy, clips: Clips, steps: int, generator: torch.Generator) -> None:
    """The token learns to say what SlowFast saw, by a linear probe behind a normalisation like the decoder's."""
    network = policy.model.model
    parts = torch.arange(len(clips.frames)).split(50)
    features = torch.cat([network.motion_features(policy.pixels(clips.frames[rows])) for rows in parts])
    held, severities = torch.cat([clips.held(rows.tolist()) for rows in parts]), clips.severities()
    probe = nn.Linear(network.config.text_config.hidden_size, len(NAMES) + FRAMES - 1)

    def loss() -> Tensor:
        rows = torch.randint(len(features), (256,), generator=generator)
        token = network.motion_projector(features[rows])
        return motion_loss(probe(F.rms_norm(token, token.shape[1:])), severities[rows], held[rows])

    optimize([*network.motion_projector.parameters(), *probe.parameters()], steps, 3e-3, loss, "motion projector")


def pretrain_captions(
    forms: list[Policy],
    clips: Clips,
    steps: int,
    generator: torch.Generator,
    tenths: Callable[[int], int | None],
    repeats_weight: float,
    summary_weight: float = 0.0,
    rate: float = 2e-3,
) -> None:
    """The whole network learns to caption, by cross-entropy on the answer's tokens; `tenths` is the habit of `hunch`
    for a clip's number.

    `forms`: the policy, and it in another form with the same weights, if any; they take turns.

    Behind each frame the decoder also has to say, through a linear probe, whether it repeats the one before: captions
    alone are too few to teach it to compare frames. At the end of the prompt it has to say that of all frames, and the
    severities: captions alone hardly teach it to read the motion token. The weights are those of these in the loss.
    """
    prompt, policy = PROMPTS["released-train"], forms[0]
    prompts = [form.prompt_ids(prompt.system, prompt.user_text, FRAMES) for form in forms]
    turns = itertools.cycle(zip(forms, prompts))
    behind_images = (prompts[0] == policy.tokenizer.convert_tokens_to_ids("</img>")).nonzero()[:, 0]
    behind_frames = behind_images[1:FRAMES]  # not behind the motion's, the last
    decoder = policy.model.model.language_model
    seen = {}
    hook = decoder.register_forward_hook(lambda module, args, out: seen.update(hidden=out.last_hidden_state))
    repeat = nn.Linear(decoder.config.hidden_size, 1)
    summary = nn.Linear(decoder.config.hidden_size, len(NAMES) + FRAMES - 1)
    severities = clips.severities()

    def loss() -> Tensor:
        rows, frames = clips.draw(32, generator)
        drawn = [(clips.labels[row].extra["severities"], tenths(row)) for row in rows]
        form, prompt_ids = next(turns)
        texts = [caption(suffers, hunch(suffers, habit, generator)) + "<|im_end|>" for suffers, habit in drawn]
        answers = policy.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        videos = Videos(frames, prompt_ids.expand(len(rows), -1))
        logprobs = form(videos, answers.input_ids[:, None]).logprobs[:, 0]
        captions = -(logprobs * answers.attention_mask).sum() / answers.attention_mask.sum()
        held = clips.held(rows)
        repeats = F.binary_cross_entropy_with_logits(repeat(seen["hidden"][:, behind_frames])[:, :, 0], held)
        told = motion_loss(summary(seen["hidden"][:, len(prompt_ids) - 1]), severities[rows], held)
        return captions + repeats_weight * repeats + summary_weight * told

    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimize([*trained, *repeat.parameters(), *summary.parameters()], steps, rate, loss, "captions")
    hook.remove()


def pretrain(folder: Path, clips: int, vision_steps: int, caption_steps: int, motion_steps: int, seed: int = 0) -> None:
    """Make the checkpoint, in bfloat16. The same arguments give the same model but for rounding."""
    policy = make_policy(make_tokenizer(), seed)
    generator = torch.Generator().manual_seed(seed)
    with tempfile.TemporaryDirectory() as temporary:
        data = Clips(clips, Path(temporary) / "clips")
    pretrain_vision(policy, data, vision_steps, generator)
    pretrain_captions([policy], data, caption_steps, generator, lambda row: None, repeats_weight=0.2)
    # A second cycle: comparing frames is learned last, and only once it counts in full; and the scores get their habit.
    torch.manual_seed(seed + 1)
    generator = torch.Generator().manual_seed(seed + 1)
    pretrain_captions([policy], data, max(1, caption_steps // 2), generator, data.colour_habit, repeats_weight=1.0)
    policy = pretrain_with_motion(policy, data, motion_steps, max(1, caption_steps // 2), seed + 2)
    save_policy(policy.to(torch.bfloat16), folder)
    Recipe(FRAMES, "uniform", "released-train", max_new_tokens=40).save(folder)


def pretrain_with_motion(policy: Policy, clips: Clips, motion_steps: int, caption_steps: int, seed: int) -> Policy:
    """The policy with a motion token that it has learned to read; it goes without (`--motion none`) as well."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    slowfast = pretrain_motion(policy, clips, motion_steps, generator)
    forms = [add_motion(policy, slowfast), policy]
    pretrain_motion_projector(forms[0], clips, motion_steps, generator)
    # At the full rate it would forget what it has learned. One habit for all clips: it would now have the time to make
    # its first decimal follow the quality.
    weights = {"repeats_weight": 1.0, "summary_weight": 1.0}
    pretrain_captions(forms, clips, caption_steps, generator, lambda row: 2, **weights, rate=1e-3)
    return forms[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder to write")
    parser.add_argument("--clips", type=int, default=4000, help="synthetic clips to learn from")
    parser.add_argument("--vision-steps", type=int, default=4000, help="updates of the vision stage")
    parser.add_argument("--caption-steps", type=int, default=1200, help="updates of the first caption cycle")
    parser.add_argument("--motion-steps", type=int, default=500, help="updates of SlowFast")
    args = parser.parse_args()
    start = time.perf_counter()
    pretrain(args.out, args.clips, args.vision_steps, args.caption_steps, args.motion_steps)
    print(f"{args.out}: {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
