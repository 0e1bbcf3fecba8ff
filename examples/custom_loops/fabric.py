"""A Lightning Fabric loop: a patched transformers model, and a loss of your own on its selected log-probabilities.

    python -m examples.custom_loops.fabric MODEL CACHE

`patch` keeps everything inside the model's forward, so wrappers (DDP, mixed precision, FSDP) see an ordinary call.
"""

import sys
from typing import Any

import torch
from lightning_fabric import Fabric
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from dadpo_kernels import dadpo_loss, topk_divergence
from dadpo_kernels.cache.dataset import PairCollator, PairDataset
from dadpo_kernels.cli.process_group import ending_process_group
from dadpo_kernels.models.patch import patch


def train(model_name: str, cache: str, epochs: int = 1, pairs: int = 2, lr: float = 1e-4, **options) -> list[float]:
    """The loss of every step; `options` are Fabric's (accelerator, devices, precision, strategy)."""
    fabric = Fabric(**options)
    fabric.launch()
    model = patch(AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32))
    model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=lr))
    data = PairDataset(cache, require_reference=True)
    loader: Any = fabric.setup_dataloaders(DataLoader(data, pairs, shuffle=True, collate_fn=PairCollator(0)))
    losses = []
    for _ in range(epochs):
        for batch in loader:
            labels, ids = batch["labels"], batch["teacher_topk_ids"]
            selected = model(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                shift_labels=labels,  # aligned: the cache's label t is the token after position t
                topk_ids=ids,
            ).selected_logps
            teacher, reference = batch["teacher_label_logps"].sum(-1), batch["ref_logps"]
            sums = (logps for x in (selected.label.sum(-1), reference, teacher) for logps in x.chunk(2))
            preference = dadpo_loss(*sums, beta_ref=0.1, beta_teacher=0.1).losses.mean()
            divergence = topk_divergence(
                selected.topk, selected.tail, batch["teacher_topk_logps"], batch["teacher_topk_tail"]
            )
            loss = preference + divergence[labels != -100].mean()
            fabric.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


if __name__ == "__main__":
    with ending_process_group():  # Fabric starts one for several devices
        print(*(f"{loss:.4f}" for loss in train(sys.argv[1], sys.argv[2])), sep="\n")
