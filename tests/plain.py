"""The plain way to compute a GRPO step, with transformers' own code: every answer carries its own copy of the prompt.

`PlainPolicy` has the verbs of `models.policy.Policy`, so that the same step runs with either: what it is compared with
in tests (equal numbers) and in benchmarks (time and memory).

Legend: N videos, G answers per video, P prompt tokens, T answer tokens, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList

from models.policy import Policy, TokenLogprobs, Videos
from models.sampling import Completions, inverse_cdf
from tests.helpers import plain_model


class Drawn(LogitsProcessor):
    """Makes `generate` draw its tokens as `inverse_cdf` does, from given uniforms (rows, T), and keeps their log-probs.

    The image token is left out, as `Policy.logprobs` leaves it out.
    """

    def __init__(self, uniforms: Tensor, prompt_length: int, image_token: int, temperature: float):
        self.uniforms, self.start, self.image_token = uniforms, prompt_length, image_token
        self.temperature, self.logprobs = temperature, []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logits = scores.float() / self.temperature
        logits[:, self.image_token] = torch.finfo(torch.float32).min
        logprobs = logits.log_softmax(-1)
        token = inverse_cdf(logprobs, self.uniforms[:, input_ids.shape[1] - self.start])[:, None]
        self.logprobs.append(logprobs.gather(-1, token))
        return torch.full_like(scores, -torch.inf).scatter(-1, token, 0.0)


class Repeated(NamedTuple):
    """What transformers takes: ids (N * G, P) and pixels (N * G * F, 3, S, S)."""

    input_ids: Tensor
    pixel_values: Tensor


class PlainPolicy(nn.Module):
    """The network and weights of a policy without motion, under transformers' own attention ('sdpa')."""

    def __init__(self, policy: Policy, attention: str = "sdpa"):
        super().__init__()
        self.model = plain_model(policy, attention).train(policy.training)
        self.model.generation_config = policy.model.generation_config
        self.pixels, self.texts, self.temperature = policy.pixels, policy.texts, policy.temperature
        self.end_ids, self.pad_id, self.autocast = policy.end_ids, policy.pad_id, policy.autocast

    def repeated(self, videos: Videos, G: int) -> Repeated:
        pixels = self.pixels(videos.frames).repeat_interleave(G, dim=0).flatten(0, 1)
        return Repeated(videos.prompt_ids.to(pixels.device).repeat_interleave(G, dim=0), pixels)

    def encode(self, videos: Videos) -> Videos:
        """Nothing yet: `generate` encodes the prompts, each G times."""
        return videos

    @torch.no_grad()
    def sample(self, prefix: Videos, uniforms: Tensor, top_p: float = 1.0) -> Completions:
        assert top_p == 1.0
        N, G, T = uniforms.shape
        inputs = self.repeated(prefix, G)
        P = inputs.input_ids.shape[1]
        image_token = self.model.config.image_token_id
        drawn = Drawn(uniforms.flatten(0, 1).to(inputs.input_ids.device), P, image_token, self.temperature)
        ends = {"eos_token_id": self.end_ids.tolist(), "pad_token_id": self.pad_id}
        with self.autocast():
            out = self.model.generate(
                **inputs._asdict(),
                attention_mask=torch.ones_like(inputs.input_ids),
                do_sample=False,
                max_new_tokens=T,
                logits_processor=LogitsProcessorList([drawn]),
                **ends,
            )
        ids = out[:, P:].unflatten(0, (N, G))
        ended = torch.isin(ids, self.end_ids)
        mask = ended.cumsum(-1) - ended.int() == 0
        logprobs = torch.cat(drawn.logprobs, dim=1).view(ids.shape).where(mask, 0)
        return Completions(ids.where(mask, self.pad_id), mask, logprobs, truncated=~ended.any(-1))

    def forward(self, videos: Videos, completion_ids: Tensor) -> TokenLogprobs:
        """Logits of all N * G * (P + T) positions, and of those the answers'."""
        N, G, T = completion_ids.shape
        inputs = self.repeated(videos, G)
        ids = torch.cat([inputs.input_ids, completion_ids.flatten(0, 1).to(inputs.input_ids.device)], dim=1)
        with self.autocast():
            logits = self.model(input_ids=ids, pixel_values=inputs.pixel_values, use_cache=False).logits
        logits = logits[:, -T - 1 : -1].unflatten(0, (N, G)).float() / self.temperature
        image_token = torch.arange(logits.shape[-1], device=logits.device) == self.model.config.image_token_id
        logprobs = logits.masked_fill(image_token, torch.finfo(torch.float32).min).log_softmax(-1)
        entropy = -(logprobs.detach().exp() * logprobs.detach()).sum(-1)
        return TokenLogprobs(logprobs.gather(-1, completion_ids.to(ids.device)[..., None])[..., 0], entropy)
