"""Captures in which a frozen model of this process scores the pairs, as the teacher or as the reference."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..cache.errors import CacheReferenceError
from ..cache.fingerprints import model_fingerprint
from ..cache.fold import entries_to_request, fold
from ..cache.format import Targets, check_pair_ids
from ..cache.pairs import IGNORE_INDEX, Pair, pad_pairs, tokens_sha256
from ..cache.reader import read_tokens
from ..cache.shard_run import REFERENCE_ROWS, Score, write_shards
from ..cache.shards import REFERENCE, Manifest, read_complete, writing
from ..cache.vocabulary import check_vocabulary
from ..models.forward import hidden_states
from ..models.lm_head import check_lm_head, lm_head, unwrap
from ..ops.head import Head
from ..ops.selected_logps import linear_selected_logps
from ..ops.topk_logps import linear_topk_logps
from .pairs import TokenizedPairs
from .teacher import teacher_settings, write_teacher

# Takes hidden states [2B, S, H] and labels [2B, S], gives values [2B, S, ...] by the names in ANSWER_COLUMNS.
ScoreTokens = Callable[[Tensor, Tensor], dict[str, Tensor]]


def capture_teacher(
    model: nn.Module,
    tokenizer: Any,
    data: TokenizedPairs,
    out: str | Path,
    *,
    k: int = 64,
    student_vocab_size: int | None = None,
    batch_tokens: int = 4096,
    shard_tokens: int = 65536,
    progress: bool = False,
) -> Manifest:
    """Let the teacher score the pairs once, and write its targets to the directory `out`.

    The targets of each answer token are the log-probabilities of the label and of the mass outside the top k
    (float32), and the k most probable ids with their log-probabilities (float16), in nats. They are those of the
    softmax over the whole vocabulary at temperature 1.

    After any interruption, the same call continues after the last finished shard. Processes started by `torchrun` or
    `accelerate launch` divide the shards among themselves; all of them must see the directory `out`. A batch never
    crosses the border of a shard, so the result does not depend on interruptions or on the number of processes.

    Args:
        model: the teacher, a causal LM of transformers, on its device. It computes in its dtype.
        tokenizer: the one that made `data`. Its vocabulary is stored for the comparison with the student's.
        data: from `tokenize_pairs`.
        k: top-k size, at most the vocabulary size.
        student_vocab_size: vocabulary size of the student's LM head if it is smaller than the teacher's. Larger ids
            are not stored, and the teacher's mass on them is part of the tail. A pair that has such a token is
            refused.
        batch_tokens: padded tokens per forward pass, but at least one pair. It changes speed and memory only, and may
            be changed when a capture is resumed.
        shard_tokens: approximate number of answer tokens per shard, which is the most that a kill can lose.
        progress: show a progress bar in tokens.

    Returns:
        The finished manifest.

    Raises:
        CacheSettingsError: `out` holds a capture with other settings; the message names them.
        CacheVocabularyError: a pair has ids outside the vocabulary.
        TypeError, ValueError: the model's head is not supported.
        ValueError: the model gives NaN, a pair has more tokens than the model positions, or an argument is out of
            range.
    """
    causal, head = prepare(model)
    _check_lengths(causal, data.pairs)
    settings = teacher_settings(tokenizer, data, k, len(head.weight), student_vocab_size, shard_tokens) | {
        "dtype": str(head.weight.dtype).removeprefix("torch."),
        "model_sha256": model_fingerprint(causal),
    }
    score = teacher_score(causal, head, k, settings["vocab_size"], batch_tokens)
    return write_teacher(tokenizer, data, Path(out), settings, _name(causal), score, progress=progress)


def teacher_score(model: Any, head: Head, k: int, vocab_size: int, batch_tokens: int) -> Score:
    """A function that scores the pairs of a shard: the k most probable ids below `vocab_size`, of a prepared model."""
    entries = entries_to_request(k, {"teacher_vocab_size": len(head.weight), "vocab_size": vocab_size})

    def score_tokens(hidden: Tensor, labels: Tensor) -> dict[str, Tensor]:
        out = linear_topk_logps(hidden, head, entries, labels=labels)
        assert out.label is not None
        return {
            "label_logps": out.label.float(),
            "topk_ids": out.ids.int(),
            "topk_logps": out.logps.float(),
            "topk_tail": out.tail.float(),
        }

    score_shard = _model_score(model, head, score_tokens, batch_tokens)

    def score_and_fold(number: int, shard: Sequence[Pair]) -> Iterator[tuple[Pair, Targets, Targets]]:
        for pair, *sides in score_shard(number, shard):
            chosen, rejected = (fold(f"pair {pair.index}", targets, k, vocab_size) for targets in sides)
            yield pair, chosen, rejected

    return score_and_fold if vocab_size < len(head.weight) else score_shard


def capture_reference(
    model: nn.Module,
    tokenizer: Any,
    cache: str | Path,
    out: str | Path | None = None,
    *,
    batch_tokens: int = 4096,
    shard_tokens: int = 65536,
    progress: bool = False,
) -> Manifest:
    """Let a reference model score the pairs of a finished teacher cache, and write the sums over each answer.

    The teacher's files are not changed. An interrupted capture resumes as that of `capture_teacher` does.

    Args:
        model: the reference, a causal LM of transformers, on its device. It computes in its dtype.
        tokenizer: the reference's, compared with the vocabulary of the cache.
        cache: directory of the teacher cache.
        out: directory for the sums; None is `cache/reference`.
        batch_tokens, shard_tokens, progress: as in `capture_teacher`.

    Returns:
        The finished manifest of the reference.

    Raises:
        CacheTokenizerError: the tokenizer gives some ids of the cache another meaning.
        CacheVocabularyError: the cache has ids outside the model's vocabulary.
        CacheReferenceError: the tokens in the cache have changed since it was captured, or its pairs have no rejected
            answers.
        CacheSettingsError: the directory holds the log-probabilities of another reference.
        CacheError: other subclasses, if the cache is not finished or damaged.
        TypeError, ValueError: as `capture_teacher`.
    """
    # Read the pairs, and check that they are those of the cache and fit the model.
    cache = Path(cache)
    manifest = read_complete(cache, "teacher", verify=False)
    if "rejected" not in manifest.sides:
        raise CacheReferenceError(f"{cache} has no rejected answers, which alone need a reference: train without one")
    check_vocabulary(cache, manifest, tokenizer)
    causal, head = prepare(model)
    pairs = read_tokens(cache, manifest)
    check_pair_ids(pairs, len(head.weight))
    _check_lengths(causal, pairs)
    fingerprint = tokens_sha256(pairs)
    if fingerprint != manifest.settings["tokens_sha256"]:
        raise CacheReferenceError(f"the tokens in {cache} have changed since the capture (SHA-256 {fingerprint})")

    # Score them.
    settings = {
        "dtype": str(head.weight.dtype).removeprefix("torch."),
        "shard_tokens": shard_tokens,
        "pairs": len(pairs),
        "tokens_sha256": fingerprint,
        "model_sha256": model_fingerprint(causal),
    }

    def score_tokens(hidden: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"label_logps": linear_selected_logps(hidden, head, labels).label}

    directory = cache / REFERENCE if out is None else Path(out)
    score = _model_score(causal, head, score_tokens, batch_tokens)
    with writing(directory, "reference", settings, {"model": _name(causal)}) as writer:
        write_shards(pairs, writer, REFERENCE_ROWS, score, shard_tokens=shard_tokens, progress=progress)
    return writer.manifest


def batches(pairs: Sequence[Pair], batch_tokens: int) -> Iterator[Sequence[Pair]]:
    """Batches of consecutive pairs with at most `batch_tokens` padded tokens each, but at least one pair.

    Args:
        pairs: sorted by falling length.
    """
    start = 0
    while start < len(pairs):
        size = max(1, batch_tokens // (2 * pairs[start].length))
        yield pairs[start : start + size]
        start += size


def _model_score(model: Any, head: Head, score_tokens: ScoreTokens, batch_tokens: int) -> Score:
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens must be at least 1, got {batch_tokens}")

    def score(number: int, shard: Sequence[Pair]) -> Iterator[tuple[Pair, Targets, Targets]]:
        for batch in batches(shard, batch_tokens):
            with torch.inference_mode(), _evaluating(model):
                scored = list(_score_batch(model, head, batch, score_tokens))
            yield from scored

    return score


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _score_batch(
    model: Any, head: Head, pairs: Sequence[Pair], score_tokens: ScoreTokens
) -> Iterator[tuple[Pair, Targets, Targets]]:
    """Each pair with the targets of its chosen and of its rejected answer."""
    batch = pad_pairs(pairs, pad_token_id=0)
    if not any(len(pair.rejected_ids) for pair in pairs):  # the prompts alone need no pass
        batch = batch[0][: len(pairs)], batch[1][: len(pairs)], batch[2][: len(pairs)]
    input_ids, attention_mask, labels = batch
    device = model.get_input_embeddings().weight.device
    hidden = hidden_states(model, input_ids.to(device), attention_mask.to(device))
    # The primitives skip the positions without a label, so only their small outputs are compacted here.
    values = score_tokens(hidden.to(head.weight.device), labels.to(head.weight.device))
    valid = labels != IGNORE_INDEX
    arrays = {name: tensor.cpu()[valid].numpy() for name, tensor in values.items()}
    if not np.isfinite(arrays["label_logps"]).all():
        raise ValueError(
            f"{type(model).__name__} gives NaN or infinite log-probabilities for answers of the pairs "
            f"{[pair.index for pair in pairs]}: run it in another dtype (float16 overflows where bfloat16 does not)"
        )
    ends = valid.sum(1).cumsum(0).tolist()
    answers = [
        {name: array[start:end] for name, array in arrays.items()}
        for start, end in zip([0, *ends], ends, strict=False)
    ]
    answers += [{name: array[:0] for name, array in arrays.items()}] * (2 * len(pairs) - len(answers))
    return zip(pairs, answers[: len(pairs)], answers[len(pairs) :], strict=True)


def prepare(model: nn.Module) -> tuple[Any, Head]:
    """The causal LM inside its wrappers, and its head, which is checked."""
    check_lm_head(model)
    return unwrap(model), lm_head(model)


def _check_lengths(model: Any, pairs: Sequence[Pair]) -> None:
    """A model with learned positions fails beyond the last, and one with RoPE says nothing there that it was made to
    say."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    longest = max(pairs, key=lambda pair: pair.length)
    if longest.length > positions:
        raise ValueError(
            f"pair {longest.index} has {longest.length} tokens, and {type(model).__name__} has {positions} positions: "
            f"tokenize with max_length={positions} (--max-length)"
        )


def _name(model: Any) -> str:
    """The model's name on the hub, or of its directory without the path, because caches are shared with others."""
    name = model.config._name_or_path
    return Path(name).name if Path(name).is_dir() else name
