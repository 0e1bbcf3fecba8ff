"""Teacher data of axolotl, DistillKit, TRL and verl: the cache holds what the teacher said, or the import refuses."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from dadpo_kernels.cache.errors import CacheSettingsError
from dadpo_kernels.cache.format import TEACHER_SCHEMA, unpack
from dadpo_kernels.cache.reader import RowReader
from dadpo_kernels.cache.shards import read_manifest
from dadpo_kernels.capture.teacher_data.importing import import_teacher_data
from dadpo_kernels.capture.teacher_data.scored import TeacherDataError
from tests.support import foreign
from tests.support.foreign import VOCAB
from tests.support.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
MAKE = {
    "axolotl": foreign.axolotl,
    "distillkit": foreign.distillkit,
    "trl": lambda sequence: foreign.trl([sequence]),
    "verl": foreign.verl,
}


def run(directory, data_format, records, packing=foreign.PACKING, **options):
    """Import records from a JSONL file, with the packing beside it, to `directory/cache`."""
    source = directory / "data.jsonl"
    source.write_text("\n".join(json.dumps(record) for record in records))
    if data_format == "distillkit":
        (directory / "compression_config.yaml").write_text(yaml.safe_dump(packing))
    return import_teacher_data(
        source, directory / "cache", data_format=data_format, tokenizer=TOKENIZER, vocab_size=VOCAB, **options
    )


def rows(directory):
    """The pairs of a cache, by index: `{column: array}`."""
    manifest = read_manifest(directory / "cache", "teacher")
    reader = RowReader(directory / "cache", TEACHER_SCHEMA)
    names = {name: name.removeprefix("chosen_").removeprefix("prompt_") for name in TEACHER_SCHEMA.names[1:]}
    found = {}
    for shard in manifest.shards:
        for number, index in enumerate(shard.index):
            row = reader.read(shard, number)
            found[index] = {
                name: unpack(row[name], short) for name, short in names.items() if not name.startswith("rejected")
            }
    return [found[index] for index in sorted(found)]


def assert_true(row, sequence, k, start, end=None, *, atol=1e-5, half=4e-3):
    """The row holds what the teacher said about the tokens from `start` to `end`."""
    end = len(sequence.ids) if end is None else end
    ids, logps = (values[start:end] for values in sequence.top(k))
    outside = np.log1p(-np.exp(logps).sum(1))
    np.testing.assert_array_equal(row["prompt_ids"], sequence.ids[:start])
    np.testing.assert_array_equal(row["chosen_ids"], sequence.ids[start:end])
    np.testing.assert_array_equal(row["chosen_topk_ids"].reshape(-1, k), ids)
    np.testing.assert_allclose(row["chosen_topk_logps"].reshape(-1, k), logps, atol=atol + half)
    np.testing.assert_allclose(row["chosen_label_logps"], sequence.label_logps()[start:end], atol=atol)
    np.testing.assert_allclose(row["chosen_topk_tail"], outside, atol=10 * atol)


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


COARSE = {
    "d": VOCAB, "k": 12, "exact_k": 4, "exact_dtype": "bfloat16", "polynomial_terms": [0, 1, 2, "sqrt"],
    "term_dtype": "float32", "residual_bins": [{"scale_dtype": "float16", "element_bits": 5, "num_elements": 3},
    {"scale_dtype": "float16", "element_bits": 1, "num_elements": 2}], "delta_encoding": False,
    "error_diffusion": False, "normalize_t": False,
}  # fmt: skip


@pytest.mark.parametrize(
    "packing",
    [
        COARSE,
        COARSE | {"delta_encoding": True, "exact_dtype": "float32"},
        COARSE | {"normalize_t": True, "polynomial_terms": [0, "exp"]},
        foreign.PACKING | {"delta_encoding": True},
        foreign.PACKING | {"exact_k": 3, "polynomial_terms": [0, 1, 2, 3, 4]},  # passes through all five
    ],
    ids=range(5),
)
def test_packings_of_distillkit(packing, tmp_path):
    sequence = foreign.scored(best=2)
    run(tmp_path, "distillkit", [foreign.distillkit(sequence, packing)], packing)
    row = rows(tmp_path)[0]
    k = packing["k"]
    np.testing.assert_array_equal(
        np.sort(row["chosen_topk_ids"].reshape(-1, k), 1), np.sort(sequence.top(k)[0][1:], 1)
    )
    exact = k == 8
    logps = sequence.top(k)[1][1:]
    np.testing.assert_allclose(row["chosen_topk_logps"].reshape(-1, k), logps, atol=5e-3 if exact else 0.6)
    np.testing.assert_allclose(row["chosen_label_logps"], sequence.label_logps()[1:], atol=2e-5 if exact else 0.02)


def test_distillkit_documents_end_with_padding_that_is_not_learned(tmp_path):
    sequence = foreign.scored()
    TOKENIZER.pad_token_id = int(sequence.ids[-1])
    try:
        run(tmp_path, "distillkit", [foreign.distillkit(sequence)])
    finally:
        TOKENIZER.pad_token = None
    assert_true(rows(tmp_path)[0], sequence, 8, 1, 23)


def test_distillkit_sum_above_one_by_rounding(tmp_path):
    """bfloat16 can push the sum above one; it is brought back, and the tail is finite."""
    sequence = foreign.scored(best=1)
    logits = np.where(np.arange(VOCAB) < 8, -0.52 * np.arange(VOCAB), -30.0)[None].repeat(24, 0)
    logps = logits - np.log(np.exp(logits).sum(1, keepdims=True)) + 0.004
    record = foreign.distillkit(sequence._replace(logps=logps, ids=np.zeros(24, int)))
    spread = foreign.distillkit(foreign.scored(1))
    run(tmp_path, "distillkit", [record, spread, spread])
    row = rows(tmp_path)[0]
    assert np.abs(np.exp(row["chosen_topk_logps"].reshape(-1, 8).astype(float)).sum(1) - 1).max() < 2e-3


def set_(name, value):
    """Replace a column, or a value at a place in it."""

    def change(record):
        *path, last = name if isinstance(name, tuple) else (name,)
        for step in path:
            record = record[step]
        record[last] = value

    return change


FAULTS = [
    ("axolotl", set_("labels", None), "labels missing; the record has: input_ids, labels"),
    ("axolotl", set_("labels", [-100] * 24), "target_mask fits labels neither"),
    ("axolotl", set_(("labels", 9), 5), "labels has other tokens than input_ids"),
    ("axolotl", set_("position_ids", [*range(12), *range(12)]), "several sequences are packed"),
    ("axolotl", set_("input_ids", list(range(5))), "target_token_ids has 24 rows, 5 are needed"),
    ("axolotl", set_("input_ids", "12 3"), "input_ids must be a list of integers"),
    ("axolotl", set_("input_ids", [1.5] * 24), "input_ids must be a list of integers"),
    ("axolotl", set_(("input_ids", 2), 10**30), "input_ids must be a list of integers"),
    ("axolotl", set_(("target_logprobs", 9, 0), "a"), "target_logprobs must hold lists of numbers"),
    ("axolotl", set_(("target_logprobs", 9, 0), None), "target_logprobs must hold lists of numbers"),
    ("axolotl", set_(("target_logprobs", 9), [-1.0]), "row 9 has 8 target_token_ids and 1 target_logprobs"),
    ("axolotl", set_(("target_logprobs", 9), -1.0), "target_logprobs must be a list of lists"),
    ("verl", set_("input_ids", [0] * 3 + [VOCAB] * 24 + [0] * 2), "token 300 is outside the vocabulary of 300"),
    ("verl", set_(("teacher_ids", 15, 3), VOCAB), "an entry with id 300 is outside the vocabulary"),
    ("verl", set_(("teacher_ids", 15, 3), -1), "an entry with id -1 is outside the vocabulary"),
    ("verl", set_(("teacher_logprobs", 15, 3), float("nan")), "an entry of nan, which is not a log-probability"),
    ("verl", set_(("teacher_logprobs", 15, 3), 0.5), "token 13 has an entry of 0.5, which is not a log-probability"),
    ("verl", set_(("teacher_logprobs", 15), [-0.1] * 8), "probabilities sum to 7.2387"),
    ("verl", set_(("teacher_logprobs", 15), [-50.0] * 8), "one of the top k is missing"),
    ("verl", set_(("attention_mask", 15), 0), "attention_mask must be one run"),
    ("verl", set_("response_mask", [1] * 50), "do not belong together"),
    ("verl", set_("response_mask", [0] * 5), "has no target that can be used"),
    ("trl", set_(("actual_token_ids", 0, 3, 0), 299), "these tokens: the server scored others"),
    ("trl", set_(("prompt_lengths", 0), 6), "logprob_token_ids has 17 rows, 18 are needed"),
    ("trl", set_(("prompt_lengths", 0), 24), "a prompt_length of 24"),
    ("trl", set_(("prompt_lengths", 0), 0), "a prompt_length of 0"),
    ("trl", set_("prompt_lengths", [7, 7]), "1 sequences, 2 prompt_lengths"),
    ("trl", set_(("actual_logprobs", 0, 3, 0), float("-inf")), None),  # known from its entry
    ("trl", set_(("logprobs", 0, 3), [float("-inf")] * 8), "token 10 has 0 entries"),
    ("distillkit", set_(("compressed_logprobs", 3), [0] * 31), "the configuration gives 32"),
    ("distillkit", set_(("bytepacked_indices", 3, 0), 256), "bytepacked_indices holds values that are not bytes"),
    ("distillkit", set_("compressed_logprobs", []), "0 rows of compressed_logprobs for 24 tokens"),
    ("distillkit", set_("attention_mask", [0] * 24), "attention_mask has zeros"),
]  # fmt: skip


@pytest.mark.parametrize(("data_format", "change", "message"), FAULTS, ids=range(len(FAULTS)))
def test_faults_are_refused_with_their_place(data_format, change, message, tmp_path):
    record = MAKE[data_format](foreign.scored())
    change(record)
    if message is None:
        run(tmp_path, data_format, [record])
        return
    with pytest.raises(TeacherDataError) as error:
        run(tmp_path, data_format, [record])
    assert message in str(error.value)
    assert f"{tmp_path / 'data.jsonl'}" in str(error.value)
    assert "\n" not in str(error.value)
    good = MAKE[data_format](foreign.scored(5))
    result = run(tmp_path, data_format, [record, good, good], on_error="skip")
    assert len(result.skipped) == (0 if "no target" in message else 1)
    assert len(rows(tmp_path)) == 2


@pytest.mark.parametrize("record", ["text", 5, None, {}])
@pytest.mark.parametrize("data_format", MAKE)
def test_records_of_another_kind(data_format, record, tmp_path):
    with pytest.raises(TeacherDataError, match=r"line 1: .* missing; the record has:"):
        run(tmp_path, data_format, [record])


def test_an_entry_twice(tmp_path):
    record = foreign.verl(foreign.scored())
    record["teacher_ids"][15][3] = record["teacher_ids"][15][2]
    with pytest.raises(TeacherDataError, match="token 13 has two entries with the same id"):
        run(tmp_path, "verl", [record])


def test_distillkit_legacy_is_refused(tmp_path):
    record = {"input_ids": [1, 2], "packed_indices": [[1]], "exact_values": [[0.5]], "coeffs": [[0.1]]}
    with pytest.raises(TeacherDataError, match="legacy format"):
        run(tmp_path, "distillkit", [record])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("[1]", "does not hold the fields"),
        ("d: [", "is not YAML"),
        ({"k": None}, "k is None, a int is needed"),
        ({"exact_k": 9}, "0 <= exact_k <= k <= d"),
        ({"d": True}, "d is True"),
        ({"exact_dtype": "int8"}, "exact_dtype is 'int8': choose one of"),
        ({"polynomial_terms": ["log"]}, "polynomial_terms holds 'log'"),
        ({"polynomial_terms": [[1]]}, "polynomial_terms holds [1]"),
        ({"residual_bins": [{"scale_dtype": "float16", "element_bits": 64, "num_elements": 1}]}, "1 to 32 bits"),
        ({"residual_bins": COARSE["residual_bins"]}, "more than the k - exact_k"),
        ({"residual_bins": [3]}, "residual_bins must hold mappings"),
        ({"colour": 1}, "unknown colour"),
    ],
)
def test_packing_is_checked(config, message, tmp_path):
    packing = foreign.PACKING | config if isinstance(config, dict) else config
    (tmp_path / "packing.yaml").write_text(packing if isinstance(packing, str) else yaml.safe_dump(packing))
    with pytest.raises(ValueError, match=r"packing\.yaml") as error:
        run(
            tmp_path,
            "distillkit",
            [foreign.distillkit(foreign.scored())],
            compression_config=tmp_path / "packing.yaml",
        )
    assert message in str(error.value)


def test_packing_of_a_training_configuration(tmp_path):
    sequence = foreign.scored()
    config = {"model": "m", "teacher": {"kind": "dataset", "logprob_compressor": foreign.PACKING}}
    run(tmp_path, "distillkit", [foreign.distillkit(sequence)], config)
    assert_true(rows(tmp_path)[0], sequence, 8, 1)


def test_packing_is_missing(tmp_path):
    with pytest.raises(ValueError, match="give the configuration with which DistillKit packed"):
        import_teacher_data(
            tmp_path / "x.parquet", tmp_path / "cache", data_format="distillkit", tokenizer=TOKENIZER, vocab_size=VOCAB
        )


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
