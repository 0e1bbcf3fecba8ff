"""The pass of a frozen model over preference pairs: the teacher's targets, or a reference's log-probabilities."""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..lm_head import LMHead, check_lm_head, hidden_states, lm_head, unwrap
from ..selected_logps import linear_selected_logps
from ..topk_logps import linear_topk_logps
from .errors import CacheReferenceError
from .fingerprints import model_fingerprint
from .pairs import IGNORE_INDEX, Pair, TokenizedPairs, pad_pairs
from .rows import (
    REFERENCE_SCHEMA,
    TEACHER_SCHEMA,
    TOKEN_COLUMNS,
    check_ids,
    read_pair,
    reference_row,
    teacher_row,
)
from .shards import REFERENCE, Manifest, RowReader, ShardWriter, read_complete, writing
from .vocabulary import VOCABULARY, check_vocabulary, vocabulary, vocabulary_file

Score = Callable[[Tensor, Tensor], dict[str, np.ndarray]]  # hidden [N, H], labels [N] -> arrays [N, ...]


def capture_teacher(
    model: nn.Module,
    tokenizer: Any,
    data: TokenizedPairs,
    out: str | Path,
    *,
    k: int = 64,
    batch_tokens: int = 4096,
    shard_tokens: int = 65536,
    progress: bool = False,
) -> Manifest:
    """Run the teacher over the pairs once and write its targets to the directory `out`.

    At every answer token: the log-probability of the realised token and of the mass outside the top-k (float32), and
    the k most probable ids with their log-probabilities (float16), under the softmax over the whole vocabulary at
    temperature 1. Interrupted in any way, the same call goes on after the last finished shard. Batches are made
    within shards, so the result does not depend on where a run was interrupted.

    Args:
        model: the teacher, a causal LM of transformers, on its device. Its dtype is the precision of the pass.
        tokenizer: the one that made `data`; its vocabulary is stored, to be compared with the student's.
        data: from `tokenize_pairs`.
        k: top-k size, at most the vocabulary's.
        batch_tokens: padded tokens a forward pass, at least one pair. Changes speed and memory, and may be changed
            when resuming.
        shard_tokens: answer tokens a shard, about: what a kill costs at most.
        progress: show a progress bar in tokens.

    Returns:
        The finished manifest.

    Raises:
        CacheSettingsError: `out` holds a capture with other settings; the message names them.
        ValueError: the model's head is not supported, the model gives NaN, or an argument is out of range.
    """
    causal, head = _prepare(model)
    vocab_size = len(head.weight)
    _check_pairs(data.pairs, vocab_size)
    tokens = vocabulary_file(vocabulary(tokenizer))
    settings = {
        "k": k,
        "temperature": 1.0,
        "vocab_size": vocab_size,
        "dtype": str(head.weight.dtype).removeprefix("torch."),
        "max_length": data.max_length,
        "shard_tokens": shard_tokens,
        "pairs": len(data.pairs),
        "source_sha256": data.source_sha256,
        "tokens_sha256": tokens_sha256(data.pairs),
        "tokenizer_sha256": hashlib.sha256(tokens).hexdigest(),
        "model_sha256": model_fingerprint(causal),
    }
    info = {"model": _name(causal), "truncated_answers": data.truncated, "skipped_pairs": data.skipped}

    def score(hidden: Tensor, labels: Tensor) -> dict[str, np.ndarray]:
        out = linear_topk_logps(hidden, head.weight, k, labels=labels, **_options(head))
        assert out.label is not None
        columns = {
            "label_logps": out.label.float(),
            "topk_ids": out.ids.int(),
            "topk_logps": out.logps.half(),
            "topk_tail": out.tail.float(),
        }
        return {name: values.cpu().numpy() for name, values in columns.items()}

    with writing(Path(out), "teacher", settings, info) as writer:
        writer.write_file(VOCABULARY, tokens)
        _run(
            causal, head, data.pairs, writer, score, teacher_row, TEACHER_SCHEMA, batch_tokens, shard_tokens, progress
        )
        return writer.manifest


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

    def score(hidden: Tensor, labels: Tensor) -> dict[str, np.ndarray]:
        return {
            "label_logps": linear_selected_logps(hidden, head.weight, labels, **_options(head)).label.cpu().numpy()
        }

    directory = cache / REFERENCE if out is None else Path(out)
    with writing(directory, "reference", settings, {"model": _name(causal)}) as writer:
        _run(causal, head, pairs, writer, score, reference_row, REFERENCE_SCHEMA, batch_tokens, shard_tokens, progress)
        return writer.manifest


