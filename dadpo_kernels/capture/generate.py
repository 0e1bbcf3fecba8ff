"""Generates preference pairs as in daDPO and dDPO: the teacher's sampled answer is chosen, the student's rejected."""

import hashlib
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ..cache.fingerprints import model_fingerprint, records_fingerprint
from ..cache.storage import storage_errors
from .chat import ChatTemplate
from .checked_lines import CheckedLines, settings_of

logger = logging.getLogger("dadpo_kernels")


class Sampling(NamedTuple):
    """How answers are sampled. `batch_size` matters too, because the answers of a batch share one random stream."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 512
    batch_size: int = 16
    seed: int = 0


def generate_answers(
    model: Any,
    template: ChatTemplate,
    prompts: Sequence[Any],
    path: str | Path,
    sampling: Sampling,
    *,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Sample one answer for each prompt, and write them to the file `path`, a line of `CheckedLines` per batch.

    After any interruption, the same call samples the batches that are missing or damaged in the file. Each batch has a
    separate seed, so the answers do not depend on interruptions.

    Args:
        model: a causal LM of transformers, on its device.
        template: the chat template of the model's tokenizer.
        prompts: strings, or lists of messages to which the template is applied.
        path: the file; an existing one must come from the same model, prompts and sampling.
        sampling: how answers are sampled.
        progress: show a progress bar in answers.

    Returns:
        `{"answer": str, "end": str, "finished": bool}` for each prompt, in their order. `end` is the token that ended
        the answer; an answer is not finished if `max_new_tokens` cut it.

    Raises:
        CacheSettingsError: `path` holds answers of another model, to other prompts, or with other sampling.
        CacheBusyError: another process writes to `path`.
        CacheError: `path` cannot be read or written.
        ValueError: an argument is out of range, the chat template refuses a prompt, or a prompt has no tokens.
    """
    # What identifies the run: model, prompts and sampling.
    _check(sampling)
    tokenizer = template.tokenizer
    ids = [_prompt_ids(template, number, prompt) for number, prompt in enumerate(prompts)]
    settings = {
        "model_sha256": model_fingerprint(model),
        "prompts_sha256": records_fingerprint({"ids": prompt} for prompt in ids),
        "today": template.today,
        **sampling._asdict(),
    }

    # Batches of prompts with similar lengths, the longest first; skip those that are in the file.
    order = sorted(range(len(ids)), key=lambda i: (-len(ids[i]), i))
    batches = [order[at : at + sampling.batch_size] for at in range(0, len(order), sampling.batch_size)]
    path = Path(path)
    with closing(CheckedLines(path, settings)) as lines:
        answers: dict[int, list[dict[str, Any]]] = {line["batch"]: line["answers"] for line in lines.records}
        logger.debug("%s: %d of %d batches are there", path, len(answers), len(batches))
        initial = sum(map(len, answers.values()))
        with tqdm(total=len(ids), initial=initial, unit="answer", desc=path.name, disable=not progress) as bar:
            for number, batch in enumerate(batches):
                if number in answers:
                    continue
                # transformers samples from the global generator and does not take another one.
                digest = hashlib.sha256(f"{sampling.seed} {number}".encode()).digest()
                torch.manual_seed(int.from_bytes(digest[:7], "big"))
                answers[number] = _sample(model, tokenizer, [ids[i] for i in batch], sampling)
                lines.append({"batch": number, "answers": answers[number]})
                bar.update(len(batch))

    by_index = {
        i: answer for number, batch in enumerate(batches) for i, answer in zip(batch, answers[number], strict=True)
    }
    return [by_index[i] for i in range(len(ids))]


def first_day(path: Path) -> date | None:
    """The date that the chat template was given when the answers in `path` were begun; None if there is none."""
    today = settings_of(path).get("today")
    return date.fromisoformat(today) if today else None


