"""A cache from a cache: fewer entries a position, a smaller vocabulary, other shards."""

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from .dataset import PairDataset
from .fold import fold
from .format import ANSWERS, Targets, check_ids
from .pairs import Pair
from .reader import read_tokens
from .shard_run import TEACHER_ROWS, run_pass
from .shards import MANIFEST, REFERENCE, Manifest, writing
from .verify import answers
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
    """Write the cache `source` anew to the directory `out`; resumes as a capture does.

    What is left out, because of k or because the student has no such id, is added to the tail: see `fold`.

    Args:
        k: entries a position; None keeps them all, or as many as every position has below `student_vocab_size`.
        student_vocab_size: rows of the student's head; None keeps the ids as they are.
        shard_tokens: answer tokens a shard; None keeps the source's.

    Raises:
        CacheVocabularyError: the student has not k of the ids at some position, or not all tokens of the pairs.
        CacheError: another one if `source` is damaged, or `out` holds another cache.
    """
    source, out = Path(source), Path(out)
    dataset = PairDataset(source)
    settings = dict(dataset.manifest.settings)
    vocab_size = min(settings["vocab_size"], student_vocab_size or settings["vocab_size"])
    pairs = read_tokens(source, dataset.manifest)
    for pair in pairs:
        for ids in pair.ids:
            check_ids(f"pair {pair.index}", ids, vocab_size)
    if k is None:
        k = dataset.k
        if any(shard.max_id >= vocab_size for shard in dataset.manifest.shards):
            items = (dataset[position] for position in range(len(dataset)))
            k = min(int((item[f"{s}_topk_ids"] < vocab_size).sum(1).min()) for item in items for s in ANSWERS)
    if not 0 <= k <= dataset.k:
        raise ValueError(f"k={k} is outside [0, {dataset.k}], what {source} holds")
    settings |= {"k": k, "vocab_size": vocab_size}
    settings["shard_tokens"] = shard_tokens or settings.get("shard_tokens", 65536)
    settings["converted_from"] = hashlib.sha256((source / MANIFEST).read_bytes()).hexdigest()
    position = {pair.index: number for number, pair in enumerate(pairs)}

    def score(number: int, shard: Sequence[Pair]) -> Iterator[tuple[Pair, Targets, Targets]]:
        for pair in shard:
            item = dataset[position[pair.index]]
            folded = [fold(f"pair {pair.index}", answer, k, vocab_size) for _, answer in answers(pair, item)]
            yield pair, folded[0], folded[1]

    files = {VOCABULARY: (source / VOCABULARY).read_bytes()}
    with writing(out, "teacher", settings, dataset.manifest.info, files) as writer:
        run_pass(pairs, writer, TEACHER_ROWS, score, shard_tokens=settings["shard_tokens"], progress=progress)
        if dataset.has_reference and writer.ranks.rank == 0:  # sums over the same tokens
            shutil.copytree(source / REFERENCE, out / REFERENCE, dirs_exist_ok=True)
    return writer.manifest
