"""The policy: an InternVL that watches videos and answers in words, with the three verbs of the algorithm.

    watch(videos) -> Videos                  before them: what no pass of a step changes, computed once
    encode(videos) -> Prefix                 vision tower and prompt, once per video, no gradient
    sample(prefix, uniforms) -> Completions  G continuations of each prefix
    forward(videos, ids) -> log-probs        the same numbers with gradient; what DDP wraps

Legend: N videos, F frames, S frame side in pixels, P prompt tokens, G answers per video, T answer tokens, V vocabulary,
K dense clips of L frames each per video, for SlowFast alone.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from models.lora import Adapter
from models.sampling import Completions, Prefix, continue_prefix, inverse_cdf
from models.shared_prefix import GroupCache, packed_positions
from models.slowfast import check_watched

LOGITS_AT_ONCE = 2**26  # numbers of one float32 tensor of tokens x V: 256 MiB

PARTS = {  # what --freeze may name, and the modules of each
    "vision": ("model.vision_tower",),
    "projector": ("model.multi_modal_projector",),
    "language": ("model.language_model", "lm_head"),
    "motion": ("model.motion_projector",),  # SlowFast itself is never trained
}


def check_parts(parts: list[str]) -> None:
    """Raise a ValueError naming --freeze for what is not in PARTS."""
    for part in parts:
        if part not in PARTS:
            raise ValueError(f"--freeze {part}: choose among {', '.join(PARTS)}")


@dataclass(frozen=True)
class Videos:
    """N videos as the model takes them: `frames` (N, F, 3, S, S) uint8 RGB and `prompt_ids` (N, P).

    `motion_clips` (N, K, L, 3, S, S) uint8: what SlowFast sees instead of the frames. `motion` (N, C), its features,
    and `visual` (N, F * t, hidden), the frames' tokens: from `Policy.watch`, where they are the same in all passes.
    """

    frames: Tensor
    prompt_ids: Tensor
    motion: Tensor | None = None
    motion_clips: Tensor | None = None
    visual: Tensor | None = None

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, rows: slice) -> "Videos":
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        return Videos(**{name: value[rows] for name, value in values if value is not None})


class TokenLogprobs(NamedTuple):
    """`logprobs` (N, G, T) of given tokens, with gradient, and the `entropy` (N, G, T), in nats, without."""

    logprobs: Tensor
    entropy: Tensor


class Policy(nn.Module):
    """An `InternVLForConditionalGeneration`, or a `VQAThinker`, with its tokenizer and image processor.

    The distribution that is sampled, scored and trained is one: softmax(logits / temperature) over all tokens but the
    image token, which stands for a frame and has no place in an answer.

    Args:
        model: loaded with the text decoder's attention set to `shared_prefix` (see `models.loading`).
        tokenizer: with the image tokens `<img>`, `<IMG_CONTEXT>`, `</img>` and a chat template.
        image_processor: its `image_mean` and `image_std` normalise pixels in [0, 1].
        autocast: compute dtype of the verbs (torch.bfloat16, say), None for the parameters' own.
        image_side: S, the frame side in pixels; None for the image processor's. Where it is not the one that the vision
            tower was made for, position embeddings are interpolated.
        cuda_graph: sampling repeats its token step as a CUDA graph.

    Raises ValueError naming --image-side if patches, or the visual tokens made of them, do not divide the frame.
    """

    IMAGE_TOKENS = ("<img>", "<IMG_CONTEXT>", "</img>")

    def __init__(
        self,
        model,
        tokenizer,
        image_processor,
        temperature: float = 1.0,
        autocast: torch.dtype | None = None,
        image_side: int | None = None,
        cuda_graph: bool = False,
    ):
        super().__init__()
        vision = model.config.vision_config
        self.image_side = image_side or image_processor.size["height"]
        unit = round(vision.patch_size[0] / model.config.downsample_ratio)  # pixels of a visual token
        if self.image_side % unit:
            raise ValueError(f"--image-side {self.image_side}: must be a multiple of {unit} for this model")
        self.tokens_per_frame = (self.image_side // unit) ** 2
        rotation = model.model.language_model.rotary_emb
        if rotation.rope_type == "dynamic":  # to scale itself it reads positions back from the device, at every token
            rotation.rope_type = "default"  # the same up to the positions that `check_length` allows
        self.model, self.tokenizer, self.image_processor = model, tokenizer, image_processor
        self.temperature = temperature
        self.autocast_dtype = autocast
        self.cuda_graph = cuda_graph
        self.adapter: Adapter | None = None
        self.register_buffer("image_mean", torch.tensor(image_processor.image_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("image_std", torch.tensor(image_processor.image_std).view(3, 1, 1), persistent=False)
        ends = model.generation_config.eos_token_id
        ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
        # One set of end tokens: what stops the sampler is what the mask counts as the end.
        self.register_buffer("end_ids", torch.tensor(sorted(ends)), persistent=False)
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends)

    @property
    def device(self) -> torch.device:
        return self.end_ids.device

    def freeze(self, parts: list[str]) -> None:
        """Train without these PARTS: the vision tower, the projectors of its tokens and of motion, the text decoder.

        Raises ValueError naming --freeze for a part that the model does not have, and if nothing is left to train.
        """
        check_parts(parts)
        if "motion" in parts and not self.has_motion:
            raise ValueError("--freeze motion: the model has no motion token")
        for part in parts:
            for parameter in self.part(part):
                parameter.requires_grad_(False)
        if not any(parameter.requires_grad for parameter in self.parameters()):
            raise ValueError(f"--freeze {','.join(parts)}: leaves nothing to train")

    def part(self, name: str) -> list[nn.Parameter]:
        """The parameters of one of PARTS."""
        return [p for module in PARTS[name] for p in self.model.get_submodule(module).parameters()]

    def layers(self) -> list[nn.Module]:
        """The layers of the vision tower and of the text decoder, of which a pass runs one after the other."""
        return [module for module in self.modules() if isinstance(module, GradientCheckpointingLayer)]

    def weights(self) -> dict[str, Tensor]:
        """What a checkpoint holds: the model's parameters and buffers by name, tied ones once; or its adapter's."""
        if self.adapter:
            return self.adapter.weights()
        every, once = (dict(self.model.named_parameters(remove_duplicate=drop)) for drop in (False, True))
        return {name: x for name, x in self.model.state_dict().items() if name in once or name not in every}

    @property
    def has_motion(self) -> bool:
        """Whether a video has one more visual token, for motion, behind those of its frames."""
        return getattr(self.model.config, "motion", None) is not None

    @property
    def clip_frames(self) -> int:
        """L, the frames of a dense clip for this SlowFast; 0 without a motion token."""
        return self.model.model.slowfast.config.clip_frames if self.has_motion else 0

    def check_frames(self, frames: int, motion_clips: int = 0) -> None:
        """Raise a ValueError if SlowFast as it is set cannot take what it would see: see `check_watched`."""
        if self.has_motion:
            check_watched(self.model.model.slowfast.config, frames, motion_clips, self.image_side)

    def check_length(self, words, frames: int, max_new_tokens: int) -> None:
        """Raise a ValueError if prompt and answer are longer than what the text decoder has positions for."""
        P = len(self.prompt_ids(words.system, words.user_text, frames))
        positions = self.model.config.text_config.max_position_embeddings
        if P + max_new_tokens > positions:
            raise ValueError(
                f"--max-new-tokens {max_new_tokens}: with the prompt's {P}, more than the model's {positions} positions"
            )

    # ---- words <-> tokens

    def prompt_ids(self, system: str, user_text: Callable[[list[str]], str], frames: int) -> Tensor:
        """(P,) ids of a chat prompt; `user_text` places `frames` image blocks in the user's message.

        It is called with their list, and for a model with motion with a block of one slot behind it. Raises ValueError
        if the tokenizer does not turn the blocks into exactly the image slots that the model fills.
        """
        start, context, end = self.IMAGE_TOKENS
        blocks = [[start + context * self.tokens_per_frame + end] * frames]
        blocks += [start + context + end] if self.has_motion else []
        expected = frames * self.tokens_per_frame + self.has_motion
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user_text(*blocks)}]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = torch.tensor(self.tokenizer(text, add_special_tokens=False).input_ids)
        slots = int((ids == self.model.config.image_token_id).sum())
        if slots != expected:
            raise ValueError(
                f"the tokenizer makes {slots} image slots of {frames} frames x {self.tokens_per_frame} tokens"
                f"{' and 1 of motion' if self.has_motion else ''}: "
                f"its {context!r} is not the model's image token {self.model.config.image_token_id}"
            )
        return ids

    def texts(self, completions: Completions) -> list[list[str]]:
        """What was written: N lists of G texts, without the end token."""
        spoken = completions.mask & ~torch.isin(completions.ids, self.end_ids)
        return [
            [self.tokenizer.decode(ids[keep]) for ids, keep in zip(*group)]
            for group in zip(completions.ids.cpu(), spoken.cpu())
        ]

    # ---- the network in parts

    def autocast(self):
        enabled = self.autocast_dtype is not None
        return torch.autocast(self.device.type, self.autocast_dtype, enabled=enabled)

    def pixels(self, frames: Tensor) -> Tensor:
        """uint8 frames (..., 3, S, S) as the networks take them: on the device, normalised, float32."""
        return (frames.to(self.device) / 255 - self.image_mean) / self.image_std

    @torch.no_grad()
    def watch(self, videos: Videos) -> Videos:
        """The videos with all that is the same in every pass of a step, the reference's too, since it is not trained.

        That is SlowFast's feature, if the model has a motion token; the dense clips are dropped then. And the frames'
        visual tokens, if the vision tower and its projector are frozen.
        """
        with self.autocast():
            if self.has_motion:
                videos = replace(videos, motion=self.motion_features(videos), motion_clips=None)
            if not any(p.requires_grad for part in ("vision", "projector") for p in self.part(part)):
                videos = replace(videos, visual=self.visual_tokens(videos))
        return videos

    def motion_features(self, videos: Videos) -> Tensor:
        """(N, C) features of SlowFast; of dense clips their mean, in float32, a video at a time for memory."""
        features = self.model.model.motion_features
        if videos.motion is not None:
            return videos.motion
        if videos.motion_clips is None:
            return features(self.pixels(videos.frames))
        return torch.stack([features(self.pixels(clips)).float().mean(0) for clips in videos.motion_clips])

    def visual_tokens(self, videos: Videos) -> Tensor:
        """(N, F * t, hidden) visual tokens of the frames."""
        if videos.visual is not None:
            return videos.visual
        pixels = self.pixels(videos.frames).flatten(0, 1)
        tokens = self.model.model.get_image_features(pixels, return_dict=True).pooler_output
        return tokens.reshape(len(videos), -1, tokens.shape[-1])

    def embed_prompt(self, videos: Videos) -> Tensor:
        """(N, P, hidden): prompt tokens, with the image slots filled by the vision tower, the last by SlowFast."""
        visual = self.visual_tokens(videos)
        if self.has_motion:
            visual = torch.cat([visual, self.model.model.motion_token(self.motion_features(videos))], dim=1)
        ids = videos.prompt_ids.to(self.device)
        embeddings = self.model.get_input_embeddings()(ids)
        slots = self.model.model.get_placeholder_mask(ids, embeddings, visual)  # raises on a count that differs
        return embeddings.masked_scatter(slots, visual.to(embeddings.dtype))

    def decode(self, embeddings: Tensor, positions: Tensor, **kwargs) -> Tensor:
        """Hidden states of the text decoder; `kwargs` for `shared_prefix_attention`, which needs no mask."""
        inputs = {"inputs_embeds": embeddings, "attention_mask": {"full_attention": None}, "position_ids": positions}
        return self.model.model.language_model(**inputs, use_cache=False, **kwargs).last_hidden_state

    def logprobs(self, hidden: Tensor) -> Tensor:
        """Log-softmax over the vocabulary but the image token, in float32, at the policy's temperature."""
        logits = self.model.lm_head(hidden).float() / self.temperature
        logits[..., self.model.config.image_token_id] = torch.finfo(torch.float32).min
        return logits.log_softmax(-1)  # Eq. (1)

    # ---- the three verbs

    @torch.no_grad()
    def encode(self, videos: Videos, begun: Tensor | None = None) -> Prefix:
        """Vision tower and prompt, once per video; the prefix can be continued more than once.

        begun (N, B): tokens of an answer to each video, to be read behind the prompt and continued.
        """
        with self.autocast():
            cache = GroupCache()
            embeddings = self.embed_prompt(videos)
            if begun is not None:
                answer = self.model.get_input_embeddings()(begun.to(self.device))
                embeddings = torch.cat([embeddings, answer.to(embeddings.dtype)], dim=1)
            P = embeddings.shape[1]
            positions = packed_positions(P, 0, 0, self.device)
            hidden = self.decode(embeddings, positions, packed=(0, 0), group_cache=cache)
            return Prefix(cache, self.logprobs(hidden[:, -1]), P)

    def sample(self, prefix: Prefix, uniforms: Tensor, top_p: float = 1.0) -> Completions:
        """Continue each prefix G ways, drawing token t of answer (n, g) with `uniforms` (N, G, T) in [0, 1)."""
        uniforms = uniforms.to(self.device)
        G, T = uniforms.shape[1:]
        uniforms = uniforms.flatten(0, 1)
        return self.follow(prefix, G, T, lambda logp, answers, t: inverse_cdf(logp, uniforms[answers, t], top_p))

    def greedy(self, prefix: Prefix, max_new_tokens: int) -> Completions:
        """The most likely token at each step: one answer per video, G = 1, the same every time."""
        return self.follow(prefix, 1, max_new_tokens, lambda logprobs, answers, t: logprobs.argmax(-1))

    def follow(self, prefix: Prefix, G: int, T: int, choose: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Completions:
        """Continue each prefix G ways by T tokens at most, those that `choose` says: see `continue_prefix`."""

        def step(token: Tensor, position: Tensor, cache: GroupCache) -> Tensor:
            embeddings = self.model.get_input_embeddings()(token)
            return self.logprobs(self.decode(embeddings, position.expand(1, token.shape[1]), group_cache=cache))

        with self.autocast():
            return continue_prefix(prefix, G, T, choose, step, self.end_ids, self.pad_id, self.cuda_graph)

    def forward(self, videos: Videos, completion_ids: Tensor) -> TokenLogprobs:
        """Log-probs of `completion_ids` (N, G, T): the prompt once, with gradient, and the answers attending to it."""
        completion_ids = completion_ids.to(self.device)
        N, G, T = completion_ids.shape
        with self.autocast():
            prompt = self.embed_prompt(videos)
            P = prompt.shape[1]
            answers = self.model.get_input_embeddings()(completion_ids[:, :, :-1])  # the last token predicts nothing
            packed = torch.cat([prompt, answers.flatten(1, 2)], dim=1)
            positions = packed_positions(P, G, T - 1, self.device)
            hidden = self.decode(packed, positions, packed=(G, T - 1))
            first = hidden[:, None, P - 1 : P].expand(N, G, 1, -1)
            hidden = torch.cat([first, hidden[:, P:].unflatten(1, (G, T - 1))], dim=2)
            return self.score_tokens(hidden, completion_ids)

    def without_adapter(self, videos: Videos, completion_ids: Tensor) -> TokenLogprobs:
        """`forward` of the policy that its adapter was added to: the reference, in the same memory."""
        with self.adapter.off():
            return self(videos, completion_ids)

    def score_tokens(self, hidden: Tensor, ids: Tensor) -> TokenLogprobs:
        """Log-probs of the tokens `ids` (N, G, T) and entropies, from the hidden states (N, G, T, hidden) before them.

        In chunks of tokens, so that memory does not grow with their number times the vocabulary: the backward pass
        computes a chunk's logits again.
        """
        size = max(1, LOGITS_AT_ONCE // self.model.config.text_config.vocab_size)
        chunks = list(zip(hidden.flatten(0, 2).split(size), ids.flatten().split(size)))
        score = self.score_chunk if len(chunks) == 1 else partial(checkpoint, self.score_chunk, use_reentrant=False)
        logprobs, entropy = zip(*(score(*chunk) for chunk in chunks))
        return TokenLogprobs(torch.cat(logprobs).view(ids.shape), torch.cat(entropy).view(ids.shape))

    def score_chunk(self, hidden: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies (M,) of M tokens."""
        logprobs = self.logprobs(hidden)
        with torch.no_grad():
            entropy = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs.gather(-1, ids[:, None])[:, 0], entropy
