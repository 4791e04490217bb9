"""What a network weighs and what a training step needs of a GPU, counted from sizes; nothing is allocated.

`inventory` counts a network on the meta device, `moments` says how many bytes of what are alive when a step is at its
fullest, `peaks` which moment of each phase is the worst. Of several processes one is counted: it holds all weights and
states, or its share of them (`Step.parallel`, `Step.shard_optimizer`). A byte count here is one of tensors
(`torch.cuda.max_memory_allocated`); the CUDA context, about half a GiB, and what the allocator loses to fragments come
on top.

Legend: N videos, F frames, S frame side in pixels, P prompt tokens, G answers per video, T answer tokens, V vocabulary,
h hidden width, m MLP width, H query heads, K key/value heads, D head width, L layers; of the vision tower v hidden
width, w MLP width. Bytes of a number: r in the residual stream, c where matrices are multiplied.
"""

import re
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn
from transformers import InternVLConfig

from models import policy
from models.lora import TARGETS
from models.policy import PARTS
from models.released import image_tokens, meta_network
from models.slowfast import SlowFastConfig

# name: prefixes of its parameters. `--freeze` names the first, second and fifth, and third with fourth.
SECTIONS = {
    "vision tower": "model.vision_tower.",
    "projector": "model.multi_modal_projector.",
    "language model": "model.language_model.",
    "lm_head": "lm_head.",
    "motion projector": "model.motion_projector.",
    "SlowFast": "model.slowfast.",
    "LoRA": "lora_",  # of adapters, which the network on the meta device does not have
}


class Precision(NamedTuple):
    """Bytes per parameter and per number of an activation."""

    weights: int
    gradients: int
    optimizer: int  # AdamW's two float32 moments, and the float32 master weights if the weights are bfloat16
    reference: int
    residual: int  # r; under autocast the sums of the residual stream stay float32
    compute: int  # c
    autocast: bool  # bfloat16 copies of float32 weights while a pass runs


PRECISIONS = {
    "float32": Precision(4, 4, 8, 4, residual=4, compute=4, autocast=False),
    "mixed": Precision(4, 4, 8, 4, residual=4, compute=2, autocast=True),
    "bfloat16": Precision(2, 2, 12, 2, residual=2, compute=2, autocast=False),
}


class Inventory(NamedTuple):
    """By section: `parameters`, those that are `trained`, and those in `matrices`, which autocast copies."""

    parameters: dict[str, int]
    trained: dict[str, int]
    matrices: dict[str, int]


def inventory(
    config: InternVLConfig, motion: SlowFastConfig | None, frozen: list[str], lora_rank: int = 0
) -> Inventory:
    """Count the network without `frozen`, names of `models.policy.PARTS`. Tied weights count once, as embeddings.

    With adapters of `lora_rank` they and the motion projector are trained alone.
    """
    model = meta_network(config, motion)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.get_input_embeddings().weight
    if lora_rank:
        frozen = ["vision", "projector", "language"]
    for name in (name for part in frozen for name in PARTS[part]):
        if name != "model.motion_projector" or motion:
            model.get_submodule(name).requires_grad_(False)
    counted = {section: [] for section in SECTIONS}
    for name, parameter in model.named_parameters():
        counted[section_of(name)].append(parameter)
    matrices = dict.fromkeys(SECTIONS, 0)
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):  # SlowFast, of Conv3d, runs without autocast
            matrices[section_of(f"{name}.")] += sum(p.numel() for p in module.parameters() if p.requires_grad)
    parameters = {section: sum(p.numel() for p in found) for section, found in counted.items()}
    trained = {section: sum(p.numel() for p in found if p.requires_grad) for section, found in counted.items()}
    adapted = [module for name, module in model.named_modules() if re.fullmatch(TARGETS, name)]
    adapters = {"LoRA": lora_rank * sum(linear.in_features + linear.out_features for linear in adapted)}
    return Inventory(parameters | adapters, trained | adapters, matrices | adapters)


def section_of(name: str) -> str:
    return next(section for section, prefix in SECTIONS.items() if name.startswith(prefix))


