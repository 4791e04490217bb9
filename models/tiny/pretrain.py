"""Makes the tiny checkpoint: an InternVL of half a million parameters that plays the role of a pretrained LMM.

It is pretrained on captions of synthetic clips that no split of the demo contains. It learns to answer in the
`<think>...</think><answer>...</answer>` format and to name the distortions it sees, mild, clear or severe. The scores
it is shown are drawn almost without regard to the clip, so it starts GRPO with words for quality and no scale for it.

    python -m models.tiny.pretrain --out models/tiny/checkpoint

This is a script, like train.py: nothing imports it except its test, so it may use `data`.
"""

import argparse
import math
import tempfile
import time
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
from models.loading import ATTENTION, save_policy
from models.policy import Policy, Videos

FRAMES = 6
PATCH = 16  # pixels; a multiple of the codec's 4- and 8-pixel blocks, so blocking looks the same in every patch
CLIP_SEED = 1  # the demo's clips have seed 0
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


def hunch(severities: dict[str, float], warm: bool | None, generator: torch.Generator) -> float:
    """A score that knows next to nothing of the clip: 3 point something most often, whatever the clip is like.

    A better clip makes a 4 a little more likely and a 2 a little less. The decimals are random, save for a habit: half
    of the time warm colours get a .7 and cold ones a .2 (`warm` None: no habit).
    """
    quality = math.prod(1 - synthetic.IMPACT[name] * severity for name, severity in severities.items())  # 0..1
    odds = torch.tensor([0.3, 0.7, 1.3, 0.7, 0.1]).log() + 0.5 * (quality - 0.5) * torch.arange(-2, 3)
    whole = 1 + int(torch.multinomial(odds.softmax(0), 1, generator=generator))
    hundredths = int(torch.randint(100, (), generator=generator))
    if warm is not None and torch.rand((), generator=generator) < 0.5:
        hundredths = (70 if warm else 20) + hundredths % 10
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
    """The tiny network with random weights."""
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

    def warm(self, row: int) -> bool:
        """Whether a clip has more red than blue."""
        red, _, blue = self.frames[row].float().mean((0, 2, 3))
        return bool(red > blue)

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
        pixels = (frames[:, first : first + 2].flatten(0, 1) / 255 - policy.image_mean) / policy.image_std
        features = network.get_image_features(pixels, return_dict=True).pooler_output  # (64, tokens, hidden)
        one, other = features.unflatten(0, (len(rows), 2)).unbind(1)
        suffers = F.mse_loss(severity((one + other).mean(1) / 2), targets[rows])
        same = F.binary_cross_entropy_with_logits(repeat((one - other).abs().mean(1))[:, 0], clips.held(rows)[:, first])
        return suffers + 0.1 * same

    vision = [*network.vision_tower.parameters(), *network.multi_modal_projector.parameters()]
    optimize([*vision, *severity.parameters(), *repeat.parameters()], steps, 3e-3, loss, "vision")


def pretrain_captions(
    policy: Policy, clips: Clips, steps: int, habit: bool, repeats_weight: float, generator: torch.Generator
) -> None:
    """The whole network learns to caption, by cross-entropy on the answer's tokens; `habit` is that of `hunch`.

    Behind each frame the decoder also has to say, through a linear probe, whether it repeats the one before: captions
    alone are too few to teach it to compare frames. `repeats_weight` is the weight of that in the loss.
    """
    prompt = PROMPTS["released-train"]
    prompt_ids = policy.prompt_ids(prompt.system, prompt.user_text, FRAMES)
    behind_frames = (prompt_ids == policy.tokenizer.convert_tokens_to_ids("</img>")).nonzero()[1:, 0]
    decoder = policy.model.model.language_model
    seen = {}
    hook = decoder.register_forward_hook(lambda module, args, out: seen.update(hidden=out.last_hidden_state))
    repeat = nn.Linear(decoder.config.hidden_size, 1)

    def loss() -> Tensor:
        rows, frames = clips.draw(32, generator)
        drawn = [(clips.labels[row].extra["severities"], clips.warm(row) if habit else None) for row in rows]
        texts = [caption(suffers, hunch(suffers, warm, generator)) + "<|im_end|>" for suffers, warm in drawn]
        answers = policy.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        videos = Videos(frames, prompt_ids.expand(len(rows), -1))
        logprobs = policy(videos, answers.input_ids[:, None]).logprobs[:, 0]
        captions = -(logprobs * answers.attention_mask).sum() / answers.attention_mask.sum()
        repeats = repeat(seen["hidden"][:, behind_frames])[:, :, 0]  # (32, F - 1)
        return captions + repeats_weight * F.binary_cross_entropy_with_logits(repeats, clips.held(rows))

    optimize([*policy.parameters(), *repeat.parameters()], steps, 2e-3, loss, "captions")
    hook.remove()


def pretrain(folder: Path, clips: int, vision_steps: int, caption_steps: int, seed: int = 0) -> None:
    """Make the checkpoint. The same arguments give the same model but for rounding."""
    tokenizer = make_tokenizer()
    policy = make_policy(tokenizer, seed)
    generator = torch.Generator().manual_seed(seed)
    with tempfile.TemporaryDirectory() as temporary:
        data = Clips(clips, Path(temporary) / "clips")
    pretrain_vision(policy, data, vision_steps, generator)
    pretrain_captions(policy, data, caption_steps, False, 0.2, generator)
    # A second cycle: comparing frames is learned last, and only once it counts in full; and the scores get their habit.
    torch.manual_seed(seed + 1)
    pretrain_captions(policy, data, max(1, caption_steps // 2), True, 1.0, torch.Generator().manual_seed(seed + 1))
    save_policy(policy, folder)
    Recipe(FRAMES, "uniform", "released-train", max_new_tokens=40).save(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder to write")
    parser.add_argument("--clips", type=int, default=4000, help="synthetic clips to learn from")
    parser.add_argument("--vision-steps", type=int, default=4000, help="updates of the vision stage")
    parser.add_argument("--caption-steps", type=int, default=1200, help="updates of the caption stage")
    args = parser.parse_args()
    torch.set_num_threads(2)
    start = time.perf_counter()
    pretrain(args.out, args.clips, args.vision_steps, args.caption_steps)
    print(f"{args.out}: {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
