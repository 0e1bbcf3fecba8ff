"""Reads preference pairs and prompts, and makes token ids from them."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from ..cache.fingerprints import records_fingerprint
from ..cache.pairs import Pair
from .chat import ChatTemplate
from .forms import ANSWERS, as_pair
from .messages import content, template_columns
from .sources import records

OnError = Literal["stop", "skip"]
_NOT_PAIRED = "answers whose prompt has none with the other label (KTO), left out"
_SECOND_BOS = "texts that began with the token that the tokenizer puts before them, which they got once"
_CUT_EARLIER = "prompts whose last tokens merge with the answer's first: the answer begins there, as in TRL"


class PairRecords(list[dict[str, Any]]):
    """Pairs `{"prompt", "chosen", "rejected"}`, or `{"prompt", "completion"}` for all of them.

    Attributes:
        where: place of each pair in its source, for messages.
        refused: why records are left out (`on_error="skip"`), one line each.
        notes: how often what was changed.
    """

    def __init__(self, pairs: Sequence[dict[str, Any]] = ()) -> None:
        super().__init__(pairs)
        self.where = [f"pair {number}" for number in range(len(self))]
        self.refused: list[str] = []
        self.notes: Counter[str] = Counter()

    def add(self, where: str, pair: dict[str, Any]) -> None:
        self.append(pair)
        self.where.append(where)


class TokenizedPairs(NamedTuple):
    """Preference pairs as token ids, and how they were made.

    Attributes:
        pairs: those that are left.
        max_length: longest sequence, or None.
        truncated: number of answers that max_length cut.
        skipped: indices of the pairs whose prompt alone fills max_length.
        source_sha256: over the records.
        refused: why pairs or records are left out (`on_error="skip"`), one line each.
        notes: how often what was changed.
        today: the date that the chat template has asked for, or None.
    """

    pairs: list[Pair]
    max_length: int | None
    truncated: int
    skipped: list[int]
    source_sha256: str
    refused: Sequence[str] = ()
    notes: Mapping[str, int] = {}
    today: str | None = None


def read_pairs(
    source: str | Path,
    limit: int | None = None,
    *,
    columns: Mapping[str, str] | None = None,
    on_error: OnError = "stop",
) -> PairRecords:
    """Read pairs `{"prompt", "chosen", "rejected"}` from a file or data set.

    Answers with a `label` (`prompt, completion, label`, KTO) become pairs of a good and a bad answer to one prompt, in
    their order. A set with one answer each gives `{"prompt", "completion"}`.

    Args:
        source: see `sources.records`. The accepted forms of a record are those of `forms.as_pair`.
        limit: number of records to read; None is all of them.
        columns: names to use instead of the source's, as `{"prompt": "question"}`.
        on_error: leave out records that are no pair, or stop at the first.

    Raises:
        ValueError: a record cannot be read or is not a pair, the source is empty, or some records only have a rejected
            answer.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    pairs = PairRecords()
    by_prompt: dict[str, dict[bool, list[tuple[str, dict[str, Any]]]]] = {}
    for where, record in islice(records(source), limit):
        try:
            pair = as_pair(where, record, pairs.notes, columns)
            named = "completion" in record or "completion" in (columns or {})
            if (label := record.get("label")) is not None and named and "completion" in pair:
                if label not in (True, False):
                    raise ValueError(f"{where}: label is {str(label)[:40]!r}: true or false is needed")
                key = json.dumps({**pair, "completion": None}, sort_keys=True)
                by_prompt.setdefault(key, {True: [], False: []})[bool(label)].append((where, pair))
                continue
        except ValueError as error:
            if on_error == "stop":
                raise
            pairs.refused.append(str(error))
            continue
        pairs.add(where, pair)
    for answers in by_prompt.values():
        good, bad = answers[True], answers[False]
        for (where, pair), (_, other) in zip(good, bad, strict=False):
            pair["chosen"], pair["rejected"] = pair.pop("completion"), other["completion"]
            pairs.add(where, pair)
        pairs.notes[_NOT_PAIRED] += abs(len(good) - len(bad))
    pairs.notes = +pairs.notes

    # Both kinds in one source are a mistake in some of its records.
    if not pairs:
        reason = f"; the first of {len(pairs.refused)} refused: {pairs.refused[0]}" if pairs.refused else ""
        raise ValueError(f"{source} has no pairs: records with prompt, chosen and rejected are needed{reason}")
    alone = ["completion" in pair for pair in pairs]
    if len(set(alone)) > 1:
        first = ", ".join(pairs.where[alone.index(kind)] for kind in (False, True))
        raise ValueError(f"{first}: only the first of them has a rejected answer; all need one, or none")
    return pairs


