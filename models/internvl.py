"""VQAThinker's network: transformers' InternVL, and one more visual token per video that says how it moves.

VQAThinker (arXiv 2508.06051), as its released code has it: a frozen SlowFast watches the very frames that the ViT sees,
and a two-layer projector makes its feature a token of the decoder. A video's image slots in the prompt are those of its
frames, in order, and then one for motion. Everything else is the native class, under its own parameter names.

Legend: N videos, F frames, H and W height and width in pixels, t visual tokens per frame, P prompt tokens, C channels
of SlowFast's feature.
"""

import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLModel
from transformers import initialization as init
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_outputs import BaseModelOutputWithPooling

from models.keys import describe
from models.shapes import check_model_type
from models.slowfast import SlowFast, SlowFastConfig


class VQAThinkerConfig(InternVLConfig):
    """InternVL's settings, and `motion`: the fields of `SlowFastConfig`, or None for an InternVL without motion."""

    model_type = "vqathinker"

    motion: dict | None = None

    def __post_init__(self, **kwargs):
        kwargs.pop("model_type", None)  # of an InternVL's config.json
        super().__post_init__(**kwargs)
        if self.motion is not None:
            self.motion = asdict(SlowFastConfig(**self.motion))


# Checkpoints on the hub keep the names that InternVL's parameters had in transformers 4. transformers 5.23 knows them
# by the type of the model alone, 5.20 by the class of a part of it too.
for ours, theirs in ((VQAThinkerConfig.model_type, InternVLConfig.model_type), ("VQAThinkerModel", "InternVLModel")):
    if mapping := get_checkpoint_conversion_mapping(theirs):
        register_checkpoint_conversion_mapping(ours, mapping)


class VQAThinkerModel(InternVLModel):
    """Vision tower, SlowFast and decoder, without the language modelling head."""

    config: VQAThinkerConfig
    # transformers loads these as float32 whatever dtype is asked for: SlowFast is small, and nothing trains it.
    _keep_in_fp32_modules_strict = ("slowfast*weight", "slowfast*bias", "slowfast*running_mean", "slowfast*running_var")

    def __init__(self, config: VQAThinkerConfig):
        super().__init__(config)
        self.slowfast = self.motion_projector = None
        if config.motion is not None:
            self.slowfast = SlowFast(SlowFastConfig(**config.motion))
            C, hidden = self.slowfast.config.channels, config.text_config.hidden_size
            layers = nn.LayerNorm(C), nn.Linear(C, hidden), nn.GELU(), nn.Linear(hidden, hidden)
            self.motion_projector = nn.Sequential(*layers)  # the released code's `motion_mlp`

    def _init_weights(self, module: nn.Module) -> None:
        """As transformers, but for SlowFast and a new projector.

        The projector starts with a token that is the same for all videos: the embedding of the image token, which
        stands in the motion slot anyway. So training starts exactly at the base model. A small random token would not
        do, since RMSNorm in the decoder brings tokens of any size to the same one. The first layer's weights come from
        a generator of their own, so the projector is the same in all processes.
        """
        super()._init_weights(module)
        _, first, _, last = getattr(self, "motion_projector", None) or [None] * 4  # absent in the base's __init__
        if isinstance(module, nn.Conv3d):  # SlowFast's alone
            init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif module is first:
            weight = torch.randn(first.weight.shape, generator=torch.Generator().manual_seed(0), device="cpu")
            init.copy_(first.weight, weight / first.in_features**0.5)
        elif module is last:
            init.zeros_(last.weight)
            init.copy_(last.bias, self.get_input_embeddings().weight[self.config.image_token_id])

    def train(self, mode: bool = True) -> "VQAThinkerModel":
        """Training mode but for SlowFast, which is frozen again: `from_pretrained` thaws all that it loads."""
        super().train(mode)
        if self.slowfast is not None:
            self.slowfast.requires_grad_(False)
        return self

    def motion_features(self, pixel_values: Tensor) -> Tensor:
        """(N, F, 3, H, W) normalised frames -> (N, C), in SlowFast's own dtype. They never change in training.

        Raises ValueError for sizes that do not fit SlowFast (`SlowFastConfig.check_input`).
        """
        with torch.autocast(pixel_values.device.type, enabled=False):
            return self.slowfast(pixel_values)

    def visual_tokens(self, pixel_values: Tensor, motion_features: Tensor | None = None, **kwargs) -> Tensor:
        """(N, F, 3, H, W) normalised frames -> (N, F * t + 1, hidden), in the order of the prompt's image slots.

        The last token is the motion's, made of `motion_features` (N, C), by default those of these frames; without
        `motion` in the config there are F * t. The image size is free where patches divide it: as in the released code,
        position embeddings are interpolated. `kwargs` are those of `get_image_features`.
        """
        N = len(pixel_values)
        frames = self.get_image_features(pixel_values.flatten(0, 1), return_dict=True, **kwargs).pooler_output
        frames = frames.reshape(N, -1, frames.shape[-1])
        if self.slowfast is None:
            return frames
        features = self.motion_features(pixel_values) if motion_features is None else motion_features
        return torch.cat([frames, self.motion_token(features)], dim=1)

    def motion_token(self, features: Tensor) -> Tensor:
        """SlowFast's features (N, C) as a token of the decoder, (N, 1, hidden)."""
        dtype = next(self.motion_projector.parameters()).dtype
        return self.motion_projector(features.to(dtype))[:, None]

    def get_placeholder_mask(self, input_ids: Tensor, inputs_embeds: Tensor, image_features: Tensor) -> Tensor:
        """(N, P, 1) bool, True at the image slots; `image_features` (images or videos, tokens, hidden).

        Raises ValueError unless each row has its even share of the tokens as slots. transformers compares the totals.
        """
        mask = (input_ids == self.config.image_token_id)[..., None]
        slots, tokens = mask.sum((1, 2)), image_features.shape[:-1].numel()
        if (slots * len(slots) != tokens).any():
            raise ValueError(f"rows with {slots.tolist()} image slots for {tokens / len(slots):g} visual tokens each")
        return mask

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        **kwargs,
    ):
        """As `InternVLModel`, with `pixel_values` (N * F, 3, H, W) for `input_ids` (N, P): the F of each row in turn.

        Raises ValueError for frames that N does not divide, and as `motion_features` and `get_placeholder_mask`.
        """
        if pixel_values is not None and mm_encoder_outputs is None:
            if input_ids is None:
                raise ValueError("pixel_values need input_ids, which say where the image slots are")
            if len(pixel_values) % len(input_ids):
                raise ValueError(f"{len(pixel_values)} frames for {len(input_ids)} rows")
            videos = pixel_values.unflatten(0, (len(input_ids), -1))
            which = {
                "vision_feature_layer": vision_feature_layer,
                "vision_feature_select_strategy": vision_feature_select_strategy,
            }
            visual, pixel_values = self.visual_tokens(videos, **which), None
            mm_encoder_outputs = {"image": BaseModelOutputWithPooling(pooler_output=visual)}
        return super().forward(input_ids, pixel_values, mm_encoder_outputs=mm_encoder_outputs, **kwargs)


