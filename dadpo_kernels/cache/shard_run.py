"""Scores preference pairs shard by shard and writes the shards: the loop that all captures share."""

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
from tqdm import tqdm

from .format import REFERENCE_SCHEMA, TEACHER_SCHEMA, Targets, reference_row, teacher_row
from .pairs import Pair
from .shards import ShardWriter

logger = logging.getLogger("dadpo_kernels")

# Takes a shard's number and its pairs; gives each pair with the targets of its chosen and of its rejected answer, in
# any order.
Score = Callable[[int, Sequence[Pair]], Iterable[tuple[Pair, Targets, Targets]]]


class RowKind(NamedTuple):
    """The columns of a row, and the function that makes one from a pair and the targets of its answers."""

    schema: pa.Schema
    make_row: Callable[[Pair, Targets, Targets], dict[str, Any]]


TEACHER_ROWS = RowKind(TEACHER_SCHEMA, teacher_row)
REFERENCE_ROWS = RowKind(REFERENCE_SCHEMA, reference_row)


def plan_shards(pairs: Sequence[Pair], shard_tokens: int) -> list[list[Pair]]:
    """Sort pairs by falling length and cut them into shards of `shard_tokens` answer tokens or slightly more.

    Pairs of similar length need little padding, and a batch that does not fit into memory fails at the beginning. The
    plan depends on the arguments only, so a resumed run makes the same one.
    """
    shards: list[list[Pair]] = []
    room = 0
    for pair in sorted(pairs, key=lambda pair: (-pair.length, pair.index)):
        if room <= 0:
            shards.append([])
            room = shard_tokens
        shards[-1].append(pair)
        room -= pair.answer_tokens
    return shards


def write_shards(
    pairs: Sequence[Pair], writer: ShardWriter, kind: RowKind, score: Score, *, shard_tokens: int, progress: bool
) -> None:
    """Score and write the shards that are not in the writer's manifest.

    Several processes divide these shards among themselves.

    The rows of a shard are in the order of the plan, whatever the order in which `score` gives them. So a cache does
    not depend on the number of interruptions or of processes.

    Raises:
        ValueError: `shard_tokens` is less than 1.
    """
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens must be at least 1, got {shard_tokens}")

    # Divide what is missing. A shard is written as a whole, so its first pair tells whether it is there.
    done = writer.manifest.index()
    rank, size = writer.ranks
    plan = plan_shards(pairs, shard_tokens)
    missing = [(number, shard) for number, shard in enumerate(plan) if shard[0].index not in done]
    share = missing[rank::size]
    logger.debug(
        "%s: %d of %d shards are missing, process %d writes %d", writer.directory, len(missing), len(plan), rank,
        len(share),
    )  # fmt: skip

    # The bar of the first process stands for all of them; it counts what a previous run wrote if it is the only one.
    initial = sum(shard.tokens for shard in writer.manifest.shards) if size == 1 else 0
    bar = tqdm(
        total=initial + sum(pair.answer_tokens for _, shard in share for pair in shard),
        initial=initial,
        unit="tok",
        unit_scale=True,
        desc=writer.manifest.kind if size == 1 else f"{writer.manifest.kind}, process 1 of {size}",
        disable=not progress or rank > 0,
    )

    # Score and write one shard after the other.
    with bar:
        for number, shard in share:
            rows, max_id = {}, 0
            for pair, chosen, rejected in score(number, shard):
                rows[pair.index] = kind.make_row(pair, chosen, rejected)
                topk_ids = [targets["topk_ids"] for targets in (chosen, rejected) if "topk_ids" in targets]
                max_id = max(max_id, *(int(ids.max(initial=0)) for ids in (*pair.ids, *topk_ids)))
                bar.update(pair.answer_tokens)
            table = pa.Table.from_pylist([rows[pair.index] for pair in shard], kind.schema)
            writer.write_shard(number, table, tokens=sum(pair.answer_tokens for pair in shard), max_id=max_id)
