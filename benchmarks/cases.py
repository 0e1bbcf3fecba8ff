"""The inputs that every variant is measured on: two preference pairs at a language-model head.

Four sequences of equal length (chosen, chosen, rejected, rejected); the first half of each is the prompt, masked.

- `smollm2`: hidden states of SmolLM2-135M-Instruct on real text, with its own head (H=576, V=49,152).
- `qwen2.5-0.5b`: that model's shapes (H=896, V=151,936) with a synthetic head. Random logits would be nearly uniform,
  which no trained model's are, so they are made peaked: each hidden state is a mixture of a few random rows of the
  head, the most probable one standing out by a margin that varies from token to token, plus noise.
  `peakedness` reports the resulting label probability and top-64 mass beside the timings.

The teacher is the same head on slightly perturbed hidden states: its true top-64, the realised token and the tail.

One liberty makes a fair comparison possible. Liger's loss takes no precomputed reference log-probabilities, so the
references are chosen such that the mixture `beta_ref ref + beta_teacher teacher` is the same for both answers of a
pair. daDPO depends on its difference alone, so Liger's reference-free loss is then the very same function, and every
variant can be held against one float64 gradient.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dadpo_kernels import TeacherTargets, linear_topk_logps

CASES = {"smollm2": "SmolLM2-135M head, real hidden states", "qwen2.5-0.5b": "Qwen2.5-0.5B shapes, synthetic"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SEQUENCES = 4
TOP_K = 64
IGNORE_INDEX = -100
BETA_REF = BETA_TEACHER = 0.01  # `with_teacher` needs them equal
KL_WEIGHT = 0.1
PERTURBATION = 0.1  # of the hidden states' root mean square: the distance between student and teacher


class Inputs(NamedTuple):
    """`hidden [4, T, H]`, `weight [V, H]`, `labels [4, T]` int64, `ref_logps [4]` float32, and teacher targets."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    ref_logps: Tensor
    teacher: TeacherTargets

    @property
    def valid(self) -> Tensor:
        """`[4 T]` bool: the flattened positions that have a label."""
        return self.labels.flatten() != IGNORE_INDEX

    @property
    def mixture_logps(self) -> Tensor:
        """`[4]`: the reference with which plain DPO at `beta_ref + beta_teacher` equals daDPO."""
        teacher = self.teacher.label_logps.sum(-1)
        return (BETA_REF * self.ref_logps + BETA_TEACHER * teacher) / (BETA_REF + BETA_TEACHER)

    def window(self, length: int) -> "Inputs":
        """The `length` positions around the end of the prompt: the same problem, but tiny, with answer tokens."""
        total, prompt = self.labels.shape[1], int((self.labels[0] == IGNORE_INDEX).sum())
        start = min(max(prompt - length // 2, 0), total - length)
        part = slice(start, start + length)
        teacher = TeacherTargets(*(t[:, part] for t in self.teacher))
        return self._replace(hidden=self.hidden[:, part], labels=self.labels[:, part], teacher=teacher)


def peaked_head(
    tokens: int, hidden_size: int, vocab_size: int, seed: int = 0, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """A random head and hidden states whose softmax is peaked as a trained model's is.

    Eight candidate tokens per position have logits near `s, s - 1, s - 2, ...` with `s ~ N(18, 3)`; all other logits
    are about `N(0, 2)` (noise, and the overlap of random rows: `hidden_size` must be hundreds), together worth a logit
    of `log V + 2`, 13.9 at V=151,936. The label is drawn from the candidates' softmax.

    Returns:
        `hidden [tokens, hidden_size]`, `weight [vocab_size, hidden_size]` float32, `labels [tokens]` int64.
    """
    generator = torch.Generator(device).manual_seed(seed)
    drawn = {"generator": generator, "device": device}
    weight = torch.randn(vocab_size, hidden_size, **drawn) / hidden_size**0.5
    candidates = torch.randint(vocab_size, (tokens, 8), **drawn)
    logits = 18 + 3 * torch.randn(tokens, 1, **drawn) - torch.arange(8, device=device)
    hidden = 1.5 * torch.randn(tokens, hidden_size, **drawn)
    hidden += torch.einsum("nc,nch->nh", logits, weight[candidates])
    labels = candidates.gather(1, torch.multinomial(logits.softmax(-1), 1, generator=generator))[:, 0]
    return hidden, weight, labels


def with_teacher(
    hidden: Tensor, weight: Tensor, labels: Tensor, top_k: int = TOP_K, seed: int = 0, masked: float = 0.5
) -> Inputs:
    """Flat `hidden [N, H]` and `labels [N]` -> two pairs, a teacher and references (see above).

    The first `masked` of every sequence is the prompt.
    """
    hidden = hidden.unflatten(0, (SEQUENCES, -1))
    labels = labels.long().unflatten(0, (SEQUENCES, -1)).clone()
    labels[:, : int(labels.shape[1] * masked)] = IGNORE_INDEX
    valid = labels != IGNORE_INDEX

    noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(seed + 1)).to(hidden.device)
    scale = PERTURBATION * hidden.float().square().mean().sqrt()
    perturbed = (hidden.float() + scale * noise).to(hidden.dtype)
    at_answers = linear_topk_logps(perturbed[valid], weight, top_k, labels=labels[valid])

    def scatter(values: Tensor) -> Tensor:
        out = values.new_zeros(*labels.shape, *values.shape[1:])
        out[valid] = values
        return out

    assert at_answers.label is not None  # labels were given
    teacher = TeacherTargets(
        scatter(at_answers.label.float()),
        scatter(at_answers.ids),
        scatter(at_answers.logps.float()),
        scatter(at_answers.tail.float()),
    )
    # With equal betas, an answer's reference may be the teacher's value of the other answer: their mean is the pair's.
    ref_logps = teacher.label_logps.sum(-1).roll(SEQUENCES // 2)
    return Inputs(hidden, weight, labels, ref_logps, teacher)


def make_inputs(case: str, dtype: torch.dtype, tokens: int) -> Inputs:
    """The inputs of one of `CASES`, with `tokens` positions in all, half of them masked."""
    if case == "smollm2":
        from examples.smollm2 import smollm2_hidden

        return with_teacher(*smollm2_hidden(tokens, dtype))
    hidden, weight, labels = peaked_head(tokens, hidden_size=896, vocab_size=151_936)
    return with_teacher(hidden.to(dtype), weight.to(dtype), labels)


def peakedness(inputs: Inputs) -> dict[str, float]:
    """How confident the teacher (a near copy of the student) is: mean label probability and mean top-k mass."""
    at_answers = inputs.labels != IGNORE_INDEX
    return {
        "label_probability": inputs.teacher.label_logps[at_answers].exp().mean().item(),
        "topk_mass": inputs.teacher.topk_logps[at_answers].exp().sum(-1).mean().item(),
    }


def save_inputs(inputs: Inputs, path: Path) -> None:
    fields = {**inputs._asdict(), **inputs.teacher._asdict()}
    fields.pop("teacher")
    save_file({name: value.contiguous() for name, value in fields.items()}, path)


def load_inputs(path: Path) -> Inputs:
    # Copies: what is mapped from the file would be counted as memory of whoever touches it first.
    stored = {name: value.clone() for name, value in load_file(path).items()}
    teacher = TeacherTargets(*(stored.pop(name) for name in TeacherTargets._fields))
    return Inputs(**stored, teacher=teacher)
