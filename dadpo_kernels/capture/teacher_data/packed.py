"""Decodes DistillKit's packed log-probabilities (distillkit/compression: bitpack, config, monotonic_logprobs).

A token's row of `compressed_logprobs` is a byte string without padding between its parts:

    the first exact_k values        in exact_dtype
    a coefficient for each term     in term_dtype; the other values are fitted by sum_i c_i t^i with t = 0, 1, ...
    for each bin of residuals       a scale in scale_dtype, then num_elements integers of element_bits bits

The values fall, but a fit of them may not. With `delta_encoding`, all values are differences to the one before. The
row of `bytepacked_indices` holds k ids of ceil(log2 d) bits. Integers are packed from their highest bit on, and zero
bits fill the last byte.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

_DTYPES = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64")}


class Bin(NamedTuple):
    """Residuals of the fit, in the order of the values: `number` integers of `bits` bits, times a scale."""

    scale_dtype: torch.dtype
    bits: int
    number: int


class Packing(NamedTuple):
    """DistillKit's `DistributionQuantizationConfig`, by its own names where they are not the same."""

    d: int
    k: int
    exact_k: int
    exact_dtype: torch.dtype
    terms: tuple[int | str, ...]  # polynomial_terms
    term_dtype: torch.dtype
    bins: tuple[Bin, ...]  # residual_bins
    delta_encoding: bool
    normalize_t: bool

    @property
    def id_bits(self) -> int:
        return (self.d - 1).bit_length()

    @property
    def id_bytes(self) -> int:
        return -(-self.k * self.id_bits // 8)

    @property
    def value_bytes(self) -> int:
        bins = sum(b.scale_dtype.itemsize - (-b.bits * b.number // 8) for b in self.bins)
        return self.exact_k * self.exact_dtype.itemsize + len(self.terms) * self.term_dtype.itemsize + bins


def read_packing(path: Path) -> Packing:
    """The packing that a YAML file describes: the `compression_config.yaml` that DistillKit writes beside its data, or
    a configuration of its training, which has it under `teacher: logprob_compressor`.

    Raises:
        ValueError: the file is not YAML, a field is missing, unknown or of another type, or the fields contradict.
    """
    import yaml

    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not YAML ({error})") from None
    if isinstance(config, dict) and isinstance(config.get("teacher"), dict):
        config = config["teacher"].get("logprob_compressor")
    if not isinstance(config, dict):
        raise ValueError(f"{path} does not hold the fields of a logprob_compressor, such as d, k and exact_k")
    fields = _Fields(path, config)
    packing = Packing(
        d=fields.take("d", int),
        k=fields.take("k", int),
        exact_k=fields.take("exact_k", int),
        exact_dtype=fields.dtype("exact_dtype", "float32"),
        terms=tuple(fields.take("polynomial_terms", list, None) or ()),
        term_dtype=fields.dtype("term_dtype", "float32"),
        bins=tuple(_bin(path, values) for values in fields.take("residual_bins", list)),
        delta_encoding=fields.take("delta_encoding", bool, True),
        normalize_t=fields.take("normalize_t", bool, False),
    )
    fields.take("error_diffusion", bool, False)  # matters to the encoder only
    fields.finish()
    if not (2 <= packing.d < 2**31 and 0 <= packing.exact_k <= packing.k <= packing.d and packing.k > 0):
        raise ValueError(f"{path}: d={packing.d}, k={packing.k}, exact_k={packing.exact_k}: 0 <= exact_k <= k <= d")
    if sum(b.number for b in packing.bins) > packing.k - packing.exact_k:
        raise ValueError(f"{path}: residual_bins hold more than the k - exact_k values that are not exact")
    for term in packing.terms:
        if term not in ("sqrt", "exp") and (type(term) is not int or term < 0):
            raise ValueError(f"{path}: polynomial_terms holds {term!r}: an exponent, 'sqrt' or 'exp' is needed")
    return packing


def unpack_ids(packed: np.ndarray, packing: Packing) -> np.ndarray:
    """Token ids int64 `[T, k]` from uint8 `[T, id_bytes]`."""
    return _integers(packed, packing.id_bits, packing.k)


def unpack_logps(packed: np.ndarray, packing: Packing) -> np.ndarray:
    """Log-probabilities float64 `[T, k]`, in the order of the ids, from uint8 `[T, value_bytes]`."""
    at = 0

    def values(dtype: torch.dtype, number: int) -> Tensor:
        nonlocal at
        part = packed[:, at : at + number * dtype.itemsize]
        at += part.shape[1]
        return torch.from_numpy(part.copy()).view(dtype) if part.size else torch.zeros(len(packed), number)

    exact = values(packing.exact_dtype, packing.exact_k)
    coefficients = values(packing.term_dtype, len(packing.terms))
    rest = torch.zeros(len(packed), packing.k - packing.exact_k)
    first = 0
    for scale_dtype, bits, number in packing.bins:
        scale = values(scale_dtype, 1).float()
        size = -(-bits * number // 8)
        integers = torch.from_numpy(_integers(packed[:, at : at + size], bits, number))
        at += size
        # One bit stands for -1 and 1, several for -2^(bits - 1) and up.
        signed = 2 * integers - 1 if bits == 1 else integers - 2 ** (bits - 1)
        rest[:, first : first + number] = signed * scale
        first += number
    if packing.terms:
        rest = rest + (_powers(packing) * coefficients[:, None]).sum(-1)
    logps = torch.cat([exact.double(), rest.double()], 1)
    return (logps.cumsum(1) if packing.delta_encoding else logps).numpy()


def _powers(packing: Packing) -> Tensor:
    """`[k - exact_k, terms]`, in the dtype in which the encoder evaluated its fit before it took the residuals."""
    number, dtype = packing.k - packing.exact_k, packing.term_dtype
    t = torch.linspace(0, 1, number, dtype=dtype) if packing.normalize_t else torch.arange(number, dtype=dtype)
    return torch.stack([t**term if isinstance(term, int) else getattr(t, term)() for term in packing.terms], -1)


def _integers(packed: np.ndarray, bits: int, number: int) -> np.ndarray:
    unpacked = np.unpackbits(packed, axis=1, count=bits * number).reshape(len(packed), number, bits)
    return unpacked @ (1 << np.arange(bits - 1, -1, -1, dtype=np.int64))


def _bin(path: Path, values: Any) -> Bin:
    if not isinstance(values, dict):
        raise ValueError(f"{path}: residual_bins must hold mappings of scale_dtype, element_bits and num_elements")
    fields = _Fields(path, values)
    bins = Bin(fields.dtype("scale_dtype"), fields.take("element_bits", int), fields.take("num_elements", int))
    fields.finish()
    if not (1 <= bins.bits <= 32 and bins.number >= 1):
        raise ValueError(f"{path}: element_bits={bins.bits}, num_elements={bins.number}: 1 to 32 bits are supported")
    return bins


_REQUIRED = object()


class _Fields:
    """Takes the fields of a mapping one by one and checks their types."""

    def __init__(self, path: Path, values: dict[Any, Any]) -> None:
        self._path = path
        self._left = dict(values)

    def take(self, name: str, kind: type, default: Any = _REQUIRED) -> Any:
        value = self._left.pop(name, default)
        if value is _REQUIRED or (value is not default and type(value) is not kind):
            given = "is missing" if value is _REQUIRED else f"is {value!r}"
            raise ValueError(f"{self._path}: {name} {given}, a {kind.__name__} is needed")
        return value

    def dtype(self, name: str, default: Any = _REQUIRED) -> torch.dtype:
        value = self.take(name, str, default)
        if value not in _DTYPES:
            raise ValueError(f"{self._path}: {name} is {value!r}: choose one of {', '.join(_DTYPES)}")
        return _DTYPES[value]

    def finish(self) -> None:
        if self._left:
            raise ValueError(f"{self._path}: unknown {', '.join(map(str, self._left))}: a packing has no such field")
