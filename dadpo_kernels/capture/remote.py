"""Captures in which an inference engine runs the teacher: vLLM in this process, or a server over HTTP."""

import hashlib
import json
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from ..cache.fold import asked_for, fold
from ..cache.format import Targets
from ..cache.pairs import Pair
from ..cache.shards import Manifest
from .pairs import TokenizedPairs
from .prompt_logprobs import answer_targets
from .scored import Answers
from .server import CompletionsServer
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

    The cache is that of `capture_teacher`, but for the tail, which no server gives: see `answer_targets`. Each answer
    is kept as it comes, so that an interrupted run, resumed with the same call, sends no token twice.

    Args:
        server: serves the teacher; a `CompletionsServer` or a `SGLangServer`.
        tokenizer: the teacher's, the one that made `data`. Token ids are sent, never text.
        k: top-k size; vLLM's limit is 20 unless it is started with `--max-logprobs`.
        vocab_size: of the teacher's configuration.
        concurrency: requests under way at a time.
        data, out, student_vocab_size, shard_tokens, progress: as `capture_teacher` takes them; with a smaller student
            vocabulary up to k + 16 log-probabilities a position are asked for.

    Raises:
        ServerError, AnswerError: the server fails for longer than its retries last; what came before is kept.
        CacheSettingsError: `out` holds a capture with other settings; the message names them.
    """
    if concurrency < 1:
        raise ValueError(f"concurrency must be at least 1, got {concurrency}")
    settings = teacher_settings(tokenizer, data, k, vocab_size, student_vocab_size, shard_tokens)
    settings |= {"served_model": server.model}
    run = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
    directory = Path(out)
    started: list[Path] = []  # files of answers whose shard is written when the next one is asked for

    def score(number: int, shard: Sequence[Pair]) -> Iterator[tuple[Pair, Targets, Targets]]:
        while started:
            started.pop().unlink()
        path = directory / f".answers-{run}-{number:05d}.sqlite"
        started.append(path)
        with closing(Answers(path)) as answers, ThreadPoolExecutor(concurrency) as executor:
            yield from _ask(executor, server, shard, answers, settings)

    manifest = write_teacher(tokenizer, data, directory, settings, server.model, score, progress=progress)
    for path in directory.glob(".answers-*"):  # a kill may have left those of a shard that was just written
        path.unlink(missing_ok=True)
    return manifest


def _ask(
    executor: ThreadPoolExecutor,
    server: CompletionsServer,
    shard: Sequence[Pair],
    answers: Answers,
    settings: dict[str, Any],
) -> Iterator[tuple[Pair, Targets, Targets]]:
    """Pairs as their two answers get complete: sequence 2i is pair i with its chosen answer, 2i + 1 with the other."""
    sequences = _sequences(shard)
    found: dict[int, Targets] = {}
    for i, (ids, start) in enumerate(sequences):
        if (kept := answers.read(i, len(ids) - start)) is not None:
            found[i] = kept
    for i, pair in enumerate(shard):
        if 2 * i in found and 2 * i + 1 in found:
            yield pair, found[2 * i], found[2 * i + 1]

    k, vocab_size, teacher_size = settings["k"], settings["vocab_size"], settings["teacher_vocab_size"]
    wanted = asked_for(k, settings)
    stopped = threading.Event()

    def ask(i: int) -> Targets:
        ids, start = sequences[i]

        def parse(answer: Any) -> Targets:
            return answer_targets(answer, ids, start, wanted, teacher_size)

        targets = server.score(ids, start, wanted, parse, stopped)
        return fold(f"pair {shard[i // 2].index}", targets, k, vocab_size) if vocab_size < teacher_size else targets

    asked = {executor.submit(ask, i): i for i in range(len(sequences)) if i not in found}
    try:
        for future in as_completed(asked):
            i = asked[future]
            found[i] = future.result()
            answers.write(i, found[i])
            if i ^ 1 in found:
                yield shard[i // 2], found[i & ~1], found[i | 1]
    finally:  # after an error, the requests under way end and their answers are kept
        stopped.set()
        executor.shutdown(cancel_futures=True)
        for future, i in asked.items():
            if i not in found and not future.cancelled() and future.exception() is None:
                answers.write(i, future.result())


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
    """Let vLLM in this process score the pairs; resumed after the last finished shard.

    Args:
        llm: `vllm.LLM(model, max_logprobs=k, ...)`.
        vocab_size: of the teacher's configuration.
        model: the teacher's name, by which a resumed run is compared with what is there.
        flat_logprobs: vLLM's compact form, for versions that have it.
        tokenizer, data, out, k, shard_tokens, progress: as `capture_from_server` takes them.

    Raises:
        AnswerError, CacheSettingsError: as `capture_from_server`.
    """
    from vllm import SamplingParams

    options = {"flat_logprobs": True} if flat_logprobs else {}
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=k, detokenize=False, **options)

    def score(number: int, shard: Sequence[Pair]) -> Iterator[tuple[Pair, Targets, Targets]]:
        sequences = _sequences(shard)
        prompts = [{"prompt_token_ids": ids} for ids, _ in sequences]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        targets = [
            answer_targets(output.prompt_logprobs, ids, start, k, vocab_size)
            for output, (ids, start) in zip(outputs, sequences, strict=True)
        ]
        yield from zip(shard, targets[::2], targets[1::2], strict=True)

    settings = teacher_settings(tokenizer, data, k, vocab_size, None, shard_tokens) | {"served_model": model}
    return write_teacher(tokenizer, data, Path(out), settings, model, score, progress=progress)


def _sequences(shard: Sequence[Pair]) -> list[tuple[list[int], int]]:
    """Ids of prompt and answer, and where the answer starts: chosen and rejected of each pair in turn."""
    return [
        (np.concatenate((pair.prompt_ids, answer)).tolist(), len(pair.prompt_ids))
        for pair in shard
        for answer in (pair.chosen_ids, pair.rejected_ids)
    ]
