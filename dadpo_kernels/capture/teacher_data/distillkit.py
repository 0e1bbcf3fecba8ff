"""DistillKit's captures (distillkit/sample_logits_vllm.py): packed log-probabilities in Parquet.

A record is one sequence: `input_ids` `[S]`, and rows of bytes in `compressed_logprobs` and `bytepacked_indices`. Row j
is about token j + 1: there are S - 1 rows, or S with one after the end. All tokens are learned, unless there is a
column `labels`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .packed import Packing, read_packing, unpack_ids, unpack_logps
from .scored import NO_ENTRY, Reader, Scored, TeacherDataError, columns, integers, learned, matrix

LOST = (
    "entries after the first exact_k are the values of a fit, which a --k up to exact_k leaves out, and all are as "
    "fine as the packing's numbers",
    "the mass outside the top k is one minus the mass inside, no finer than that",
    "a realised token outside the top k has no log-probability",
    "there is no prompt: every token after the first is learned (but for one padding token at the end), and documents "
    "that share a sequence see each other",
)
_CONFIG = "compression_config.yaml"
_EXCESS = 0.05  # by how much the packing may push the sum of probabilities above one


def reader(source: Path, tokenizer: Any, compression_config: Path | None) -> Reader:
    if compression_config is None:
        compression_config = (source if source.is_dir() else source.parent) / _CONFIG
        if not compression_config.is_file():
            raise ValueError(
                f"{compression_config} is missing: give the configuration with which DistillKit packed the data as "
                "--compression-config"
            )
    packing = read_packing(compression_config)
    # DistillKit appends a padding token, so that the engine scores the last token of a text as part of its prompt.
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id != tokenizer.eos_token_id else None

    def read(where: str, record: Any) -> Iterator[Scored]:
        yield _sequence(where, record, packing, pad)

    return read


def _sequence(where: str, record: Any, packing: Packing, pad: int | None) -> Scored:
    if isinstance(record, dict) and "compressed_logprobs" not in record and "coeffs" in record:
        raise TeacherDataError(
            f"{where}: packed_indices, exact_values and coeffs are DistillKit's legacy format. Its values can be "
            "logits less their mean, of which no log-probabilities can be made: capture again"
        )
    names = ("input_ids", "compressed_logprobs", "bytepacked_indices")
    ids, values, indices = columns(where, record, *names)
    ids = integers(where, names[0], ids)
    length = len(values) if isinstance(values, list) else 0
    if len(ids) < 2 or length not in (len(ids) - 1, len(ids)):
        raise TeacherDataError(f"{where}: {length} rows of {names[1]} for {len(ids)} tokens: one less is needed")
    logps = unpack_logps(_bytes(where, names[1], values, length, packing.value_bytes), packing)[: len(ids) - 1]
    topk_ids = unpack_ids(_bytes(where, names[2], indices, length, packing.id_bytes), packing)[: len(ids) - 1]

    # No fitted value is above the exact ones, which come first.
    if packing.exact_k:
        logps = np.minimum(
            logps, np.where(np.arange(packing.k) < packing.exact_k, np.inf, logps[:, packing.exact_k - 1, None])
        )

    # The tokens that are learned.
    is_target = learned(where, record, ids)
    is_target[-1] &= pad is None or ids[-1] != pad

    # Bring a sum that the packing has pushed above one back to it.
    with np.errstate(over="ignore"):
        total = np.where(logps > NO_ENTRY, np.exp(logps), 0).sum(1)
    logps -= np.log(np.where((total > 1) & (total <= 1 + _EXCESS), total, 1))[:, None]
    return Scored(
        ids,
        is_target,
        np.concatenate([np.zeros((1, packing.k), np.int64), topk_ids]),
        np.concatenate([np.full((1, packing.k), -np.inf), logps]),
        np.full(len(ids), np.nan),
    )


def _bytes(where: str, name: str, value: Any, length: int, width: int) -> np.ndarray:
    rows = matrix(where, name, value, length, kinds="iu", fill=0)
    if rows.shape[1] != width or any(len(row or []) != width for row in value):
        raise TeacherDataError(
            f"{where}: rows of {name} have {rows.shape[1]} bytes, the configuration gives {width}: it is not the one "
            "with which the data were packed"
        )
    if rows.size and not (rows.min() >= 0 and rows.max() <= 255):
        raise TeacherDataError(f"{where}: {name} holds values that are not bytes")
    return rows.astype(np.uint8)
