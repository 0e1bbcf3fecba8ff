"""What is measured: the shapes, the batches, and what stands in for a GPU in a dry run."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.cases import IGNORE_INDEX, peaked_head
from benchmarks.gpu_suite.timing import Unavailable
from benchmarks.variants import RETAIN_EVERYTHING
from dadpo_kernels.ops.backends.registry import BACKENDS


class Shape(NamedTuple):
    """An LM head."""

    name: str
    width: int
    vocab: int


# The most telling first: a wide head, whose products hide much, and a narrow one, whose products hide little.
SHAPES = (
    Shape("Llama-3-8B", 4096, 128_256),
    Shape("Qwen2.5-0.5B", 896, 151_936),
    Shape("Qwen2.5-1.5B", 1536, 151_936),
    Shape("Gemma-2-2B", 2304, 256_000),
    Shape("Vicuna-7B", 4096, 32_000),
)
TOKENS = 8192  # valid ones
TOP_K = (64, 0)
REPEATS = 7
GPU_BACKENDS = ("triton", "cuda", "triton_rows")
PLANS = {"retain": RETAIN_EVERYTHING, "recompute": 0}
TINY = (32, 64, 600)  # tokens, width and vocabulary of a dry run


@dataclass(frozen=True)
class Settings:
    """`dry`: the same tasks in the same order, on tiny problems of a CPU, which PyTorch's backend runs."""

    dry: bool = False

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry else "cuda")

    @property
    def repeats(self) -> int:
        return 1 if self.dry else REPEATS

    @property
    def capability(self) -> int:
        return 90 if self.dry else 10 * torch.cuda.get_device_properties().major

    def sizes(self, shape: Shape, tokens: int = TOKENS) -> tuple[int, int, int]:
        """Tokens, width and vocabulary to allocate."""
        return TINY if self.dry else (tokens, shape.width, shape.vocab)

    def backend(self, name: str, dtype: torch.dtype = torch.bfloat16) -> str:
        """The backend to call for `name`.

        Raises:
            Unavailable: it cannot run here.
        """
        if self.dry:
            return "torch"
        if reason := BACKENDS[name].obstacle(self.device, dtype):
            raise Unavailable(reason)
        return name


class Batch(NamedTuple):
    hidden: Tensor
    weight: Tensor
    labels: Tensor
    topk_ids: Tensor | None


def batch(s: Settings, shape: Shape, top_k: int, masked: bool = False) -> Batch:
    """`TOKENS` valid positions of a peaked head (see `benchmarks.cases`); masked: as many again without a label."""
    tokens, width, vocab = s.sizes(shape)
    hidden, weight, labels = peaked_head(tokens, width, vocab, device=s.device)
    hidden, weight = hidden.to(torch.bfloat16), weight.to(torch.bfloat16)
    ids = None
    if top_k:  # all different, as a teacher's are, and the label among them
        step = torch.randint(1, vocab // top_k, (tokens, 1), device=s.device)
        ids = (labels[:, None] + step * torch.arange(top_k, device=s.device)) % vocab
    if masked:
        hidden, labels = torch.cat([hidden, hidden]), torch.cat([labels, torch.full_like(labels, IGNORE_INDEX)])
        ids = None if ids is None else torch.cat([ids, ids])
    return Batch(hidden, weight, labels, ids)
