import argparse
import sys
from pathlib import Path

import torch

from . import __doc__ as description
from .runner import complaints, run_all
from .stages import FULL, STAGES, TINY, profile, run_stage
from .tables import report


def main() -> None:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--seconds", type=float, default=450.0, help="for everything")
    parser.add_argument("--dry-run", action="store_true", help="tiny problems, on the CPU if there is no GPU")
    parser.add_argument("--only", choices=list(STAGES), action="append", help="stages to run; default: all")
    parser.add_argument("--stage", choices=list(STAGES), help="run one here, a line of JSON for each row")
    parser.add_argument("--profile", action="store_true", help="the three hottest kernels of each backend")
    args = parser.parse_args()
    settings = TINY if args.dry_run else FULL
    if not args.dry_run and not torch.cuda.is_available():
        sys.exit("no CUDA device: the suite measures GPUs (--dry-run goes through its motions on a CPU)")
    if args.profile:
        print(profile(settings))
    elif args.stage:
        run_stage(args.stage, settings)
    else:
        options = ["--dry-run"] if args.dry_run else []
        limits = {name: STAGES[name].seconds for name in args.only or STAGES}
        results = run_all(limits, options, args.out, args.seconds)
        print(report(results))
        sys.exit("\n".join(complaints(results)) or None)


if __name__ == "__main__":
    main()