class VQAThinker(InternVLForConditionalGeneration):
    """InternVL with a motion token; used like its base class, with the pixels of N videos of F frames each.

    `generate` is refused with motion, by a ValueError of `get_placeholder_mask`: transformers encodes the images before
    it knows whose they are. `models.policy` samples.

    Built from a config, or loaded by `from_pretrained` from a checkpoint without them, SlowFast and the projector have
    initial weights. `load_vqathinker` takes care that SlowFast's are real.
    """

    config: VQAThinkerConfig

    def __init__(self, config: VQAThinkerConfig):
        super(InternVLForConditionalGeneration, self).__init__(config)  # its own would build the inner model twice
        self.model = VQAThinkerModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()


# Options of `from_pretrained` that report all keys that do not match, those of other shapes too.
REPORTED = {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}


def refuse_other_keys(name: str | os.PathLike, report: Mapping[str, Iterable]) -> None:
    """Raise a ValueError naming --model that lists the keys of `from_pretrained`'s report, if any."""
    mismatched = [f"{key} {tuple(found)}, not {tuple(expected)}" for key, found, expected in report["mismatched_keys"]]
    problems = describe(report["missing_keys"], report["unexpected_keys"], mismatched)
    if problems:
        raise ValueError(f"--model {name}: {problems}")


def load_vqathinker(
    name: str | os.PathLike,
    slowfast: SlowFast | None = None,
    motion: Mapping[str, Any] | None = None,
    **kwargs,
) -> VQAThinker:
    """A checkpoint (folder or hub name) of VQAThinker, or of InternVL in transformers' own format, in evaluation mode.

    Args:
        slowfast: for an InternVL, which then gets a motion token and a new projector (a warning says so): the network
            with its weights, which are copied. See `load_slowfast`.
        motion: fields of `SlowFastConfig` that replace the checkpoint's, as `slow_stride` for another number of frames.
        kwargs: as for `from_pretrained`.

    Raises ValueError naming --model for another architecture and for keys that are missing, left over or of another
    shape; naming --slowfast if it is given to a checkpoint that has one, or missing though `motion` is given.
    """
    fields, _ = VQAThinkerConfig.get_config_dict(name)
    check_model_type(name, fields)
    config = VQAThinkerConfig.from_dict(fields)
    new = ()
    if slowfast is not None:
        if config.motion is not None:
            raise ValueError(f"--slowfast: --model {name} has its own")
        config.motion = asdict(slowfast.config)
        new = ("model.slowfast.", "model.motion_projector.")
    if motion is not None:
        if config.motion is None:
            raise ValueError(f"--slowfast: --model {name} has no motion token, and a new one needs weights")
        config.motion = asdict(SlowFastConfig(**{**config.motion, **motion}))
    model, report = VQAThinker.from_pretrained(name, config=config, **REPORTED, **kwargs)
    report["missing_keys"] = {key for key in report["missing_keys"] if not key.startswith(new)}
    refuse_other_keys(name, report)
    if slowfast is not None:
        model.model.slowfast.load_state_dict(slowfast.state_dict())
        warnings.warn(f"--model {name}: the motion projector is new and says nothing of a video yet", stacklevel=2)
    return model
