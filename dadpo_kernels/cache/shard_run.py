"""One pass over preference pairs, shard after shard: what a model's and a server's have in common."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
from tqdm import tqdm

from .format import REFERENCE_SCHEMA, TEACHER_SCHEMA, Targets, reference_row, teacher_row
from .pairs import Pair
from .shards import ShardWriter

# A shard's number and its pairs -> each pair with the targets of its chosen and its rejected answer, in any order.
Score = Callable[[int, Sequence[Pair]], Iterable[tuple[Pair, Targets, Targets]]]


class RowKind(NamedTuple):
    """How a pair and the targets of its answers become a row."""

    schema: pa.Schema
    make_row: Callable[[Pair, Targets, Targets], dict[str, Any]]


TEACHER_ROWS = RowKind(TEACHER_SCHEMA, teacher_row)
REFERENCE_ROWS = RowKind(REFERENCE_SCHEMA, reference_row)


def plan_shards(pairs: Sequence[Pair], shard_tokens: int) -> list[list[Pair]]:
    """Pairs by falling length, so that a batch is padded little and one that does not fit fails at once; cut into
    shards of `shard_tokens` answer tokens or slightly more. Depends on nothing but its arguments."""
    shards: list[list[Pair]] = []
    room = 0
    for pair in sorted(pairs, key=lambda pair: (-pair.length, pair.index)):
        if room <= 0:
            shards.append([])
            room = shard_tokens
        shards[-1].append(pair)
        room -= pair.answer_tokens
    return shards


def run_pass(
    pairs: Sequence[Pair], writer: ShardWriter, kind: RowKind, score: Score, *, shard_tokens: int, progress: bool
) -> None:
    """Score and write the shards that `writer` lacks; of several processes, each takes its share of them.

    A shard's rows are in the order of the plan whatever the order of `score`, so a cache does not depend on how often
    it was interrupted, nor on the number of processes.
    """
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens must be at least 1, got {shard_tokens}")
    done = writer.manifest.index()
    rank, size = writer.ranks
    # A shard is written whole, so its first pair stands for it.
    missing = [(n, shard) for n, shard in enumerate(plan_shards(pairs, shard_tokens)) if shard[0].index not in done]
    mine = missing[rank::size]
    initial = sum(shard.tokens for shard in writer.manifest.shards) if size == 1 else 0
    bar = tqdm(
        total=initial + sum(pair.answer_tokens for _, shard in mine for pair in shard),
        initial=initial,
        unit="tok",
        unit_scale=True,
        desc=writer.manifest.kind if size == 1 else f"{writer.manifest.kind}, process 1 of {size}",
        disable=not progress or rank > 0,
    )
    with bar:
        for number, shard in mine:
            rows, max_id = {}, 0
            for pair, chosen, rejected in score(number, shard):
                rows[pair.index] = kind.make_row(pair, chosen, rejected)
                topk_ids = [answer["topk_ids"] for answer in (chosen, rejected) if "topk_ids" in answer]
                max_id = max(max_id, *(int(ids.max(initial=0)) for ids in (*pair.ids, *topk_ids)))
                bar.update(pair.answer_tokens)
            table = pa.Table.from_pylist([rows[pair.index] for pair in shard], kind.schema)
            writer.write_shard(number, table, tokens=sum(pair.answer_tokens for pair in shard), max_id=max_id)
