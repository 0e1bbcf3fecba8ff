"""How near a student is to its teacher on held-out pairs: numbers that need no judge."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM

from dadpo_kernels import SelectedLogps, TeacherTargets, linear_selected_logps, topk_divergence
from dadpo_kernels.cache.dataset import PairCollator, PairDataset
from dadpo_kernels.models.forward import hidden_states
from dadpo_kernels.models.lm_head import lm_head
from examples.quickstart.precision import bfloat16_is_fast

ROWS = {
    "kl": "KL to the teacher on its answers (nats/token)",
    "nll": "NLL of the teacher's answers (nats/token)",
    "accuracy": "Prefers the teacher's answer (share of pairs)",
    "margin": "Log-likelihood margin (nats/token)",
    "reward_accuracy": "Preference accuracy of log(model / pruned)",
}


Logps = Callable[[dict[str, Tensor], TeacherTargets], SelectedLogps]  # of the teacher's ids, from a batch of pairs


def evaluate(model_path: Path, cache: Path) -> dict[str, Any]:
    """`summary` of the model in a directory on the pairs of a teacher cache, and "log_ratios" of the pairs."""
    model: Any = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    figures, log_ratios = summary(logps_of(model), PairDataset(cache, vocab_size=len(lm_head(model).weight)))
    return figures | {"log_ratios": log_ratios.tolist()}


def evaluate_teacher(cache: Path) -> dict[str, Any]:
    """The same of the teacher itself, whose log-probabilities the cache holds: no model runs."""
    figures, log_ratios = summary(
        lambda _, teacher: SelectedLogps(teacher.label_logps, teacher.topk_logps, teacher.topk_tail),
        PairDataset(cache),
    )
    return figures | {"log_ratios": log_ratios.tolist()}


def measure(model: Any, pairs: Dataset) -> dict[str, float]:
    """`summary` of a model on the items of a `PairDataset`."""
    return summary(logps_of(model), pairs)[0]


def reward_accuracy(policy: dict[str, Any], reference: dict[str, Any]) -> float:
    """The share of pairs that DPO's implicit reward `log(policy / reference)` ranks as they are; a tie counts half."""
    reward = torch.tensor(policy["log_ratios"]) - torch.tensor(reference["log_ratios"])
    return float((reward.sign() + 1).mean() / 2)


def logps_of(model: Any) -> Logps:
    """The log-probabilities that a transformers model gives, on the CPU."""
    model.eval()
    head = lm_head(model)
    device = head.weight.device

    @torch.no_grad()
    def logps(batch: dict[str, Tensor], teacher: TeacherTargets) -> SelectedLogps:
        batch = {name: value.to(device) for name, value in batch.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16_is_fast()):
            hidden = hidden_states(model, batch["input_ids"], batch["attention_mask"])
            out = linear_selected_logps(hidden, head.weight, batch["labels"], teacher.topk_ids.to(device))
        assert out.topk is not None
        assert out.tail is not None
        return SelectedLogps(out.label.cpu(), out.topk.cpu(), out.tail.cpu())

    return logps


def summary(student: Logps, pairs: Dataset) -> tuple[dict[str, float], Tensor]:
    """Means over the items of a `PairDataset`, and every pair's `logp(chosen) - logp(rejected)`.

    `kl` (KL(teacher ‖ student) over the cache's top-k and the rest as one outcome), `reverse_kl` (the other way round)
    and `nll` are over the tokens of the chosen answers. A pair's margin is the mean log-probability a token of the
    chosen answer minus that of the rejected one; the model prefers the chosen one where it is positive: lengths are
    divided out, so a taste for long answers does not count.
    """
    collate = PairCollator(pad_token_id=0)  # never attended to: any id serves
    count = len(pairs)  # type: ignore[arg-type]
    kl, reverse_kl, nll, tokens = 0.0, 0.0, 0.0, 0
    margins: list[Tensor] = []
    log_ratios: list[Tensor] = []
    for start in range(0, count, 8):
        batch = collate([pairs[i] for i in range(start, min(start + 8, count))])
        teacher = TeacherTargets(*(batch[f"teacher_{name}"] for name in TeacherTargets._fields))
        logps = student(batch, teacher)
        assert logps.topk is not None
        assert logps.tail is not None
        valid = batch["labels"] != -100
        sums = logps.label.sum(1)
        for values, collected in ((sums, log_ratios), (sums / valid.sum(1), margins)):
            collected.append(values.chunk(2)[0] - values.chunk(2)[1])
        chosen = valid.clone()
        chosen[len(chosen) // 2 :] = False
        at = [x[chosen] for x in (logps.topk, logps.tail, teacher.topk_logps, teacher.topk_tail)]
        kl += topk_divergence(*at).sum().item()
        reverse_kl += topk_divergence(*at, kind="reverse_kl").sum().item()
        nll -= logps.label[chosen].sum().item()
        tokens += int(chosen.sum())
    margin = torch.cat(margins)
    figures = {
        "kl": kl / tokens,
        "reverse_kl": reverse_kl / tokens,
        "nll": nll / tokens,
        "accuracy": (margin > 0).float().mean().item(),
        "margin": margin.mean().item(),
    }
    return figures, torch.cat(log_ratios)
