"""What the GPU kernels become on three generations of GPUs, without one: `python -m tools.static_report`.

The Triton backends run on small CPU tensors while their launches compile and do nothing else (`offline.py`), with the
Triton that is imported. Another one, such as that of the PyTorch on the machine to come, needs two commands:

    pip install --no-deps --target DIR triton==3.6.0
    PYTHONPATH=DIR python -m tools.static_report

The CUDA C++ kernels are read from the extension, if it is built for all three.

The file keeps a part for each Triton and one for the extension. A run replaces the parts that it can make, a unit of
work at a time: one that was cut off goes on behind the last, as long as the sources are the same.
`python -m benchmarks.report` makes tables of it.
"""

import argparse
import ast
import hashlib
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton

from benchmarks.rows import markdown
from dadpo_kernels.ops.backends import cuda, triton_, tuning
from dadpo_kernels.ops.backends.base import Coefficients, Retained, State
from dadpo_kernels.ops.backends.gpu_base import RowTiles
from tools import offline
from tools.machine_code import CHIPS, Chip, Compiled, architectures, inspect_extension, inspect_triton

ROOT = Path(__file__).parents[1]
SOURCES = {
    "triton": ("dadpo_kernels/ops/backends/triton_kernels/*.py", "dadpo_kernels/ops/backends/triton_.py"),
    "cuda": ("csrc/common/*", "csrc/cuda/*"),
}
COMMITTED = ROOT / "tools/static.json"
COMPILERS = ("3.6.0", "3.9.0")  # Tritons: PyTorch 2.11's, and the newest
CUDA = "CUDA C++"
FUSED = {
    "forward": "forward",
    "retain": "forward",
    "gradient": "logit_gradient",
    "probe": "forward",
    "repair": "repair",
}  # by `CONFIGS`
ROWS, TOP_K = 16, 64
# What changes the code: options of the head, and a width that no depth of a block divides (fused kernels only).
VARIANTS = {"plain": (False, 64), "bias, softcap": (True, 64), "bias, softcap, ragged width": (True, 72)}
TILES = (4096, 8192)  # columns: of thousands of tokens, and of fewer


def problem(kind: type[RowTiles], dtype: torch.dtype, columns: int, variant: str) -> RowTiles:
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
    chip: Chip, dtype: torch.dtype, variant: str, kernel: str, config: tuning.Config
) -> Iterator[Compiled]:
    """A fused kernel of `tuning` in one configuration."""
    # float32 is computed in pieces, which not every chip's newest unit takes.
    instructions = (chip.matrix_instruction,) if dtype != torch.float32 else ()
    instructions += ("cp.async.bulk.tensor",) if config.TMA else ()
    tiles = problem(triton_.FusedTiles, dtype, 512, variant)

    def chosen(name: str, *_) -> tuning.Config:
        return config if name == kernel else listed(chip, name, dtype, variant)[0]

    with mock.patch.object(triton_, "choose", chosen), offline.compiling(chip.capability) as compiled:
        one_pass(tiles, kernel)
    wanted = f"{'hopper' if config.PERSISTENT else 'fused'}.{FUSED[kernel]}"
    *_, code = (code for name, code in compiled.values() if name == wanted)  # the last: one that retains probes first
    yield inspect_triton(
        chip, code, instructions, name=f"{wanted}: {kernel}", dtype=label(dtype), variant=variant, config=str(config)
    )


