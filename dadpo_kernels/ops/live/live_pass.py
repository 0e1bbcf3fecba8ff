"""The live plan: chunks of tokens, exact on the columns that matter to a chunk, one ghost token for all others.

Write `P [n, V]` for the softmax of a chunk's tokens outside their entries (times the softcap's slope): there the
gradient of the logits is `dz_n = a_n P_n`, with a scalar `a_n` that only the backward knows. The columns with the
least energy `sum_n P_nj^2` are *dead*; their block of P becomes the rank-one matrix of the same row and column sums,

    P_nj  ->  d_n profile_j,     d_n = sum_{j dead} P_nj,     profile_j = sum_n P_nj / sum_n d_n

which costs one row of a thin product per chunk instead of `n` rows of a wide one. Nothing is dropped: every token's
mass and every column's total stay. All other columns are *live* and exact; those of the entries always are.

The error is known, not estimated. With `rho_n` the norm of row n of the difference, the gradient of the logits is off
by exactly `sqrt(sum_n a_n^2 rho_n^2)` in the Frobenius norm. The forward takes the fewest live columns that keep every
chunk within half the tolerance for a plain log-likelihood; the backward knows `a_n`, checks again, and recomputes the
worst chunks exactly if that guess was wrong. So `|dz' - dz| <= grad_tolerance |dz|` holds for every loss.

Matrices are stored by column of the vocabulary, `[V, n]`: a live column is a contiguous row.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends.base import Coefficients, Entries, Grads, Head, State, inside_topk, merge_tail, statistic_dtype
from ..backends.reference import transform_logits
from ..backends.torch_ import finite, wide_mm
from ..plan import LivePlan
from .diagnostics import LiveDiagnostics, record

LIVE = -1.0  # in a stored profile: this column is live
AIM = 0.5  # of the tolerance, in the forward: the loss's coefficients differ from token to token
KEPT = 4096  # columns copied at a time
TRIES = 4  # at a chunk's live columns


@dataclass(frozen=True)
class Chunk:
    """A chunk in the backward. Exact ones have every column live and no mass."""

    part: slice  # of the rows
    live: Tensor  # [L] ascending
    places: Tensor  # [M, n] of the entries among the live columns
    exps: Tensor | None  # [L, n] where they were kept
    coefficients: Coefficients
    mass: Tensor  # [n] a_n d_n


class LivePass:
    """Forward and backward over `hidden [n, H]`, in plain PyTorch. `buffer` carries what the backward needs."""

    def __init__(self, hidden: Tensor, head: Head, entries: Entries, plan: LivePlan, buffer: Tensor) -> None:
        self.hidden, self.head, self.entries, self.plan = hidden, head, entries, plan
        self.wide = statistic_dtype(hidden.dtype)
        count = len(buffer) - plan.profile_bytes
        self.profiles = buffer[: plan.profile_bytes].view(self.wide).view(-1, plan.vocab)  # LIVE at live columns
        self.exps = buffer[plan.profile_bytes :][: count // hidden.itemsize * hidden.itemsize].view(hidden.dtype)

    def statistics(self) -> tuple[State, Tensor]:
        """The softmax state of every row, and `dead [n, 3]`: dead mass, residual norm, energy outside the entries.

        These three are in units of `exp(z - base)`, the base being the largest logit outside the top k.
        """
        plan, rows = self.plan, len(self.hidden)
        state = State.new(rows, self.entries.ids.shape[1], self.hidden)
        dead = self.hidden.new_zeros(rows, 3, dtype=self.wide)
        space = self.empty((plan.vocab + 1) * plan.chunk)  # V columns and a spare one
        used = 0
        for index, part in enumerate(plan.chunks):
            count = part.stop - part.start
            exps = space[: (plan.vocab + 1) * count].view(-1, count)
            entries, own = self.entries.rows(part), state.rows(part)
            self.exponentials(part, exps, entries, own)
            live = self.choose(index, exps[:-1], entries, own, dead[part])
            end = used + len(live) * count
            if end <= len(self.exps):
                out = self.exps[used:end].view(-1, count)
                for some, columns in zip(out.split(KEPT), live.split(KEPT), strict=True):
                    some.copy_(self.kept(exps, columns))
                used = end
        return state, dead

    def empty(self, count: int) -> Tensor:
        return self.hidden.new_empty(count, dtype=self.wide)

    def exponentials(self, part: slice, exps: Tensor, entries: Entries, state: State) -> None:
        """Fills the rows' state, and `exps [V + 1, n]` with `exp(z - base) * slope`, 0 at the entries."""
        for first, columns in self.plan.tiles:
            exps[first : first + columns] = self.logits(slice(first, first + columns), part)
        ids = entries.ids.long().T
        state.selected.copy_(exps.gather(0, ids).T)
        exps.scatter_(0, ids.where(entries.in_topk.T, self.plan.vocab), -torch.inf)
        state.max.copy_(exps[:-1].amax(0))
        base = finite(state.max)
        for first, columns in self.plan.tiles:
            tile = exps[first : first + columns]
            slope = self.slope(tile)
            state.sum.add_(tile.sub_(base).exp_().sum(0))
            if slope is not None:
                tile *= slope
        exps.scatter_(0, ids, 0.0)

    def choose(self, index: int, exps: Tensor, entries: Entries, state: State, dead: Tensor) -> Tensor:
        """The chunk's live columns, as few as the tolerance allows; fills its profile and `dead [n, 3]`."""
        row_base, lse, _ = merge_tail(state, inside_topk(entries, state.selected))
        base = finite(state.max)
        share = (base - row_base - lse).exp()  # P = share * exps
        sums, energy, outside = self.column_sums(exps, share, base)
        label = entries.order == entries.order.shape[1] - 1
        missed = 1 - ((state.selected - row_base[:, None]) - lse[:, None]).exp()[label]  # dz_y of a log-likelihood
        slope = self.slope(state.selected)
        if slope is not None:
            missed *= slope[label]
        allowed = (AIM * self.plan.tolerance) ** 2 * (missed.square().sum() + energy.sum()).double()
        energy.index_fill_(0, entries.ids.long().flatten(), torch.inf)

        rounding = 8 * torch.finfo(self.wide).eps  # of the three sums that cancel in a residual

        def tried(dropped: Tensor) -> tuple[Tensor, ...]:
            """With columns dead whose energy is `dropped`: these, their profile, mass, residuals and error."""
            is_dead = energy < self.threshold(energy, dropped)
            profile = sums * is_dead
            profile /= profile.sum().clamp_min(torch.finfo(self.wide).tiny)
            mass, cross, square = self.residuals(exps, is_dead, profile)
            residual = (square - 2 * mass * cross + mass.square() * profile.square().sum()).clamp_min(0)
            residual = (residual + rounding * square).sqrt()
            return is_dead, profile, mass, residual, (residual * share).square().sum()

        # The energy of what is dead is the error of dropping it. The rank-one form's is a little less in a peaked
        # softmax, far less in a flat one, and may be more where a few tokens and a few columns hold most of the mass.
        best, count, dropped = None, 0, allowed
        for _ in range(TRIES):
            trial = tried(dropped)
            error = trial[-1]
            if error <= allowed:
                best, before, count = trial, count, int(trial[0].sum())
                if error > allowed / 4 or 0 < count == before:
                    break
                dropped = dropped * (allowed / (2 * error)).clamp(max=256)
            elif best is None:
                dropped = dropped / 16
            else:
                break
        is_dead, profile, mass, residual, _ = best or tried(0 * allowed)
        dead.copy_(torch.stack([mass, residual, outside], 1))
        self.profiles[index] = profile.masked_fill_(~is_dead, LIVE)
        return (~is_dead).nonzero()[:, 0]

    def column_sums(self, exps: Tensor, share: Tensor, base: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of `P = share * exps`: `sum_n P [V]` and `sum_n P^2 [V]`; and `sum_j exps^2 [n]`."""
        sums, energy, outside = torch.mv(exps, share), exps.new_empty(len(exps)), torch.zeros_like(share)
        for first, columns in self.plan.tiles:
            square = exps[first : first + columns].square()
            energy[first : first + columns] = torch.mv(square, share.square())
            outside += square.sum(0)
        return sums, energy, outside

    def kept(self, exps: Tensor, live: Tensor) -> Tensor:
        """The rows `live` of the chunk's exps, from the base of their tokens: `[L, n]`."""
        return exps.index_select(0, live)

    def threshold(self, energy: Tensor, allowed: Tensor) -> Tensor:
        """The energy below which all columns together have no more than `allowed`."""
        ranked = energy.sort().values
        count = (ranked.cumsum(0, dtype=torch.float64) <= allowed).sum()
        return torch.cat([ranked, ranked.new_full((1,), torch.inf)])[count]

    def residuals(self, exps: Tensor, is_dead: Tensor, profile: Tensor) -> Tensor:
        """`[3, n]`: sums over the dead columns of `exps`, of `profile * exps` and of `exps^2`."""
        sums = torch.zeros(3, exps.shape[1], dtype=torch.float64, device=exps.device)
        weights = torch.stack([is_dead.to(self.wide), profile])
        for first, columns in self.plan.tiles:
            tile = exps[first : first + columns]
            sums[:2] += weights[:, first : first + columns] @ tile
            sums[2] += weights[0, first : first + columns] @ tile.square()
        return sums

    def gradient(self, coefficients: Coefficients, dead: Tensor, grads: Grads) -> None:
        """Writes the gradients of all rows and records the diagnostics; `dead` is what `statistics` returned."""
        chunks = self.checked_chunks(coefficients, dead, grads)
        plan, hidden, weight = self.plan, self.hidden, self.head.weight
        spread = torch.stack([chunk.mass @ hidden[chunk.part].to(self.wide) for chunk in chunks])  # [chunks, H]
        total = torch.stack([chunk.mass.sum() for chunk in chunks])
        ghosts = torch.zeros_like(spread)  # profile @ weight
        grad_hidden = None if grads.hidden is None else grads.hidden[:, : hidden.shape[1]]
        for first, columns in plan.tiles:
            tile = slice(first, first + columns)
            profile = self.profiles[: len(chunks), tile].clamp_min(0)
            if grad_hidden is not None:
                ghosts += profile @ weight[tile].to(self.wide)
            grad_weight = grad_bias = None
            if grads.weight is not None:
                grad_weight = accumulator(grads.weight[tile], self.wide)
                torch.mm(profile.T, spread, out=grad_weight)
            if grads.bias is not None:
                grad_bias = grads.bias[tile]
                torch.mv(profile.T, total, out=grad_bias)
            for chunk in chunks:
                self.live_gradient(chunk, first, columns, Grads(grad_hidden, grad_weight, grad_bias))
            if grads.weight is not None and grad_weight is not None:
                grads.weight[tile] = grad_weight
                del grad_weight  # before the next tile's weight is widened
        if grad_hidden is not None:
            for chunk, ghost in zip(chunks, ghosts, strict=True):
                grad_hidden[chunk.part].addr_(chunk.mass, ghost)

    def live_gradient(self, chunk: Chunk, first: int, columns: int, grads: Grads) -> None:
        """Adds the chunk's live columns in a tile to `grads.hidden [N, H]`, `grads.weight [columns, H]` and bias."""
        begin, end = torch.searchsorted(chunk.live, torch.tensor([first, first + columns]).to(chunk.live)).tolist()
        if begin == end:
            return
        live, own, part = chunk.live[begin:end], chunk.coefficients, chunk.part
        dz = self.empty((len(live) + 1) * len(own.c)).view(-1, len(own.c))  # and a spare row
        if chunk.exps is not None:
            torch.mul(chunk.exps[begin:end], own.c, out=dz[:-1])
        else:
            logits = self.logits(live, part)
            slope = self.slope(logits)
            torch.mul(logits.sub_(own.base).exp_(), own.c, out=dz[:-1])
            if slope is not None:
                dz[:-1] *= slope
        inside = (chunk.places >= begin) & (chunk.places < end)
        dz = dz.scatter_(0, (chunk.places - begin).where(inside, len(live)), own.values.T)[:-1]
        if grads.hidden is not None or grads.weight is not None:
            self.add_products(dz, live, first, part, grads)
        if grads.bias is not None:
            grads.bias.index_add_(0, live - first, dz.sum(1))

    def add_products(self, dz: Tensor, live: Tensor, first: int, part: slice, grads: Grads) -> None:
        """Adds `dz.T @ weight[live]` to the chunk's rows of `grads.hidden`, and `dz @ hidden` to `grads.weight`.

        `dz [L, n]`; `grads.weight` begins with row `first`. A chunk's columns are distinct: no two additions meet.
        """
        low = dz.to(self.hidden.dtype)
        if grads.hidden is not None:
            add_product(grads.hidden[part], low.T, self.head.weight.index_select(0, live))
        if grads.weight is not None:
            grads.weight.index_add_(0, live - first, wide_mm(low, self.hidden[part]))

    def checked_chunks(self, coefficients: Coefficients, dead: Tensor, grads: Grads) -> list[Chunk]:
        """Every chunk's part in the backward, held against the tolerance now that its coefficients are known."""
        plan, (mass, residual, outside) = self.plan, dead.unbind(1)
        c, base, values = coefficients.c, coefficients.base, coefficients.values
        error = (c.double() * residual).square()
        norm = (c.double().square() * outside) + values.double().square().masked_fill(self.entries.repeats, 0).sum(1)
        errors = torch.stack([error[part].sum() for part in plan.chunks]).nan_to_num(nan=torch.inf)
        ranked, order = errors.sort()
        norm = norm.where(norm.isfinite(), 0).sum()
        fits = torch.zeros_like(order, dtype=torch.bool)
        fits[order] = ranked.cumsum(0) <= plan.tolerance**2 * norm
        chunks, used, exact, lived, recomputed = [], 0, 0, 0, 0
        for index, part in enumerate(plan.chunks):
            count, own = part.stop - part.start, Coefficients(c[part], base[part], values[part])
            live, exps, ghost = (self.profiles[index] < 0).nonzero()[:, 0], None, own.c * mass[part]
            end = used + len(live) * count
            if end <= len(self.exps):
                exps, used = self.exps[used:end].view(-1, count), end
            if not fits[index]:
                live, exps, ghost = torch.arange(plan.vocab, device=live.device), None, torch.zeros_like(ghost)
                exact += count
            places = torch.searchsorted(live, self.entries.ids[part].T.long().contiguous())
            chunks.append(Chunk(part, live, places, exps, own, ghost))
            lived += len(live) * count
            recomputed += 0 if exps is not None else len(live) * count
        everything = plan.rows * plan.vocab
        products = (grads.hidden is not None) + (grads.weight is not None)
        record(
            LiveDiagnostics(
                tokens=plan.rows,
                certificate=float((errors[fits].sum() / norm.clamp_min(torch.finfo(norm.dtype).tiny)).sqrt()),
                live_share=lived / everything,
                exact_share=exact / plan.rows,
                units=1 + (recomputed + products * lived) / everything,
            )
        )
        return chunks

    def logits(self, columns: slice | Tensor, part: slice) -> Tensor:
        """`[columns, n]`"""
        h = self.head
        raw = wide_mm(h.weight[columns], self.hidden[part].T)
        bias = None if h.bias is None else h.bias[columns].to(raw.dtype)[:, None]
        return transform_logits(raw, bias, h.scale, h.softcap, h.temperature)

    def slope(self, logits: Tensor) -> Tensor | None:
        """`1 - tanh^2` of the softcap, from the logits behind it."""
        h = self.head
        return None if h.softcap is None else 1 - (logits * (h.temperature / h.softcap)).square()


def accumulator(out: Tensor, dtype: torch.dtype) -> Tensor:
    """`out` itself if it can hold sums, else a wide buffer of its shape."""
    return out if out.dtype == dtype else torch.empty_like(out, dtype=dtype)


def add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """`out += a @ b`, accumulated in out's dtype."""
    if a.dtype == out.dtype:
        out.addmm_(a, b)
    else:
        out.add_(wide_mm(a, b))
