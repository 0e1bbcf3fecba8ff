"""Masked tokens out before the first product, and back in after the last."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .backends.base import (
    Coefficients,
    Entries,
    Grads,
    State,
    inside_topk,
    merge_tail,
    run_backward,
)
from .backends.logit_gradient import logit_coefficients
from .backends.registry import BACKENDS
from .checks import check_range, check_storage
from .head import Head
from .live.live_pass import LivePass
from .live.plan import make_live_plan
from .log import debug
from .run import exact_plan


def compact(hidden: Tensor, index: Tensor) -> Tensor:
    """The rows of `hidden [N, H]` at `index`, contiguous; no copy where these are all rows."""
    return hidden.contiguous() if len(index) == len(hidden) else hidden[index]


def spread(values: Tensor, index: Tensor, like: Tensor) -> Tensor:
    """Values of the tokens at `index`, ascending, at their places among as many tokens as `like` has, 0 elsewhere.

    Contiguous, and no view of another tensor.
    """
    if len(index) == len(like):
        alone = values.is_contiguous() and 0 < values.nbytes == values.untyped_storage().nbytes()
        return values if alone else values.clone(memory_format=torch.contiguous_format)
    return values.new_zeros(len(like), *values.shape[1:]).index_copy_(0, index, values)


def spread_gradient(gradient: Tensor, index: Tensor, hidden: Tensor) -> Tensor:
    """Hidden's gradient, `[n, H]` of the tokens at `index`, in hidden's dtype and shape."""
    return spread(gradient.to(hidden.dtype), index, hidden)


def local_ids(ids: Tensor, first: int, columns: int) -> Tensor:
    """Ids counted from `first`, in the same order; those outside `[first, first + columns)` where no tile meets them.

    That is below 0, or 2^16 and more behind the last column, which the padding of no tile reaches.
    """
    ids = ids - first
    return ids + 2**16 * (ids >= columns)


class ValidTokens:
    """The tokens whose label is not `ignore_index`, and the tiles over them.

    The forward makes one from labels and ids, the backward the same one from the selection that the
    forward has saved: ids that share memory with NumPy or another process may have changed in between.

    Args:
        hidden: `[N, H]`.
        head: whose rows may be the rows `first`, `first + 1`, ... of a head with `vocab` rows.
        selection: see `select`.
        buffer_bytes: size of the buffer for what the forward retains.
    """

    def __init__(
        self, hidden: Tensor, head: Head, selection: Sequence[Tensor], backend: str, buffer_bytes: int
    ) -> None:
        check_storage(head.weight)
        padded_index, ids, order, counts = selection
        rows, thrice = counts.tolist()
        columns, width = head.weight.shape
        self.index = padded_index[:rows]
        self.head, self.backend = head, BACKENDS[backend]
        entries = Entries(ids, order, pairs=not thrice)
        self.entries = entries if rows == len(ids) else entries.rows(self.index)
        self.tiles = self.backend.tiles(compact(hidden, self.index), head, self.entries)
        self.plan = exact_plan(backend, rows, columns, width, hidden.dtype, buffer_bytes)

    @staticmethod
    def select(
        labels: Tensor, topk_ids: Tensor | None, ignore_index: int, vocab: int, shard: tuple[int, int] | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`(index [N], ids [N, M], order [N, M], counts [2])` of `labels [N]` and `topk_ids [N, K]`, after checks.

        Index: the valid tokens first. Ids and order: the entries of all tokens. Counts: of the valid tokens, and of
        those in whose row an id stands three times; on the CPU, the only thing that waits for the device.

        Args:
            shard: `(first, columns)`: of these columns of the vocabulary alone, see `local_ids`.
        """
        valid = labels != ignore_index
        check_range("labels", labels.where(valid, 0), vocab)
        if topk_ids is not None:
            topk_ids = topk_ids.where(valid[:, None], 0)
            check_range("topk_ids", topk_ids, vocab)
        if shard is not None:
            labels = local_ids(labels, *shard)
            topk_ids = None if topk_ids is None else local_ids(topk_ids, *shard)
        entries = Entries.merge(labels, topk_ids)
        counts = torch.stack([valid.sum(), (entries.thrice() & valid).sum()]).cpu()
        return torch.nonzero_static(valid, size=len(valid))[:, 0], entries.ids, entries.order, counts

    def of_all(self, values: Tensor) -> Tensor:
        """The valid tokens' rows of what has a row for every token."""
        return values if len(self.index) == len(values) else values[self.index]

    def logps(self, state: State) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`(label [n], topk [n, K], tail [n], summary [n, 3])` from the softmax state of all columns.

        The summary is what `gradients` needs of the state: lse, and of the tail the largest logit and the inverse of
        the sum relative to it; both 0 for an empty tail.
        """
        base, lse, tail = merge_tail(state, inside_topk(self.entries, state.selected))
        selected = (state.selected - base[:, None]) - lse[:, None]
        logps = torch.empty_like(selected).scatter_(1, self.entries.order, selected)
        k = logps.shape[1] - 1
        inverse = state.sum.to(lse.dtype).reciprocal().masked_fill(state.sum == 0, 0)
        summary = torch.stack([base + lse, state.max.masked_fill(state.max == -torch.inf, 0), inverse], 1)
        return logps[:, k], logps[:, :k], tail, summary

    def gradients(
        self,
        outputs: Sequence[Tensor],
        grads: Sequence[Tensor],
        state: Tensor,
        buffer: Tensor,
        needs: Sequence[bool],
        grad_tolerance: float | None = None,
    ) -> Grads:
        """Gradients of hidden `[n, H]`, weight and bias, as `needs` says; all but the weight's in the state's dtype.

        `outputs` and `grads` are label, topk and tail of all tokens; `state [N, 3]` is the summary that `logps` gave,
        with zeros for masked tokens, and for the live plan `[N, 6]`, with what its forward says of dead columns.
        """
        weight, wide = self.head.weight, state.dtype
        rows, width = len(self.index), weight.shape[1]
        grad_hidden = weight.new_zeros(rows, self.tiles.grad_hidden_columns(), dtype=wide) if needs[0] else None
        grad_weight = self.tiles.empty(*weight.shape, dtype=weight.dtype, device=weight.device) if needs[1] else None
        grad_bias = weight.new_empty(len(weight), dtype=wide) if needs[2] else None
        if rows:
            coefficients, dead = self.coefficients(outputs, grads, state)
            out = Grads(grad_hidden, grad_weight, grad_bias)
            if grad_tolerance is None:
                plan = replace(self.plan, grad_hidden=bool(needs[0]), grad_weight=bool(needs[1]))
                debug("backward, %s", plan)
                run_backward(self.tiles, plan, buffer, coefficients, out)
            else:
                self.live_pass(grad_tolerance, buffer, len(state)).backward(coefficients, dead, out)
        else:
            for grad in (grad_weight, grad_bias):
                if grad is not None:
                    grad.zero_()
        return Grads(None if grad_hidden is None else grad_hidden[:, :width], grad_weight, grad_bias)

    def coefficients(
        self, outputs: Sequence[Tensor], grads: Sequence[Tensor], state: Tensor
    ) -> tuple[Coefficients, Tensor]:
        """The gradient of the logits, and what the live plan's forward says of dead columns, of the valid tokens."""
        numbers = [(topk, label[:, None], tail[:, None]) for label, topk, tail in (outputs, grads)]
        k = outputs[1].shape[1] + 1
        parts = self.of_all(torch.cat([*numbers[0], *numbers[1], state], 1)).split([k, 1, k, 1, state.shape[1]], 1)
        logps, tail, incoming, incoming_tail, state = parts
        return logit_coefficients(
            self.entries, self.head, logps, tail[:, 0], state[:, :3], incoming, incoming_tail[:, 0]
        ), state[:, 3:]

    def live_pass(self, grad_tolerance: float, buffer: Tensor, tokens: int) -> LivePass:
        """The live pass over the valid ones of `tokens` tokens, with the buffer that forward and backward share."""
        hidden, head = self.tiles.hidden, self.head
        vocab, width = head.weight.shape
        size = hidden.dtype.itemsize
        plan = make_live_plan(tokens, len(hidden), vocab, width, size, len(buffer), grad_tolerance)
        return self.backend.live(hidden, head, self.entries, plan, buffer)
