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

import torch
from torch import Tensor

from ..backends.base import Coefficients, Entries, Grads, State, accumulator_dtype, inside_topk, merge_tail
from ..backends.torch_ import finite, wide_mm
from ..head import Head
from .plan import LivePlan
from .tolerance import LIVE, Chunk, check_chunks

AIM = 0.5  # of the tolerance, in the forward: the loss's coefficients differ from token to token
COPIED = 4096  # columns retained at a time
TRIES = 4  # at a chunk's live columns


class LivePass:
    """Forward and backward over `hidden [n, H]`, in plain PyTorch. `buffer` carries what the backward needs."""

    def __init__(self, hidden: Tensor, head: Head, entries: Entries, plan: LivePlan, buffer: Tensor) -> None:
        self.hidden, self.head, self.entries, self.plan = hidden, head, entries, plan
        self.wide = accumulator_dtype(hidden.dtype)
        count = len(buffer) - plan.profile_bytes
        self.profiles = buffer[: plan.profile_bytes].view(self.wide).view(-1, plan.vocab)  # LIVE at live columns
        self.exps = buffer[plan.profile_bytes :][: count // hidden.itemsize * hidden.itemsize].view(hidden.dtype)

    @staticmethod
    def workspace_bytes(plan: LivePlan, width: int, dtype: torch.dtype, grad_weight: bool) -> tuple[int, int]:
        """`(forward, backward)`: what each holds at most in addition to results and buffer.

        The forward has the exponentials of a chunk over the whole vocabulary, and copies of a tile of them; the
        backward a tile of the gradient of the logits, the rows of the weight and of its gradient that go with it, and
        for low-precision weights the tile's accumulator.
        """
        wide = accumulator_dtype(dtype).itemsize
        logits = plan.tile * plan.chunk * wide
        rows = plan.tile * width * wide
        profiles = -(-plan.rows // plan.chunk) * plan.tile * wide
        accumulated = rows if grad_weight and dtype.itemsize < wide else 0
        return plan.vocab * (plan.chunk + 8) * wide + 2 * logits, 2 * logits + 2 * rows + profiles + accumulated

    def forward(self) -> tuple[State, Tensor]:
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
            entries, chunk_state = self.entries.rows(part), state.rows(part)
            self.exponentials(part, exps, entries, chunk_state)
            live = self.choose(index, exps[:-1], entries, chunk_state, dead[part])
            end = used + len(live) * count
            if end <= len(self.exps):
                out = self.exps[used:end].view(-1, count)
                for rows_out, columns in zip(out.split(COPIED), live.split(COPIED), strict=True):
                    rows_out.copy_(self.retained_exponentials(exps, columns))
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
            slope = self.head.slope(tile)
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
        slope = self.head.slope(state.selected)
        if slope is not None:
            missed *= slope[label]
        allowed = (AIM * self.plan.grad_tolerance) ** 2 * (missed.square().sum() + energy.sum()).double()
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

    def retained_exponentials(self, exps: Tensor, live: Tensor) -> Tensor:
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

    def backward(self, coefficients: Coefficients, dead: Tensor, grads: Grads) -> None:
        """Writes the gradients of all rows and records the diagnostics; `dead` is what `forward` returned."""
        chunks = check_chunks(self.plan, self.entries, self.profiles, self.exps, coefficients, dead, grads)
        plan, hidden, weight = self.plan, self.hidden, self.head.weight
        # The ghost tokens: one a chunk, with the mean hidden state of its dead mass.
        ghost_hidden = torch.stack([chunk.mass @ hidden[chunk.part].to(self.wide) for chunk in chunks])  # [chunks, H]
        total = torch.stack([chunk.mass.sum() for chunk in chunks])
        ghost_weight = torch.zeros_like(ghost_hidden)  # profile @ weight
        grad_hidden = None if grads.hidden is None else grads.hidden[:, : hidden.shape[1]]
        for first, columns in plan.tiles:
            tile = slice(first, first + columns)
            profile = self.profiles[: len(chunks), tile].clamp_min(0)
            if grad_hidden is not None:
                ghost_weight += profile @ weight[tile].to(self.wide)
            grad_weight = grad_bias = None
            if grads.weight is not None:
                grad_weight = accumulator(grads.weight[tile], self.wide)
                torch.mm(profile.T, ghost_hidden, out=grad_weight)
            if grads.bias is not None:
                grad_bias = grads.bias[tile]
                torch.mv(profile.T, total, out=grad_bias)
            for chunk in chunks:
                self.live_gradient(chunk, first, columns, Grads(grad_hidden, grad_weight, grad_bias))
            if grads.weight is not None and grad_weight is not None:
                grads.weight[tile] = grad_weight
                del grad_weight  # before the next tile's weight is widened
        if grad_hidden is not None:
            for chunk, ghost in zip(chunks, ghost_weight, strict=True):
                grad_hidden[chunk.part].addr_(chunk.mass, ghost)

    def live_gradient(self, chunk: Chunk, first: int, columns: int, grads: Grads) -> None:
        """Adds the chunk's live columns in a tile to `grads.hidden [N, H]`, `grads.weight [columns, H]` and bias."""
        begin, end = torch.searchsorted(chunk.live, torch.tensor([first, first + columns]).to(chunk.live)).tolist()
        if begin == end:
            return
        live, coefficients, part = chunk.live[begin:end], chunk.coefficients, chunk.part
        c = coefficients.c
        dz = self.empty((len(live) + 1) * len(c)).view(-1, len(c))  # and a spare row
        if chunk.exps is not None:
            torch.mul(chunk.exps[begin:end], c, out=dz[:-1])
        else:
            logits = self.logits(live, part)
            slope = self.head.slope(logits)
            torch.mul(logits.sub_(coefficients.base).exp_(), c, out=dz[:-1])
            if slope is not None:
                dz[:-1] *= slope
        inside = (chunk.places >= begin) & (chunk.places < end)
        dz = dz.scatter_(0, (chunk.places - begin).where(inside, len(live)), coefficients.values.T)[:-1]
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

    def logits(self, columns: slice | Tensor, part: slice) -> Tensor:
        """`[columns, n]`"""
        h = self.head
        raw = wide_mm(h.weight[columns], self.hidden[part].T)
        bias = None if h.bias is None else h.bias[columns].to(raw.dtype)[:, None]
        return h.transform(raw, bias)


def accumulator(out: Tensor, dtype: torch.dtype) -> Tensor:
    """`out` itself if it can hold sums, else a wide buffer of its shape."""
    return out if out.dtype == dtype else torch.empty_like(out, dtype=dtype)


def add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """`out += a @ b`, accumulated in out's dtype."""
    if a.dtype == out.dtype:
        out.addmm_(a, b)
    else:
        out.add_(wide_mm(a, b))
