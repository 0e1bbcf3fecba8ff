"""A training loop of your own with nothing but PyTorch: any network that gives hidden states, and a teacher cache.

    python -m examples.custom_loops.pytorch CACHE

The network here is a small GRU; put yours in its place. The gradients of the micro-batches of a step add up to those
of one large batch exactly, whatever their lengths: `counts` is all it takes.
"""

import itertools
import sys

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dadpo_kernels import LinearDaDPOLoss, TeacherTargets, pair_counts
from dadpo_kernels.cache.dataset import PairCollator, PairDataset


class Student(nn.Module):
    def __init__(self, vocab_size: int, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.body = nn.GRU(width, width, batch_first=True)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Hidden states `[B, T, H]`; the head is the embedding's weight, and no logits are made."""
        return self.body(self.embedding(input_ids))[0]


def train(cache: str, steps: int = 20, micro_batches: int = 3, pairs: int = 2) -> list[float]:
    """The loss of every step."""
    torch.manual_seed(0)
    data = PairDataset(cache)
    loader = DataLoader(data, batch_size=pairs, shuffle=True, collate_fn=PairCollator(0))
    student = Student(data.vocab_size)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    # The student's own answers are pushed below the teacher's, and its distribution towards the teacher's.
    linear_loss = LinearDaDPOLoss(beta_ref=0.0, beta_teacher=0.1, kl_weight=1.0)
    endless = itertools.chain.from_iterable(itertools.repeat(loader))
    losses = []
    for _ in range(steps):
        batches = list(itertools.islice(endless, micro_batches))
        counts = torch.stack([pair_counts(batch["labels"]) for batch in batches]).sum(0)
        total = 0.0
        for batch in batches:
            teacher = TeacherTargets(*(batch[f"teacher_{name}"] for name in TeacherTargets._fields))
            hidden = student(batch["input_ids"])
            out = linear_loss(hidden, student.embedding.weight, batch["labels"], teacher=teacher, counts=counts)
            out.loss.backward()
            total += out.loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


if __name__ == "__main__":
    print(*(f"{loss:.4f}" for loss in train(sys.argv[1])), sep="\n")