def read_tokens(cache: Path, manifest: Manifest) -> list[Pair]:
    """The token ids of all pairs of a teacher cache, in the order of their source."""
    reader = RowReader(cache, TEACHER_SCHEMA)
    rows = (row for shard in manifest.shards for row in reader.read_columns(shard, TOKEN_COLUMNS))
    return sorted((read_pair(row) for row in rows), key=lambda pair: pair.index)


def tokens_sha256(pairs: Sequence[Pair]) -> str:
    """SHA-256 over indices and token ids, in the order of the source."""
    digest = hashlib.sha256()
    for pair in pairs:
        lengths = [pair.index, *map(len, pair.ids)]
        for numbers in (lengths, *pair.ids):
            digest.update(np.asarray(numbers, dtype="<i8").tobytes())
    return digest.hexdigest()


def plan_shards(pairs: Sequence[Pair], shard_tokens: int) -> list[list[Pair]]:
    """Pairs by falling length, so that a batch is padded little and one that does not fit fails at once; cut into
    shards of `shard_tokens` answer tokens or slightly more. Depends on nothing but its arguments."""
    shards: list[list[Pair]] = []
    room = 0
    for pair in sorted(pairs, key=lambda pair: (-pair.length, pair.index)):
        if room <= 0:
            shards.append([])
            room = shard_tokens
        shards[-1].append(pair)
        room -= pair.answer_tokens
    return shards


def batches(pairs: Sequence[Pair], batch_tokens: int) -> Iterator[Sequence[Pair]]:
    """Consecutive pairs, longest first, with at most `batch_tokens` padded tokens a batch but at least one pair."""
    start = 0
    while start < len(pairs):
        size = max(1, batch_tokens // (2 * pairs[start].length))
        yield pairs[start : start + size]
        start += size


@torch.inference_mode()
def _run(
    model: Any,
    head: LMHead,
    pairs: Sequence[Pair],
    writer: ShardWriter,
    score: Score,
    make_row: Callable[..., dict[str, Any]],
    schema: pa.Schema,
    batch_tokens: int,
    shard_tokens: int,
    progress: bool,
) -> None:
    for name, value in (("batch_tokens", batch_tokens), ("shard_tokens", shard_tokens)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    done = writer.manifest.index()
    total = sum(pair.answer_tokens for pair in pairs)
    initial = sum(shard.tokens for shard in writer.manifest.shards)
    bar = tqdm(
        total=total, initial=initial, unit="tok", unit_scale=True, desc=writer.manifest.kind, disable=not progress
    )
    with bar, _evaluating(model):
        for number, shard in enumerate(plan_shards(pairs, shard_tokens)):
            if shard[0].index in done:  # a shard is written whole, so its first pair stands for it
                continue
            rows, max_id = [], 0
            for batch in batches(shard, batch_tokens):
                for pair, chosen, rejected in _score_batch(model, head, batch, score):
                    rows.append(make_row(pair, chosen, rejected))
                    topk_ids = [answer["topk_ids"] for answer in (chosen, rejected) if "topk_ids" in answer]
                    max_id = max(max_id, *(int(ids.max(initial=0)) for ids in (*pair.ids, *topk_ids)))
                bar.update(sum(pair.answer_tokens for pair in batch))
            tokens = sum(pair.answer_tokens for pair in shard)
            writer.write_shard(number, pa.Table.from_pylist(rows, schema), tokens=tokens, max_id=max_id)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _score_batch(
    model: Any, head: LMHead, pairs: Sequence[Pair], score: Score
) -> Iterator[tuple[Pair, dict[str, np.ndarray], dict[str, np.ndarray]]]:
    """Each pair with the arrays of its chosen and of its rejected answer."""
    input_ids, attention_mask, labels = pad_pairs(pairs, pad_token_id=0)
    device = model.get_input_embeddings().weight.device
    hidden = hidden_states(model, input_ids.to(device), attention_mask.to(device))
    valid = labels != IGNORE_INDEX
    hidden = hidden[valid.to(hidden.device)].to(head.weight.device)
    arrays = score(hidden, labels[valid].to(head.weight.device))
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


def _prepare(model: nn.Module) -> tuple[Any, LMHead]:
    check_lm_head(model)
    return unwrap(model), lm_head(model)


def _options(head: LMHead) -> dict[str, Any]:
    return {"bias": head.bias, "logit_scale": head.logit_scale, "softcap": head.softcap}


def _check_pairs(pairs: Sequence[Pair], vocab_size: int) -> None:
    for pair in pairs:
        for ids in pair.ids:
            check_ids(f"pair {pair.index}", ids, vocab_size)


def _name(model: Any) -> str:
    """The hub's name or the directory's own, without the path to it: caches are shared."""
    name = model.config._name_or_path
    return Path(name).name if Path(name).is_dir() else name
