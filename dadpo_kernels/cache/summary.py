"""Summarises a cache in numbers and in a picture, to help a user choose k."""

import itertools
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from .dataset import PairDataset
from .format import SIDES
from .verify import split_sides

_BINS = 50


class CacheSummary(NamedTuple):
    """Numbers over all answer tokens of a cache.

    Attributes:
        tokens: `{side: int}`, the number of answer tokens.
        label_ranks: `{side: int64 [K + 1]}`, how often the label is the r-th most probable token; the last number
            counts the labels outside the top K.
        mass: float64 `[K]`, mean probability of the k most probable tokens together, for k = 1 .. K.
        lowest: float64 `[K]`, the 5% quantile of that probability over the positions, to 0.02.
        histogram: int64 `[50, K]`, number of positions by that probability.
        repeated_pairs: number of pairs that have the same token ids as another one.
    """

    tokens: dict[str, int]
    label_ranks: dict[str, np.ndarray]
    mass: np.ndarray
    lowest: np.ndarray
    histogram: np.ndarray
    repeated_pairs: int


def summarize(dataset: PairDataset, *, progress: bool = False) -> CacheSummary:
    """Read the whole cache once and count. Raises CacheError if a row is damaged."""
    k = dataset.k
    tokens = dict.fromkeys(SIDES, 0)
    label_ranks = {side: np.zeros(k + 1, np.int64) for side in SIDES}
    total = np.zeros(k)
    histogram = np.zeros((_BINS, k), np.int64)
    seen = set()
    columns = np.arange(k)
    for position in tqdm(range(len(dataset)), unit="pair", desc="reading", disable=not progress):
        item = dataset[position]
        pair = item.pop("pair")
        seen.add(tuple(ids.tobytes() for ids in pair.ids))
        for side, answer in split_sides(pair, item):
            tokens[side] += len(answer["ids"])
            is_label = answer["topk_ids"] == answer["ids"][:, None]
            rank = np.where(is_label.any(1), is_label.argmax(1) if k else 0, k)
            label_ranks[side] += np.bincount(rank, minlength=k + 1)
            mass = np.exp(answer["topk_logps"].astype(np.float64)).cumsum(1)
            total += mass.sum(0)
            np.add.at(histogram, (np.minimum(mass * _BINS, _BINS - 1).astype(int), columns), 1)
    count = max(1, sum(tokens.values()))
    lowest = ((histogram.cumsum(0) < 0.05 * count).sum(0)) / _BINS
    return CacheSummary(tokens, label_ranks, total / count, lowest, histogram, len(dataset) - len(seen))


def format_summary(summary: CacheSummary) -> str:
    """A table with one line for each of some k: the mass of the top k, and the share of labels that are in it."""
    k = len(summary.mass)
    lines = [f"{'k':>6}{'mean mass':>12}{'worst 5%':>12}{'chosen in it':>15}{'rejected in it':>16}"]
    for n in _powers(k):
        inside = [summary.label_ranks[side][:n].sum() / max(1, summary.tokens[side]) for side in SIDES]
        lines.append(
            f"{n:>6}{summary.mass[n - 1]:>12.4f}{summary.lowest[n - 1]:>12.2f}{inside[0]:>15.2%}{inside[1]:>16.2%}"
        )
    return "\n".join(lines)


def plot_summary(summary: CacheSummary, path: str | Path) -> None:
    """Draw two histograms into a PNG file: the mass of the top k for some k, and the rank of the label."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    k = len(summary.mass)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")

    # The mass, for the four largest k.
    shown = _powers(k)[-4:]
    edges = np.linspace(0, 1, _BINS + 1)
    count = max(1, sum(summary.tokens.values()))
    for n in shown:
        left.stairs(summary.histogram[:, n - 1] / count, edges, label=f"k = {n}", linewidth=1.5)
    left.set(
        xlabel="probability of the k most probable tokens", ylabel="share of positions", yscale="log", xlim=(0, 1)
    )
    if shown:
        left.legend(frameon=False)

    # The rank of the label, in bins that end at powers of two.
    starts = [0, *_powers(k)]
    labels = [str(a + 1) if b - a == 1 else f"{a + 1}–{b}" for a, b in itertools.pairwise(starts)]
    for offset, side in ((-0.2, "chosen"), (0.2, "rejected")):
        ranks = summary.label_ranks[side]
        heights = [ranks[a:b].sum() for a, b in itertools.pairwise(starts)] + [ranks[k]]
        shares = np.array(heights) / max(1, summary.tokens[side])
        right.bar(np.arange(len(heights)) + offset, shares, 0.4, label=side)
    right.set_xticks(range(len(labels) + 1), [*labels, f"> {k}"])
    right.set(xlabel="rank of the label", ylabel="share of tokens", yscale="log")
    right.legend(frameon=False)

    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png", dpi=150)
    plt.close(figure)


def _powers(k: int) -> list[int]:
    """1, 2, 4, ... up to k, and k itself."""
    return sorted({2**n for n in range(k.bit_length()) if 2**n <= k} | ({k} if k else set()))
