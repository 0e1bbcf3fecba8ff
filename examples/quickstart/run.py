"""The main job on real input: prune a model, restore it from its teacher, and measure on held-out pairs.

    make quickstart            # 10 minutes on 2 cores, installation included
    make quickstart FULL=1     # all pairs on any machine, and more passes over them

Every step is a command or a public function that works the same on a large model; this file only strings them
together. A step that is finished is not repeated, so an interrupted run goes on where it stopped.
"""

import argparse
import json
import resource
import time
from pathlib import Path

from dadpo_kernels.cache.errors import CacheError
from dadpo_kernels.cache.shards import REFERENCE, read_complete
from dadpo_kernels.cli.main import main as dadpo
from dadpo_kernels.train.checkpoints import LIST
from examples.quickstart.evaluate import ROWS, evaluate, evaluate_teacher, reward_accuracy
from examples.quickstart.plots import plot
from examples.quickstart.precision import bfloat16_is_fast
from examples.quickstart.prune import DATA, prune
from examples.smollm2 import smollm2_dir

HERE = Path(__file__).parent
K = "32"
PAIRS_WITHOUT_BFLOAT16 = {"train": "104", "heldout": "40"}  # of 275 and 56: in float32 everything takes twice as long


def command(done: bool, *arguments: object) -> None:
    """Prints and runs `dadpo ARGUMENTS`, unless it is done."""
    words = [str(a) for a in arguments]
    if done:
        print(f"\n# done before: dadpo {' '.join(words)}")
        return
    print(f"\n$ dadpo {' '.join(words)}", flush=True)
    if dadpo(words):
        raise SystemExit(f"dadpo {words[0]} failed; run it again to go on")


def captured(directory: Path, kind: str) -> bool:
    """Whether a cache is complete: a capture that was interrupted left one that is not."""
    try:
        read_complete(directory, kind, verify=False)
    except CacheError:
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="all pairs, three times as many passes over them")
    parser.add_argument("--out", type=Path, help="where results go (default: runs/quickstart or runs/quickstart-full)")
    args = parser.parse_args()
    out = args.out or Path("runs/quickstart-full" if args.full else "runs/quickstart")
    begin = time.time()
    low = bfloat16_is_fast()
    frozen, trained = ("--dtype", "bfloat16" if low else "float32"), ("--bf16", low)

    teacher = smollm2_dir()
    pruned = prune(teacher, out / "pruned")
    for name in ("train", "heldout"):
        limit = [] if low or args.full else ["--limit", PAIRS_WITHOUT_BFLOAT16[name]]
        cache = out / f"cache-{name}"
        data = DATA / f"{name}.jsonl"
        command(
            captured(cache, "teacher"),
            "teacher",
            "--model",
            teacher,
            "--data",
            data,
            "--out",
            cache,
            "--k",
            K,
            *limit,
            *frozen,
        )

    longer = ["--num_train_epochs", "3"] if args.full else []
    sft, student = out / "sft", out / "dadpo"
    options = ["--cache", out / "cache-train", *trained, *longer]
    command((sft / LIST).exists(), "train", HERE / "sft.yaml", "--model", pruned, "--output_dir", sft, *options)
    cache = out / "cache-train"
    command(captured(cache / REFERENCE, "reference"), "reference", "--model", sft, "--cache", cache, *frozen)
    command(
        (student / LIST).exists(),
        "train",
        HERE / "dadpo.yaml",
        "--model",
        sft,
        "--output_dir",
        student,
        *options,
    )

    heldout, models = out / "cache-heldout", {"pruned": pruned, "after SFT": sft, "after daDPO": student}
    results = {"teacher": evaluate_teacher(heldout)} | {name: evaluate(path, heldout) for name, path in models.items()}
    for figures in results.values():
        figures["reward_accuracy"] = reward_accuracy(figures, results["pruned"])
    speed = {stage.name: json.loads((stage / "train_results.json").read_text()) for stage in (sft, student)}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    written = {"heldout": results, "training": speed, "peak_gib": peak, "seconds": time.time() - begin}
    (out / "results.json").write_text(json.dumps(written, indent=2))
    plot(out, {"sft": sft, "daDPO": student}, results)
    print(table(results, speed, peak, time.time() - begin))
    print(f"\nnumbers: {out}/results.json   plots: {out}/*.png")


def table(results: dict, speed: dict, peak: float, seconds: float) -> str:
    """What a newcomer wants to see: did it get better on pairs it never trained on?"""
    width = max(map(len, ROWS.values()))
    lines = ["", f"{'Held-out pairs':<{width}}" + "".join(f"{name:>14}" for name in results)]
    for key, title in ROWS.items():
        lines.append(f"{title:<{width}}" + "".join(f"{r[key]:>14.3f}" for r in results.values()))
    rates = ", ".join(f"{name} {s['tokens_per_second']:.0f}" for name, s in speed.items())
    return "\n".join(
        [*lines, f"\nTrained tokens per second: {rates}. Peak memory {peak:.1f} GiB. {seconds / 60:.1f} minutes."]
    )


if __name__ == "__main__":
    main()
