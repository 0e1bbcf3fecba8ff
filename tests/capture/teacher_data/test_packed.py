"""DistillKit's packings are decoded, and what describes them is checked."""

import numpy as np
import pytest
import yaml

from dadpo_kernels.capture.teacher_data.importing import import_teacher_data
from dadpo_kernels.capture.teacher_data.scored import TeacherDataError
from tests.capture.teacher_data.imported import TOKENIZER, assert_true, rows, run
from tests.support import foreign
from tests.support.foreign import VOCAB

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
    np.testing.assert_array_equal(np.sort(row["chosen_topk_ids"], 1), np.sort(sequence.top(k)[0][1:], 1))
    exact = k == 8
    logps = sequence.top(k)[1][1:]
    np.testing.assert_allclose(row["chosen_topk_logps"], logps, atol=5e-3 if exact else 0.6)
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
    assert np.abs(np.exp(row["chosen_topk_logps"].astype(float)).sum(1) - 1).max() < 2e-3


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
