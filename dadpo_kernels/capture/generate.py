"""Generates preference pairs as in daDPO and dDPO: the teacher's sampled answer is chosen, the student's rejected."""

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ..cache.errors import CacheSettingsError
from ..cache.fingerprints import model_fingerprint, records_fingerprint

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
    tokenizer: Any,
    prompts: Sequence[Any],
    path: str | Path,
    sampling: Sampling,
    *,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Sample one answer for each prompt, and write them to the JSONL file `path` batch by batch.

    After any interruption, the same call continues after the last complete batch. Each batch has a separate seed, so
    the answers do not depend on interruptions.

    Args:
        model: a causal LM of transformers, on its device.
        tokenizer: the model's.
        prompts: strings, or lists of messages to which the tokenizer's chat template is applied.
        path: the file; an existing one must come from the same model, prompts and sampling.
        sampling: how answers are sampled.
        progress: show a progress bar in answers.

    Returns:
        `{"answer": str, "finished": bool}` for each prompt, in their order. An answer is not finished if
        `max_new_tokens` cut it.

    Raises:
        CacheSettingsError: `path` holds answers of another model, to other prompts, or with other sampling.
        ValueError: an argument is out of range, or a prompt has no tokens.
    """
    # What identifies the run: model, prompts and sampling.
    _check(sampling)
    ids = [_prompt_ids(tokenizer, number, prompt) for number, prompt in enumerate(prompts)]
    settings = {
        "model_sha256": model_fingerprint(model),
        "prompts_sha256": records_fingerprint({"ids": prompt} for prompt in ids),
        **sampling._asdict(),
    }

    # Batches of prompts with similar lengths, the longest first; skip those that are in the file.
    order = sorted(range(len(ids)), key=lambda i: (-len(ids[i]), i))
    batches = [order[at : at + sampling.batch_size] for at in range(0, len(order), sampling.batch_size)]
    path = Path(path)
    lines = _resume(path, settings, [len(batch) for batch in batches])
    logger.debug("%s: %d of %d answers are there", path, len(lines), len(ids))
    bar = tqdm(total=len(ids), initial=len(lines), unit="answer", desc=path.name, disable=not progress)
    with path.open("a", encoding="utf-8") as file, bar:
        done = len(lines)
        for number, batch in enumerate(batches):
            if done >= len(batch):
                done -= len(batch)
                continue
            # transformers samples from the global generator and does not take another one.
            torch.manual_seed(int.from_bytes(hashlib.sha256(f"{sampling.seed} {number}".encode()).digest()[:7], "big"))
            answers = _sample(model, tokenizer, [ids[i] for i in batch], sampling)
            batch_lines = [{"index": i, **answer} for i, answer in zip(batch, answers, strict=True)]
            file.write("".join(json.dumps(line) + "\n" for line in batch_lines))
            file.flush()
            os.fsync(file.fileno())
            lines += batch_lines
            bar.update(len(batch))

    by_index = {line.pop("index"): line for line in lines}
    return [by_index[i] for i in range(len(ids))]


def make_pairs(prompts: Sequence[Any], chosen: Sequence[str], rejected: Sequence[str]) -> list[dict[str, Any]]:
    """Records for `tokenize_pairs`, from the answers' texts. An answer to a list of messages becomes a message."""

    def like_prompt(prompt: Any, text: str) -> Any:
        return [{"role": "assistant", "content": text}] if isinstance(prompt, list) else text

    return [
        {"prompt": prompt, "chosen": like_prompt(prompt, good), "rejected": like_prompt(prompt, bad)}
        for prompt, good, bad in zip(prompts, chosen, rejected, strict=True)
    ]


def write_records(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Write a JSONL file atomically: `path` never holds a part of the records."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _check(sampling: Sampling) -> None:
    for name in ("max_new_tokens", "batch_size"):
        if getattr(sampling, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(sampling, name)}")
    if not sampling.temperature >= 0:
        raise ValueError(f"temperature must be 0 (greedy) or positive, got {sampling.temperature}")
    if not 0 < sampling.top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {sampling.top_p}")


def _prompt_ids(tokenizer: Any, number: int, prompt: Any) -> list[int]:
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
    else:
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    if not ids:
        raise ValueError(f"prompt {number} has no tokens")
    return ids


def _resume(path: Path, settings: dict[str, Any], sizes: list[int]) -> list[dict[str, Any]]:
    """The lines of the complete batches in the file. What follows them is cut off. A new file gets the settings as its
    first line."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    if not lines or not lines[0].endswith(b"\n"):
        path.write_text(json.dumps({"settings": settings}) + "\n")
        return []
    try:
        previous = json.loads(lines[0])["settings"]
        names = [name for name, value in settings.items() if previous.get(name) != value]
    except (ValueError, TypeError, KeyError, AttributeError):
        raise CacheSettingsError(f"{path} is not a file of answers: move it, or write to another file") from None
    if names:
        raise CacheSettingsError(f"{path} holds answers of another run ({', '.join(names)} differ): move it")
    whole = [line for line in lines[1:] if line.endswith(b"\n")]
    count = 0
    for size in sizes:
        if count + size > len(whole):
            break
        count += size
    with path.open("rb+") as file:
        file.truncate(sum(map(len, lines[: 1 + count])))
    return [json.loads(line) for line in whole[:count]]


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
        answers.append({"answer": text, "finished": at is not None})
    return answers


def _end_ids(model: Any, tokenizer: Any) -> list[int]:
    configured = model.generation_config.eos_token_id
    end_ids = configured if isinstance(configured, list) else [configured]
    return sorted({token for token in (*end_ids, tokenizer.eos_token_id) if token is not None})
