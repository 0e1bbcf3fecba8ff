"""What a step does, counted instead of timed: `python -m tools.work --out tools/work.json`.

For every backend and plan, on one small random problem:

- `products`: matrix products in units of `N·V·H` (2NVH floating-point operations);
- `passes`: elements read by PyTorch's other operations on tile-sized tensors, in units of `N·V`;
- `allocated`: bytes of the tensors allocated along the way, in units of `4·N·V` (all of them, not the peak).

The numbers are the same on every machine with the same PyTorch, so a test compares them with the committed file: a
change that adds a product, a pass over the vocabulary or a large temporary fails there, however fast the machine. The
`cpu` backend's passes happen inside its extension, which reads each tile once; its products are counted at that
boundary.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.profiler import ProfilerActivity, profile

from dadpo_kernels import linear_selected_logps, linear_topk_logps
from dadpo_kernels.ops.backends import cpu

TOKENS, VOCAB, WIDTH, TOP_K = 24, 40_000, 32, 8  # several tiles in every backend
PLANS = {"recompute": 0, "partial": 2**21, "retain": 2**40}
BACKENDS = ("torch", "cpu")


def tasks() -> dict[str, Callable[[], object]]:
    """`{"backend/plan": one call of it}`."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(TOKENS, WIDTH, generator=g), torch.randn(VOCAB, WIDTH, generator=g)
    labels, ids = (torch.randint(VOCAB, shape, generator=g) for shape in ((TOKENS,), (TOKENS, TOP_K)))

    def train(backend: str, budget: int, frozen: bool = False) -> None:
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)
        out = linear_selected_logps(*leaves, labels, ids, backend=backend, memory_budget=budget)
        (out.label.sum() + out.topk.sum() + out.tail.sum()).backward()

    calls: dict[str, Callable[[], object]] = {}
    for backend in BACKENDS:
        for plan, budget in PLANS.items():
            calls[f"{backend}/{plan}"] = partial(train, backend, budget)
        calls[f"{backend}/frozen"] = partial(train, backend, PLANS["recompute"], frozen=True)
        calls[f"{backend}/no_grad"] = partial(linear_selected_logps, hidden, weight, labels, ids, backend=backend)
        calls[f"{backend}/topk"] = partial(linear_topk_logps, hidden, weight, TOP_K, labels=labels, backend=backend)
    return calls


def count(only: str = "") -> dict[str, dict[str, float]]:
    """`{"backend/plan": {"products": , "passes": , "allocated": }}` of the tasks whose name ends with `only`."""
    with plainest_instructions():
        return {name: measure(call) for name, call in tasks().items() if name.endswith(only)}


@contextmanager
def plainest_instructions() -> Iterator[None]:
    """What the extension pads, hence allocates, depends on how wide its vectors are: take what every processor has."""
    active = cpu._cpu.active()
    cpu._cpu.use(cpu._cpu.available()[-1])
    try:
        yield
    finally:
        cpu._cpu.use(active)


SLACK = 0.01  # of the counted unit: index arithmetic on a few rows may come and go


def grown(before: dict, after: dict) -> list[str]:
    """One line per count of `after` that is missing in, or larger than in, `before`.

    Raises:
        ValueError: the counts are from different PyTorch versions, whose operations differ inside.
    """
    if before["torch"] != after["torch"]:
        raise ValueError(
            f"counted with torch {before['torch']} and {after['torch']}; count both with the same: "
            "python -m tools.work --out FILE"
        )
    lines = []
    for plan, counts in after["work"].items():
        for name, value in counts.items():
            old = before["work"].get(plan, {}).get(name)
            if old is None:
                lines.append(f"{plan}: {name} is new ({value}): commit a new file")
            elif value > old + SLACK:
                lines.append(f"{plan}: {name} grew from {old} to {value}")
    return lines


def measure(run: Callable[[], object]) -> dict[str, float]:
    """One call of `run` under PyTorch's profiler and a count at the extension's boundary."""
    run()  # whatever happens only once happens here
    with (
        counted_products() as products,
        profile(
            activities=[ProfilerActivity.CPU], record_shapes=True, profile_memory=True, with_flops=True
        ) as profiler,
    ):
        run()
    events = profiler.events() or []
    flops = sum(e.flops or 0 for e in events if e.name in ("aten::mm", "aten::addmm"))
    read = sum(largest(e.input_shapes) for e in events if reads_elements(e.name))
    allocated = sum(e.self_cpu_memory_usage for e in events if e.self_cpu_memory_usage > 0)
    return {
        "products": round(products.total + flops / (2 * TOKENS * VOCAB * WIDTH), 3),
        "passes": round(read / (TOKENS * VOCAB), 3),
        "allocated": round(allocated / (4 * TOKENS * VOCAB), 3),
    }


def largest(shapes: list[list[int]]) -> int:
    """Elements of the largest input, 0 if it is smaller than a tile could be."""
    size = max((math.prod(shape) for shape in shapes if shape and isinstance(shape[0], int)), default=0)
    return size if size >= TOKENS * 1024 else 0


@cache
def reads_elements(name: str) -> bool:
    """Whether this is one of PyTorch's own operations, no product (those are counted apart), factory or view."""
    namespace, _, op = name.partition("::")
    if namespace != "aten" or op in ("mm", "addmm", "matmul", "linear") or op.startswith("new_"):
        return False
    packet = getattr(torch.ops.aten, op)
    returns = [r for overload in packet.overloads() for r in getattr(packet, overload)._schema.returns]
    return not any(r.alias_info and not r.alias_info.is_write for r in returns)


@contextmanager
def counted_products() -> Iterator[SimpleNamespace]:
    """`total`: products that the extension makes meanwhile, in units of `N·V·H`."""
    counter, extension = SimpleNamespace(total=0.0), cpu._cpu

    def unit(columns: int) -> float:
        return columns / VOCAB

    class Counting:
        """The extension, with `Tile` keeping its number of columns for the three passes that make products."""

        def __getattr__(self, name: str):
            return getattr(extension, name)

        def Tile(self, **fields):
            self.columns = fields["columns"]
            return extension.Tile(**fields)

        def forward(self, *args) -> None:
            counter.total += unit(self.columns)
            extension.forward(*args)

        def topk(self, *args) -> None:
            counter.total += unit(self.columns)
            extension.topk(*args)

        def backward(self, tile, c, base, values, hidden, weight, stride, bias, exps, *rest) -> None:
            counter.total += unit(self.columns) * ((not exps) + bool(hidden) + bool(weight))
            extension.backward(tile, c, base, values, hidden, weight, stride, bias, exps, *rest)

    cpu._cpu = Counting()
    try:
        yield counter
    finally:
        cpu._cpu = extension


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write (default: standard output)")
    out = parser.parse_args().out
    text = json.dumps({"torch": torch.__version__.split("+")[0], "work": count()}, indent=1) + "\n"
    if out:
        out.write_text(text)
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
