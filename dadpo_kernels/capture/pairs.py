"""Reads preference pairs and prompts, and makes token ids from them."""

import json
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..cache.fingerprints import records_fingerprint
from ..cache.pairs import Pair
from .sources import as_pair, records


class TokenizedPairs(NamedTuple):
    """Preference pairs as token ids, and how they were made."""

    pairs: list[Pair]
    max_length: int | None
    truncated: int  # answers that max_length cut
    skipped: list[int]  # indices of the pairs whose prompt alone fills max_length
    source_sha256: str


def read_pairs(source: str | Path, limit: int | None = None) -> list[dict[str, Any]]:
    """Read at most `limit` pairs `{"prompt", "chosen", "rejected"}` from a file or data set.

    Args:
        source: see `sources.records`. The accepted forms of a record are those of `sources.as_pair`.

    Raises:
        ValueError: a record cannot be read or is not a pair, or the source is empty.
    """
    pairs: list[dict[str, Any]] = []
    for where, record in islice(records(source), limit):
        pairs.append(as_pair(where, record))
        _check_record(where, pairs[-1])
    if not pairs:
        raise ValueError(f"{source} has no pairs: records with prompt, chosen and rejected are needed")
    return pairs


def read_prompts(source: str | Path, limit: int | None = None) -> list[Any]:
    """Read at most `limit` prompts, strings or lists of messages, from the column `prompt` of a file or data set.

    Args:
        source: see `sources.records`.

    Raises:
        ValueError: a record cannot be read or does not have a prompt, or the source is empty.
    """
    prompts = []
    for where, record in islice(records(source), limit):
        prompt = record.get("prompt") if isinstance(record, dict) else None
        if not prompt or not (isinstance(prompt, str) or (isinstance(prompt, list) and all(map(_is_message, prompt)))):
            raise ValueError(f"{where}: prompt must be a string or a list of messages")
        prompts.append(prompt)
    if not prompts:
        raise ValueError(f"{source} has no prompts")
    return prompts


def tokenize_pairs(
    records: Sequence[dict[str, Any]], tokenizer: Any, max_length: int | None = None, *, progress: bool = False
) -> TokenizedPairs:
    """Token ids of preference pairs, as TRL's `DPOTrainer` makes them.

    - Conversational pairs (lists of messages): the tokenizer's chat template is applied to `prompt` with the
      generation prompt, and to `prompt + answer`. The answer's tokens are those of the second after the first. The
      record's `tools` and `chat_template_kwargs` are passed to the template.
    - Standard pairs (strings): `prompt` and `prompt + answer + eos_token` are tokenized unchanged.
    - A sequence longer than `max_length` loses the end of its answer, and a pair whose prompt alone has `max_length`
      tokens is skipped.

    One case is an error that TRL only warns about: the tokens of the prompt are not a prefix of those of prompt and
    answer. TRL drops the end of the prompt then, and the student would be trained on a context that never occurs.

    Args:
        records: `{"prompt", "chosen", "rejected"}` each; further columns are ignored.
        tokenizer: a tokenizer of transformers.
        max_length: maximum number of tokens of prompt and answer together, or None.
        progress: show a progress bar.

    Raises:
        ValueError: a record is malformed, a prompt is empty or not a prefix, an answer is empty, or no pair is left.
    """
    from tqdm import tqdm

    if max_length is not None and max_length < 2:
        raise ValueError(f"max_length must be at least 2, got {max_length}: a prompt token and an answer token")
    pairs: list[Pair] = []
    truncated, skipped = 0, []
    for index, record in enumerate(tqdm(records, desc="tokenizing", unit="pair", disable=not progress)):
        # The prompt's ids, and those of the prompt with each of the answers.
        where = f"pair {index}"
        _check_record(where, record)
        prompt, *full = _conversation(tokenizer, record) if _is_chat(record) else _text(tokenizer, record)
        if not prompt:
            raise ValueError(f"{where}: the prompt has no tokens, so nothing predicts the first token of the answers")
        if max_length is not None and len(prompt) >= max_length:
            skipped.append(index)
            continue

        # The answers' ids are what follows the prompt, up to max_length.
        answers = []
        for name, ids in zip(("chosen", "rejected"), full, strict=True):
            if ids[: len(prompt)] != prompt:
                raise ValueError(_not_a_prefix(where, name, tokenizer, prompt, ids))
            if len(ids) == len(prompt):
                raise ValueError(f"{where}: {name} has no tokens")
            answers.append(ids[len(prompt) : max_length])
            truncated += len(prompt) + len(answers[-1]) < len(ids)
        pairs.append(Pair(index, *(np.array(ids, dtype=np.int32) for ids in (prompt, *answers))))
    if not pairs:
        raise ValueError(f"none of {len(records)} pairs has a prompt shorter than max_length={max_length}: raise it")
    return TokenizedPairs(pairs, max_length, truncated, skipped, records_fingerprint(records))


def _is_chat(record: dict[str, Any]) -> bool:
    return isinstance(record["prompt"], list)


def _conversation(tokenizer: Any, record: dict[str, Any]) -> Iterable[list[int]]:
    if not tokenizer.chat_template:
        raise ValueError(
            "the pairs are conversations and the tokenizer has no chat template: use an instruction-tuned model, set "
            "tokenizer.chat_template, or give strings"
        )
    tools = record.get("tools")
    options = {
        "tools": json.loads(tools) if isinstance(tools, str) else tools,
        **(record.get("chat_template_kwargs") or {}),
        "return_dict": False,
    }
    yield tokenizer.apply_chat_template(record["prompt"], add_generation_prompt=True, **options)
    for name in ("chosen", "rejected"):
        yield tokenizer.apply_chat_template(record["prompt"] + record[name], **options)


def _text(tokenizer: Any, record: dict[str, Any]) -> Iterable[list[int]]:
    yield tokenizer(record["prompt"])["input_ids"]
    eos = tokenizer.eos_token or ""
    for name in ("chosen", "rejected"):
        yield tokenizer(record["prompt"] + record[name].removesuffix(eos) + eos)["input_ids"]


def _not_a_prefix(where: str, name: str, tokenizer: Any, prompt: list[int], ids: list[int]) -> str:
    at = next((t for t, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b), len(ids))
    return (
        f"{where}: the tokens of the prompt are not a prefix of those of prompt and {name}; from token {at} they are "
        f"{tokenizer.decode(prompt[at : at + 8])!r} and {tokenizer.decode(ids[at : at + 8])!r}. Use a chat template "
        "that renders the prompt the same way in both cases, or end the prompt on a token boundary (move trailing "
        "spaces to the answers)"
    )


def _check_record(where: str, record: Any) -> None:
    names = ("prompt", "chosen", "rejected")
    if not isinstance(record, dict) or (missing := [name for name in names if name not in record]):
        reason = f"missing {', '.join(missing)}" if isinstance(record, dict) else "not an object"
        raise ValueError(f"{where}: {reason}. A pair needs prompt, chosen and rejected, with the prompt as a column")
    if all(isinstance(record[name], str) for name in names):
        return
    if not all(isinstance(record[name], list) and all(map(_is_message, record[name])) for name in names):
        raise ValueError(
            f"{where}: prompt, chosen and rejected must all be strings, or all lists of messages "
            '{"role": ..., "content": ...}'
        )


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and "role" in message
