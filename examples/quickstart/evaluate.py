"""How near a student is to its teacher on held-out pairs: numbers that need no judge."""

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM

from dadpo_kernels import TeacherTargets, linear_selected_logps, topk_divergence
from dadpo_kernels.lm_head import hidden_states, lm_head
from dadpo_kernels.teacher.dataset import PairCollator, PairDataset
from examples.quickstart.precision import bfloat16_is_fast

ROWS = {
    "kl": "KL to the teacher on its answers (nats/token)",
    "nll": "NLL of the teacher's answers (nats/token)",
    "accuracy": "Prefers the teacher's answer (share of pairs)",
    "margin": "Log-likelihood margin (nats/token)",
}


def evaluate(model_path: Path, cache: Path) -> dict[str, float]:
    """`measure` of the model in a directory on the pairs of a teacher cache."""
    model: Any = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    return measure(model, PairDataset(cache, vocab_size=len(lm_head(model).weight)))


@torch.no_grad()
def measure(model: Any, pairs: Dataset) -> dict[str, float]:
    """Means over items of a `PairDataset`.

    `kl` (KL(teacher ‖ student) over the cache's top-k and the rest as one outcome), `reverse_kl` (the other way round)
    and `nll` are over the tokens of the chosen answers. A pair's margin is the mean log-probability a token of the
    chosen answer minus that of the rejected one; the model prefers the chosen one where it is positive: lengths are
    divided out, so a taste for long answers does not count.
    """
    model.eval()
    head, collate = lm_head(model), PairCollator(pad_token_id=0)  # never attended to: any id serves
    device, count = head.weight.device, len(pairs)  # type: ignore[arg-type]
    kl, reverse_kl, nll, tokens, margins = 0.0, 0.0, 0.0, 0, []
    for start in range(0, count, 8):
        batch = collate([pairs[i] for i in range(start, min(start + 8, count))])
        batch = {name: value.to(device) for name, value in batch.items()}
        labels = batch["labels"]
        teacher = TeacherTargets(*(batch[f"teacher_{name}"] for name in TeacherTargets._fields))
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16_is_fast()):
            hidden = hidden_states(model, batch["input_ids"], batch["attention_mask"])
            student = linear_selected_logps(hidden, head.weight, labels, teacher.topk_ids)
        assert student.topk is not None
        assert student.tail is not None
        valid = labels != -100
        means = (student.label.sum(1) / valid.sum(1)).chunk(2)
        margins.append(means[0] - means[1])
        chosen = valid.clone()
        chosen[len(chosen) // 2 :] = False
        at = [x[chosen] for x in (student.topk, student.tail, teacher.topk_logps, teacher.topk_tail)]
        kl += topk_divergence(*at).sum().item()
        reverse_kl += topk_divergence(*at, kind="reverse_kl").sum().item()
        nll -= student.label[chosen].sum().item()
        tokens += int(chosen.sum())
    margin = torch.cat(margins)
    return {
        "kl": kl / tokens,
        "reverse_kl": reverse_kl / tokens,
        "nll": nll / tokens,
        "accuracy": (margin > 0).float().mean().item(),
        "margin": margin.mean().item(),
    }
