import argparse
import re
import sys
from pathlib import Path

import torch

from benchmarks.gpu_suite import __doc__ as description
from benchmarks.gpu_suite.runner import complaints, run_all
from benchmarks.gpu_suite.stages import CALLS
from benchmarks.gpu_suite.tables import report

SECONDS = 480.0


def device_name(dry: bool) -> str:
    """For a file: `h100` of "NVIDIA H100 80GB HBM3"."""
    if dry:
        return "dry-run"
    name = torch.cuda.get_device_name().lower().removeprefix("nvidia ")
    match = re.match(r"[a-z]+\d+", name)
    return match[0] if match else re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def main() -> None:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("call", choices=list(CALLS), help="second: compute-sanitizer, and rivals with large wheels")
    parser.add_argument(
        "--out", type=Path, default=Path("gpu-results"), help="folder for the JSON file and its tables"
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for everything (default: {SECONDS:.0f})")
    parser.add_argument("--dry-run", action="store_true", help="tiny problems on the CPU, and a clock as planned")
    parser.add_argument("--only", action="append", help="a stage to run; default: all of the call")
    args = parser.parse_args()
    stages = CALLS[args.call]
    if unknown := set(args.only or ()) - set(stages):
        parser.error(f"--only {unknown.pop()}: the {args.call} call has {', '.join(stages)}")
    if not args.dry_run and not torch.cuda.is_available():
        sys.exit("no CUDA device: the suite measures GPUs (--dry-run goes through its motions on a CPU)")
    args.out.mkdir(parents=True, exist_ok=True)
    # Part of a call does not replace the file of a whole one.
    path = args.out / f"{'-'.join(['gpu', device_name(args.dry_run), args.call, *(args.only or [])])}.json"
    chosen = {name: stage for name, stage in stages.items() if not args.only or name in args.only}
    results = run_all(chosen, ["--dry-run"] if args.dry_run else [], path, args.seconds, args.dry_run)
    text = report(results)
    path.with_suffix(".md").write_text(text)
    print(text)  # ends with the goals
    sys.exit(bool(complaints(results)))


if __name__ == "__main__":
    main()
