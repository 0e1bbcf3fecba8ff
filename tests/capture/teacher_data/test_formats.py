"""Teacher data of axolotl, DistillKit, TRL and verl: the cache holds what the teacher said, or the import refuses."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from dadpo_kernels.cache.dataset import PairDataset
from dadpo_kernels.cache.errors import CacheSettingsError
from dadpo_kernels.capture.teacher_data.importing import import_teacher_data
from dadpo_kernels.capture.teacher_data.scored import TeacherDataError
from dadpo_kernels.train.config import DaDPOConfig
from dadpo_kernels.train.trainer import DaDPOTrainer
from tests.capture.teacher_data.imported import MAKE, TOKENIZER, assert_true, rows, run
from tests.support import foreign
from tests.support.foreign import VOCAB
from tests.support.tiny import tiny_llama


@pytest.mark.parametrize("data_format", MAKE)
def test_the_cache_holds_what_the_teacher_said(data_format, tmp_path):
    sequences = [foreign.scored(seed, length=20 + seed) for seed in range(5)]
    result = run(tmp_path, data_format, [MAKE[data_format](sequence) for sequence in sequences], shard_tokens=30)
    start = 1 if data_format == "distillkit" else 7
    for row, sequence in zip(rows(tmp_path), sequences, strict=True):
        assert_true(row, sequence, 8, start)
    assert result.tokens == sum(20 + seed - start for seed in range(5))
    assert (result.records, result.skipped, result.bounded) == (5, [], 0)
    assert result.manifest.settings["sides"] == ["chosen"]
    assert len(result.manifest.shards) > 1
    assert any("no rejected answers" in line for line in result.lost)


@pytest.mark.parametrize("data_format", MAKE)
def test_nulls_and_parquet(data_format, tmp_path):
    """Parquet, in a directory of numbered files: the same cache as from JSONL."""
    records = [MAKE[data_format](foreign.scored(seed)) for seed in range(12)]
    run(tmp_path, data_format, records)
    expected = rows(tmp_path)
    parts = tmp_path / "parts"
    parts.mkdir()
    for number, record in enumerate(records):
        pq.write_table(pa.Table.from_pylist([record]), parts / f"data_{number}.parquet")
    (parts / "compression_config.yaml").write_text(yaml.safe_dump(foreign.PACKING))
    import_teacher_data(
        parts, tmp_path / "again" / "cache", data_format=data_format, tokenizer=TOKENIZER, vocab_size=VOCAB
    )
    for a, b in zip(expected, rows(tmp_path / "again"), strict=True):
        assert all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("about_next", [True, False])
def test_axolotl_rows_are_about_the_next_token_or_the_same(about_next, tmp_path):
    sequence = foreign.scored()
    run(tmp_path, "axolotl", [foreign.axolotl(sequence, about_next=about_next)])
    assert_true(rows(tmp_path)[0], sequence, 8, 7)


def test_axolotl_teacher_without_the_first_learned_tokens(tmp_path):
    """The mask fits both versions then; the realised tokens decide."""
    sequence = foreign.scored()
    record = foreign.axolotl(sequence)
    record["target_mask"][6] = record["target_mask"][7] = [0] * 8
    run(tmp_path, "axolotl", [record])
    assert_true(rows(tmp_path)[0], sequence, 8, 9)


@pytest.mark.parametrize("data_format", ["axolotl", "trl", "verl"])
def test_turns_become_pairs_with_all_that_precedes_them(data_format, tmp_path):
    learned = np.isin(np.arange(24), [*range(5, 9), *range(15, 24)])
    sequence = foreign.scored()._replace(learned=learned)
    run(tmp_path, data_format, [MAKE[data_format](sequence)])
    if data_format == "trl":  # whose completion is one run
        assert_true(rows(tmp_path)[0], sequence, 8, 5)
        return
    first, second = rows(tmp_path)
    assert_true(first, sequence, 8, 5, 9)
    assert_true(second, sequence, 8, 15)


def test_nothing_predicts_the_first_token(tmp_path):
    sequence = foreign.scored()._replace(learned=np.full(24, True))
    run(tmp_path, "axolotl", [foreign.axolotl(sequence)])
    assert_true(rows(tmp_path)[0], sequence, 8, 1)


def test_renormalised_data_are_refused(tmp_path):
    with pytest.raises(TeacherDataError, match=r"17 of 17 tokens .* sum to one, so they were renormalised"):
        run(tmp_path, "axolotl", [foreign.axolotl(foreign.scored(), renormalised=True)])


@pytest.mark.parametrize("on_error", ["stop", "skip"])
@pytest.mark.parametrize("by", [1, -1])
def test_shifted_rows_are_refused(on_error, by, tmp_path):
    learned = np.isin(np.arange(24), range(7, 23))  # not the last one: its row would be verl's dummy
    records = [foreign.verl(foreign.scored(seed)._replace(learned=learned)) for seed in range(5)]
    # In these, every wrong row lists its token by chance: skipping the others would leave them.
    chance = foreign.verl(foreign.scored(99)._replace(learned=np.arange(24) == 9), left=0, right=0)
    chance["teacher_ids"][8 - by][0] = chance["input_ids"][9]
    for record in [*records, chance]:
        for name in ("teacher_ids", "teacher_logprobs"):
            record[name] = record[name][-by:] + record[name][:-by]
    message = "they should be about, and .* shifted by one" if on_error == "skip" else "seem to be shifted by one"
    with pytest.raises(TeacherDataError, match=message):
        run(tmp_path, "verl", [*records, chance], on_error=on_error)


def test_verl_recipe_gkd(tmp_path):
    sequence = foreign.scored()
    run(tmp_path, "verl", [foreign.verl(sequence, names=("teacher_topk_indices", "teacher_topk_logps"))])
    assert_true(rows(tmp_path)[0], sequence, 8, 7)


def test_verl_realised_tokens_are_no_distribution(tmp_path):
    record = foreign.verl(foreign.scored(), k=1, left=0, right=0)
    record["teacher_ids"] = [[token] for token in record["input_ids"][1:]] + [[0]]
    with pytest.raises(TeacherDataError, match="as in verl's modes k1 to k3"):
        run(tmp_path, "verl", [record])


def test_trl_knows_labels_outside_the_top_k(tmp_path):
    sequence = foreign.scored(best=30)
    assert (sequence.label_logps() < sequence.top(8)[1][:, -1]).any()
    run(tmp_path, "trl", [foreign.trl([sequence])])
    assert_true(rows(tmp_path)[0], sequence, 8, 7)


def test_trl_batch_and_padding_of_entries(tmp_path):
    """k is what all positions have; the mass of the others is in the tail."""
    sequences = [foreign.scored(seed, best=3) for seed in range(3)]
    run(tmp_path, "trl", [foreign.trl(sequences[:2]), foreign.trl(sequences[2:], padded=3)])
    for row, sequence in zip(rows(tmp_path), sequences, strict=True):
        assert_true(row, sequence, 5, 7)
    with pytest.raises(TeacherDataError, match="token 7 has 5 entries, k=6 are needed"):
        run(tmp_path, "trl", [foreign.trl(sequences, padded=3)], k=6)
    with pytest.raises(CacheSettingsError, match="k was 5 and is 4"):
        run(tmp_path, "trl", [foreign.trl(sequences[:2]), foreign.trl(sequences[2:], padded=3)], k=4)


def test_unknown_labels(tmp_path):
    """Refused, skipped, or bounded: a label outside is no more probable than the last entry, nor than the tail."""
    unlisted, listed = foreign.scored(1, best=30), foreign.scored(2)
    records = [foreign.verl(unlisted), foreign.verl(listed)]
    with pytest.raises(TeacherDataError, match=r"data.jsonl, line 1: \d+ of 17 tokens, .* --label-bound.*--on-error"):
        run(tmp_path, "verl", records)
    result = run(tmp_path, "verl", records, on_error="skip")
    assert len(result.skipped) == 1
    assert_true(rows(tmp_path)[0], listed, 8, 7)

    (tmp_path / "bound").mkdir()
    result = run(tmp_path / "bound", "verl", records, label_bound=True)
    true = unlisted.label_logps()[7:]
    outside = true < unlisted.top(8)[1][7:, -1]
    assert result.bounded == outside.sum() > 0
    assert result.manifest.settings["label_bound"]
    row = rows(tmp_path / "bound")[0]
    assert (row["chosen_label_logps"] >= true - 1e-5).all()
    bound = np.minimum(unlisted.top(8)[1][7:, -1], row["chosen_topk_tail"])
    np.testing.assert_allclose(row["chosen_label_logps"], np.where(outside, bound, true), atol=1e-5)


def test_again_does_nothing_and_other_data_are_refused(tmp_path):
    records = [foreign.verl(foreign.scored(seed)) for seed in range(4)]
    run(tmp_path, "verl", records, shard_tokens=20)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "cache").glob("*.parquet")}
    (tmp_path / "cache" / "shard-00001.parquet").unlink()
    run(tmp_path, "verl", records, shard_tokens=20)
    after = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "cache").glob("*.parquet")}
    assert {path: content for path, (content, _) in after.items()} == {p: c for p, (c, _) in before.items()}
    assert sum(after[path] == before[path] for path in before) == len(before) - 1
    assert {path.name for path in (tmp_path / "cache").iterdir() if path.name.startswith(".")} == {".lock"}
    records[0]["teacher_logprobs"][15][7] -= 1e-3
    with pytest.raises(CacheSettingsError, match="source_sha256"):
        run(tmp_path, "verl", records, shard_tokens=20)


@pytest.mark.parametrize("options", [{"limit": 0}, {"k": 0}, {"compression_config": "x"}, {"data_format": "kd"}])
def test_arguments(options, tmp_path):
    with pytest.raises(ValueError, match=r"at least 1|belongs to the format distillkit|choose one of"):
        run(tmp_path, **{"data_format": "verl", "records": [foreign.verl(foreign.scored())], **options})


def test_distillkit_labels(tmp_path):
    sequence = foreign.scored()
    labels = np.where(sequence.learned, sequence.ids, -100).tolist()
    run(tmp_path, "distillkit", [{**foreign.distillkit(sequence), "labels": labels}])
    assert_true(rows(tmp_path)[0], sequence, 8, 7)


def test_a_student_learns_from_it(tmp_path):
    """Distilled SFT, the same whichever framework has written the data; a preference loss is refused."""
    sequences = [foreign.scored(seed) for seed in range(4)]
    losses = []
    for data_format in ("axolotl", "trl", "verl"):
        (tmp_path / data_format).mkdir()
        run(tmp_path / data_format, data_format, [MAKE[data_format](sequence) for sequence in sequences])
        options = {
            "output_dir": str(tmp_path / "out"), "max_steps": 3, "per_device_train_batch_size": 2, "use_cpu": True,
            "learning_rate": 1e-2, "logging_steps": 1, "report_to": "none", "save_strategy": "no", "kl_weight": 1.0,
        }  # fmt: skip
        dataset = PairDataset(tmp_path / data_format / "cache")
        trainer = DaDPOTrainer(tiny_llama(), DaDPOConfig(**options), dataset, processing_class=TOKENIZER)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0][0] > losses[0][-1] > 0
    assert losses[1] == losses[2] == losses[0]
    with pytest.raises(ValueError, match="has no rejected answers"):
        DaDPOTrainer(tiny_llama(), DaDPOConfig(**options, beta_teacher=0.1), dataset, processing_class=TOKENIZER)
