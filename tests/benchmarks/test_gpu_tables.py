"""What is made of the GPU suite's results: predictions, goals, README's table, comparisons and plots."""

import itertools
import json

import pytest

pytest.importorskip("triton")

from benchmarks import compare, style
from benchmarks.gpu_suite import cost_model, tables
from benchmarks.gpu_suite.settings import GPU_BACKENDS, PLANS


@pytest.mark.parametrize(("backend", "predicted"), [("cuda", 37.3), ("triton", 36.5)])
def test_the_model_predicts_what_a_review_did(backend, predicted):
    """From the same arithmetic, written independently (milliseconds, Llama-3-8B, 8,192 tokens, all retained).

    The review reckoned with tiles of 16,384 columns for `cuda`, and 0.5 ms less for what is small.
    """
    gpu = cost_model.GPUS["H100"]
    assert cost_model.three_products(gpu, 8192, 4096, 128_256) * 1e3 == pytest.approx(33.4, abs=0.05)
    time = cost_model.step(gpu, backend, "retain", 8192, 4096, 128_256, 64)
    assert time * 1e3 == pytest.approx(predicted, abs=1.3)


def test_the_model_knows_more_work_from_less():
    h100, h200 = cost_model.GPUS.values()
    for backend, plan in itertools.product(GPU_BACKENDS, PLANS):
        few, many, copies = (
            cost_model.step(gpu, backend, plan, tokens, 896, 151_936, 0)
            for gpu, tokens in ((h100, 4096), (h100, 8192), (h200, 8192))
        )
        assert few < many
        assert copies <= many
        assert many > cost_model.three_products(h100, 8192, 896, 151_936)
    assert cost_model.gpu_named("NVIDIA H100 80GB HBM3") is h100
    assert cost_model.gpu_named("NVIDIA H200") is h200
    assert cost_model.gpu_named("NVIDIA A100-SXM4-80GB") is None


def step(name, milliseconds, **changes):
    row = {"shape": "Llama-3-8B", "top_k": 64, "masked": False, "name": name, "both_seconds": milliseconds / 1e3}
    return row | {"peak_bytes_above_gradients": 302 * 2**20} | changes


PRODUCTS = {"shape": "Llama-3-8B", "name": "the three products", "tokens": 8192, "width": 4096, "vocab": 128_256}


def results_of(device="NVIDIA H100 80GB HBM3", **stages):
    environment = {"device": device, "versions": {"torch": "2"}, "date": "today", "commit": "c", "dry_run": False}
    made = {name: {"status": "complete", "seconds": 1.0, "limit": 2.0, "rows": rows} for name, rows in stages.items()}
    return {"environment": environment, "stages": made}


def test_goals():
    rows = [
        PRODUCTS | {"both_seconds": 0.036},
        step("dadpo-kernels cuda, retain", 41),
        step("dadpo-kernels cuda, recompute", 57, top_k=0),
        step("Liger", 90),
        {"shape": "Llama-3-8B", "name": "dadpo-kernels triton, retain", "top_k": 64, "masked": False, "error": "no"},
    ]
    results = results_of(table=rows, passes=[{"backend": "cuda", "pass": "topk", "of_copy": 0.8}])
    room = 300 + 2 * 8192 * 128_256 / 2**20
    goals = [(round(row["measured"], 2), row["limit"], row["reached"]) for row in tables.goals(results)]
    assert goals == [
        (41, 42, True), (1.14, 1.15, True), (302, room, True), (1.58, 1.45, False), (302, 300, False),
        (0.8, 0.85, False),
    ]  # fmt: skip


def test_predictions_stand_beside_the_measurements():
    rows = [PRODUCTS | {"both_seconds": 0.0334}, step("dadpo-kernels cuda, retain", 38), step("Liger", 90),
            step("dadpo-kernels cuda, recompute", 90), step("dadpo-kernels triton, retain", 20)]  # fmt: skip
    results = results_of(table=rows)
    text = tables.report(results)
    (line,) = (line for line in text.splitlines() if line.startswith("| Llama-3-8B") and "cuda, retain |" in line)
    assert line.endswith("| 1.138 | 37.74 | 1.007 |")
    assert [miss.partition(":")[0] for miss in tables.misses(results)] == [
        "Llama-3-8B, dadpo-kernels cuda, recompute, K = 64", "Llama-3-8B, dadpo-kernels triton, retain, K = 64",
    ]  # fmt: skip
    assert text.index("from the cost model") < text.index("### goals")
    assert tables.misses(results_of("another GPU", table=rows)) == []


def test_readme_says_what_is_missing_and_what_was_measured():
    assert tables.readme([]).count("not measured yet") == 3
    rows = [
        PRODUCTS | {"both_seconds": 0.033},
        step("dadpo-kernels cuda, retain", 62),
        step("dadpo-kernels triton, retain", 45),
        step("PyTorch eager", 120),
        step("dadpo-kernels triton, retain", 1, masked=True),
    ]
    alone = [step("cce", 99, top_k=0), step("Liger", 66, top_k=0), step("TRL chunked", 0, top_k=0)]
    del alone[2]["both_seconds"]
    text = tables.readme([results_of(table=rows, rivals=alone), results_of(build=[])])
    assert "| 33.0 | 45.0 (1.36, triton) | – | 120.0 (3.64, PyTorch eager) | – | 66.0 (2.00, Liger) |" in text


def test_two_files_are_compared(tmp_path):
    def file(name: str, seconds: float, peak: int | None):
        row = {"shape": "a", "top_k": 16, "masked": True, "name": "ours", "both_seconds": seconds}
        failed = {"shape": "a", "top_k": 16, "masked": False, "name": "ours", "error": "out of memory"}
        stages = {"table": [row | {"peak_bytes_above_gradients": peak}, failed, {"shape": "a", "name": "x"}]}
        (tmp_path / name).write_text(json.dumps(results_of(**stages)))
        return compare.read(tmp_path / name)

    assert compare.lines(file("a", 0.002, 2**21), file("b", 0.003, 2**22)) == [
        "a 16 True ours peak: 2 -> 4 MiB (2.00x)", "a 16 True ours time: 2 -> 3 ms (1.50x)"
    ]  # fmt: skip
    assert compare.lines(file("a", 0.002, None), file("b", 0.001, None)) == ["a 16 True ours time: 2 -> 1 ms (0.50x)"]


def test_units_and_plot(tmp_path):
    row = {"both_seconds": 0.5, "both_flops": 3e12, "peak_bytes_above_gradients": 2**21, "error": None}
    assert tables.readable(row) == {"both ms": 500.0, "both TFLOP/s": 3.0, "peak MiB above gradients": 2.0}
    rows = [PRODUCTS | {"both_seconds": 0.033}, step("dadpo-kernels cuda, retain", 62), step("Liger", 90)]
    style.save(tables.draw(results_of(table=rows)), tmp_path / "gpu.png")
    assert (tmp_path / "gpu.png").stat().st_size > 1000
