"""How near a student is to its teacher on held-out pairs: numbers that need no judge."""

from pathlib import Path

import torch
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


@torch.no_grad()
def evaluate(model_path: Path, cache: Path) -> dict[str, float]:
    """Means over the cache's pairs.

    `kl` (over the cache's top-k and the rest as one outcome) and `nll` are over the tokens of the chosen answers. A
    pair's margin is the mean log-probability a token of the chosen answer minus that of the rejected one; the model
    prefers the chosen one where it is positive: lengths are divided out, so a taste for long answers does not count.
    """
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    head = lm_head(model)
    pairs = PairDataset(cache, vocab_size=len(head.weight))
    collate = PairCollator(model.config.pad_token_id)
    kl, nll, tokens, margins = 0.0, 0.0, 0, []
    for start in range(0, len(pairs), 8):
        batch = collate([pairs[i] for i in range(start, min(start + 8, len(pairs)))])
        labels = batch["labels"]
        teacher = TeacherTargets(*(batch[f"teacher_{name}"] for name in TeacherTargets._fields))
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16_is_fast()):
            hidden = hidden_states(model, batch["input_ids"], batch["attention_mask"])
            student = linear_selected_logps(hidden, head.weight, labels, teacher.topk_ids)
        valid = labels != -100
        means = (student.label.sum(1) / valid.sum(1)).chunk(2)
        margins.append(means[0] - means[1])
        chosen = valid.clone()
        chosen[len(chosen) // 2 :] = False
        at = [x[chosen] for x in (student.topk, student.tail, teacher.topk_logps, teacher.topk_tail)]
        kl += topk_divergence(*at).sum().item()
        nll -= student.label[chosen].sum().item()
        tokens += int(chosen.sum())
    margin = torch.cat(margins)
    return {
        "kl": kl / tokens,
        "nll": nll / tokens,
        "accuracy": (margin > 0).float().mean().item(),
        "margin": margin.mean().item(),
    }