def make_pairs(
    prompts: Sequence[Any],
    chosen: Sequence[Mapping[str, Any]],
    rejected: Sequence[Mapping[str, Any]],
    template: ChatTemplate,
) -> tuple[list[dict[str, Any]], int]:
    """Records for `tokenize_pairs` from the lines of `generate_answers`, and how many of them are rendered texts.

    An answer to a list of messages becomes a message. A chat template need not render what a model answered: it may
    strip the thinking or spaces, so that the prompt is no prefix any more. Such a pair is written as the texts that
    the models read and wrote.
    """
    pairs, rendered = [], 0
    for number, (prompt, good, bad) in enumerate(zip(prompts, chosen, rejected, strict=True)):
        texts = {"chosen": good["answer"], "rejected": bad["answer"]}
        if isinstance(prompt, str):
            pairs.append({"prompt": prompt, **texts})
            continue
        record = {"prompt": prompt}
        record |= {name: [{"role": "assistant", "content": text}] for name, text in texts.items()}
        if template.kwargs:
            record["chat_template_kwargs"] = template.kwargs
        if not _is_rendered(template, record, texts):
            text = template.ids(f"prompt {number}", prompt, {}, add_generation_prompt=True, tokenize=False)
            ends = {"chosen": good["end"], "rejected": bad["end"]}
            record = {"prompt": text, **{name: texts[name] + ends[name] for name in texts}}
            rendered += 1
        pairs.append(record)
    return pairs, rendered


def _is_rendered(template: ChatTemplate, record: Mapping[str, Any], texts: Mapping[str, str]) -> bool:
    """Whether the chat template renders the answers behind the prompt as they are."""
    prompt = template.ids("", record["prompt"], {}, add_generation_prompt=True, tokenize=False)
    try:
        return all(
            template.ids("", record["prompt"] + record[name], {}, tokenize=False).startswith(prompt + text)
            for name, text in texts.items()
        )
    except ValueError:  # as of a template that parses what it thinks a model answers
        return False


def write_records(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Write a JSONL file atomically: `path` never holds a part of the records. Raises CacheError if it cannot."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with storage_errors(path):
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _check(sampling: Sampling) -> None:
    for name in ("max_new_tokens", "batch_size"):
        if getattr(sampling, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(sampling, name)}")
    if not 0 <= sampling.temperature < math.inf:
        raise ValueError(f"temperature must be 0 (greedy) or positive, got {sampling.temperature}")
    if not 0 < sampling.top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {sampling.top_p}")


def _prompt_ids(template: ChatTemplate, number: int, prompt: Any) -> list[int]:
    if isinstance(prompt, str):
        ids = template.tokenizer(prompt)["input_ids"]
    else:
        ids = template.ids(f"prompt {number}", prompt, {}, add_generation_prompt=True)
    if not ids:
        raise ValueError(f"prompt {number} has no tokens")
    return ids


@torch.inference_mode()
def _sample(model: Any, tokenizer: Any, prompts: list[list[int]], sampling: Sampling) -> list[dict[str, Any]]:
    device = model.get_input_embeddings().weight.device
    longest = max(map(len, prompts))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
    input_ids = torch.full((len(prompts), longest), pad)
    attention_mask = torch.zeros_like(input_ids)
    for i, ids in enumerate(prompts):  # padded on the left, because generation continues on the right
        input_ids[i, longest - len(ids) :] = torch.tensor(ids)
        attention_mask[i, longest - len(ids) :] = 1

    # Generate. What the model's configuration says about sampling is overruled.
    sampled = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    end_ids = _end_ids(model, tokenizer)
    output: Tensor = model.generate(
        input_ids=input_ids.to(device),
        attention_mask=attention_mask.to(device),
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=end_ids or None,
        pad_token_id=pad,
        **(sampled if sampling.temperature else greedy),
    )

    # An answer ends before the first end token.
    answers = []
    for tokens in output[:, longest:].tolist():
        at = next((i for i, token in enumerate(tokens) if token in end_ids), None)
        text = tokenizer.decode(tokens[:at], skip_special_tokens=True)
        end = "" if at is None else tokenizer.decode(tokens[at : at + 1])
        answers.append({"answer": text, "end": end, "finished": at is not None})
    return answers


def _end_ids(model: Any, tokenizer: Any) -> list[int]:
    configured = model.generation_config.eos_token_id
    end_ids = configured if isinstance(configured, list) else [configured]
    return sorted({token for token in (*end_ids, tokenizer.eos_token_id) if token is not None})
