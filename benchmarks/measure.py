"""One measurement in a process of its own: `python -m benchmarks.measure INPUTS --variant NAME --objective dpo`.

The order of events keeps the figures apart:

1. a call on 16 positions per sequence: imports, library start-up and compilation happen here, charged to nobody;
2. one call on the whole inputs, whose peak memory is taken: the growth of the process's resident set over what it was
   with the inputs loaded, by the kernel's own high-water mark, so gradients and every library's workspace count;
3. `--calls` timed calls, forward and backward, with the floor's three products timed before, between and after them:
   on a machine whose speed drifts, a call is compared with its own neighbours. Like the floor, which writes memory
   that was written before, a call follows another: a virtual machine may give memory that lay free for the seconds
   of the floor back to its host, and a step of a training follows a step.

One line of JSON goes to standard output. `benchmarks.run` starts these processes in turn.
"""

import argparse
import ctypes
import gc
import json
import time
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from benchmarks.cases import Inputs, load_inputs
from benchmarks.floor import arranged, measure_floor, timed
from benchmarks.oracle import relative_error
from benchmarks.variants import find_variant

WARM_UP_POSITIONS = 16


def resident_mib(field: str) -> float:
    """`VmRSS` (now) or `VmHWM` (its high-water mark) of this process, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise ValueError(f"/proc/self/status has no field {field!r}")


def reset_high_water_mark() -> float:
    """Hand freed memory back, set `VmHWM` to the present resident set, and return that in MiB."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # see proc_pid_clear_refs(5)
    return resident_mib("VmRSS")


def measure(
    name: str,
    objective: str,
    inputs: Inputs,
    calls: int,
    exact: dict[str, Tensor] | None = None,
    floor: dict[str, str] | None = None,
) -> dict:
    """Peak memory, seconds per call and, where `exact` (of `benchmarks.oracle`) is given, errors of one variant.

    Args:
        floor: `{product: arrangement}`, to time the floor as well.

    Returns:
        `peak_mib`, `first_seconds` (of the call whose memory was taken), `seconds` (of the others), `loss`; with
        `floor` also `floor_seconds`, one more than calls; with `exact` also `loss_error` (absolute),
        `hidden_grad_error` and `weight_grad_error` (relative, None for a frozen head).
    """
    variant = find_variant(name)
    if objective not in variant.objectives:
        raise ValueError(f"variant {name!r} does not compute {objective!r}, only {', '.join(variant.objectives)}")

    def step(batch: Inputs) -> tuple[Tensor, Tensor, Tensor | None]:
        hidden = batch.hidden.detach().requires_grad_()
        weight = batch.weight.detach().requires_grad_(not variant.frozen)
        loss = variant.loss(batch._replace(hidden=hidden, weight=weight), objective)
        loss.backward()
        assert hidden.grad is not None  # every loss here depends on the hidden states
        return loss.detach(), hidden.grad, weight.grad

    step(inputs.window(WARM_UP_POSITIONS))
    before = reset_high_water_mark()
    start = time.perf_counter()
    loss, hidden_grad, weight_grad = step(inputs)
    first = time.perf_counter() - start
    result: dict[str, Any] = {"peak_mib": resident_mib("VmHWM") - before, "first_seconds": first, "loss": loss.item()}
    if exact is not None:
        result["loss_error"] = abs(loss.double() - exact["loss"]).item()
        result["hidden_grad_error"] = relative_error(hidden_grad.flatten(0, 1)[inputs.valid], exact["hidden_grad"])
        result["weight_grad_error"] = (
            None if weight_grad is None else relative_error(weight_grad, exact["weight_grad"])
        )
    del loss, hidden_grad, weight_grad
    if floor is None:
        return result | {"seconds": [timed(lambda: step(inputs)) for _ in range(calls)]}
    products = arranged(inputs.hidden.flatten(0, 1)[inputs.valid], inputs.weight, floor)
    products()  # its memory is written once before it is timed
    seconds, floors = [], [timed(products)]
    for _ in range(calls):
        step(inputs)
        seconds.append(timed(lambda: step(inputs)))
        floors.append(timed(products))
    return result | {"seconds": seconds, "floor_seconds": floors}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", type=Path, help="file written by benchmarks.cases.save_inputs")
    parser.add_argument("--variant", required=True, help="see benchmarks.variants.find_variant; or floor")
    parser.add_argument("--objective", help="what to compute; not used by the floor")
    parser.add_argument("--calls", type=int, default=2, help="timed calls")
    parser.add_argument("--exact", type=Path, help="file written by benchmarks.oracle.save_gradients: report errors")
    parser.add_argument(
        "--floor", type=json.loads, help="JSON {product: arrangement}: time the floor beside the calls"
    )
    args = parser.parse_args()
    inputs = load_inputs(args.inputs)
    if args.variant == "floor":
        result = measure_floor(inputs.hidden.flatten(0, 1)[inputs.valid], inputs.weight, args.calls)
    else:
        exact = None if args.exact is None else load_file(args.exact)
        result = measure(args.variant, args.objective, inputs, args.calls, exact, args.floor)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