def listed(chip: Chip, kernel: str, dtype: torch.dtype, variant: str) -> list[tuning.Config]:
    """The configurations that a call on this chip chooses from, and those that no GPU has met yet."""
    return tuning.candidates(kernel, chip.capability // 10, dtype, VARIANTS[variant][1])


def one_pass(tiles: RowTiles, name: str) -> None:
    assert isinstance(tiles, triton_.FusedTiles)
    columns, entries = len(tiles.head.weight), tiles.entries.ids.shape[1]
    state = State.new(ROWS, entries, tiles.hidden)
    retained = Retained(tiles.padded(columns, tiles.hidden.dtype), tiles.hidden.new_zeros(ROWS, dtype=torch.float32))
    if name == "gradient":
        tiles.logit_gradient(0, columns, Coefficients(state.max, state.max, state.selected))
    elif name == "probe":
        tiles.partial_states(name, 0, columns, state, None)
    elif name == "repair":
        tiles.repair(state.max, retained)
    else:
        tiles.forward(0, columns, state, retained if name == "retain" else None)


def label(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Part(NamedTuple):
    """Of the file: what decides its content, and the work in pieces of seconds."""

    source: str
    units: dict[str, Callable[[], Iterator[Compiled] | list[Compiled]]]


def triton_part() -> Part:
    work: dict[str, Callable] = {}
    for capability, chip in CHIPS.items():
        for dtype, variant in itertools.product(triton_.DTYPES, VARIANTS):
            inputs = f"sm_{capability}, {label(dtype)}, {variant}"
            for kernel in tuning.CONFIGS:
                for config in listed(chip, kernel, dtype, variant):
                    work[f"{inputs}, {kernel}, {config}"] = partial(
                        compile_fused, chip, dtype, variant, kernel, config
                    )
        for dtype, columns in itertools.product(triton_.DTYPES, TILES):
            # With every option of the head, which only add to what the rows hold.
            name = f"sm_{capability}, {label(dtype)}, {columns} columns"
            work[name] = partial(compile_rows, chip, dtype, columns, "bias, softcap")
    return Part(fingerprint("triton"), work)


def cuda_part(module: Path) -> Part:
    work = {f"sm_{c}": partial(inspect_extension, chip, module) for c, chip in CHIPS.items()}
    return Part(fingerprint("cuda"), work)


def parts() -> dict[str, Part]:
    """Those that this machine can make."""
    made = {f"Triton {triton.__version__}": triton_part()}
    module = Path(cuda._cuda.__file__) if cuda._cuda else None
    if module and set(CHIPS) <= set(architectures(module)):
        made[CUDA] = cuda_part(module)
    return made


def fingerprint(language: str) -> str:
    """Of the sources that decide what the kernels become, whatever is said beside their code."""
    files = sorted(path for pattern in SOURCES[language] for path in ROOT.glob(pattern) if path.is_file())
    content = [(without_words if path.suffix == ".py" else without_comments)(path.read_text()) for path in files]
    return hashlib.sha256("\0".join(content).encode()).hexdigest()[:16]


def without_words(source: str) -> str:
    """Python without comments, docstrings and layout, in a form that does not depend on Python's version."""

    def bare(node: Any) -> Any:
        if isinstance(node, list):
            return [bare(n) for n in node if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]
        if isinstance(node, ast.AST):  # versions differ in empty fields
            return [type(node).__name__, {k: bare(v) for k, v in ast.iter_fields(node) if v not in (None, [])}]
        return repr(node)

    return json.dumps(bare(ast.parse(source)))


def without_comments(source: str) -> str:
    """C++ without comments and empty lines; strings stay as they are."""
    pattern = r'"(?:\\.|[^"\\\n])*"|//[^\n]*|/\*.*?\*/'
    bare = re.sub(pattern, lambda match: match[0] if match[0][0] == '"' else " ", source, flags=re.DOTALL)
    return "\n".join(" ".join(line.split()) for line in bare.splitlines() if line.strip())


def run(path: Path, work: dict[str, Part]) -> dict:
    """Adds to the file what it lacks of `work`: `{part: {"source": ..., "units": {name: rows}}}`."""
    results = json.loads(path.read_text()) if path.exists() else {}
    for name, part in work.items():
        stored = results.get(name)
        kept = stored["units"] if stored and stored["source"] == part.source else {}
        units = {unit: rows for unit, rows in kept.items() if unit in part.units}
        results[name] = {"source": part.source, "units": units}
        for unit, compile_unit in part.units.items():
            if unit not in units:
                units[unit] = [asdict(row) for row in compile_unit()]
                write(path, results)
                print(f"{name}, {len(units)} of {len(part.units)}: {unit}", file=sys.stderr)
    write(path, results)
    return results


def write(path: Path, results: dict) -> None:
    """One kernel a line: two versions of the file can be compared."""
    written = []
    for name, part in results.items():
        units = [
            f"{json.dumps(u)}: [\n" + ",\n".join(map(json.dumps, rows)) + "\n]" for u, rows in part["units"].items()
        ]
        head = f'{json.dumps(name)}: {{"source": {json.dumps(part["source"])}, "units": {{\n'
        written.append(head + ",\n".join(units) + "\n}}")
    temporary = path.with_suffix(".tmp")
    temporary.write_text("{\n" + ",\n".join(written) + "\n}\n")
    os.replace(temporary, path)


def compiled_rows(part: dict) -> list[Compiled]:
    return [Compiled(**row) for rows in part["units"].values() for row in rows]


def complaints(results: dict) -> list[str]:
    """What must not be used, and why."""
    return [
        f"{name}: {row}: {'; '.join(row.complaints)}"
        for name, part in results.items()
        for row in compiled_rows(part)
        if row.complaints
    ]


def report(results: dict) -> str:
    """The tables: a line for each kernel and configuration, the worst over the head's options in each cell."""
    rows = {name: compiled_rows(part) for name, part in results.items()}
    number, bad = sum(map(len, rows.values())), complaints(results)
    matrix = ", ".join(f"{chip.matrix_instruction} on sm_{chip.capability}" for chip in CHIPS.values())
    verdict = (
        "\n".join([f"**{len(bad)} of {number} must not be used:**", "", *(f"- {line}" for line in bad)])
        if bad
        else f"None of the {number} accesses local memory in its loop (that around the matrix product; anywhere, if "
        "it has no loop), waits after every wgmma, or asks for more shared memory than its chip has; the fused "
        f"bfloat16 kernels use the newest matrix unit of each chip ({matrix})."
    )
    extension = rows.pop(CUDA, [])
    compilers = {name.removeprefix("Triton "): compiled for name, compiled in rows.items()}
    parts = [
        f"Compiled with {' and '.join(rows)} (CUDA C++: nvcc), not run: `python -m tools.static_report`.",
        verdict,
        "A cell: registers of a thread / KiB of shared memory of a block / warps on a multiprocessor in percent of "
        "the most it holds / instructions that access local memory, if any; the worst over bias, softcap and ragged "
        "widths.",
        "**Fused kernels**, by chip and version of Triton (rows x columns x depth of a block; row blocks that pass "
        "over the columns together)",
        table(by_chip(compilers, ("fused.", "hopper.")), "configuration"),
        "**Triton passes over a tile in memory**, by chip and version of Triton",
        table(by_chip(compilers, ("rows.", "topk.")), "tile"),
        "**CUDA C++ passes**",
        table(by_chip({"": extension}, ("cuda.",)), "block"),
    ]
    return "\n\n".join(parts) + "\n"


def occupancy(results: dict) -> str:
    """For docs/triton.md: Hopper's bfloat16 blocks without options, a cell "registers, blocks" for each Triton."""
    names = {"forward": "forward", "retain": "forward", "gradient": "logit_gradient"}
    kernels = {f"{module}.{name}: {k}": k for module in ("fused", "hopper") for k, name in names.items()}
    cells: dict[str, dict[str, list[str]]] = {}
    for row in (row for name, part in results.items() if name != CUDA for row in compiled_rows(part)):
        if (row.chip, row.dtype, row.variant) == (90, "bfloat16", "plain") and row.kernel in kernels:
            cell = cells.setdefault(row.config, {}).setdefault(kernels[row.kernel], [])
            cell.append(f"{row.registers}, {row.blocks}")
    lines = [[config, *("; ".join(by_kernel.get(k, [])) for k in names)] for config, by_kernel in cells.items()]
    return markdown(["configuration", *names], lines)


def by_chip(compilers: dict[str, list[Compiled]], kernels: tuple[str, ...]) -> dict[str, list[Compiled]]:
    """The columns of a table of these kernels, by their titles."""
    return {
        f"sm_{chip}" + (f", {version}" if version else ""): [
            row for row in rows if row.chip == chip and row.kernel.startswith(kernels)
        ]
        for chip in CHIPS
        for version, rows in compilers.items()
    }


def table(columns: dict[str, list[Compiled]], what: str) -> str:
    by_line: dict[tuple[str, str, str], dict[str, list[Compiled]]] = {}
    for title, rows in columns.items():
        for row in rows:
            by_line.setdefault((row.kernel, row.dtype, row.config), {}).setdefault(title, []).append(row)
    lines = [[*line, *(cell(cells.get(title, [])) for title in columns)] for line, cells in by_line.items()]
    return markdown(["kernel", "dtype", what, *columns], lines)


def cell(rows: list[Compiled]) -> str:
    if not rows:
        return ""
    registers, shared, spills = (max(getattr(r, name) for r in rows) for name in ("registers", "shared", "spills"))
    text = f"{registers} / {shared / 1024:.0f} / {100 * min(r.occupancy for r in rows):.0f}"
    return f"{text} / {spills}" if spills else text


TABLES = {"kernels": report, "occupancy": occupancy}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "tools/static.json")
    args = parser.parse_args()
    results = run(args.out, parts())
    print(report(results))
    sys.exit("\n".join(complaints(results)) or None)


if __name__ == "__main__":
    main()
