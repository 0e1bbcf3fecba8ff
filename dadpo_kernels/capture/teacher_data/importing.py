"""Writes teacher data of other frameworks to a cache, after it has checked every value."""

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import numpy as np
from tqdm import tqdm

from ...cache.fold import fold
from ...cache.format import Targets
from ...cache.pairs import Pair
from ...cache.shard_run import TEACHER_ROWS, write_shards
from ...cache.shards import Manifest, writing
from ...cache.vocabulary import VOCABULARY, vocabulary, vocabulary_file
from ..pairs import TokenizedPairs
from ..sources import records
from ..teacher import teacher_settings
from . import axolotl, distillkit, trl, verl
from .answers import Answer, answers
from .scored import Scored, TeacherDataError

_MODULES: dict[str, Any] = {"axolotl": axolotl, "distillkit": distillkit, "trl": trl, "verl": verl}
_DTYPES = {"label_logps": "<f4", "topk_ids": "<i4", "topk_logps": "<f4", "topk_tail": "<f4"}
# Probabilities that sum to one this closely at this share of all positions were renormalised: a teacher leaves more
# than that outside its top k at some of them.
_ROUNDING, _SHARE = 1e-5, 0.99
_ONE_SIDE = "there are no rejected answers: the cache serves a stage without preference loss (both betas 0)"


class Imported(NamedTuple):
    """What `import_teacher_data` did.

    Attributes:
        records: number of records read.
        skipped: for each record that was left out, the reason.
        tokens: number of answer tokens.
        bounded: how many of them have a bound as their label's log-probability.
        lost: what data in this format do not hold.
    """

    manifest: Manifest
    records: int
    skipped: list[str]
    tokens: int
    bounded: int
    lost: tuple[str, ...]


def import_teacher_data(
    source: str | Path,
    out: str | Path,
    *,
    data_format: str,
    tokenizer: Any,
    vocab_size: int,
    model: str = "",
    compression_config: str | Path | None = None,
    k: int | None = None,
    limit: int | None = None,
    on_error: Literal["stop", "skip"] = "stop",
    label_bound: bool = False,
    shard_tokens: int = 65536,
    progress: bool = False,
) -> Imported:
    """Write a teacher cache of `source`, whose pairs have a chosen answer only: there is nothing to prefer it to.

    Each run of target tokens becomes a pair: the tokens before it are the prompt, so that every target keeps the
    context that the teacher saw. Pairs are numbered in the order of the source. The import checks what `dadpo cache
    verify` does and, over the whole source, that the rows are about the right tokens and have not been renormalised.

    An interrupted import resumes as a capture does.

    Args:
        source: see `sources.records`, or a directory of Parquet files, which are read in the order of their numbers.
        data_format: axolotl, distillkit, trl or verl; the module of this name says which columns it needs.
        tokenizer: of teacher and student.
        vocab_size: of the teacher's LM head.
        model: the teacher's name, for people.
        compression_config: for distillkit, see `packed.read_packing`; None takes the file beside the data.
        k: entries per position; None takes the largest number that all positions have.
        limit: read the first records only.
        on_error: what to do with a record that cannot be used.
        label_bound: where a realised token is not listed and its log-probability is unknown, store the largest value
            that it can have, instead of treating this as an error. Only the preference loss reads these values, and
            it needs rejected answers.
        shard_tokens: as for a capture.
        progress: show progress bars.

    Raises:
        TeacherDataError: a record cannot be used, none is left, or the source was renormalised or is shifted.
        ValueError: an argument is wrong, or the source or its configuration cannot be read.
        CacheError: `out` holds another cache.
    """
    if data_format not in _MODULES:
        raise ValueError(f"format {data_format!r}: choose one of {', '.join(_MODULES)}")
    if compression_config is not None and data_format != "distillkit":
        raise ValueError(f"a compression configuration belongs to the format distillkit, not to {data_format}")
    for name, number in (("limit", limit), ("k", k)):
        if number is not None and number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    module = _MODULES[data_format]
    if module is distillkit:
        config = None if compression_config is None else Path(compression_config)
        read = distillkit.reader(Path(source), tokenizer, config)
    else:
        read = module.read
    lost = (*module.LOST, _ONE_SIDE)

    # Check everything once, and keep the targets in a file without a name until it is known how to order them.
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=out) as file:
        spool, survey = _Spool(file), _Survey(vocab_size)
        skipped: list[str] = []
        count = 0
        for where, record in tqdm(
            islice(_records(source), limit), desc="reading", unit="record", disable=not progress
        ):
            count += 1
            try:
                runs: list[Answer] = []
                for scored in read(where, record):
                    survey.add(scored)
                    runs += answers(where, scored, vocab_size, k, label_bound)
            except TeacherDataError as error:
                if on_error == "stop":
                    raise TeacherDataError(f"{error}; --on-error skip leaves such records out") from None
                skipped.append(str(error))
                continue
            for answer in runs:
                spool.add(answer)
        if not spool.pairs:
            raise TeacherDataError(
                f"{source} has no target that can be used"
                + (f": {len(skipped)} records were skipped; the first is {skipped[0]}" if skipped else "")
            )
        survey.check(source)

        # Write them.
        data = TokenizedPairs(spool.pairs, None, 0, [], spool.digest.hexdigest())
        settings = teacher_settings(tokenizer, data, spool.fewest if k is None else k, vocab_size, None, shard_tokens)
        settings |= {"imported_from": data_format, "label_bound": label_bound}
        info = {"model": model, "lost": list(lost), "skipped_records": len(skipped)}
        files = {VOCABULARY: vocabulary_file(vocabulary(tokenizer))}

        def score(number: int, shard: Sequence[Pair]) -> Iterator[tuple[Pair, Targets, Targets]]:
            for pair in shard:
                targets = fold(f"pair {pair.index}", spool.read(pair), settings["k"], vocab_size)
                yield pair, targets, {name: values[:0] for name, values in targets.items()}

        with writing(out, "teacher", settings, info, files) as writer:
            write_shards(spool.pairs, writer, TEACHER_ROWS, score, shard_tokens=shard_tokens, progress=progress)
    return Imported(writer.manifest, count, skipped, spool.tokens, spool.bounded, lost)


