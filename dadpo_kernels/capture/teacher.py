"""The settings and files of a teacher cache, which are the same whatever runs the teacher."""

import hashlib
from pathlib import Path
from typing import Any

from ..cache.fold import shared_vocabulary
from ..cache.format import check_pair_ids
from ..cache.pairs import tokens_sha256
from ..cache.shard_run import TEACHER_ROWS, Score, write_shards
from ..cache.shards import Manifest, writing
from ..cache.vocabulary import VOCABULARY, vocabulary, vocabulary_file
from .pairs import TokenizedPairs


def teacher_settings(
    tokenizer: Any,
    data: TokenizedPairs,
    k: int,
    teacher_vocab_size: int,
    student_vocab_size: int | None,
    shard_tokens: int,
) -> dict[str, Any]:
    """The settings of a teacher's capture, which must be the same when it is resumed.

    Raises:
        ValueError: k is not between 0 and the size of the shared vocabulary, or only some pairs have a rejected
            answer.
        CacheVocabularyError: a pair has a token outside the shared vocabulary.
    """
    vocab_size = shared_vocabulary(teacher_vocab_size, student_vocab_size)
    if not 0 <= k <= vocab_size:
        raise ValueError(f"k={k} is outside [0, {vocab_size}], the vocabulary of teacher and student")
    check_pair_ids(data.pairs, vocab_size)
    alone = [pair.index for pair in data.pairs if not len(pair.rejected_ids)]
    if 0 < len(alone) < len(data.pairs):
        raise ValueError(f"pair {alone[0]} has no rejected answer, and others have one: give all pairs one, or none")
    return {
        "k": k,
        "temperature": 1.0,
        "vocab_size": vocab_size,
        "teacher_vocab_size": teacher_vocab_size,
        "max_length": data.max_length,
        "shard_tokens": shard_tokens,
        "pairs": len(data.pairs),
        "source_sha256": data.source_sha256,
        "tokens_sha256": tokens_sha256(data.pairs),
        "tokenizer_sha256": hashlib.sha256(vocabulary_file(vocabulary(tokenizer))).hexdigest(),
        **({"sides": ["chosen"]} if alone else {}),
        **({"today": data.today} if data.today else {}),
    }


def write_teacher(
    tokenizer: Any,
    data: TokenizedPairs,
    out: Path,
    settings: dict[str, Any],
    model: str,
    score: Score,
    *,
    progress: bool,
) -> Manifest:
    """Score all pairs with `score` and write them to the directory `out` as a teacher cache."""
    info = {"model": model, "truncated_answers": data.truncated, "skipped_pairs": data.skipped}
    info |= {"refused_records": len(data.refused), "notes": dict(data.notes)}
    files = {VOCABULARY: vocabulary_file(vocabulary(tokenizer))}
    with writing(out, "teacher", settings, info, files) as writer:
        write_shards(data.pairs, writer, TEACHER_ROWS, score, shard_tokens=settings["shard_tokens"], progress=progress)
    return writer.manifest
