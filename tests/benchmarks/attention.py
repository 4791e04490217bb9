"""Ways to let G answers attend to [shared prompt | own past] in one layer: the one in use, and those that were slower.

    python -m tests.benchmarks.attention
    python -m tests.benchmarks.attention --group 16 --new-tokens 200 --device cuda

Random queries, keys and values of one video. Prints JSON: for each way the least milliseconds of several rounds, of the
forward pass alone and with the backward pass.

Legend: G answers, P prompt tokens, T answer tokens, A = G * T, H query heads, K key/value heads, D channels of a head.
A way takes query (N, H, P + A, D), key and value (N, K, P + A, D), G and T, and returns (N, P + A, H, D).
"""

import argparse
import json
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from models.shared_prefix import packed_attention


def per_answer(query: Tensor, key: Tensor, value: Tensor, G: int, T: int) -> Tensor:
    """In use: each answer behind its own copy of the prompt's keys and values."""
    return packed_attention(query, key, value, G, T, query.shape[-1] ** -0.5)


def dense_mask(query: Tensor, key: Tensor, value: Tensor, G: int, T: int) -> Tensor:
    """One call for all answers under a mask (A, P + A) that hides siblings, whose scores are computed all the same."""
    P = query.shape[2] - G * T
    own = torch.block_diag(*[torch.ones(T, T, dtype=torch.bool, device=query.device).tril()] * G)
    mask = torch.cat([own.new_ones(G * T, P), own], dim=1)
    attend = {"enable_gqa": True}
    prompt = F.scaled_dot_product_attention(query[:, :, :P], key[:, :, :P], value[:, :, :P], is_causal=True, **attend)
    answers = F.scaled_dot_product_attention(query[:, :, P:], key, value, attn_mask=mask, **attend)
    return torch.cat([prompt, answers], dim=2).transpose(1, 2)