class _Spool:
    """Keeps pairs in memory and their targets in a file."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._places: list[tuple[int, int]] = []  # of each pair: where its targets begin, and their k
        self.pairs: list[Pair] = []
        self.digest = hashlib.sha256()  # over all tokens and targets, so that another source is not resumed with
        self.fewest = 2**31
        self.tokens = self.bounded = 0

    def add(self, answer: Answer) -> None:
        pair = Pair(len(self.pairs), answer.prompt_ids, answer.answer_ids, answer.answer_ids[:0])
        k = answer.targets["topk_ids"].shape[1]
        content = b"".join(answer.targets[name].astype(dtype).tobytes() for name, dtype in _DTYPES.items())
        self._places.append((self._file.tell(), k))
        self._file.write(content)
        for part in (np.array([len(pair.prompt_ids), len(pair.chosen_ids), k]), *pair.ids[:2]):
            self.digest.update(part.astype("<i8").tobytes())
        self.digest.update(content)
        self.pairs.append(pair)
        self.fewest = min(self.fewest, k)
        self.tokens += len(pair.chosen_ids)
        self.bounded += answer.bounded

    def read(self, pair: Pair) -> Targets:
        place, k = self._places[pair.index]
        self._file.seek(place)
        targets = {}
        for name, dtype in _DTYPES.items():
            shape = (len(pair.chosen_ids), k) if name in ("topk_ids", "topk_logps") else (len(pair.chosen_ids),)
            content = self._file.read(int(np.prod(shape)) * 4)
            targets[name] = np.frombuffer(content, dtype).reshape(shape)
        return targets


class _Survey:
    """Finds what no single record tells: rows about other tokens than they should be, and renormalised rows."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._hits = {0: 0, -1: 0, 1: 0}
        self._positions = self._sum_to_one = 0

    def add(self, scored: Scored) -> None:
        for offset in self._hits:
            self._hits[offset] += scored.hits(offset)
        logps = scored.topk_logps[1:][scored.is_target[1:]]
        self._positions += len(logps)
        if logps.shape[1] < self._vocab_size:
            with np.errstate(over="ignore"):
                self._sum_to_one += int((np.abs(np.exp(logps).sum(1) - 1) <= _ROUNDING).sum())

    def check(self, source: str | Path) -> None:
        best = max(self._hits, key=self._hits.__getitem__)
        if self._hits[best] > self._hits[0]:
            raise TeacherDataError(
                f"{source}: {self._hits[0]} of the rows list the token that they should be about, and "
                f"{self._hits[best]} the one {'before' if best < 0 else 'after'} it: the rows are shifted by one"
            )
        if self._sum_to_one > _SHARE * self._positions:
            raise TeacherDataError(
                f"{source}: at {self._sum_to_one} of {self._positions} tokens the probabilities of the top k sum to "
                "one, so they were renormalised and the mass outside is lost; targets need it. Score the sequences "
                "again with `dadpo teacher`, or export the data without normalisation"
            )


def _records(source: str | Path) -> Iterator[tuple[str, Any]]:
    path = Path(source)
    parts = sorted(path.glob("*.parquet"), key=lambda part: (len(part.name), part.name)) if path.is_dir() else []
    for part in parts:
        yield from records(part)
    if not parts:
        yield from records(source)
