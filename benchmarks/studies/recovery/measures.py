"""What a student answers by itself, judged by nobody but its teacher.

The measures on the teacher's answers are `examples.quickstart.evaluate.measure`.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dadpo_kernels import linear_selected_logps
from dadpo_kernels.cache.pairs import IGNORE_INDEX, pad_pairs
from dadpo_kernels.capture.chat import ChatTemplate
from dadpo_kernels.capture.generate import Sampling, generate_answers
from dadpo_kernels.capture.pairs import tokenize_pairs
from dadpo_kernels.models.forward import hidden_states
from dadpo_kernels.models.lm_head import lm_head
from examples.quickstart.make_pairs import whole_sentences

BATCH = 8
EMPTY = "."  # stands for an answer without text, which has no log-likelihood


def sample(
    model: Any, tokenizer: Any, prompts: Sequence[Any], path: Path, max_new_tokens: int, seed: int
) -> list[str]:
    """One answer a prompt, drawn as the committed pairs were (temperature 0.7, top-p 0.95, cut to whole sentences)."""
    model.eval()
    sampling = Sampling(0.7, 0.95, max_new_tokens, batch_size=56, seed=seed)
    answers = generate_answers(model, ChatTemplate(tokenizer), prompts, path, sampling)
    return [whole_sentences(answer["answer"].strip()) or EMPTY for answer in answers]


@torch.no_grad()
def likelihood(teacher: Any, tokenizer: Any, prompts: Sequence[Any], answers: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The teacher's mean log-probability a token of each answer `[n]` (length does not count), and their tokens."""
    records = [
        {"prompt": prompt, "completion": [{"role": "assistant", "content": answer}]}
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    pairs = tokenize_pairs(records, tokenizer).pairs
    head = lm_head(teacher)
    means, lengths = [], []
    for start in range(0, len(pairs), BATCH):
        part = pairs[start : start + BATCH]
        ids, mask, labels = (t[: len(part)].to(head.weight.device) for t in pad_pairs(part, pad_token_id=0))
        logps = linear_selected_logps(hidden_states(teacher, ids, mask), head.weight, labels).label
        lengths.append((labels != IGNORE_INDEX).sum(1).cpu())
        means.append(logps.sum(1).double().cpu() / lengths[-1])
    return torch.cat(means), torch.cat(lengths)


def preference_rate(student: Tensor, teacher: Tensor) -> float:
    """Wins minus losses of the student's answers against the teacher's own, as a share: 0 is parity, -1 never."""
    return ((student > teacher).double() - (student < teacher).double()).mean().item()


def texture(answers: Sequence[str]) -> dict[str, float]:
    """Signs of collapse, on words: `distinct_N`, different N-grams as a share of all in all answers together, and
    `repetition`, the mean share of an answer's 4-grams that it has had before."""
    words = [answer.lower().split() for answer in answers]
    result = {}
    for n in (1, 2, 3):
        grams = [g for w in words for g in ngrams(w, n)]
        result[f"distinct_{n}"] = len(set(grams)) / max(1, len(grams))
    shares = [(sum(c - 1 for c in Counter(g).values()) / len(g)) for w in words if (g := ngrams(w, 4))]
    return result | {"repetition": sum(shares) / max(1, len(shares))}


def ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(words[i:] for i in range(n)), strict=False))
