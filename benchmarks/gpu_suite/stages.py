"""The stages of both calls in their order, the most valuable first: a call that is cut short has measured those."""

from benchmarks.gpu_suite.build import build
from benchmarks.gpu_suite.checks import CONFIGURATIONS, LANES, correctness
from benchmarks.gpu_suite.kernels import ceilings_and_products, row_passes_and_sweep
from benchmarks.gpu_suite.sanitizer import LANES as SANITIZED
from benchmarks.gpu_suite.sanitizer import sanitizers
from benchmarks.gpu_suite.steps import profiles, rivals_and_losses, second_rivals, table
from benchmarks.gpu_suite.task import Stage

BUILD = Stage(build, 75, ("extension", "triton"))
FIRST = {
    "build": BUILD,
    "ceilings": Stage(ceilings_and_products, 40),
    "correctness": Stage(correctness, 45, (*LANES, CONFIGURATIONS)),
    "profiles": Stage(profiles, 30),
    "table": Stage(table, 120),
    "passes": Stage(row_passes_and_sweep, 45),
    "rivals": Stage(rivals_and_losses, 120),
}
SECOND = {"build": BUILD, "sanitizers": Stage(sanitizers, 240, SANITIZED), "quack": Stage(second_rivals, 120)}
CALLS = {"first": FIRST, "second": SECOND}
STAGES = FIRST | SECOND