def two_parts(query: Tensor, key: Tensor, value: Tensor, G: int, T: int) -> Tensor:
    """Scores on the prompt and on the own past as matrix products, one softmax over both; nothing is copied."""
    _, H, length, D = query.shape
    K, P = key.shape[1], length - G * T
    attend = {"is_causal": True, "enable_gqa": True}
    prompt = F.scaled_dot_product_attention(query[:, :, :P], key[:, :, :P], value[:, :, :P], **attend)
    grouped = (query[:, :, P:] * D**-0.5).unflatten(1, (K, H // K)).unflatten(3, (G, T))  # (N, K, H/K, G, T, D)
    on_prompt = (grouped.flatten(2, 4) @ key[:, :, :P].mT).unflatten(2, (H // K, G, T))
    own_key, own_value = (x[:, :, P:].unflatten(2, (G, T))[:, :, None] for x in (key, value))  # (N, K, 1, G, T, D)
    on_own = grouped @ own_key.mT
    future = torch.ones(T, T, dtype=torch.bool, device=query.device).triu(1)
    weights = torch.cat([on_prompt, on_own.masked_fill(future, -torch.inf)], dim=-1).softmax(-1)
    to_prompt, to_own = weights.split([P, T], dim=-1)
    out = (to_prompt.flatten(2, 4) @ value[:, :, :P]).unflatten(2, (H // K, G, T)) + to_own @ own_value
    return torch.cat([prompt, out.flatten(1, 2).flatten(2, 3)], dim=2).transpose(1, 2)


class Merged(torch.autograd.Function):
    """softmax over [prompt | own past] from two kernels' results and their log-sum-exp; for one video, on a CPU.

    query (G, H, T, D), key and value (G, K, T, D), the prompt's (1, K, P, D) -> (G, H, T, D). With the result and the
    log-sum-exp of the whole, each kernel's own backward pass gives its part of the gradients.
    """

    forward_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, prompt_key: Tensor, prompt_value: Tensor) -> Tensor:
        share = query.shape[1] // key.shape[1]
        own, own_lse = Merged.forward_kernel(query, *(x.repeat_interleave(share, 1) for x in (key, value)), 0.0, True)
        out, lse = Merged.forward_kernel(Merged.rows(query, key), prompt_key, prompt_value, 0.0, False)
        out, lse = Merged.answers(out, query), Merged.answers(lse[..., None], query)[..., 0]
        whole = torch.logaddexp(lse, own_lse)
        out = torch.lerp(out, own, (own_lse - whole).exp()[..., None])
        ctx.save_for_backward(query, key, value, prompt_key, prompt_value, out, whole)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        query, key, value, prompt_key, prompt_value, out, lse = ctx.saved_tensors
        share, grad = query.shape[1] // key.shape[1], grad.contiguous()
        repeated = (x.repeat_interleave(share, 1) for x in (key, value))
        of_query, *of_own = Merged.backward_kernel(grad, query, *repeated, out, lse, 0.0, True)
        of_own = [x.unflatten(1, (-1, share)).sum(2) for x in of_own]
        grad, rows, out, lse = (Merged.rows(x, key) for x in (grad, query, out, lse[..., None]))
        prompt = rows, prompt_key, prompt_value, out, lse[..., 0].contiguous()
        more, *of_prompt = Merged.backward_kernel(grad, *prompt, 0.0, False)
        return of_query + Merged.answers(more, query), *of_own, *of_prompt

    @staticmethod
    def rows(x: Tensor, key: Tensor) -> Tensor:
        """(G, H, T, D) -> (1, K, H/K * G * T, D): all that attend to the same keys of the prompt."""
        return x.unflatten(1, (key.shape[1], -1)).permute(1, 2, 0, 3, 4).flatten(1, 3)[None]

    @staticmethod
    def answers(rows: Tensor, query: Tensor) -> Tensor:
        G, H, T, _ = query.shape
        K = rows.shape[1]
        return rows[0].unflatten(1, (H // K, G, T)).permute(2, 0, 1, 3, 4).flatten(1, 2)


def merged(query: Tensor, key: Tensor, value: Tensor, G: int, T: int) -> Tensor:
    """A call for all answers on the prompt, one on their own pasts, merged by log-sum-exp; nothing is copied."""
    P = query.shape[2] - G * T
    of_prompt, of_answers = zip(*(x.split([P, G * T], dim=2) for x in (query, key, value)))
    prompt = F.scaled_dot_product_attention(*of_prompt, is_causal=True, enable_gqa=True)
    outs = []
    for n in range(len(query)):
        own = [x[n].unflatten(1, (G, T)).transpose(0, 1).contiguous() for x in of_answers]
        outs.append(Merged.apply(*own, *(x[n : n + 1].contiguous() for x in of_prompt[1:])))
    answers = torch.stack(outs).transpose(2, 3).flatten(1, 2)  # (N, G, H, T, D) -> (N, G * T, H, D)
    return torch.cat([prompt.transpose(1, 2), answers], dim=1)


WAYS = {"per answer": per_answer, "dense mask": dense_mask, "two parts": two_parts, "merged": merged}


def least_ms(work: Callable[[], object], rounds: int, synchronize: Callable[[], None]) -> float:
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        work()
        synchronize()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times[1:])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--group", type=int, default=8, help="G (default: 8)")
    parser.add_argument("--prompt", type=int, default=549, help="P (default: 549)")
    parser.add_argument("--new-tokens", type=int, default=64, help="T (default: 64)")
    parser.add_argument("--heads", type=int, nargs=2, default=(8, 4), help="H and K (default: 8 4)")
    parser.add_argument("--channels", type=int, default=32, help="D (default: 32)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args(arguments)
    synchronize = torch.cuda.synchronize if args.device == "cuda" else lambda: None
    torch.set_num_threads(1)
    (H, K), length = args.heads, args.prompt + args.group * args.new_tokens
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    leaves = [torch.randn(1, n, length, args.channels, device=args.device, dtype=dtype) for n in (H, K, K)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    found = {}
    for name, way in WAYS.items():
        if way is merged and args.device != "cpu":
            continue

        def forward(way=way) -> Tensor:
            with torch.no_grad():
                return way(*leaves, args.group, args.new_tokens)

        def both(way=way) -> tuple[Tensor, ...]:
            return torch.autograd.grad(way(*leaves, args.group, args.new_tokens).sum(), leaves)

        milliseconds = [least_ms(work, args.rounds, synchronize) for work in (forward, both)]
        found[name] = dict(zip(("forward_ms", "with_backward_ms"), milliseconds))
    print(json.dumps({**vars(args), "ways": found}, indent=1))


if __name__ == "__main__":
    main()
