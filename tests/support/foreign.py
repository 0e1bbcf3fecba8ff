"""Teacher data as other frameworks write them, made of a random teacher whose whole distribution is known."""

from typing import NamedTuple

import numpy as np

VOCAB = 300


class Sequence(NamedTuple):
    """S tokens, the tokens to learn, and the teacher's log-probabilities `[S, VOCAB]`; row t is about token t."""

    ids: np.ndarray
    learned: np.ndarray
    logps: np.ndarray

    def top(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        ids = np.argsort(-self.logps, 1)[:, :k]
        return ids, np.take_along_axis(self.logps, ids, 1)

    def label_logps(self) -> np.ndarray:
        return self.logps[np.arange(len(self.ids)), self.ids]


def scored(seed: int = 0, length: int = 24, prompt: int = 7, best: int = 4) -> Sequence:
    """Tokens that are each among the `best` ones of the teacher's distribution."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(length, VOCAB)) * 3
    logps = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    ids = np.argsort(-logps, 1)[np.arange(length), rng.integers(0, best, length)]
    return Sequence(ids, np.arange(length) >= prompt, logps.astype(np.float32).astype(float))


def axolotl(sequence: Sequence, k: int = 8, *, about_next: bool = True, renormalised: bool = False) -> dict:
    ids, logps = sequence.top(k)
    if renormalised:
        logps = (logps - np.log(np.exp(logps).sum(1, keepdims=True))).astype(np.float32)
    mask = np.repeat(sequence.learned[:, None], k, 1).astype(int)
    rows = {"target_token_ids": (ids, 0), "target_logprobs": (logps, -1e9), "target_mask": (mask, 0)}
    if about_next:
        rows = {name: (np.vstack([v[1:], np.full_like(v[:1], pad)]), pad) for name, (v, pad) in rows.items()}
    return {
        "input_ids": sequence.ids.tolist(),
        "labels": np.where(sequence.learned, sequence.ids, -100).tolist(),
        "attention_mask": [1] * len(sequence.ids),
        **{name: values.tolist() for name, (values, _) in rows.items()},
    }


def verl(sequence: Sequence, k: int = 8, *, left: int = 3, right: int = 2, names=("teacher_ids", "teacher_logprobs")):
    """As in a batch: padded on both sides, with a response_mask of the response's width."""
    ids, logps = sequence.top(k)
    length, start = len(sequence.ids), int(sequence.learned.argmax())
    outer = ((left, right), (0, 0))
    return {
        "input_ids": np.pad(sequence.ids, (left, right)).tolist(),
        "attention_mask": np.pad(np.ones(length, int), (left, right)).tolist(),
        "response_mask": np.pad(sequence.learned[start:].astype(int), (0, right)).tolist(),
        names[0]: np.pad(np.vstack([ids[1:], np.zeros((1, k), int)]), outer).tolist(),
        names[1]: np.pad(np.vstack([logps[1:], np.zeros((1, k))]), outer).tolist(),
    }


def trl(sequences: list[Sequence], k: int = 8, *, padded: int = 0) -> dict:
    """One call of `get_sequence_logprobs`, whose rows end with `padded` places without an entry."""
    record = {name: [] for name in ("sequences", "prompt_lengths")}
    record |= {name: [] for name in ("logprobs", "logprob_token_ids", "actual_logprobs", "actual_token_ids")}
    for sequence in sequences:
        start = int(sequence.learned.argmax())
        ids, logps = (np.array(values[start:]) for values in sequence.top(k))
        ids[:, k - padded :], logps[:, k - padded :] = 0, -np.inf
        record["sequences"].append(sequence.ids.tolist())
        record["prompt_lengths"].append(start)
        record["logprobs"].append(logps.tolist())
        record["logprob_token_ids"].append(ids.tolist())
        record["actual_logprobs"].append(sequence.label_logps()[start:, None].tolist())
        record["actual_token_ids"].append(sequence.ids[start:, None].tolist())
    return record


PACKING = {"d": VOCAB, "k": 8, "exact_k": 8, "exact_dtype": "float32", "residual_bins": [], "delta_encoding": False}


def distillkit(sequence: Sequence, packing: dict = PACKING) -> dict:
    """S - 1 rows, the first about token 1, packed as DistillKit's description of its format says."""
    ids, logps = (values[1:] for values in sequence.top(packing["k"]))
    return {
        "input_ids": sequence.ids.tolist(),
        "compressed_logprobs": [[*pack_values(row, packing)] for row in logps],
        "bytepacked_indices": [[*pack_bits(row, int(np.ceil(np.log2(packing["d"]))))] for row in ids],
    }


def pack_bits(values, bits: int) -> bytes:
    text = "".join(f"{int(value):0{bits}b}" for value in values)
    text += "0" * (-len(text) % 8)
    return bytes(int(text[at : at + 8], 2) for at in range(0, len(text), 8))


def pack_values(logps: np.ndarray, packing: dict) -> bytes:
    values = np.diff(logps, prepend=0) if packing["delta_encoding"] else logps
    exact_k, terms = packing["exact_k"], packing.get("polynomial_terms") or []
    content = pack_floats(values[:exact_k], packing["exact_dtype"])
    rest = values[exact_k:]
    if terms:
        number = len(rest)
        t = np.linspace(0, 1, number) if packing.get("normalize_t") else np.arange(number)
        x = np.stack([np.sqrt(t) if term == "sqrt" else np.exp(t) if term == "exp" else t**term for term in terms], -1)
        coefficients = np.linalg.lstsq(x, rest, rcond=None)[0]
        content += pack_floats(coefficients, "float32")
        rest = rest - x @ coefficients.astype(np.float32)
    for one in packing["residual_bins"]:
        bits, part = one["element_bits"], rest[: one["num_elements"]]
        most = 1 if bits == 1 else 2 ** (bits - 1)
        scale = np.array([np.abs(part).max() / most]).astype(np.float16)
        content += pack_floats(scale, one["scale_dtype"])
        if bits == 1:
            content += pack_bits(part > 0, 1)
        else:
            content += pack_bits(np.clip(np.round(part / float(scale[0])), -most, most - 1) + most, bits)
        rest = rest[one["num_elements"] :]
    return content


def pack_floats(values: np.ndarray, dtype: str) -> bytes:
    if dtype != "bfloat16":
        return np.asarray(values, dtype).tobytes()
    bits = np.asarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # to the nearest, ties to even
    return rounded.astype("<u2").tobytes()
