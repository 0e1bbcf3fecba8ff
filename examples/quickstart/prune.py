"""A student from a teacher: the same transformer without some of its layers.

    python -m examples.quickstart.prune --search 6     # which layers? prints them, least harmful first

The layers in `DROPPED` were found by this search on the quickstart's own training answers: one at a time, the layer
whose removal moves the teacher's next-token distribution least (KL over answer tokens), given those already removed:
14, 5, 17, 3, 25, 19, at 0.15, 0.29, 0.44, 0.59, 0.78 and 1.00 nats a token.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from dadpo_kernels.capture.pairs import read_pairs, tokenize_pairs
from examples.smollm2 import smollm2_dir

DATA = Path(__file__).parent / "data"
DROPPED = (3, 5, 14, 17, 19, 25)


def drop_layers(model: PreTrainedModel, dropped: Sequence[int]) -> PreTrainedModel:
    """Removes decoder layers in place and renumbers the rest for the key-value cache."""
    kept = [layer for i, layer in enumerate(model.model.layers) if i not in set(dropped)]
    model.model.layers = nn.ModuleList(kept)
    for i, layer in enumerate(kept):
        layer.self_attn.layer_idx = i
    model.config.num_hidden_layers = len(kept)
    return model


def prune(teacher: Path, out: Path, dropped: Sequence[int] = DROPPED) -> Path:
    """Saves the pruned model and the teacher's tokenizer in `out`, unless they are there."""
    if not (out / "config.json").exists():
        model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
        drop_layers(model, dropped).save_pretrained(out)
        AutoTokenizer.from_pretrained(teacher).save_pretrained(out)
    return out


@torch.no_grad()
def search(teacher: Path, count: int, pairs: int = 8) -> list[int]:
    """Greedy: `count` times, drops the layer whose loss costs least KL(teacher || student) on the chosen answers."""
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    layers = list(model.model.layers)
    tokenized = tokenize_pairs(read_pairs(DATA / "train.jsonl"), tokenizer).pairs
    texts = tokenized[:: len(tokenized) // pairs][:pairs]
    batch = [torch.tensor([[*p.prompt_ids, *p.chosen_ids]]) for p in texts]
    answers = [len(p.chosen_ids) for p in texts]

    def logps(kept: list[int]) -> torch.Tensor:
        model.model.layers = nn.ModuleList([layers[i] for i in kept])
        out = [model(ids, use_cache=False).logits[0, -n - 1 : -1] for ids, n in zip(batch, answers, strict=True)]
        return torch.cat(out).log_softmax(-1)

    kept, dropped = list(range(len(layers))), []
    full = logps(kept)
    for _ in range(count):
        cost = {i: (full.exp() * (full - logps([j for j in kept if j != i]))).sum(-1).mean().item() for i in kept}
        best = min(cost, key=lambda i: cost[i])
        kept.remove(best)
        dropped.append(best)
        print(f"without layers {sorted(dropped)}: KL {cost[best]:.3f} nats a token", flush=True)
    return dropped


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--search", type=int, default=6, help="layers to remove")
    print(search(smollm2_dir(), parser.parse_args().search))
