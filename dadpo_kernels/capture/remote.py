"""Captures in which an inference engine runs the teacher: vLLM in this process, or a server over HTTP."""

import hashlib
import json
import secrets
import threading
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from ..cache.fold import entries_to_request, fold
from ..cache.format import Targets, empty_targets
from ..cache.pairs import Pair
from ..cache.shards import Manifest
from .pairs import TokenizedPairs
from .probe import COMPANY, probe
from .prompt_logprobs import answer_targets
from .scored_sequences import ScoredSequences
from .server import CompletionsServer, check_concurrency
from .teacher import teacher_settings, write_teacher


def capture_from_server(
    server: CompletionsServer,
    tokenizer: Any,
    data: TokenizedPairs,
    out: str | Path,
    *,
    k: int = 64,
    vocab_size: int,
    student_vocab_size: int | None = None,
    concurrency: int = 32,
    shard_tokens: int = 65536,
    progress: bool = False,
) -> Manifest:
    """Let a running server score the pairs, and write the teacher's targets to the directory `out`.

    The cache is the same as that of `capture_teacher` except for the tail, which servers do not return: see
    `answer_targets`. Each scored sequence is stored immediately, so that the same call, after an interruption, sends
    only those that are missing. Each call sends one of them twice before it trusts the server: see `probe`.

    Args:
        server: a `CompletionsServer` or a `SGLangServer` that serves the teacher.
        tokenizer: the teacher's, which also made `data`. The server receives token ids, never text.
        data: from `tokenize_pairs`.
        k: top-k size. vLLM's limit is 20 unless it is started with `--max-logprobs`.
        vocab_size: vocabulary size in the teacher's configuration.
        student_vocab_size: as in `capture_teacher`. With a smaller student vocabulary, up to k + 16 log-probabilities
            per position are requested.
        concurrency: number of simultaneous requests.
        out, shard_tokens, progress: as in `capture_teacher`.

    Returns:
        The finished manifest.

    Raises:
        ServerError, ResponseError: a request fails after all retries, or the server answers differently when it is
            asked again; the sequences scored so far stay stored.
        CacheSettingsError: `out` holds a capture with other settings; the message names them.
        ValueError: `concurrency` or `k` is out of range.
    """
    check_concurrency("concurrency", concurrency)
    settings = teacher_settings(tokenizer, data, k, vocab_size, student_vocab_size, shard_tokens)
    settings |= {"served_model": server.model}
    run = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
    directory = Path(out)

    # The scored sequences of a shard are deleted when the next one is scored, because it has been written by then.
    obsolete: list[Path] = []
    trusted = False

    def score(number: int, shard: Sequence[Pair]) -> Iterator[tuple[Pair, Targets, Targets]]:
        nonlocal trusted
        while obsolete:
            obsolete.pop().unlink()
        path = directory / f".answers-{run}-{number:05d}"
        obsolete.append(path)
        with closing(ScoredSequences(path, settings)) as scored, ThreadPoolExecutor(concurrency) as executor:
            trusted |= yield from _score_shard(executor, server, shard, scored, settings, trusted=trusted)

    manifest = write_teacher(tokenizer, data, directory, settings, server.model, score, progress=progress)
    for path in directory.glob(".answers-*"):  # also those of a shard that was written just before a kill
        path.unlink(missing_ok=True)
    return manifest


