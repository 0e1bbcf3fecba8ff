"""The plans in plain PyTorch, for any device and floating dtype: what runs where no extension or Triton does.

Products of low-precision operands give float32 logits: by `out_dtype` on CUDA, by widening one tile of the operands
elsewhere (ATen's CPU product would round its result).
"""

import torch
from torch import Tensor

from .base import Best, Coefficients, Grads, Retained, State, Tiles, accumulator_dtype

WORKSPACE = 32 * 2**20  # bytes of one tile of logits


def wide_mm(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` with a float32 (or wider) result, whatever the operands' dtype."""
    wide = accumulator_dtype(a.dtype)
    if a.dtype != wide and a.is_cuda:
        return torch.mm(a, b, out_dtype=wide)
    return a.to(wide) @ b.to(wide)


class TorchTiles(Tiles):
    @staticmethod
    def tile_columns(rows: int, width: int, dtype: torch.dtype) -> int:
        return max(256, min(16384, WORKSPACE // (accumulator_dtype(dtype).itemsize * max(1, rows)) // 256 * 256))

    @staticmethod
    def workspace_bytes(rows: int, columns: int, width: int, dtype: torch.dtype, grad_weight: bool) -> int:
        # Three tiles (logits, logits with a spare column, exponentials); of low-precision operands one more in their
        # dtype, and its widened copy and the operands' where the product needs them.
        wide = accumulator_dtype(dtype)
        low = rows * columns * (dtype.itemsize + wide.itemsize) + (rows + columns) * width * wide.itemsize
        return rows * columns * 3 * wide.itemsize + (low if dtype != wide else 0)

    def logits(self, first: int, columns: int) -> Tensor:
        h = self.head
        raw = wide_mm(self.hidden, h.weight[first : first + columns].T)
        bias = None if h.bias is None else h.bias[first : first + columns].to(raw.dtype)
        return h.transform(raw, bias)

    def columns_of(self, first: int, columns: int, only: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`(hit [n, M], column [n, M])`: entries of this tile; the others point at one spare column behind it."""
        local = self.entries.ids.long() - first
        hit = (local >= 0) & (local < columns)
        if only is not None:
            hit &= only
        return hit, local.where(hit, columns)

    def forward(self, first: int, columns: int, state: State, retained: Retained | None) -> None:
        logits = self.logits(first, columns)
        hit, column = self.columns_of(first, columns)
        padded = torch.cat([logits, logits.new_full((len(logits), 1), -torch.inf)], 1)
        state.selected.copy_(torch.where(hit, padded.gather(1, column), state.selected))
        padded.scatter_(1, self.columns_of(first, columns, self.entries.in_topk)[1], -torch.inf)
        tail = padded[:, :columns]
        base = absorb(state, tail)
        if retained is not None:
            slope = self.head.slope(logits)
            exps = (tail - base[:, None]).exp_()
            retained.exps.copy_(exps if slope is None else exps * slope)
            retained.bases.copy_(base[:, None])

    def backward(
        self, first: int, columns: int, coefficients: Coefficients, grads: Grads, retained: Retained | None
    ) -> None:
        c, base = coefficients.c, coefficients.base
        if retained is None:
            logits = self.logits(first, columns)
            slope = self.head.slope(logits)
            dz = (logits - base[:, None]).exp_().mul_(c[:, None])
            if slope is not None:
                dz *= slope
        else:
            # A tile without a tail has base 0, which may be far above; its exponentials are all 0.
            dz = retained.exps.to(c.dtype) * (c * (retained.bases[:, 0] - base).clamp(max=0).exp())[:, None]
        dz = torch.cat([dz, dz.new_empty(len(dz), 1)], 1)
        dz.scatter_(1, self.columns_of(first, columns)[1], coefficients.values)
        dz = dz[:, :columns]
        low = dz.to(self.hidden.dtype)
        if grads.hidden is not None:
            grads.hidden.add_(wide_mm(low, self.head.weight[first : first + columns]))
        if grads.weight is not None:
            grads.weight[first : first + columns] = wide_mm(low.T, self.hidden)
        if grads.bias is not None:
            grads.bias[first : first + columns] = dz.sum(0)

    def topk(self, first: int, columns: int, state: State, best: Best) -> None:
        logits = self.logits(first, columns)
        hit, column = self.columns_of(first, columns)
        padded = torch.cat([logits, logits.new_full((len(logits), 1), -torch.inf)], 1)
        state.selected.copy_(torch.where(hit, padded.gather(1, column), state.selected))
        # What is retained so far has lower ids and stands in front, so a stable sort gives ties to the lowest id.
        have = min(best.k, first)
        ids = torch.arange(first, first + columns, device=logits.device, dtype=torch.int32).expand_as(logits)
        values, order = torch.cat([best.values[:, :have], logits], 1).sort(dim=1, descending=True, stable=True)
        keep = min(best.k, first + columns)
        ids = torch.cat([best.ids[:, :have], ids], 1).gather(1, order[:, :keep])
        best.values[:, :keep], best.ids[:, :keep] = values[:, :keep], ids
        if keep < values.shape[1]:
            absorb(state, values[:, keep:])


def finite(maximum: Tensor) -> Tensor:
    """A reference for exponentials that never forms `inf - inf`."""
    return maximum.masked_fill(maximum == -torch.inf, 0)


def absorb(state: State, logits: Tensor) -> Tensor:
    """Merges a tile into the running softmax state; returns the tile's own base `[n]`."""
    tile_max = logits.amax(1)
    merged = torch.maximum(state.max, tile_max)
    # Not summed in float64: on a CPU, ATen would copy the tile for it, and its sums are pairwise anyway.
    total = (logits - finite(merged)[:, None]).exp_().sum(1)
    state.sum.mul_((state.max - finite(merged)).exp().double()).add_(total)
    state.max.copy_(merged)
    return finite(tile_max)


def obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """None: PyTorch takes every device and floating dtype."""
    return None
