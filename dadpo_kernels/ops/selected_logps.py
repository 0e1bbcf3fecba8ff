"""The primitive: log-probabilities of the label, of the teacher's top-k ids and of the tail, from hidden states.

Every loss of this package, and any other that reads a few log-probabilities per token, is plain PyTorch on its
outputs. With `q = softmax(z)`, `T` the token's top-k ids, incoming gradients `g`, `G = g_label + sum g_topk + g_tail`:

    dz_j = (g_tail / q_tail - G) q_j          j outside T and not the label
    dz_j = -G q_j + g_topk[k] (+ g_label)     j = topk_ids[k] (and the label)
    dz_y = (g_tail / q_tail - G) q_y + g_label    a label y outside T

one scalar per token times the softmax, with the selected entries overwritten. `q_j / q_tail` is `exp(z_j - lse_tail)`.
"""

from dataclasses import replace
from typing import NamedTuple, Unpack

import torch
from torch import Tensor

from . import autograd, checks
from .backends import reference
from .head import Head, HeadOptions
from .log import debug
from .run import Run


class SelectedLogps(NamedTuple):
    """Log-probabilities in nats: `label [...]`, `topk [..., K]`, `tail [...]`: the log of the mass outside the top k.

    float32 (float64 for float64 inputs); 0 where the label is `ignore_index`.
    """

    label: Tensor
    topk: Tensor
    tail: Tensor


def linear_selected_logps(
    hidden: Tensor,
    weight: Tensor | Head,
    labels: Tensor,
    topk_ids: Tensor | None = None,
    *,
    ignore_index: int = -100,
    backend: str = "auto",
    memory_budget: int | None = None,
    grad_tolerance: float | None = None,
    **head_options: Unpack[HeadOptions],
) -> SelectedLogps:
    """Selected log-probabilities of `softmax(z)` without `[tokens, V]` logits, differentiable once in reverse mode.

        z = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap) / temperature
        label[n] = log q[n, labels[n]]
        topk[n, k] = log q[n, topk_ids[n, k]]
        tail[n] = log sum_j q[n, j] over the j that are not in topk_ids[n]

    `torch.func.grad`, `vjp` and `vmap`, such as for gradients per sample, take it too; `vmap` runs the samples one
    after the other, each with its own memory_budget. Meta tensors give shapes and dtypes.

    Args:
        hidden: `[..., H]` float32, bfloat16, float16 or float64, any strides.
        weight: `[V, H]`, the LM head's weight, of hidden's dtype (`torch.autocast` casts both, as for a linear); or a
            `Head`, such as `lm_head(model)` gives, which brings the head's options with it.
        labels: `[...]` int64 or int32, aligned: position t of `hidden` predicts `labels[t]`.
        topk_ids: `[..., K]` int64 or int32; duplicates and the label may be among them. None: no top k, `tail` is 0.
        ignore_index: label of masked tokens. They are dropped before the first product; outputs and gradients are 0
            there whatever `hidden` and `topk_ids` hold.
        backend: "cpu", "cuda", "triton_rows", "triton", "torch", "reference" (dense, all derivatives), or "auto":
            the first that can take the tensors; `dadpo doctor` tells which.
        memory_budget: bytes the forward may keep for the backward to save one of four matrix products; 0 keeps
            nothing, None means 256 MiB. The workspace, which comes on top, is constant in the number of tokens.
        grad_tolerance: None for exact gradients. Otherwise the live plan may replace the gradient of the logits dz by
            a cheaper dz' with `|dz' - dz| <= grad_tolerance |dz|` (Frobenius norm over all tokens, checked in every
            backward), about half the work; 1e-3 is what rounding dz to bfloat16 costs. The outputs stay exact.
            `live_diagnostics` tells the error and the cost; docs/live.md derives both.
        head_options: `bias` `[V]`, `logit_scale`, `softcap`, `temperature`; see `Head`.

    Returns:
        `SelectedLogps(label [...], topk [..., K], tail [...])`. Where the top k covers the vocabulary, `tail` is -inf
        and takes no gradient.

    Raises:
        TypeError: a dtype that is not supported, or hidden and weight of different dtypes.
        ValueError: shapes, devices or options that do not fit; head_options in addition to a `Head`; labels or ids
            outside `[0, V)` (on CUDA a device-side assertion, since a check would wait for the device).
        RuntimeError: second derivatives, and forward mode (`torch.func.jvp`, `jacfwd`, dual numbers), which only
            "reference" has; in the backward, if the weight's memory was freed since the forward (FSDP2 does, of a
            weight that is used outside its module's forward).

    Source: the online softmax of arXiv 1805.02867; recomputation in the backward as in Cut Cross Entropy
    (arXiv 2411.09009) and Liger (arXiv 2410.10989); the shared gradient form is this package's.
    """
    run = Run(backend, memory_budget, grad_tolerance)
    return selected_logps_of(hidden, Head.of(weight, head_options), labels, topk_ids, ignore_index, run)


def selected_logps_of(
    hidden: Tensor, head: Head, labels: Tensor, topk_ids: Tensor | None, ignore_index: int, run: Run
) -> SelectedLogps:
    """`linear_selected_logps` with the head and the ways to run it as one value each."""
    hidden, head = head.prepare(hidden)
    shape = hidden.shape[:-1]
    checks.check_ids("labels", labels, shape, hidden.device)
    if topk_ids is not None:
        checks.check_ids("topk_ids", topk_ids, shape, hidden.device, extra=1)
    backend = run.resolve(hidden.device, hidden.dtype)

    flat, y = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    ids = None if topk_ids is None else topk_ids.reshape(len(y), topk_ids.shape[-1])
    if backend == "reference":
        index = (y != ignore_index).nonzero()[:, 0]
        checks.check_range("labels", y[index], len(head.weight), index)
        if ids is not None:
            checks.check_range("topk_ids", ids[index], len(head.weight), index)
        label, topk, tail = reference.selected_logps(flat, head, y, ids, ignore_index)
    else:
        if not (torch.is_grad_enabled() and any(t.requires_grad for t in (hidden, *head.tensors))):
            run = replace(run, memory_budget=0, grad_tolerance=None)  # without a backward there is nothing to save
        buffer_bytes = run.buffer_bytes(len(y), len(head.weight), hidden.dtype, backend)
        debug("backend %s, %d bytes for the backward, grad_tolerance=%s", backend, buffer_bytes, run.grad_tolerance)
        label, topk, tail, *_ = autograd.SelectedLogpsFunction.call(
            flat, head.weight, head.bias, y, ids, head.logit_scale, head.softcap, head.temperature, ignore_index,
            backend, run.grad_tolerance, buffer_bytes,
        )  # fmt: skip
    return SelectedLogps(label.view(shape), topk.view(*shape, topk.shape[-1]), tail.view(shape))