def _score_shard(
    executor: ThreadPoolExecutor,
    server: CompletionsServer,
    shard: Sequence[Pair],
    scored: ScoredSequences,
    settings: dict[str, Any],
    *,
    trusted: bool,
) -> Generator[tuple[Pair, Targets, Targets], None, bool]:
    """Pairs with their targets, in the order in which their second side gets scored. Returns whether the server was
    asked for any, which it is only after a probe if it is not `trusted`.

    Sequence 2i is pair i with its chosen answer, and sequence 2i + 1 with its rejected answer.
    """
    k, vocab_size, teacher_size = settings["k"], settings["vocab_size"], settings["teacher_vocab_size"]
    entries = entries_to_request(k, settings)
    sequences = _sequences(shard)
    stopped = threading.Event()

    def request(i: int) -> Targets:
        ids, start = sequences[i]

        def parse(prompt_logprobs: Any) -> Targets:
            return answer_targets(prompt_logprobs, ids, start, entries, teacher_size)

        parsed = server.score(ids, start, entries, parse, stopped)
        return fold(f"pair {shard[i // 2].index}", parsed, k, vocab_size) if vocab_size < teacher_size else parsed

    # Read what is stored, and give the pairs of which both sides are.
    targets = {i: empty_targets(k) for i in range(2 * len(shard)) if i not in sequences}
    for i, (ids, start) in sequences.items():
        if (stored := scored.read(i, ids, start)) is not None:
            targets[i] = stored
    for i, pair in enumerate(shard):
        if 2 * i in targets and 2 * i + 1 in targets:
            yield pair, targets[2 * i], targets[2 * i + 1]
    missing = [i for i in sequences if i not in targets]

    requests: dict[Future[Targets], int] = {}

    def results() -> Iterator[tuple[int, Targets]]:
        if missing and not trusted:
            candidates = missing if len(missing) > COMPANY else sequences
            longest = sorted(candidates, key=lambda i: len(sequences[i][0]))[-1 - COMPANY :]
            yield from probe(request, executor, longest, server.no_prefix_cache).items()
        requests.update((executor.submit(request, i), i) for i in missing if i not in targets)
        for future in as_completed(requests):
            yield requests[future], future.result()

    # Request the others, and store each sequence before its pair is given.
    try:
        for i, result in results():
            if i in targets:  # it was stored, and the probe needed company
                continue
            targets[i] = result
            scored.write(i, *sequences[i], result)
            if i ^ 1 in targets:
                yield shard[i // 2], targets[i & ~1], targets[i | 1]
    finally:
        # After an error, wait for the requests that have been sent, and store what they return.
        stopped.set()
        executor.shutdown(cancel_futures=True)
        for future, i in requests.items():
            if i not in targets and not future.cancelled() and future.exception() is None:
                scored.write(i, *sequences[i], future.result())
    return bool(missing)


def capture_from_vllm(
    llm: Any,
    tokenizer: Any,
    data: TokenizedPairs,
    out: str | Path,
    *,
    k: int = 64,
    vocab_size: int,
    model: str,
    flat_logprobs: bool = True,
    shard_tokens: int = 65536,
    progress: bool = False,
) -> Manifest:
    """Let vLLM in this process score the pairs. An interrupted capture resumes after the last finished shard.

    Args:
        llm: `vllm.LLM(model, max_logprobs=k, ...)`.
        vocab_size: vocabulary size in the teacher's configuration.
        model: the teacher's name; a resumed capture must give the same one.
        flat_logprobs: request vLLM's compact form; False for versions that do not have it.
        tokenizer, data, out, k, shard_tokens, progress: as in `capture_from_server`.

    Returns:
        The finished manifest.

    Raises:
        ResponseError, CacheSettingsError, ValueError: as `capture_from_server`.
    """
    from vllm import SamplingParams

    options = {"flat_logprobs": True} if flat_logprobs else {}
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=k, detokenize=False, **options)

    def score(number: int, shard: Sequence[Pair]) -> Iterator[tuple[Pair, Targets, Targets]]:
        sequences = _sequences(shard)
        # With a salt, no prompt reads what another one left in the prefix cache: see `probe`.
        prompts = [{"prompt_token_ids": ids, "cache_salt": secrets.token_hex(16)} for ids, _ in sequences.values()]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        targets = {
            i: answer_targets(output.prompt_logprobs, ids, start, k, vocab_size)
            for output, (i, (ids, start)) in zip(outputs, sequences.items(), strict=True)
        }
        for i, pair in enumerate(shard):
            yield pair, targets[2 * i], targets.get(2 * i + 1) or empty_targets(k)

    settings = teacher_settings(tokenizer, data, k, vocab_size, None, shard_tokens) | {"served_model": model}
    return write_teacher(tokenizer, data, Path(out), settings, model, score, progress=progress)


def _sequences(shard: Sequence[Pair]) -> dict[int, tuple[list[int], int]]:
    """`(ids, start)` of both sides of each pair in turn, by number: the ids of prompt and answer, and where the answer
    starts. An answer without tokens has none."""
    return {
        2 * i + side: (np.concatenate((pair.prompt_ids, answer_ids)).tolist(), len(pair.prompt_ids))
        for i, pair in enumerate(shard)
        for side, answer_ids in enumerate((pair.chosen_ids, pair.rejected_ids))
        if len(answer_ids)
    }
