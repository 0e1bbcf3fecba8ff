"""What a cache holds, in numbers and as a picture, so that a user can choose k."""

import itertools
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from .dataset import PairDataset
from .format import ANSWERS
from .verify import answers

_BINS = 50


class CacheStatistics(NamedTuple):
    """Over the answer tokens of a cache.

    Attributes:
        tokens: `{side: number}` of answer tokens.
        ranks: `{side: int64 [K + 1]}`, how often the realised token is the r-th most probable, last: outside.
        mass: float64 `[K]`, mean probability of the k most probable tokens, k = 1 .. K.
        lowest: float64 `[K]`, the same at the worst 5% of positions: that quantile, to 0.02.
        histogram: int64 `[50, K]`, positions by that probability.
        same_pairs: pairs whose token ids are those of another.
    """

    tokens: dict[str, int]
    ranks: dict[str, np.ndarray]
    mass: np.ndarray
    lowest: np.ndarray
    histogram: np.ndarray
    same_pairs: int


def statistics(dataset: PairDataset, *, progress: bool = False) -> CacheStatistics:
    """Reads the whole cache once."""
    k = dataset.k
    tokens = dict.fromkeys(ANSWERS, 0)
    ranks = {side: np.zeros(k + 1, np.int64) for side in ANSWERS}
    total = np.zeros(k)
    histogram = np.zeros((_BINS, k), np.int64)
    seen = set()
    columns = np.arange(k)
    for position in tqdm(range(len(dataset)), unit="pair", desc="reading", disable=not progress):
        item = dataset[position]
        pair = item.pop("pair")
        seen.add(tuple(ids.tobytes() for ids in pair.ids))
        for side, answer in answers(pair, item):
            tokens[side] += len(answer["ids"])
            realised = answer["topk_ids"] == answer["ids"][:, None]
            rank = np.where(realised.any(1), realised.argmax(1) if k else 0, k)
            ranks[side] += np.bincount(rank, minlength=k + 1)
            mass = np.exp(answer["topk_logps"].astype(np.float64)).cumsum(1)
            total += mass.sum(0)
            np.add.at(histogram, (np.minimum(mass * _BINS, _BINS - 1).astype(int), columns), 1)
    count = max(1, sum(tokens.values()))
    lowest = ((histogram.cumsum(0) < 0.05 * count).sum(0)) / _BINS
    return CacheStatistics(tokens, ranks, total / count, lowest, histogram, len(dataset) - len(seen))


def table(found: CacheStatistics) -> str:
    """For some k: the mass of the k most probable tokens, and how many realised tokens are among them."""
    k = len(found.mass)
    rows = [f"{'k':>6}{'mean mass':>12}{'worst 5%':>12}{'chosen in it':>15}{'rejected in it':>16}"]
    for n in _powers(k):
        inside = [found.ranks[side][:n].sum() / max(1, found.tokens[side]) for side in ANSWERS]
        rows.append(
            f"{n:>6}{found.mass[n - 1]:>12.4f}{found.lowest[n - 1]:>12.2f}{inside[0]:>15.2%}{inside[1]:>16.2%}"
        )
    return "\n".join(rows)


def plot(found: CacheStatistics, path: str | Path) -> None:
    """Two histograms as PNG: the mass of the top k, for some k, and the rank of the realised token."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    k = len(found.mass)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    shown = _powers(k)[-4:]
    edges = np.linspace(0, 1, _BINS + 1)
    count = max(1, sum(found.tokens.values()))
    for n in shown:
        left.stairs(found.histogram[:, n - 1] / count, edges, label=f"k = {n}", linewidth=1.5)
    left.set(
        xlabel="probability of the k most probable tokens", ylabel="share of positions", yscale="log", xlim=(0, 1)
    )
    if shown:
        left.legend(frameon=False)
    starts = [0, *_powers(k)]
    labels = [str(a + 1) if b - a == 1 else f"{a + 1}–{b}" for a, b in itertools.pairwise(starts)]
    for offset, side in ((-0.2, "chosen"), (0.2, "rejected")):
        ranks = found.ranks[side]
        heights = [ranks[a:b].sum() for a, b in itertools.pairwise(starts)] + [ranks[k]]
        right.bar(np.arange(len(heights)) + offset, np.array(heights) / max(1, found.tokens[side]), 0.4, label=side)
    right.set_xticks(range(len(labels) + 1), [*labels, f"> {k}"])
    right.set(xlabel="rank of the realised token", ylabel="share of tokens", yscale="log")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png", dpi=150)
    plt.close(figure)


def _powers(k: int) -> list[int]:
    """1, 2, 4, ... and k itself."""
    return sorted({2**n for n in range(k.bit_length()) if 2**n <= k} | ({k} if k else set()))
