"""The backward's check of the live plan: which chunks stay within the tolerance, the loss's gradient being known."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends.base import Coefficients, Entries, Grads
from ..log import debug
from .diagnostics import LiveDiagnostics, record
from .plan import LivePlan

LIVE = -1.0  # in a stored profile: this column is live


@dataclass(frozen=True)
class Chunk:
    """A chunk in the backward. Exact ones have every column live and no mass."""

    part: slice  # of the rows
    live: Tensor  # [L] ascending
    places: Tensor  # [M, n] of the entries among the live columns
    exps: Tensor | None  # [L, n] where they were retained
    coefficients: Coefficients
    mass: Tensor  # [n] a_n d_n


def check_chunks(
    plan: LivePlan,
    entries: Entries,
    profiles: Tensor,
    retained: Tensor,
    coefficients: Coefficients,
    dead: Tensor,
    grads: Grads,
) -> list[Chunk]:
    """Every chunk's part in the backward; those that break the tolerance become exact. Records the diagnostics.

    Args:
        profiles: `[chunks, V]`, `LIVE` at live columns.
        retained: the exponentials of live columns, one chunk behind the other as far as they fitted.
        dead: `[n, 3]` of the forward: dead mass, residual norm, energy outside the entries.
    """
    mass, residual, outside = dead.unbind(1)
    c, base, values = coefficients.c, coefficients.base, coefficients.values
    # Squared errors, and the squared norm of the gradient of the logits, which they may not exceed a share of.
    error = (c.double() * residual).square()
    norm = (c.double().square() * outside) + values.double().square().masked_fill(entries.repeats, 0).sum(1)
    errors = torch.stack([error[part].sum() for part in plan.chunks]).nan_to_num(nan=torch.inf)
    norm = norm.where(norm.isfinite(), 0).sum()
    # As many chunks as fit, the smallest errors first.
    ranked, order = errors.sort()
    fits = torch.zeros_like(order, dtype=torch.bool)
    fits[order] = ranked.cumsum(0) <= plan.grad_tolerance**2 * norm

    chunks, used, exact, live_elements, recomputed = [], 0, 0, 0, 0
    for index, part in enumerate(plan.chunks):
        count = part.stop - part.start
        chunk_coefficients = Coefficients(c[part], base[part], values[part])
        live, exps, ghost = (profiles[index] < 0).nonzero()[:, 0], None, c[part] * mass[part]
        end = used + len(live) * count
        if end <= len(retained):
            exps, used = retained[used:end].view(-1, count), end
        if not fits[index]:
            live, exps, ghost = torch.arange(plan.vocab, device=live.device), None, torch.zeros_like(ghost)
            exact += count
        places = torch.searchsorted(live, entries.ids[part].T.long().contiguous())
        chunks.append(Chunk(part, live, places, exps, chunk_coefficients, ghost))
        live_elements += len(live) * count
        recomputed += 0 if exps is not None else len(live) * count

    elements = plan.rows * plan.vocab
    products = (grads.hidden is not None) + (grads.weight is not None)
    diagnostics = LiveDiagnostics(
        tokens=plan.rows,
        certificate=float((errors[fits].sum() / norm.clamp_min(torch.finfo(norm.dtype).tiny)).sqrt()),
        live_share=live_elements / elements,
        exact_share=exact / plan.rows,
        units=1 + (recomputed + products * live_elements) / elements,
    )
    debug("%s: %s", plan, diagnostics)
    record(diagnostics)
    return chunks