def read_prompts(source: str | Path, limit: int | None = None) -> list[Any]:
    """Read at most `limit` prompts, strings or lists of messages, from the column `prompt` of a file or data set.

    Args:
        source: see `sources.records`.

    Raises:
        ValueError: a record cannot be read or does not have a prompt, or the source is empty.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    prompts = []
    for where, record in islice(records(source), limit):
        prompt = content(where, "prompt", record.get("prompt")) if isinstance(record, dict) else None
        if not prompt:
            raise ValueError(f"{where}: prompt must be a string or a list of messages, and not empty")
        prompts.append(prompt)
    if not prompts:
        raise ValueError(f"{source} has no prompts")
    return prompts


def tokenize_pairs(
    records: Sequence[dict[str, Any]],
    tokenizer: Any,
    max_length: int | None = None,
    *,
    template: ChatTemplate | None = None,
    on_error: OnError = "stop",
    progress: bool = False,
) -> TokenizedPairs:
    """Token ids of preference pairs, as TRL's `DPOTrainer` makes them.

    - Conversational pairs (lists of messages): the tokenizer's chat template is applied to `prompt` with the
      generation prompt, and to `prompt + answer`. The answer's tokens are those of the second after the first. The
      record's `tools` and `chat_template_kwargs` are passed to the template.
    - Standard pairs (strings): `prompt` and `prompt + answer + eos_token` are tokenized unchanged. What a template has
      rendered before does not get a second token at its beginning, nor at its end.
    - A sequence longer than `max_length` loses the end of its answer, and a pair whose prompt alone has `max_length`
      tokens is skipped.
    - Records `{"prompt", "completion"}` give pairs without a rejected answer.

    Where the tokens of the prompt are not a prefix of those of prompt and answer, because the prompt's last ones merge
    with the answer's first, the answer begins where they differ, as in TRL. Where more than a word or any of the
    template's own tokens differs, TRL warns and drops the end of the prompt: this is an error here, as the student
    would be trained on a context that never occurs.

    Args:
        records: `{"prompt", "chosen", "rejected"}` or `{"prompt", "completion"}` each; further columns are ignored.
        tokenizer: a tokenizer of transformers.
        max_length: maximum number of tokens of prompt and answer together, or None.
        template: options of the chat template; None has none.
        on_error: leave out the pairs that are refused, or stop at the first.
        progress: show a progress bar.

    Raises:
        ValueError: a record is malformed, a prompt is empty or not a prefix, an answer is empty, both answers have the
            same tokens though their texts differ, or no pair is left.
    """
    from tqdm import tqdm

    if max_length is not None and max_length < 2:
        raise ValueError(f"max_length must be at least 2, got {max_length}: a prompt token and an answer token")
    if not isinstance(records, PairRecords):
        records = PairRecords(records)
    template = template or ChatTemplate(tokenizer)
    notes, refused = Counter(records.notes), list(records.refused)
    pairs: list[Pair] = []
    truncated, skipped = 0, []
    bar = tqdm(records, desc="tokenizing", unit="pair", disable=not progress)
    for index, (where, record) in enumerate(zip(records.where, bar, strict=True)):
        try:
            prompt, *full = _token_ids(where, record, tokenizer, template, notes)
        except ValueError as error:
            if on_error == "stop":
                raise
            refused.append(str(error))
            continue
        if max_length is not None and len(prompt) >= max_length:
            skipped.append(index)
            continue
        answers = [ids[len(prompt) : max_length] for ids in full]
        truncated += sum(len(prompt) + len(ids) < len(whole) for ids, whole in zip(answers, full, strict=True))
        answers += [[]] * (2 - len(answers))
        pairs.append(Pair(index, *(np.array(ids, dtype=np.int32) for ids in (prompt, *answers))))
    if not pairs:
        reason = f", and {len(refused)} are refused: {refused[0]}" if refused else ""
        raise ValueError(
            f"none of {len(records)} pairs has a prompt shorter than max_length={max_length}: raise it{reason}"
        )
    fingerprint = records_fingerprint(records)
    return TokenizedPairs(pairs, max_length, truncated, skipped, fingerprint, refused, dict(notes), template.today)


def _token_ids(
    where: str, record: Any, tokenizer: Any, template: ChatTemplate, notes: Counter[str]
) -> tuple[list[int], ...]:
    """The ids of the prompt, and those of the prompt with each of the answers."""
    names = ("completion",) if isinstance(record, dict) and "completion" in record else ANSWERS
    if not isinstance(record, dict) or (missing := [name for name in ("prompt", *names) if name not in record]):
        reason = f"missing {', '.join(missing)}" if isinstance(record, dict) else "not an object"
        raise ValueError(f"{where}: {reason}. A pair needs prompt, chosen and rejected, with the prompt as a column")
    parts = [content(where, name, record[name]) for name in ("prompt", *names)]
    if len({type(part) for part in parts}) > 1 or parts[0] is None:
        raise ValueError(f"{where}: prompt, {', '.join(names)} must all be strings, or all lists of messages")
    if isinstance(parts[0], list):
        prompt, *full = _conversation(where, parts, names, template_columns(where, record), template)
    else:
        prompt, *full = _text(parts, tokenizer, notes)
    if not prompt:
        raise ValueError(f"{where}: the prompt has no tokens, so nothing predicts the first token of the answers")

    # The answers' ids are what follows the prompt.
    length = min(_common(prompt, ids) for ids in full)
    if length < len(prompt):
        name, ids = next((n, ids) for n, ids in zip(names, full, strict=True) if _common(prompt, ids) == length)
        rest = prompt[length:]
        of_template = not tokenizer.added_tokens_decoder.keys().isdisjoint(rest)
        if not length or of_template or len(tokenizer.decode(rest).split()) > 1:
            raise ValueError(
                f"{where}: the tokens of the prompt are not a prefix of those of prompt and {name}; from token "
                f"{length} they are {tokenizer.decode(rest[:8])!r} and {tokenizer.decode(ids[length : length + 8])!r}."
                " Use a chat template that renders the prompt the same way in both cases (--chat-template, "
                "--chat-template-kwargs), or leave such pairs out with --on-error skip"
            )
        notes[_CUT_EARLIER] += 1
        prompt = prompt[:length]
    for name, ids in zip(names, full, strict=True):
        if len(ids) == length:
            raise ValueError(f"{where}: {name} has no tokens")
    if len(full) == 2 and full[0] == full[1] and parts[1] != parts[2]:
        raise ValueError(
            f"{where}: chosen and rejected have the same tokens though their texts differ: the chat template leaves "
            "the texts out (does it need contents as lists of parts?), or the tokenizer cannot tell them apart"
        )
    return prompt, *full


def _common(a: list[int], b: list[int]) -> int:
    return next((t for t, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _conversation(
    where: str, parts: list[Any], names: Sequence[str], variables: dict[str, Any], template: ChatTemplate
) -> list[list[int]]:
    prompt, *answers = parts
    return [template.ids(f"{where}, prompt", prompt, variables, add_generation_prompt=True)] + [
        template.ids(f"{where}, {name}", prompt + answer, variables)
        for name, answer in zip(names, answers, strict=True)
    ]


def _text(parts: list[str], tokenizer: Any, notes: Counter[str]) -> list[list[int]]:
    prompt, *answers = parts
    bos, eos = tokenizer.bos_token, tokenizer.eos_token or ""
    ids = tokenizer(prompt)["input_ids"]
    if bos and prompt.startswith(bos) and ids[:2] == [tokenizer.bos_token_id] * 2:
        notes[_SECOND_BOS] += 1
        prompt = prompt.removeprefix(bos)
        ids = tokenizer(prompt)["input_ids"]
    ends = tuple(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    closed = [answer if answer.rstrip().endswith(ends) else answer + eos for answer in answers]
    return [ids] + [tokenizer(prompt + answer)["input_ids"] for answer in closed]
