"""Checks everything about a cache that can be checked without its teacher."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from .dataset import PairDataset
from .errors import CacheError
from .format import SIDES, TEACHER_SCHEMA, Targets, read_pair, read_targets
from .pairs import Pair, tokens_sha256
from .reader import RowReader
from .shards import REFERENCE, Manifest, Shard, check_sha256, read_complete
from .vocabulary import read_vocabulary

_SLACK = 1e-3  # by how much probabilities may miss a sum of one, in addition to the rounding of float16


def problems(directory: str | Path) -> Iterator[str]:
    """Describe each problem of a cache in one line; gives nothing for a valid cache.

    It checks the manifest; the size and SHA-256 of each file; the sums of the reference; the index, lengths, ids and
    values of each row; that the values can come from one softmax (`answer_problems`); and the manifest's token counts,
    largest ids and fingerprint of the tokens.
    """
    # The files. Nothing else can be checked if one of them is damaged.
    directory = Path(directory)
    try:
        dataset = PairDataset(directory, verify=False)  # checks that it is complete, the sizes, and the reference
        manifest = dataset.manifest
        read_vocabulary(directory, manifest)
        if dataset.has_reference:
            read_complete(directory / REFERENCE, "reference", verify=True)
    except CacheError as error:
        yield str(error)
        return
    damaged = []
    for shard in manifest.shards:
        try:
            check_sha256(directory / shard.file, shard.sha256)
        except CacheError as error:
            damaged.append(str(error))
    if damaged:
        yield from damaged
        return

    # The rows, and what the manifest says about them.
    reader = RowReader(directory, TEACHER_SCHEMA)
    pairs: list[Pair] = []
    for shard in manifest.shards:
        yield from _shard_problems(reader, shard, manifest, pairs)
    fingerprint = tokens_sha256(sorted(pairs, key=lambda pair: pair.index))
    if fingerprint != manifest.settings["tokens_sha256"]:
        yield f"the tokens have the SHA-256 {fingerprint}, the manifest says {manifest.settings['tokens_sha256']}"


def _shard_problems(reader: RowReader, shard: Shard, manifest: Manifest, pairs: list[Pair]) -> Iterator[str]:
    """The problems of one shard's rows; adds its pairs to `pairs`."""
    tokens = max_id = 0
    for row in range(len(shard.index)):
        try:
            values = reader.read(shard, row)
            pair = read_pair(values, manifest.sides)
            targets = read_targets(values, pair, manifest.settings["k"], manifest.settings["vocab_size"])
        except CacheError as error:
            yield f"{shard.file}: {error}"
            continue
        pairs.append(pair)
        tokens += pair.answer_tokens
        max_id = max(max_id, *(int(ids.max(initial=0)) for ids in pair.ids))
        for side, answer in split_sides(pair, targets):
            max_id = max(max_id, int(answer["topk_ids"].max(initial=0)))
            for problem in answer_problems(answer):
                yield f"{shard.file}: pair {pair.index}, {side}: {problem}"
    for name, listed, counted in (("tokens", shard.tokens, tokens), ("max_id", shard.max_id, max_id)):
        if listed != counted:
            yield f"{shard.file}: {name} is {counted}, the manifest says {listed}"


def split_sides(pair: Pair, targets: Mapping[str, np.ndarray]) -> Iterator[tuple[str, Targets]]:
    """`(side, targets)` of both sides of a pair, by the names in `ANSWER_COLUMNS`, the answer's ids included.

    Args:
        targets: of both sides, by `{side}_{name}`; other names are ignored.
    """
    for side, ids in zip(SIDES, pair.ids[1:], strict=True):
        columns = {name.removeprefix(f"{side}_"): v for name, v in targets.items() if name.startswith(f"{side}_")}
        yield side, {"ids": ids, **columns}


def answer_problems(answer: Targets) -> Iterator[str]:
    """Describe why an answer's values cannot come from one softmax, each problem with the first position that has it.

    With p the probabilities of the top k, these conditions must hold: no id occurs twice; p does not rise;
    `sum p + exp(tail) = 1`, up to 1e-3 and float16's rounding of each `log p`; a label in the top k has the value of
    its entry; a label outside is not more probable than the last entry, or than the tail.

    Args:
        answer: targets and ids of an answer, as `split_sides` gives them.
    """
    ids, label, tail = answer["topk_ids"], answer["label_logps"].astype(float), answer["topk_tail"].astype(float)
    stored = answer["topk_logps"].astype(np.float16)
    logps = stored.astype(float)

    # What float16 may have changed in each entry; -inf is exact.
    with np.errstate(invalid="ignore"):
        rounding = np.nan_to_num(np.spacing(np.abs(stored)).astype(float), nan=0.0, posinf=0.0)
    p = np.exp(logps)

    # Where the label is in the top k: its entry, and by how much the two may differ.
    is_label = ids == answer["ids"][:, None]
    inside = is_label.any(1)
    entry = np.where(is_label, logps, -np.inf).max(1, initial=-np.inf)
    allowed = np.where(is_label, rounding, 0).max(1, initial=0.0) + _SLACK
    last, last_rounding = (logps[:, -1], rounding[:, -1]) if ids.shape[1] else (np.zeros_like(tail), 0.0)

    by_id = np.sort(ids, axis=1)
    checks = {
        "an id occurs twice in the top k": (by_id[:, 1:] == by_id[:, :-1]).any(1),
        "the top k is not sorted by falling probability": (logps[:, 1:] > logps[:, :-1]).any(1),
        "top k and tail do not sum to one": np.abs(p.sum(1) + np.exp(tail) - 1) > _SLACK + (p * rounding).sum(1),
        "the label's value differs from its entry in the top k": inside & ~(np.abs(label - entry) <= allowed),
        "the label is outside the top k and more probable than its last entry": ~inside
        & (label > last + last_rounding + _SLACK),
        "the label is outside the top k and more probable than the tail": ~inside & (label > tail + _SLACK),
    }
    for problem, at in checks.items():
        if at.any():
            yield f"{problem} (position {int(at.argmax())} of the answer, {int(at.sum())} in all)"
