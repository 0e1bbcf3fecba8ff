"""Which operations of PyTorch make the host wait for a device, or copy to it: a CUDA graph can hold neither."""

from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dadpo_kernels.ops.backends.base import Coefficients, Entries, Grads, Tiles, run_backward, run_forward
from dadpo_kernels.ops.head import Head
from dadpo_kernels.ops.run import plan_for
from tests.support.dense import IGNORE, Problem

WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "unique_consecutive", "repeat_interleave"}
METHODS = ("cpu", "tolist", "numpy")  # they wait too, and the dispatcher does not see them as what they are


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []  # what computes: the name, elements of the result

    @property
    def names(self) -> set[str]:
        return {name for name, _ in self.calls}

    def __enter__(self):
        def recorded(name: str):
            method = getattr(torch.Tensor, name)

            def call(tensor, *args, **kwargs):
                self.calls.append((name, 0))
                return method(tensor, *args, **kwargs)

            return call

        self.methods = [mock.patch.object(torch.Tensor, name, recorded(name)) for name in METHODS]
        for method in self.methods:
            method.start()
        return super().__enter__()

    def __exit__(self, *error):
        for method in self.methods:
            method.stop()
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not (func.is_view or "empty" in name or name == "promote_types"):
            self.calls.append((name, out.numel() if isinstance(out, torch.Tensor) else 0))
        return out


def assert_no_waiting(kind: type[Tiles], p: Problem, budget: int, backend: str) -> None:
    """Forward and backward passes over all tiles; the removal of masked tokens before them waits, and is not here."""
    with Operations() as operations:
        assert (p.labels == IGNORE).nonzero().numel() > 0
    assert operations.names & WAITING == {"nonzero"}
    labels, rows, vocab = p.labels.clamp(min=0), *(len(t) for t in (p.labels, p.weight))
    tiles = kind(p.hidden, Head(p.weight, p.bias, 1.0, 30.0, 1.0), Entries.merge(labels, p.topk_ids))
    plan = plan_for(rows, vocab, p.hidden.shape[1], p.hidden.dtype, backend=backend, memory_budget=budget)
    buffer = torch.zeros(plan.retained_bytes, dtype=torch.uint8)
    grads = Grads(
        p.hidden.new_zeros(p.hidden.shape, dtype=torch.float32), torch.zeros_like(p.weight), torch.zeros(vocab)
    )
    with Operations() as operations:
        state = run_forward(tiles, plan, buffer)
        coefficients = Coefficients(torch.ones(rows), state.max, torch.ones_like(state.selected))
        run_backward(tiles, plan, buffer, coefficients, grads)
    assert ("addmm" in operations.names) == (plan.retained < vocab)
    assert not operations.names & {*WAITING, *METHODS}
    assert all(t is not None and t.abs().sum() > 0 for t in (grads.hidden, grads.weight, grads.bias))
