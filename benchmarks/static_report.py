"""What the GPU kernels become on three generations of GPUs, without one: `python -m benchmarks.static_report`.

The Triton backends run on small CPU tensors while their launches compile and do nothing else (`offline.py`). The CUDA
C++ kernels are read from the extension, if it is built.

The results are on disk after every unit of work, and a run that was cut off goes on behind the last one; they are
thrown away when their sources or, for its own, Triton change. `markdown` makes tables of them.
"""

import argparse
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import triton

from dadpo_kernels.backends import cuda, triton_, triton_tuning
from dadpo_kernels.backends.tiled import Coefficients, Kept, State, Tiles

from . import offline
from .machine_code import CHIPS, Chip, Compiled, inspect_extension, inspect_triton

ROOT = Path(__file__).parents[1]
SOURCES = {
    "triton": ("dadpo_kernels/backends/triton_kernels/*.py", "dadpo_kernels/backends/triton_.py"),
    "cuda": ("csrc/common/*", "csrc/cuda/*"),
}
CUDA_UNIT = "CUDA C++"
FUSED = ("forward.statistics", "backward.logit_gradient")
ROWS, TOP_K, CUDA_THREADS = 16, 64, 512
# What changes the code: options of the head, and a width that no depth of a block divides (fused kernels only).
VARIANTS = {"plain": (False, 64), "bias, softcap": (True, 64), "bias, softcap, ragged width": (True, 72)}
TILES = (4096, 8192)  # columns: of thousands of tokens, and of fewer


def problem(kind: type[Tiles], dtype: torch.dtype, columns: int, variant: str) -> Tiles:
    options, width = VARIANTS[variant]
    return offline.problem(
        kind, dtype, rows=ROWS, columns=columns, width=width, top_k=TOP_K, bias=options, softcap=options
    )


def compile_rows(chip: Chip, dtype: torch.dtype, columns: int, variant: str) -> Iterator[Compiled]:
    """The kernels that pass over a tile of products of `columns` columns, and the small ones."""
    with offline.compiling(chip.capability) as compiled:
        offline.passes(problem(triton_.TritonTiles, dtype, columns, variant), TOP_K)
    for name, kernel in compiled.values():
        yield inspect_triton(
            chip, kernel, (), name=name, dtype=label(dtype), variant=variant, config=f"{columns} columns"
        )


def compile_fused(
    chip: Chip, dtype: torch.dtype, variant: str, kernel: str, config: triton_tuning.Config
) -> Iterator[Compiled]:
    """A fused kernel of `triton_tuning` in one configuration; that which retains also as the repair it makes."""
    # float32 is computed in pieces, which not every chip's newest unit takes.
    instructions = (chip.matrix_instruction,) if dtype != torch.float32 else ()
    instructions += ("cp.async.bulk.tensor",) if config.TMA else ()
    with offline.compiling(chip.capability) as compiled, mock.patch.object(triton_, "choose", return_value=config):
        one_pass(problem(triton_.FusedTiles, dtype, 512, variant), kernel)
    fused = [(name, code) for name, code in compiled.values() if name in FUSED]
    for (name, code), role in zip(fused, ("", ", repair"), strict=False):
        yield inspect_triton(
            chip, code, instructions, name=f"{name}: {kernel}{role}", dtype=label(dtype), variant=variant,
            config=str(config),
        )  # fmt: skip


