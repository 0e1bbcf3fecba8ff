"""From the JSON of `benchmarks.capture` to the documentation:

    python -m benchmarks.capture_report benchmarks/results/capture.json docs/teacher.md

Rewrites what stands between the page's two markers.
"""

import argparse
import json
from pathlib import Path

from benchmarks.cases import TOP_K
from benchmarks.report.comparison import replace_between_markers

BEGIN, END = "<!-- benchmark:capture -->", "<!-- /benchmark:capture -->"


def report(sections: dict[str, dict]) -> str:
    """Markdown of the parts that were measured: the heads' table, what the cache loses, what reading it costs."""
    by_dtype = {name.split("/")[1]: s["result"] for name, s in sections.items() if name.startswith("head/")}
    parts = [heads(by_dtype)] if by_dtype else []
    parts += [
        text(sections[name]["result"]) for name, text in (("cache", cache), ("reader", reader)) if name in sections
    ]
    e = next(iter(sections.values()))["environment"]
    parts.append(f"SmolLM2-135M, {e['threads']} cores of an {e['cpu']}, PyTorch {e['versions']['torch']}.")
    return "\n\n".join(parts)


def cache(r: dict) -> str:
    return (
        f"A cache of {r['tokens']:,} answer tokens of real pairs takes {r['bytes_per_token']:.0f} bytes a token at "
        f"k = {TOP_K}. What float16 loses: the KL divergence to a student, top-k and tail, is {r['kl_exact']:.3f} "
        f"nats a token exactly and {r['kl_cached']:.3f} from the cache; they differ by {r['kl_error_mean']:.1e} on "
        f"average, and by {r['kl_error_max']:.1e} at the worst token."
    )


def reader(r: dict) -> str:
    return (
        f"A training step of {r['pairs']} pairs ({r['tokens']:.0f} answer tokens) takes {r['step_in_memory']:.2f} s "
        f"with batches that are in memory and {r['step_loaded']:.2f} s with {r['workers']} loader processes, of which "
        f"it waits {r['wait'] * 1e3:.1f} ms ({r['wait_share']:.2%} of a step). Reading, checking and collating a "
        f"batch takes one process {r['read'] * 1e3:.1f} ms ({r['read_share']:.2%})."
    )


def heads(by_dtype: dict[str, list[dict]]) -> str:
    """Times of the head's work as multiples of the one matrix product that makes the logits."""
    lines = [
        "| answer tokens | one product | dadpo-kernels | dense `log_softmax().topk()` | peak MiB | dense: peak MiB |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for dtype, rows in by_dtype.items():
        for row in rows:
            ours, dense = (f"{row[name] / row['gemm']:.2f}" for name in ("ours", "dense"))
            memory = f"{row['ours_mib']:.0f} | {row['dense_mib']:.0f}"
            lines.append(f"| {row['tokens']:,}, {dtype} | {row['gemm']:.2f} s | {ours} | {dense} | {memory} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path, help="file of benchmarks.capture with all its parts")
    parser.add_argument("page", type=Path, help="Markdown file with the two markers")
    args = parser.parse_args()
    text = report(json.loads(args.json.read_text()))
    args.page.write_text(replace_between_markers(args.page.read_text(), text, BEGIN, END))


if __name__ == "__main__":
    main()
