"""Shows which plan of the loss fits into memory, and what it costs in matrix products."""

import argparse

from .values import at_least, size

DTYPES = ("float32", "bfloat16", "float16", "float64")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--vocab", type=at_least(1), required=True, help="vocabulary size V")
    parser.add_argument("--hidden", type=at_least(1), required=True, help="hidden size H")
    parser.add_argument("--tokens", type=at_least(1), required=True, help="answer tokens of a micro-batch")
    parser.add_argument(
        "--k", type=at_least(0), default=64, help="number of the teacher's top-k ids per token (default 64)"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bfloat16", help="dtype of hidden states and LM head (default %(default)s)"
    )
    parser.add_argument(
        "--backend", default="auto", help="see `dadpo doctor` (default: the one that this machine would use)"
    )
    parser.add_argument(
        "--grad-tolerance",
        type=float,
        metavar="X",
        help="relative error allowed in the gradient of the logits: shows the live plan (default: exact gradients)",
    )
    parser.add_argument("--frozen-head", action="store_true", help="the LM head is not trained (LoRA)")
    parser.add_argument("--memory", type=size, help="bytes that model and activations leave for the loss, as 24GiB")


def run(args: argparse.Namespace) -> int:
    import torch

    from ..ops.backends.registry import resolve
    from ..ops.memory import MemoryEstimate, estimate_memory

    # The plans for no memory, the default, unlimited memory, and what the given memory leaves.
    dtype = getattr(torch, args.dtype)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backend = resolve("auto", device, dtype) if args.backend == "auto" else args.backend

    def estimate(budget: int | None) -> MemoryEstimate:
        return estimate_memory(
            args.tokens, args.vocab, args.hidden, dtype, k=args.k, backend=backend, memory_budget=budget,
            grad_tolerance=args.grad_tolerance, frozen_head=args.frozen_head,
        )  # fmt: skip

    estimates = {"0": estimate(0), "default": estimate(None), "everything": estimate(2**62)}
    if args.memory is not None:
        spare = args.memory - estimates["0"].total
        if spare > 0:
            estimates[str(spare)] = estimate(spare)

    # A table with a line for each plan.
    print(f"backend {backend}, {args.tokens} tokens x {args.vocab} ids x {args.hidden}, {args.dtype}")
    print(f"full logits would take {mib(estimates['0'].logits)} MiB in float32, for each copy")
    print(f"{'memory_budget':>16} {'plan':>10} {'products':>9} {'retained MiB':>13} {'peak MiB':>9}  fits")
    for name, estimated in estimates.items():
        fits = "" if args.memory is None else ("yes" if estimated.total <= args.memory else "no")
        plan = estimated.plan
        units = f"{'>= ' if plan.name == 'live' else ''}{plan.units:.2f}"  # a live plan's depend on the data
        print(
            f"{name:>16} {plan.name:>10} {units:>9} {mib(plan.retained_bytes):>13} {mib(estimated.total):>9}  {fits}"
        )
    if args.memory is not None and estimates["0"].total > args.memory:
        print("Nothing fits: the gradients take most of the memory. Freeze the head, or use a smaller micro-batch.")
        return 1
    return 0


def mib(count: int) -> str:
    """A number of bytes in MiB."""
    return f"{count / 2**20:,.0f}"
