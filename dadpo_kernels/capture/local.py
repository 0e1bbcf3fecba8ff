"""The pass of a frozen model over preference pairs: the teacher's targets, or a reference's log-probabilities."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..cache.errors import CacheReferenceError
from ..cache.fingerprints import model_fingerprint
from ..cache.fold import asked_for, fold
from ..cache.format import Targets, check_ids
from ..cache.pairs import IGNORE_INDEX, Pair, pad_pairs, tokens_sha256
from ..cache.reader import read_tokens
from ..cache.shard_run import REFERENCE_ROWS, Score, run_pass
from ..cache.shards import REFERENCE, Manifest, read_complete, writing
from ..cache.vocabulary import check_vocabulary
from ..models.lm_head import check_lm_head, hidden_states, lm_head, unwrap
from ..ops.head import Head
from ..ops.selected_logps import linear_selected_logps
from ..ops.topk_logps import linear_topk_logps
from .pairs import TokenizedPairs
from .teacher import teacher_settings, write_teacher

AnswerScore = Callable[[Tensor, Tensor], Targets]  # hidden [N, H], labels [N] -> arrays [N, ...]


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
    """Run the teacher over the pairs once and write its targets to the directory `out`.

    At every answer token: the log-probability of the realised token and of the mass outside the top-k (float32), and
    the k most probable ids with their log-probabilities (float16), under the softmax over the whole vocabulary at
    temperature 1. Interrupted in any way, the same call goes on after the last finished shard. Processes started by
    `torchrun` or `accelerate launch` share the shards; `out` must be a directory that all of them see. Batches are
    made within shards, so the result does not depend on where a run was interrupted, or on the number of processes.

    Args:
        model: the teacher, a causal LM of transformers, on its device. Its dtype is the precision of the pass.
        tokenizer: the one that made `data`; its vocabulary is stored, to be compared with the student's.
        data: from `tokenize_pairs`.
        k: top-k size, at most the vocabulary's.
        student_vocab_size: rows of the student's head if they are fewer than the teacher's: no other ids are stored,
            and the teacher's mass on them is part of the tail. A pair that has such a token is refused.
        batch_tokens: padded tokens a forward pass, at least one pair. Changes speed and memory, and may be changed
            when resuming.
        shard_tokens: answer tokens a shard, about: what a kill costs at most.
        progress: show a progress bar in tokens.

    Returns:
        The finished manifest.

    Raises:
        CacheSettingsError: `out` holds a capture with other settings; the message names them.
        CacheVocabularyError: a pair has ids that the vocabulary has not.
        ValueError: the model's head is not supported, the model gives NaN, or an argument is out of range.
    """
    causal, head = _prepare(model)
    settings = teacher_settings(tokenizer, data, k, len(head.weight), student_vocab_size, shard_tokens) | {
        "dtype": str(head.weight.dtype).removeprefix("torch."),
        "model_sha256": model_fingerprint(causal),
    }

    asked, folds = asked_for(k, settings), settings["vocab_size"] < len(head.weight)

    def answer(hidden: Tensor, labels: Tensor) -> Targets:
        out = linear_topk_logps(hidden, head, asked, labels=labels)
        assert out.label is not None
        columns = {
            "label_logps": out.label.float(),
            "topk_ids": out.ids.int(),
            "topk_logps": out.logps.float(),
            "topk_tail": out.tail.float(),
        }
        targets = {name: values.cpu().numpy() for name, values in columns.items()}
        return fold("the teacher", targets, k, settings["vocab_size"]) if folds else targets

    score = _model_score(causal, head, answer, batch_tokens)
    return write_teacher(tokenizer, data, Path(out), settings, _name(causal), score, progress=progress)


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
    """Score the pairs of a finished teacher cache with a reference model; the sums go to `cache/reference`, or `out`.

    Nothing of the teacher's is touched. Resumes as `capture_teacher` does.

    Raises:
        CacheTokenizerError, CacheVocabularyError: the cache's ids mean other tokens to this model, or none.
        CacheSettingsError: the directory holds the log-probabilities of another reference.
    """
    cache = Path(cache)
    targets = read_complete(cache, "teacher", verify=False)
    check_vocabulary(cache, targets, tokenizer)
    causal, head = _prepare(model)
    pairs = read_tokens(cache, targets)
    _check_pairs(pairs, len(head.weight))
    if (found := tokens_sha256(pairs)) != targets.settings["tokens_sha256"]:
        raise CacheReferenceError(f"the tokens in {cache} are not those it was captured with (SHA-256 {found})")
    settings = {
        "dtype": str(head.weight.dtype).removeprefix("torch."),
        "shard_tokens": shard_tokens,
        "pairs": len(pairs),
        "tokens_sha256": found,
        "model_sha256": model_fingerprint(causal),
    }

    def answer(hidden: Tensor, labels: Tensor) -> Targets:
        selected = linear_selected_logps(hidden, head, labels)
        return {"label_logps": selected.label.cpu().numpy()}

    directory = cache / REFERENCE if out is None else Path(out)
    score = _model_score(causal, head, answer, batch_tokens)
    with writing(directory, "reference", settings, {"model": _name(causal)}) as writer:
        run_pass(pairs, writer, REFERENCE_ROWS, score, shard_tokens=shard_tokens, progress=progress)
    return writer.manifest


def batches(pairs: Sequence[Pair], batch_tokens: int) -> Iterator[Sequence[Pair]]:
    """Consecutive pairs, longest first, with at most `batch_tokens` padded tokens a batch but at least one pair."""
    start = 0
    while start < len(pairs):
        size = max(1, batch_tokens // (2 * pairs[start].length))
        yield pairs[start : start + size]
        start += size


def _model_score(model: Any, head: Head, answer: AnswerScore, batch_tokens: int) -> Score:
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens must be at least 1, got {batch_tokens}")

    def score(number: int, shard: Sequence[Pair]) -> Iterator[tuple[Pair, Targets, Targets]]:
        for batch in batches(shard, batch_tokens):
            with torch.inference_mode(), _evaluating(model):
                scored = list(_score_batch(model, head, batch, answer))
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
    model: Any, head: Head, pairs: Sequence[Pair], answer: AnswerScore
) -> Iterator[tuple[Pair, Targets, Targets]]:
    """Each pair with the arrays of its chosen and of its rejected answer."""
    input_ids, attention_mask, labels = pad_pairs(pairs, pad_token_id=0)
    device = model.get_input_embeddings().weight.device
    hidden = hidden_states(model, input_ids.to(device), attention_mask.to(device))
    valid = labels != IGNORE_INDEX
    hidden = hidden[valid.to(hidden.device)].to(head.weight.device)
    arrays = answer(hidden, labels[valid].to(head.weight.device))
    if not np.isfinite(arrays["label_logps"]).all():
        raise ValueError(
            f"{type(model).__name__} gives NaN or infinite log-probabilities for answers of the pairs "
            f"{[pair.index for pair in pairs]}: run it in another dtype (float16 overflows where bfloat16 does not)"
        )
    ends = valid.sum(1).cumsum(0).tolist()
    rows = [
        {name: values[start:end] for name, values in arrays.items()}
        for start, end in zip([0, *ends], ends, strict=False)
    ]
    return zip(pairs, rows[: len(pairs)], rows[len(pairs) :], strict=True)


def _prepare(model: nn.Module) -> tuple[Any, Head]:
    check_lm_head(model)
    return unwrap(model), lm_head(model)


def _check_pairs(pairs: Sequence[Pair], vocab_size: int) -> None:
    for pair in pairs:
        for ids in pair.ids:
            check_ids(f"pair {pair.index}", ids, vocab_size)


def _name(model: Any) -> str:
    """The hub's name or the directory's own, without the path to it: caches are shared."""
    name = model.config._name_or_path
    return Path(name).name if Path(name).is_dir() else name
