"""Everything that can be checked about a cache without its teacher."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from .dataset import PairDataset
from .errors import CacheError
from .format import ANSWERS, TEACHER_SCHEMA, Targets, read_pair, read_targets
from .pairs import Pair, tokens_sha256
from .reader import RowReader
from .shards import REFERENCE, check_sha256, read_complete
from .vocabulary import read_vocabulary

_SLACK = 1e-3  # probabilities may sum to this much more or less than one, beside what float16 rounds


def problems(directory: str | Path) -> Iterator[str]:
    """Each thing that is wrong with a cache, in words; nothing for a cache that is right.

    Checked: the manifest; every file's size and SHA-256; the reference's sums; every row's index, lengths, ids and
    values; that its values are of one softmax (`answer_problems`); and the manifest's tokens, largest ids and
    fingerprint of the tokens.
    """
    directory = Path(directory)
    try:
        dataset = PairDataset(directory, verify=False)  # complete, sizes, and the reference
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
    reader = RowReader(directory, TEACHER_SCHEMA)
    pairs: list[Pair] = []
    for shard in manifest.shards:
        tokens = max_id = 0
        for row in range(len(shard.index)):
            try:
                values = reader.read(shard, row)
                pair = read_pair(values)
                targets = read_targets(values, pair, manifest.settings["k"], manifest.settings["vocab_size"])
            except CacheError as error:
                yield f"{shard.file}: {error}"
                continue
            pairs.append(pair)
            tokens += pair.answer_tokens
            max_id = max(max_id, *(int(ids.max(initial=0)) for ids in pair.ids))
            for side, answer in answers(pair, targets):
                max_id = max(max_id, int(answer["topk_ids"].max(initial=0)))
                for problem in answer_problems(answer):
                    yield f"{shard.file}: pair {pair.index}, {side}: {problem}"
        for name, listed, found in (("tokens", shard.tokens, tokens), ("max_id", shard.max_id, max_id)):
            if listed != found:
                yield f"{shard.file}: {name} is {found}, the manifest says {listed}"
    fingerprint = tokens_sha256(sorted(pairs, key=lambda pair: pair.index))
    if fingerprint != manifest.settings["tokens_sha256"]:
        yield f"the tokens have the SHA-256 {fingerprint}, the manifest says {manifest.settings['tokens_sha256']}"


def answers(pair: Pair, targets: Mapping[str, np.ndarray]) -> Iterator[tuple[str, Targets]]:
    """`(side, its columns)` of both answers of a row, its ids included."""
    for side, ids in zip(ANSWERS, pair.ids[1:], strict=True):
        columns = {name.removeprefix(f"{side}_"): v for name, v in targets.items() if name.startswith(f"{side}_")}
        yield side, {"ids": ids, **columns}


def answer_problems(answer: Targets) -> Iterator[str]:
    """What shows that an answer's values are not those of one softmax, at the first position where it does.

    With p the top-k probabilities: no id twice; by falling probability; `sum p + exp(tail) = 1`, up to 1e-3 and
    float16's rounding of each `log p`; the realised token's value is that of its top-k entry if it has one, else it
    is no larger than the last one, and than the tail.
    """
    ids, label, tail = answer["topk_ids"], answer["label_logps"].astype(float), answer["topk_tail"].astype(float)
    stored = answer["topk_logps"].astype(np.float16)
    logps = stored.astype(float)
    with np.errstate(invalid="ignore"):
        rounding = np.nan_to_num(np.spacing(np.abs(stored)).astype(float), nan=0.0, posinf=0.0)  # of -inf: nothing
    p = np.exp(logps)
    realised = ids == answer["ids"][:, None]
    inside = realised.any(1)
    entry = np.where(realised, logps, -np.inf).max(1, initial=-np.inf)
    allowed = np.where(realised, rounding, 0).max(1, initial=0.0) + _SLACK
    last, last_rounding = (logps[:, -1], rounding[:, -1]) if ids.shape[1] else (np.zeros_like(tail), 0.0)
    ranked = np.sort(ids, axis=1)
    checks = {
        "an id occurs twice in the top-k": (ranked[:, 1:] == ranked[:, :-1]).any(1),
        "the top-k is not by falling probability": (logps[:, 1:] > logps[:, :-1]).any(1),
        "top-k and tail do not sum to one": np.abs(p.sum(1) + np.exp(tail) - 1) > _SLACK + (p * rounding).sum(1),
        "the realised token's value is not that of its top-k entry": inside & ~(np.abs(label - entry) <= allowed),
        "the realised token is outside the top-k and more probable than its last entry": ~inside
        & (label > last + last_rounding + _SLACK),
        "the realised token is outside the top-k and more probable than the tail": ~inside & (label > tail + _SLACK),
    }
    for problem, at in checks.items():
        if at.any():
            yield f"{problem} (position {int(at.argmax())} of the answer, {int(at.sum())} in all)"
