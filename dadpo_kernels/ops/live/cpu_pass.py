"""The live plan on the C++ passes of `csrc/cpu/live.h` and `csrc/cpu/live_gradient.h`."""

from typing import Any

import torch
from torch import Tensor

from ..backends.base import Entries, Grads, State
from ..backends.cpu import Workspace, _cpu, address, describe_tile, operand, prepare
from .live_pass import LivePass

VECTOR = 16  # numbers that a kernel may read behind the last


class CpuLivePass(LivePass):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        weight, bias = self.head.weight, self.head.bias
        self.weight = weight if weight.stride(1) == 1 else weight.contiguous()
        self.bias = None if bias is None else bias.float().contiguous()
        self.workspace = Workspace()

    def empty(self, count: int) -> Tensor:
        return prepare(super().empty(count + VECTOR))[:count]

    def exponentials(self, part: slice, exps: Tensor, entries: Entries, state: State) -> None:
        """As the parent's, but each group of columns has a base of its own, which `factors [groups, n]` holds.

        `column_sums` replaces it by the factor that brings the group to the base of the whole row.
        """
        hidden = self.hidden[part]
        in_topk = entries.in_topk.contiguous()
        self.factors = exps.new_empty(-(-self.plan.vocab // _cpu.GROUP), len(hidden))
        tile = describe_tile(hidden, self.head, self.weight, self.bias, 0, self.plan.vocab, entries.ids, in_topk)
        _cpu.live_exponentials(
            tile, address(state.max), address(state.sum), address(state.selected), address(exps), address(self.factors)
        )

    def column_sums(self, exps: Tensor, share: Tensor, base: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        vocab, count = exps.shape
        sums, energy = exps.new_empty(vocab), exps.new_empty(vocab)
        squares = exps.new_empty(len(self.factors), count)
        _cpu.live_columns(
            address(exps), vocab, count, torch.get_num_threads(), address(self.factors), address(base), address(share),
            address(sums), address(energy), address(squares),
        )  # fmt: skip
        return sums, energy, squares.sum(0, dtype=torch.float64).float()

    def residuals(self, exps: Tensor, is_dead: Tensor, profile: Tensor) -> Tensor:
        sums = exps.new_empty(len(self.factors), 3, exps.shape[1])
        _cpu.live_residuals(
            address(exps), *exps.shape, torch.get_num_threads(), address(self.factors), address(is_dead),
            address(profile), address(sums),
        )  # fmt: skip
        return sums.sum(0, dtype=torch.float64)

    def retained_exponentials(self, exps: Tensor, live: Tensor) -> Tensor:
        return super().retained_exponentials(exps, live).mul_(self.factors.index_select(0, live // _cpu.GROUP))

    def threshold(self, energy: Tensor, allowed: Tensor) -> Tensor:
        """By the 16 leading bits of each energy, which order it to a hundredth: much faster than sorting."""
        bits = energy.abs().view(torch.int32) >> 16  # a NaN may be negative
        cumulative = torch.bincount(bits, weights=energy.double().nan_to_num(torch.inf), minlength=1 << 15).cumsum(0)
        return ((cumulative <= allowed).sum().to(torch.int32) << 16).view(torch.float32)

    def add_products(self, dz: Tensor, live: Tensor, first: int, part: slice, grads: Grads) -> None:
        """As the parent's; rows of `grads.hidden` lie as far apart as `CpuTiles.grad_hidden_columns`."""
        hidden, (columns, rows) = self.hidden[part], dz.shape
        if operand(hidden.dtype) != dz.dtype:  # a bfloat16 product reads pairs of tokens: whole ones
            low = dz.new_zeros(columns * (rows + rows % 2) + VECTOR, dtype=hidden.dtype)
            low[:-VECTOR].view(columns, -1)[:, :rows] = dz
            dz = low
        grad_hidden = None if grads.hidden is None else grads.hidden[part]
        call = _cpu.LiveGradient(
            dz=address(dz), live=address(live), columns=columns, rows=rows, hidden=address(hidden),
            hidden_stride=hidden.stride(0), weight=address(self.weight), weight_stride=self.weight.stride(0),
            width=hidden.shape[1], grad_hidden=address(grad_hidden),
            grad_hidden_stride=0 if grad_hidden is None else grad_hidden.stride(0), grad_weight=address(grads.weight),
            grad_weight_stride=0 if grads.weight is None else grads.weight.stride(0), first=first,
            bf16=hidden.dtype == torch.bfloat16, threads=torch.get_num_threads(),
        )  # fmt: skip
        _cpu.live_gradient(call, self.workspace.at_least(_cpu.live_workspace_bytes(call)))
