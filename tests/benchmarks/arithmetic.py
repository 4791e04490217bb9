"""What a GRPO step has to compute and to read, counted from sizes: the plain way, ours, and the least time of ours.

    python -m tests.benchmarks.arithmetic --model internvl3-8b-shape --videos 4 --group 8 --new-tokens 200

Prints a table. Floating-point operations are those of matrix products and attention, masked scores included, as torch
counts them. The least time is the longer of operations and bytes at the rates given, which are an H100 SXM's (NVIDIA's
data sheet: 989 TFLOP/s of dense bfloat16, 3.35 TB/s).

Legend: N videos, G answers per video, F frames, P prompt tokens, T answer tokens, h hidden width, L layers.
"""

import argparse
from dataclasses import dataclass

from transformers import InternVLConfig

from models.released import image_tokens
from tests.benchmarks.shapes import SHAPES


@dataclass(frozen=True)
class Sizes:
    """A network and a step; `bytes_` of a number where the token loop computes."""

    config: InternVLConfig
    N: int
    G: int
    F: int
    P: int
    T: int
    bytes_: int = 2

    @property
    def text(self):
        return self.config.text_config

    @property
    def kv(self) -> int:
        """Channels of a token's keys, of all key/value heads."""
        return self.text.hidden_size // self.text.num_attention_heads * self.text.num_key_value_heads

    @property
    def weights(self) -> int:
        """Numbers in the matrices of the decoder's layers: each token is multiplied with every one."""
        h = self.text.hidden_size
        return self.text.num_hidden_layers * (2 * h * h + 2 * h * self.kv + 3 * h * self.text.intermediate_size)

    # ---- operations

    def tokens(self, count: int) -> int:
        return 2 * self.weights * count

    def scores(self, queries: int, keys: int) -> int:
        """Attention of so many queries to so many keys each, in all layers."""
        return 4 * self.text.hidden_size * self.text.num_hidden_layers * queries * keys

    def head(self, count: int) -> int:
        return 2 * self.text.hidden_size * self.text.vocab_size * count

    def vision(self) -> int:
        """The frames of one video, up to their visual tokens, without attention."""
        vision, side = self.config.vision_config, self.config.vision_config.image_size[0]
        v, patches = vision.hidden_size, (side // vision.patch_size[0]) ** 2
        layer = 2 * (4 * v * v + 2 * v * vision.intermediate_size) * (patches + 1)
        shuffled, h = v * round(1 / self.config.downsample_ratio) ** 2, self.text.hidden_size
        projector = 2 * (shuffled * h + h * h) * image_tokens(self.config, side)
        return self.F * (vision.num_hidden_layers * layer + projector) + self.patch_embedding()

    def patch_embedding(self) -> int:
        vision = self.config.vision_config
        return 2 * 3 * self.F * vision.hidden_size * vision.image_size[0] ** 2

    def vision_scores(self) -> int:
        vision = self.config.vision_config
        patches = (vision.image_size[0] // vision.patch_size[0]) ** 2
        return self.F * vision.num_hidden_layers * 4 * vision.hidden_size * (patches + 1) ** 2

    def rollout(self, shared: bool) -> dict[str, int]:
        G, P, T = self.G, self.P, self.T
        copies = 1 if shared else G
        loop = sum(self.tokens(G) + self.scores(G, P + t) + self.head(G) for t in range(1, T))
        prefill = self.tokens(P) + self.scores(P, P) + self.head(1)
        vision = self.vision() + self.vision_scores()
        parts = {"vision": copies * vision, "prefill": copies * prefill, "token loop": loop}
        return {name: self.N * count for name, count in parts.items()}

    def passes(self, shared: bool) -> tuple[int, int]:
        """Forward pass of all answers' log-probs, from frames, and its backward pass.

        Each product has two gradients, but for the pixels'; attention computes its scores once more.
        """
        G, P, T = self.G, self.P, self.T
        if shared:
            products = self.vision() + self.tokens(P + G * (T - 1)) + self.head(G * T)
            scores = self.vision_scores() + self.scores(P, P) + self.scores(G * (T - 1), P + T - 1)
            copies = self.N
        else:
            products = self.vision() + self.tokens(P + T) + self.head(P + T)
            scores = self.vision_scores() + self.scores(P + T, P + T)
            copies = self.N * G
        return copies * (products + scores), copies * (2 * products + 5 * scores // 2 - self.patch_embedding())

    def step(self, shared: bool, checkpointing: bool) -> dict[str, int]:
        forward, backward = self.passes(shared)
        backward += checkpointing * forward
        return self.rollout(shared) | {"reference": forward, "forward": forward, "backward": backward}

    # ---- bytes

    def token_loop_bytes(self) -> int:
        """What our token loop reads at least: at each token the decoder, and keys and values of prompts and answers."""
        N, G, P, T = self.N, self.G, self.P, self.T
        weights = self.weights + self.text.hidden_size * self.text.vocab_size
        token = 2 * self.text.num_hidden_layers * self.kv
        return self.bytes_ * sum(weights + token * N * (P + G * t) for t in range(1, T))


def table(sizes: Sizes, checkpointing: bool, flop_per_s: float, bytes_per_s: float) -> str:
    """Markdown, a row a phase and one for their sum."""
    plain, ours = (sizes.step(shared, checkpointing) for shared in (False, True))
    least = {phase: count / flop_per_s for phase, count in ours.items()}
    least["token loop"] = max(least["token loop"], sizes.token_loop_bytes() / bytes_per_s)
    for column in (plain, ours, least):
        column["step"] = sum(column.values())
    lines = ["| phase | plain, TFLOP | ours, TFLOP | plain / ours | ours at least, s |", "|" + 5 * "---|"]
    for phase in ours:
        counts = f"{plain[phase] / 1e12:.1f} | {ours[phase] / 1e12:.1f} | {plain[phase] / ours[phase]:.1f}"
        lines.append(f"| {phase} | {counts} | {least[phase]:.3f} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=SHAPES, default="internvl3-8b-shape")
    parser.add_argument("--videos", type=int, default=4, help="N (default: 4)")
    parser.add_argument("--group", type=int, default=8, help="G (default: 8)")
    parser.add_argument("--frames", type=int, default=6, help="F (default: 6)")
    parser.add_argument("--prompt", type=int, default=1700, help="P (default: 1700)")
    parser.add_argument("--new-tokens", type=int, default=200, help="T (default: 200)")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--flop-per-s", type=float, default=989e12, help="of a matrix product (default: 989e12)")
    parser.add_argument("--bytes-per-s", type=float, default=3.35e12, help="of memory (default: 3.35e12)")
    args = parser.parse_args(arguments)
    sizes = Sizes(SHAPES[args.model](), args.videos, args.group, args.frames, args.prompt, args.new_tokens)
    print(table(sizes, args.gradient_checkpointing, args.flop_per_s, args.bytes_per_s))


if __name__ == "__main__":
    main()