@dataclass(frozen=True)
class Step:
    """What one process does in a step.

    `videos` (N) of its own, sampled with `copies` (2 if each has a perturbed copy), updated `micro_batch` at a time;
    `frames` (F) of `side` (S) pixels, and `clip_frames` for SlowFast alone; `prompt` (P) tokens; `answers` (G) a video
    of `tokens` (T). `lora`: adapters are trained, and the reference is the policy without them.
    """

    videos: int
    copies: int
    micro_batch: int
    frames: int
    side: int
    prompt: int
    answers: int
    tokens: int
    precision: str
    checkpointing: bool
    reference: bool
    processes: int
    top_p: bool = False
    clip_frames: int = 0
    parallel: str = "ddp"
    shard_optimizer: bool = False
    lora: bool = False


Bytes = dict[str, float]  # by component


class Network:
    """The widths of a network, and the bytes of its passes; `n` is always a number of videos in one pass."""

    def __init__(self, config: InternVLConfig, motion: SlowFastConfig | None, counts: Inventory, step: Step):
        text, vision = config.text_config, config.vision_config
        self.step, self.counts, self.motion, self.precision = step, counts, motion, PRECISIONS[step.precision]
        self.fsdp = step.parallel == "fsdp" and step.processes > 1
        self.shares = step.processes if self.fsdp else 1  # among which weights, gradients and reference are divided
        self.optimizer_shares = step.processes if self.fsdp or step.shard_optimizer else 1
        if self.fsdp and self.precision.autocast:  # weights arrive in bfloat16, and embeddings with them
            self.precision = self.precision._replace(residual=2, autocast=False)
        self.r, self.c = self.precision.residual, self.precision.compute
        self.V, self.h, self.m, self.L = (
            text.vocab_size,
            text.hidden_size,
            text.intermediate_size,
            text.num_hidden_layers,
        )
        D = getattr(text, "head_dim", None) or self.h // text.num_attention_heads
        self.q, self.kv = text.num_attention_heads * D, text.num_key_value_heads * D  # channels of a token
        self.heads = text.num_attention_heads
        self.v, self.w, self.vision_layers = vision.hidden_size, vision.intermediate_size, vision.num_hidden_layers
        self.patches = (step.side // vision.patch_size[0]) ** 2
        self.visual = image_tokens(config, step.side)
        self.shuffled = self.v * round(1 / config.downsample_ratio) ** 2  # channels of a visual token before the MLP

    # ---- states: alive from the second step on, whatever the phase

    def states(self) -> Bytes:
        """Gradients stay between steps: they are freed when the next update begins. See `gradients_between_steps`."""
        every, trained = sum(self.counts.parameters.values()), sum(self.counts.trained.values())
        step, slowfast = self.step, self.counts.parameters["SlowFast"]  # which is float32 always, and whole
        reference = (self.precision.reference * (every - slowfast) / self.shares + 4 * slowfast) * step.reference
        if step.lora:  # the policy without its adapter, with the motion projector as it was, --beta 0 or not
            reference = self.precision.reference * self.counts.parameters["motion projector"]
        return {
            "weights": self.precision.weights * (every - slowfast) / self.shares + 4 * slowfast,
            "gradients": self.precision.gradients * trained / self.shares,
            "optimizer": self.precision.optimizer * trained / self.optimizer_shares,
            "reference": reference,
            "frames": step.copies * step.videos * (step.frames + step.clip_frames) * 3 * step.side**2,  # uint8
        }

    def gradients_between_steps(self) -> float:
        """Gradients of bfloat16 parameters are used up in the optimizer step, except for what DDP's buckets hold."""
        used_up = self.precision.weights == 2 and (self.fsdp or self.step.processes == 1)
        return 0 if used_up else self.states()["gradients"]

    # ---- what fsdp has whole for a time, in the compute dtype

    def all_gathered(self) -> Bytes:
        every = sum(self.counts.parameters.values()) - self.counts.parameters["SlowFast"]
        return {"gathered weights": self.c * every * self.fsdp}

    def passing(self, gradients: bool) -> Bytes:
        """Of a pass: a decoder layer and the one fetched ahead, and what is in no layer; their gradients, and those of
        a layer once more in the dtype of their sum."""
        decoder_layer = (self.counts.parameters["language model"] - self.V * self.h) / self.L
        heads = sum(self.counts.parameters[name] for name in ("projector", "lm_head", "motion projector"))
        rest = self.V * self.h + heads
        found = {"gathered weights": self.c * (rest + 2 * decoder_layer) * self.fsdp}
        if gradients:
            summed = self.precision.gradients * decoder_layer
            found["whole gradients"] = (self.c * (rest + decoder_layer) + summed) * self.fsdp
        return found

    # ---- pieces

    def autocast_copies(self, sections=tuple(SECTIONS)) -> float:
        """bfloat16 copies of the trained matrices: made at first use, kept until the pass ends."""
        return 2 * sum(self.counts.matrices[name] for name in sections) * self.precision.autocast

    def frozen_copies(self) -> float:
        """Those of the frozen matrices of a decoder with adapters, made at each use and kept for the backward pass."""
        matrices = self.counts.parameters["language model"] - self.V * self.h
        return 2 * matrices * self.precision.autocast * self.step.lora

    def pixels(self, n: int) -> float:
        """float32 frames."""
        return 4 * n * self.step.frames * 3 * self.step.side**2

    def image_positions(self, n: int) -> int:
        return n * self.step.frames * (self.patches + 1)  # patches and the class token

    def packed(self, n: int) -> int:
        """Tokens of packed rows; the last token of an answer is predicted but not read."""
        return n * (self.step.prompt + self.step.answers * (self.step.tokens - 1))

    def behind_prompt(self, n: int) -> float:
        """Of one layer: each answer's queries, and its keys and values behind a copy of the prompt's."""
        G, T = self.step.answers, self.step.tokens - 1
        return self.c * n * G * (T * self.q + (self.step.prompt + T) * 2 * self.kv)

    def logits(self, n: int) -> float:
        """float32 (tokens, V) of all answers' tokens, or of one chunk of them (`Policy.score_tokens`)."""
        return 4 * min(n * self.step.answers * self.step.tokens, self.chunk()) * self.V

    def chunk(self) -> int:
        """Tokens whose logits are computed at once."""
        return max(1, policy.LOGITS_AT_ONCE // self.V)

    def decoder_layer_saved(self, n: int) -> float:
        """Kept for the backward pass by a decoder layer, without its input; the attention kernel is a fused one.

        Of h: two norms keep the normalised tokens and their outputs, which under autocast are cast once for each of
        q, k, v and gate, up; in bfloat16 the norms work on a float32 copy instead of the residual. Of q and kv: rotated
        queries, keys, values; attention's output, and again with prompt and answers joined. Of m: gate, its
        activation, up, their product.
        """
        r, c, h = self.r, self.c, self.h
        if self.precision.autocast:
            norms = (2 * 4 + 5 * c + r) * h  # normalised twice, five casts, the residual between the halves
        elif c == 4:
            norms = (2 * 4 + 2 * c + r) * h
        else:
            norms = (2 * 4 + 2 * c + 2 * c) * h  # float32 copies; normalised tokens and outputs in bfloat16
        joined = c * (3 * self.q + 2 * self.kv + 4 * self.m)
        return self.packed(n) * (norms + joined) + self.behind_prompt(n)

    def vision_layer_saved(self, n: int) -> float:
        """As above: the norms' outputs (one for q, k, v; one for the MLP), q, k, v, attention's output, the outputs
        before the two layer scales, the residual between the halves; the MLP before and behind its activation."""
        casts = 4 if self.precision.autocast else 2
        return self.image_positions(n) * (((casts + 6) * self.c + self.r) * self.v + 2 * self.c * self.w)

    def vision_pass(self, n: int) -> float:
        """Most that a pass without gradient holds at once: in the MLP of a layer, whose input, attention, residual and
        norm are still there; and the pixels, with a copy for the patch embedding."""
        layer = self.image_positions(n) * (4 * self.r * self.v + 2 * self.c * self.w)
        return self.pixels(n) + max(layer, self.pixels(n))

    def decoder_pass(self, tokens: int, answers: float = 0) -> float:
        """The same for a decoder layer: embeddings, input, residual and norm; in its MLP gate, up and their product, or
        in its attention queries, keys, values and output, and copies of the `answers`' (`behind_prompt`)."""
        attention = tokens * 2 * (self.q + self.kv) * self.c + answers
        return tokens * 4 * self.r * self.h + max(tokens * 3 * self.c * self.m, attention)

    def watch_pass(self, n: int) -> float:
        """SlowFast at its widest, in float32: behind the stem's convolution, normalised and not, half the side. It sees
        all videos' frames at once, or the clips of one video."""
        if self.motion is None:
            return 0
        frames = self.step.clip_frames or n * self.step.frames
        slow = frames / self.motion.slow_stride
        stem = 2 * self.motion.slow_width * slow * (self.step.side / 2) ** 2 * 4
        return stem + 4 * (frames + slow) * 3 * self.step.side**2

    def saved(self, n: int) -> dict[str, float]:
        """Kept for the backward pass, by section. With checkpointing a layer keeps its input alone."""
        keep, s = self.step.checkpointing, self.packed(n)
        visual = n * self.step.frames * self.visual
        vision = self.vision_layers * (
            self.image_positions(n) * self.r * self.v if keep else self.vision_layer_saved(n) + self.layer_input(n)
        )
        decoder = self.L * (
            s * self.r * self.h if keep else self.decoder_layer_saved(n) + s * self.h * self.input_kept()
        )
        return {
            "vision": (vision + self.pixels(n)) * (self.counts.trained["vision tower"] > 0),
            # before and behind the norm; before and behind the activation
            "projector": visual * ((self.r + self.c) * self.shuffled + 2 * self.c * self.h) * self.sees(),
            # the prompt's embeddings, the last norm
            "decoder": decoder + s * (3 * self.r * self.h),
        }

    def sees(self) -> bool:
        """Whether the frames' tokens are computed with gradient, in each pass; else once a step (`Policy.watch`)."""
        return self.counts.trained["vision tower"] + self.counts.trained["projector"] > 0

    def layer_input(self, n: int) -> float:
        return self.image_positions(n) * self.r * self.v

    def input_kept(self) -> int:
        """Bytes of a decoder layer's input that its own first norm keeps: in bfloat16 a float32 copy, counted there."""
        return 0 if self.step.precision == "bfloat16" else self.r

    # ---- moments

    def moments(self) -> dict[tuple[str, str], Bytes]:
        """(phase, moment) -> bytes by component, states included, zero for what is not alive."""
        states, step = self.states(), self.step
        found = {}
        between = states | {"gradients": self.gradients_between_steps()}
        for moment, bytes_ in self.rollout().items():
            found["rollout", moment] = between | self.all_gathered() | bytes_
        n = min(step.micro_batch, step.videos)
        if step.reference:
            for moment, bytes_ in self.reference(n).items():
                found["reference", moment] = between | self.passing(gradients=False) | bytes_
        for moment, bytes_ in self.update(n).items():
            found["update", moment] = states | self.passing(gradients=True) | bytes_
        found["optimizer step", "AdamW"] = states | {"optimizer's temporaries": self.optimizer_temporaries()}
        return found

    def rollout(self) -> dict[str, Bytes]:
        """All videos at once, with their perturbed copies, without gradient."""
        step, c = self.step, self.c
        M = step.videos * step.copies
        per_token = self.L * 2 * self.kv * c
        prompts, answers = M * step.prompt * per_token, M * step.answers * step.tokens * per_token

        def copies(*sections):
            return {"bfloat16 copies of weights": self.autocast_copies(sections)}

        decoder = ("language model", "lm_head")  # sampling is a pass of its own, behind the prompts'
        # float32 log-probs, their double, its exp (or its sum); with --top-p sorted values, order, sum, difference
        logits = M * step.answers * self.V * (44 if step.top_p else 20)
        # scores in two parts, joined, softmax in float32, back in the compute dtype
        scores = M * step.answers * self.heads * (step.prompt + step.tokens) * (2 * c + 4)
        return {
            "SlowFast": {"activations": self.watch_pass(M)},
            "vision tower": copies("vision tower") | {"activations": self.vision_pass(M)},
            "prompts": copies(*SECTIONS) | {"activations": self.decoder_pass(M * step.prompt), "KV cache": prompts},
            "sampling": copies(*decoder) | {"activations": scores, "logits": logits, "KV cache": prompts + answers},
        }

    def reference(self, n: int) -> dict[str, Bytes]:
        """A pass without gradient over a micro-batch; frozen weights are copied one at a time."""
        copy = 2 * self.V * self.h * self.precision.autocast
        return {
            "vision tower": {"activations": self.vision_pass(n) * self.sees()},
            "decoder": {"activations": self.decoder_pass(self.packed(n), self.behind_prompt(n))},
            # log-probs; their exp, and its product with them, for the entropy
            "logits": {"logits": max(3 * self.logits(n), self.logits(n) + copy)},
        }

    def update(self, n: int) -> dict[str, Bytes]:
        """Forward and backward pass of a micro-batch."""
        step, p = self.step, self.precision
        saved, logits = self.saved(n), self.logits(n)
        first = step.videos <= step.micro_batch  # the only micro-batch: its gradients are not there before it
        trained = {name: p.gradients * count / self.shares for name, count in self.counts.trained.items()}
        none = {"gradients": 0} if first else {}
        head = {"gradients": trained["lm_head"]} if first else {}

        def heads(count: int) -> Bytes:  # of several chunks; later ones of a step add to gradients that are there
            if n * step.answers * step.tokens <= self.chunk():
                return {}
            return {"gradients": count * trained["lm_head"] + (0 if first else sum(trained.values()))}

        kept = ("lm_head", "projector", "motion projector") if step.checkpointing else tuple(SECTIONS)
        again = step.checkpointing  # a layer is computed once more before its backward pass
        frozen, head_copy = self.frozen_copies(), 2 * self.V * self.h * self.precision.autocast * step.lora
        whole = 0 if again else frozen
        held = {"bfloat16 copies of weights": self.autocast_copies(kept) + whole}
        behind = {"bfloat16 copies of weights": self.autocast_copies(kept) + (frozen / self.L if again else frozen)}
        ahead = {"bfloat16 copies of weights": held["bfloat16 copies of weights"] + head_copy}
        activations = sum(saved.values())
        # read twice, for prompts and for answers: two gradients of all rows, then their sum, which is new
        rows = p.gradients * self.V * self.h * (trained["language model"] > 0)
        later = {"gradients": sum(trained.values()) - trained["vision tower"] - trained["projector"]} if first else {}
        decoder = again * self.decoder_layer_saved(n) + self.packed(n) * (2 * self.c * self.m + 2 * self.r * self.h)
        vision = again * self.vision_layer_saved(n) + self.image_positions(n) * (self.c * self.w + 2 * self.r * self.v)
        return {
            # logits and log-probs, with all copies of weights: autocast keeps them until the forward pass ends
            "log-probs": none
            | {
                "bfloat16 copies of weights": self.autocast_copies() + whole + head_copy,
                "activations": activations,
                "logits": 2 * logits,
            },
            # log-probs, their exp, its product with them (entropy); in the backward pass log-probs and two gradients
            "logits": none | ahead | heads(1) | {"activations": activations, "logits": 3 * logits},
            # the head's gradient so far, and what a chunk adds to it; its logits' gradient
            "lm_head": none | ahead | heads(2) | {"activations": activations, "logits": logits * self.c / 4},
            "last decoder layer": head | behind | {"activations": activations + decoder},
            "embeddings": later | {"activations": saved["vision"] + saved["projector"] + (2 if first else 3) * rows},
            "last vision layer": later | {"activations": saved["vision"] + vision * (saved["vision"] > 0)},
        }

    def optimizer_temporaries(self) -> float:
        """Of bfloat16 parameters the gradients in float32, which replace the others but for those in DDP's buckets; and
        the largest matrix as it comes from the processes that share the optimizer alone. AdamW itself, one kernel,
        needs none."""
        masters = 4 * sum(self.counts.trained.values()) / self.optimizer_shares * (self.precision.weights == 2)
        replaced = self.states()["gradients"] - self.gradients_between_steps()
        fetched = self.precision.weights * self.V * self.h * (self.optimizer_shares > self.shares)
        return masters - replaced + fetched


class Peak(NamedTuple):
    """The fullest moment: its phase, its name, bytes by component, largest first."""

    phase: str
    moment: str
    components: Bytes

    @property
    def total(self) -> float:
        return sum(self.components.values())


def peaks(config: InternVLConfig, motion: SlowFastConfig | None, counts: Inventory, step: Step) -> list[Peak]:
    """The fullest moment of each phase of a step, the worst first."""
    best: dict[str, Peak] = {}
    for (phase, moment), components in Network(config, motion, counts, step).moments().items():
        ordered = dict(sorted(components.items(), key=lambda item: -item[1]))
        peak = Peak(phase, moment, ordered)
        if phase not in best or peak.total > best[phase].total:
            best[phase] = peak
    return sorted(best.values(), key=lambda peak: -peak.total)
