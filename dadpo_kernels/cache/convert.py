"""Writes a new cache from an existing one, with fewer entries per position, a smaller vocabulary or other shards."""

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from .dataset import PairDataset
from .fold import fold, shared_vocabulary
from .format import Targets, check_pair_ids
from .pairs import Pair
from .reader import read_tokens
from .shard_run import TEACHER_ROWS, write_shards
from .shards import MANIFEST, REFERENCE, Manifest, writing
from .verify import split_sides
from .vocabulary import VOCABULARY


def convert_cache(
    source: str | Path,
    out: str | Path,
    *,
    k: int | None = None,
    student_vocab_size: int | None = None,
    shard_tokens: int | None = None,
    progress: bool = False,
) -> Manifest:
    """Write a converted copy of the cache `source` to the directory `out`.

    An interrupted run resumes as a capture does.

    The mass of entries that are left out, because of k or because their ids are outside the student's vocabulary, is
    added to the tail: see `fold`.

    Args:
        k: entries per position. None keeps all of them or, with `student_vocab_size`, the largest number that all
            positions have below it.
        student_vocab_size: vocabulary size of the student's LM head; None keeps the ids as they are.
        shard_tokens: answer tokens per shard; None keeps the source's setting.
        progress: show a progress bar in tokens.

    Returns:
        The finished manifest.

    Raises:
        CacheVocabularyError: a position has fewer than k ids in the student's vocabulary, or a pair has a token
            outside it.
        CacheError: one of its other subclasses if `source` is damaged, or if `out` holds another cache.
        ValueError: k is larger than the source's.
    """
    source, out = Path(source), Path(out)
    dataset = PairDataset(source)
    settings = dict(dataset.manifest.settings)

    # The student's vocabulary must contain the tokens of all pairs.
    vocab_size = shared_vocabulary(settings["vocab_size"], student_vocab_size)
    pairs = read_tokens(source, dataset.manifest)
    check_pair_ids(pairs, vocab_size)

    # Choose k. Only a smaller vocabulary makes it necessary to read the targets for that.
    if k is None:
        k = dataset.k
        if any(shard.max_id >= vocab_size for shard in dataset.manifest.shards):
            items = (dataset[position] for position in range(len(dataset)))
            k = min(
                int((item[f"{s}_topk_ids"] < vocab_size).sum(1).min())
                for item in items
                for s in dataset.manifest.sides
            )
    if not 0 <= k <= dataset.k:
        raise ValueError(f"k={k} is outside [0, {dataset.k}], the range that {source} allows")

    settings |= {"k": k, "vocab_size": vocab_size}
    settings["shard_tokens"] = shard_tokens or settings.get("shard_tokens", 65536)
    settings["converted_from"] = hashlib.sha256((source / MANIFEST).read_bytes()).hexdigest()
    position = {pair.index: number for number, pair in enumerate(pairs)}

    def score(number: int, shard: Sequence[Pair]) -> Iterator[tuple[Pair, Targets, Targets]]:
        for pair in shard:
            sides = split_sides(pair, dataset[position[pair.index]])
            chosen, rejected = (fold(f"pair {pair.index}", targets, k, vocab_size) for _, targets in sides)
            yield pair, chosen, rejected

    files = {VOCABULARY: (source / VOCABULARY).read_bytes()}
    with writing(out, "teacher", settings, dataset.manifest.info, files) as writer:
        write_shards(pairs, writer, TEACHER_ROWS, score, shard_tokens=settings["shard_tokens"], progress=progress)
        # The reference holds sums over the same tokens, which do not change.
        if dataset.has_reference and writer.ranks.rank == 0:
            shutil.copytree(source / REFERENCE, out / REFERENCE, dirs_exist_ok=True)
    return writer.manifest
