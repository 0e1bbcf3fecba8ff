"""Compares a sample of a cache, which a server may have written, with a local pass of its teacher."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from ..cache.dataset import PairDataset
from ..cache.errors import CacheVocabularyError
from ..cache.format import SIDES
from ..cache.vocabulary import check_vocabulary
from .local import prepare, teacher_score

# Of label log-probabilities, in nats, root mean square: float32 engines differ by 1e-4, and logits of about 20 that
# are rounded to bfloat16, whose spacing is 0.125 there, by 0.04 (spacing / sqrt(12)).
TOLERANCE = 0.02


class Difference(NamedTuple):
    """How far a cache is from its teacher, over the answer tokens of a sample of its pairs.

    Attributes:
        pairs, tokens: size of the sample.
        mean, rms, most: absolute difference of the labels' log-probabilities in nats: its mean, its root mean square,
            and the largest one.
        worst: the pair that has the largest one.
        tail: the largest absolute difference of `exp(topk_tail)`, the mass outside the top k.
        same_ids: share of the teacher's top-k ids that the cache has at the same position of the answer.
    """

    pairs: int
    tokens: int
    mean: float
    rms: float
    most: float
    worst: int
    tail: float
    same_ids: float


def compare_with_teacher(
    model: nn.Module, tokenizer: Any, cache: str | Path, *, sample: int = 16, batch_tokens: int = 4096
) -> Difference:
    """Score evenly spaced pairs of a cache with its teacher, and compare.

    Args:
        model: the teacher, a causal LM of transformers, on its device, in the dtype to compare with.
        tokenizer: the teacher's.
        cache: directory of a finished cache.
        sample: number of pairs.
        batch_tokens: as in `capture_teacher`.

    Raises:
        CacheError: the cache is damaged, or of another tokenizer or a larger vocabulary.
        ValueError: `sample` is less than 1, or the model gives NaN.
    """
    if sample < 1:
        raise ValueError(f"sample must be at least 1, got {sample}")
    dataset = PairDataset(cache, verify=False)
    check_vocabulary(Path(cache), dataset.manifest, tokenizer)
    positions = np.unique(np.linspace(0, len(dataset) - 1, sample).round().astype(int)).tolist()
    items = {item["pair"].index: item for item in (dataset[position] for position in positions)}
    causal, head = prepare(model)
    if dataset.vocab_size > len(head.weight):
        raise CacheVocabularyError(
            f"{cache} is of a teacher with {dataset.vocab_size} ids or more, and this model has {len(head.weight)}"
        )
    score = teacher_score(causal, head, dataset.k, dataset.vocab_size, batch_tokens)

    label, tail, same, worst = [], [], [], (0.0, -1)
    for pair, *sides in score(0, [item["pair"] for item in items.values()]):
        for side, targets in zip(SIDES, sides, strict=True):
            cached = {name: items[pair.index][f"{side}_{name}"] for name in targets}
            apart = np.abs(cached["label_logps"] - targets["label_logps"].astype(np.float64))
            worst = max(worst, (float(apart.max(initial=0)), pair.index))
            label.append(apart)
            tail.append(np.abs(np.exp(cached["topk_tail"]) - np.exp(targets["topk_tail"])))
            same.append((targets["topk_ids"][:, :, None] == cached["topk_ids"][:, None, :]).any(2).ravel())
    apart, mass, ids = (np.concatenate(parts) for parts in (label, tail, same))
    return Difference(
        len(items), len(apart), float(apart.mean()), float(np.sqrt((apart**2).mean())), worst[0], worst[1],
        float(mass.max()), float(ids.mean()) if ids.size else 1.0,
    )  # fmt: skip
