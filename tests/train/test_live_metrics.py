"""What the live plan reports is a mean over the tokens of all ranks, also where a rank has had no backward."""

import pytest
import torch
import torch.distributed as dist

from dadpo_kernels.ops.live.diagnostics import LiveDiagnostics, record
from dadpo_kernels.train.live_metrics import LiveMetrics
from tests.support.ranks import run_ranks

BACKWARDS = {
    0: [LiveDiagnostics(100, 0.01, 0.2, 0.0, 1.5), LiveDiagnostics(300, 0.03, 0.4, 0.5, 2.5)],
    1: [LiveDiagnostics(400, 0.02, 0.1, 0.0, 1.0)],
    2: [],
}


def report() -> list[dict[str, float]]:
    def summed(values: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(values)
        return values

    metrics = LiveMetrics(0.1, summed, torch.device("cpu"))
    with metrics.collect():
        for diagnostics in BACKWARDS[dist.get_rank()]:
            record(diagnostics)
    return [metrics.pop(), metrics.pop()]


def test_means_are_over_the_tokens_of_all_ranks():
    expected = {"certificate": 0.0225, "live_share": 0.225, "exact_share": 0.1875, "units": 1.625}
    for means, again in run_ranks(3, report):
        assert means == pytest.approx({f"live/{name}": value for name, value in expected.items()})
        assert again == {}  # a new count, with nothing in it


def test_without_a_tolerance_no_rank_waits_for_another():
    metrics = LiveMetrics(None, lambda _: pytest.fail("reduced"), torch.device("cpu"))
    assert metrics.pop() == {}
