"""The floor: the three matrix products that any exact loss with a trained head has to do, and nothing else.

`logits = hidden @ weight.T`, `dhidden = dlogits @ weight` and `dweight = dlogits.T @ hidden`, on the valid tokens,
into memory that already exists. Each product is timed in every plausible ATen arrangement (logits stored by token or
by vocabulary entry; all of the vocabulary at once or in tiles that stay near the caches) and the fastest is taken, so
the floor may mix arrangements that no single program could. In bfloat16 the products round as ATen's do: it is a floor
of time, not of accuracy. A processor without instructions for bfloat16 makes the products tens of times faster in
float32, so there that is the floor (`floor_dtype`), with operands that are float32 already.
"""

import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from examples.quickstart.precision import processor_multiplies_bfloat16

TILE = 16_384


def floor_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the floor's products for operands of `dtype`."""
    return torch.float32 if dtype == torch.bfloat16 and not processor_multiplies_bfloat16() else dtype


def products(hidden: Tensor, weight: Tensor) -> Iterator[tuple[str, str, Callable[[], Tensor]]]:
    """`(product, arrangement, run)` for every arrangement; `hidden [N, H]` the valid tokens, `run()` the product."""
    tokens, vocab_size, dtype = len(hidden), len(weight), floor_dtype(hidden.dtype)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    grad_hidden, grad_weight = torch.ones_like(hidden), torch.ones_like(weight)
    for width in {min(TILE, vocab_size), vocab_size}:
        for by_token in (True, False):
            shape = (tokens, vocab_size) if by_token else (vocab_size, tokens)
            memory = torch.ones(shape, dtype=dtype)  # written, so that no product pays for page faults
            logits = memory if by_token else memory.t()
            tiles = [slice(start, min(start + width, vocab_size)) for start in range(0, vocab_size, width)]
            scratch = [logits[:, tile] for tile in tiles]

            def forward(tiles=tiles, scratch=scratch, by_token=by_token, logits=logits) -> Tensor:
                for tile, z in zip(tiles, scratch, strict=True):
                    if by_token:
                        torch.mm(hidden, weight[tile].t(), out=z)
                    else:
                        torch.mm(weight[tile], hidden.t(), out=z.t())
                return logits

            def to_hidden(tiles=tiles, scratch=scratch) -> Tensor:
                grad_hidden.zero_()
                for tile, z in zip(tiles, scratch, strict=True):
                    grad_hidden.addmm_(z, weight[tile])
                return grad_hidden

            def to_weight(tiles=tiles, scratch=scratch) -> Tensor:
                for tile, z in zip(tiles, scratch, strict=True):
                    torch.mm(z.t(), hidden, out=grad_weight[tile])
                return grad_weight

            name = f"by {'token' if by_token else 'vocabulary'}, tiles of {width}"
            yield "logits", name, forward
            yield "dhidden", name, to_hidden
            yield "dweight", name, to_weight


def measure_floor(hidden: Tensor, weight: Tensor, calls: int) -> dict[str, dict]:
    """`{product: {"seconds": of the fastest arrangement, median over calls, "arrangement": its name}}`."""
    dtype = floor_dtype(hidden.dtype)
    torch.mm(hidden[:64].to(dtype), weight[:64].t().to(dtype))  # the GEMM library's own start-up
    best: dict[str, dict] = {}
    for product, name, run in products(hidden, weight):
        seconds = statistics.median(timed(run) for _ in range(calls))
        if product not in best or seconds < best[product]["seconds"]:
            best[product] = {"seconds": seconds, "arrangement": name}
    return best


def arranged(hidden: Tensor, weight: Tensor, arrangements: dict[str, str]) -> Callable[[], None]:
    """The three products, one after the other, each in its arrangement of `{product: name}`."""
    runs = [run for product, name, run in products(hidden, weight) if arrangements[product] == name]

    def floor() -> None:
        for run in runs:
            run()

    return floor


def timed(run: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
