"""Every kernel once on the host, ragged: what the sanitizers watch.

python check.py MODULE, in a process of its own because a sanitizer must be loaded first.
"""

import sys
from pathlib import Path

import torch

from dadpo_kernels import linear_topk_logps
from dadpo_kernels.ops.backends.registry import BACKENDS, Backend
from tests.support.cuda_host import HostTiles
from tests.support.dense import IGNORE, assert_as_good_as_dense, random_problem
from tests.support.extension import load


def main(path: str) -> None:
    HostTiles.module = load(Path(path))
    HostTiles.tile_columns = staticmethod(lambda *_: 100)
    BACKENDS["host"] = Backend(HostTiles, lambda *_: None, ())
    for dtype in (torch.float32, torch.float16):  # bfloat16 takes float32's way
        p = random_problem(rows=3, vocab=133, width=7, k=9, bias=True, softcap=6.0)
        for budget in (0, 2**31):
            assert_as_good_as_dense(p, dtype, "host", budget)
    hidden, weight = torch.randn(2, 5), torch.randn(133, 5)
    labels = torch.tensor([IGNORE, 132])
    got = linear_topk_logps(hidden, weight, 70, labels=labels, backend="host")
    want = linear_topk_logps(hidden, weight, 70, labels=labels, backend="reference")
    assert torch.equal(got.ids, want.ids)
    print("checked")


if __name__ == "__main__":
    main(sys.argv[1])