def listed(chip: Chip, kernel: str, dtype: torch.dtype, variant: str) -> list[triton_tuning.Config]:
    """The configurations that a call on this chip chooses from."""
    return triton_tuning.candidates(kernel, chip.capability // 10, dtype, VARIANTS[variant][1])


def one_pass(tiles: Tiles, name: str) -> None:
    columns, entries = len(tiles.head.weight), tiles.entries.ids.shape[1]
    state = State.new(ROWS, entries, tiles.hidden)
    if name == "gradient":
        assert isinstance(tiles, triton_.FusedTiles)
        tiles.logit_gradient(0, columns, Coefficients(state.max, state.max, state.selected))
        return
    padded, groups = tiles.kept_shape(ROWS, columns)
    exps, bases = tiles.hidden.new_zeros(ROWS, padded), tiles.hidden.new_zeros(ROWS, groups, dtype=torch.float32)
    tiles.statistics(0, columns, state, Kept(exps, bases) if name == "retain" else None)


def label(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def units() -> dict[str, Callable[[], Iterator[Compiled] | list[Compiled]]]:
    """The work, in pieces of seconds."""
    work: dict[str, Callable] = {}
    for capability, chip in CHIPS.items():
        for dtype, variant in itertools.product(triton_.DTYPES, VARIANTS):
            inputs = f"sm_{capability}, {label(dtype)}, {variant}"
            for kernel in triton_tuning.CONFIGS:
                for config in listed(chip, kernel, dtype, variant):
                    work[f"{inputs}, {kernel}, {config}"] = partial(
                        compile_fused, chip, dtype, variant, kernel, config
                    )
        for dtype, columns in itertools.product(triton_.DTYPES, TILES):
            # With every option of the head, which only add to what the rows hold.
            name = f"sm_{capability}, {label(dtype)}, {columns} columns"
            work[name] = partial(compile_rows, chip, dtype, columns, "bias, softcap")
        if cuda._cuda:
            work[f"sm_{capability}, {CUDA_UNIT}"] = partial(
                inspect_extension, chip, Path(cuda._cuda.__file__), CUDA_THREADS
            )
    return work


def fingerprints() -> dict[str, str]:
    """Of everything that decides what the kernels become, by their language."""
    found = {}
    for language, patterns in SOURCES.items():
        files = sorted(path for pattern in patterns for path in ROOT.glob(pattern) if path.is_file())
        content = b"\0".join([path.read_bytes() for path in files])
        found[language] = hashlib.sha256(content).hexdigest()[:16]
    return found | {"triton": f"{triton.__version__}, {found['triton']}"}


def run(path: Path, work: dict[str, Callable[[], Iterator[Compiled] | list[Compiled]]]) -> dict:
    """Adds to the file what it lacks of these sources: `{"triton": ..., "sources": ..., "units": {name: rows}}`."""
    results: dict = {"triton": triton.__version__, "sources": fingerprints(), "units": {}}
    if path.exists():
        stored = json.loads(path.read_text())
        same = {key for key, value in results["sources"].items() if stored["sources"].get(key) == value}
        results["units"] = {
            name: rows
            for name, rows in stored["units"].items()
            if name in work and ("cuda" if name.endswith(CUDA_UNIT) else "triton") in same
        }
    for name, compile_unit in work.items():
        if name not in results["units"]:
            results["units"][name] = [asdict(row) for row in compile_unit()]
            write(path, results)
            print(f"{len(results['units'])} of {len(work)}: {name}", file=sys.stderr)
    return results


def write(path: Path, results: dict) -> None:
    """One kernel a line: two versions of the file can be compared."""
    named = [
        f"{json.dumps(name)}: [\n" + ",\n".join(map(json.dumps, rows)) + "\n]"
        for name, rows in results["units"].items()
    ]
    head = json.dumps({k: v for k, v in results.items() if k != "units"})[:-1]
    temporary = path.with_suffix(".tmp")
    temporary.write_text(f'{head}, "units": {{\n' + ",\n".join(named) + "\n}}\n")
    os.replace(temporary, path)


def compiled_rows(results: dict) -> list[Compiled]:
    return [Compiled(**row) for rows in results["units"].values() for row in rows]


def markdown(results: dict) -> str:
    """The tables: a line for each kernel and configuration, the worst over the head's options in each cell."""
    rows = compiled_rows(results)
    bad = [f"- {row}: {'; '.join(row.complaints)}" for row in rows if row.complaints]
    matrix = ", ".join(f"{chip.matrix_instruction} on sm_{chip.capability}" for chip in CHIPS.values())
    verdict = (
        "\n".join([f"**{len(bad)} of {len(rows)} must not be used:**", "", *bad])
        if bad
        else f"None of the {len(rows)} spills, has a stack or asks for more shared memory than its chip has; the "
        f"fused bfloat16 kernels use the newest matrix unit of each chip ({matrix})."
    )
    parts = [
        f"Compiled with Triton {results['triton']} (CUDA C++: nvcc), not run: `python -m benchmarks.static_report`.",
        verdict,
        "A cell: registers of a thread / KiB of shared memory of a block / warps on a multiprocessor in percent of "
        "the most it holds; the worst over bias, softcap and ragged widths.",
        "**Fused kernels** (rows x columns x depth of a block; row blocks that pass over the columns together)",
        table([row for row in rows if row.kernel.startswith(FUSED)], "configuration"),
        "**Triton passes over a tile in memory**",
        table([row for row in rows if row.kernel.startswith(("rows.", "topk."))], "tile"),
        "**CUDA C++ passes**",
        table([row for row in rows if row.kernel.startswith("cuda.")], "block"),
    ]
    return "\n\n".join(parts) + "\n"


def table(rows: list[Compiled], what: str) -> str:
    chips = " | ".join(f"sm_{chip}" for chip in CHIPS)
    lines = [f"| kernel | dtype | {what} | {chips} |", "|---|---|---|" + "---:|" * len(CHIPS)]
    for kernel, dtype, config in dict.fromkeys((row.kernel, row.dtype, row.config) for row in rows):
        cells = []
        for chip in CHIPS:
            here = [r for r in rows if (r.chip, r.kernel, r.dtype, r.config) == (chip, kernel, dtype, config)]
            cells.append(
                f"{max(r.registers for r in here)} / {max(r.shared for r in here) / 1024:.0f} / "
                f"{100 * min(r.occupancy for r in here):.0f}"
                if here
                else ""
            )
        lines.append(f"| {kernel} | {dtype} | {config} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/static.json")
    args = parser.parse_args()
    results = run(args.out, units())
    print(markdown(results))
    sys.exit("\n".join(f"{row}: {row.complaints}" for row in compiled_rows(results) if row.complaints) or None)


if __name__ == "__main__":
    main()
