"""What the Triton kernels become on three generations of GPUs, without one: `python -m benchmarks.static_report`.

The backends run on small CPU tensors while a driver that only names a target stands in for CUDA's: every launch is
compiled with exactly the types, alignments and options that it would have on the device, and nothing is launched. From
the machine code come registers, stack, spills, shared memory and the matrix instruction; from those the occupancy.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.knobs import nvidia
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from dadpo_kernels.backends import triton_, triton_tuning
from dadpo_kernels.backends.tiled import Best, Coefficients, Entries, Grads, Head, Kept, State, Tiles

REGISTERS_PER_SM, WARPS_PER_SM, TENSOR_COLUMNS = 65_536, 64, 512
FUSED = ("forward.statistics", "backward.logit_gradient")
ROWS, TOP_K = 16, 64
VARIANTS = {"plain": (False, 64), "bias, softcap": (True, 64), "bias, softcap, ragged width": (True, 72)}


@dataclass(frozen=True)
class Chip:
    """What bounds a program, from the CUDA programming guide's "Compute Capabilities"."""

    capability: int
    matrix_instruction: str  # as the PTX writes it
    shared_per_block: int
    shared_per_sm: int

    def blocks(self, registers: int, shared: int, warps: int, tensor_columns: int) -> int:
        """Blocks that one multiprocessor holds at a time."""
        per_warp = -(-registers * 32 // 256) * 256
        by_registers = REGISTERS_PER_SM // 4 // per_warp * 4 // warps
        by_shared = self.shared_per_sm // (shared + 1024)  # one KiB of every block is the system's
        by_tensor = TENSOR_COLUMNS // tensor_columns if tensor_columns else by_registers
        return min(WARPS_PER_SM // warps, by_registers, by_shared, by_tensor)


CHIPS = {
    chip.capability: chip
    for chip in (
        Chip(80, "mma.sync", 163 * 1024, 164 * 1024),
        Chip(90, "wgmma.mma_async", 227 * 1024, 228 * 1024),
        Chip(100, "tcgen05.mma", 227 * 1024, 228 * 1024),
    )
}


@dataclass(frozen=True)
class Compiled:
    """One kernel in one configuration on one chip."""

    chip: int
    kernel: str
    inputs: str
    config: str
    registers: int
    stack: int  # bytes
    spills: int  # instructions that read or write local memory
    shared: int  # bytes
    matrix: bool  # has the chip's matrix instruction
    blocks: int  # on a multiprocessor at a time
    occupancy: float  # warps on a multiprocessor over the most it holds

    @property
    def complaints(self) -> list[str]:
        """Why this configuration must not be used."""
        chip, found = CHIPS[self.chip], []
        if self.spills or self.stack:
            found.append(f"{self.spills} accesses to local memory, {self.stack} bytes of stack")
        if self.shared > chip.shared_per_block:
            found.append(f"{self.shared} bytes of shared memory, the chip has {chip.shared_per_block}")
        if self.kernel.startswith(FUSED) and "float32" not in self.inputs and not self.matrix:
            found.append(f"no {chip.matrix_instruction}")
        return found


class OfflineDriver:
    """Stands in for Triton's CUDA driver: it names a target and has no device."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # Triton keeps compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling(capability: int) -> Iterator[dict]:
    """Launches inside compile for that target and run nothing: `{kernel's name and hash: CompiledKernel}`."""
    compiled: dict = {}
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        name = f"{self.fn.__module__.rpartition('.')[2]}.{self.fn.__name__}"
        compiled.setdefault(kernel.hash, (name, kernel))

    offline = mock.patch.object(driver, "_active", OfflineDriver(capability))
    with mock.patch.object(JITFunction, "run", compile_only), offline:
        yield compiled


def problem(kind: type[Tiles], dtype: torch.dtype, columns: int, variant: str) -> Tiles:
    options, width = VARIANTS[variant]
    weight, hidden = torch.zeros(columns, width, dtype=dtype), torch.zeros(ROWS, width, dtype=dtype)
    head = Head(weight, weight[:, 0].contiguous() if options else None, 1.0, 30.0 if options else None, 1.0)
    ids = torch.arange(TOP_K).expand(ROWS, TOP_K)
    return kind(hidden, head, Entries.merge(ids[:, 0], ids))


def passes(tiles: Tiles) -> None:
    """Every pass of a backend over one tile: statistics, retained or not, both gradients, and top-k."""
    columns, entries = len(tiles.head.weight), tiles.entries.ids.shape[1]
    padded, groups = tiles.kept_shape(ROWS, columns)
    hidden, state = tiles.hidden, State.new(ROWS, entries, tiles.hidden)
    kept = Kept(hidden.new_zeros(ROWS, padded), hidden.new_zeros(ROWS, groups, dtype=torch.float32))
    coefficients = Coefficients(state.max, state.max, state.selected)
    wide = {"dtype": torch.float32}
    grads = Grads(
        hidden.new_zeros(hidden.shape, **wide), torch.zeros_like(tiles.head.weight), hidden.new_zeros(columns, **wide)
    )
    for stored in (None, kept):
        tiles.statistics(0, columns, state, stored)
        tiles.gradient(0, columns, coefficients, grads, stored)
    if type(tiles) is triton_.RowTiles:  # the fused backend uses the same
        slots = hidden.new_zeros(ROWS, 2 * TOP_K + 1, **wide)
        tiles.topk(0, columns, state, Best(slots, slots.to(torch.int32), slots[:, 0].to(torch.int32), TOP_K))


def compile_rows(chip: Chip, dtype: torch.dtype, columns: int, variant: str) -> Iterator[Compiled]:
    """The kernels that pass over a tile of products of `columns` columns, and the small ones."""
    with compiling(chip.capability) as compiled:
        passes(problem(triton_.RowTiles, dtype, columns, variant))
    for name, kernel in compiled.values():
        yield inspect(chip, name, describe(dtype, variant), f"{columns} columns", kernel)


def compile_fused(chip: Chip, dtype: torch.dtype, variant: str, only_first: bool = False) -> Iterator[Compiled]:
    """The fused kernels in the configurations that `triton_tuning` lists for them on this chip."""
    for pass_name in triton_tuning.CONFIGS:
        choices = triton_tuning.candidates(pass_name, chip.capability // 10, dtype, VARIANTS[variant][1])
        for config in choices[:1] if only_first else choices:
            with compiling(chip.capability) as compiled, mock.patch.object(triton_, "choose", lambda *_, c=config: c):
                one_pass(problem(triton_.FusedTiles, dtype, 512, variant), pass_name)
            fused = [(name, kernel) for name, kernel in compiled.values() if name in FUSED]
            for (name, kernel), role in zip(fused, ("", " (repair)"), strict=False):
                label = f"{name} {pass_name}{role}"
                yield inspect(chip, label, describe(dtype, variant), "x".join(map(str, config)), kernel)


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


def describe(dtype: torch.dtype, variant: str) -> str:
    return f"{str(dtype).removeprefix('torch.')}, {variant}"


def inspect(chip: Chip, name: str, inputs: str, config: str, kernel) -> Compiled:
    """Reads the machine code with the tools that Triton ships."""
    with tempfile.TemporaryDirectory() as directory:
        cubin = Path(directory) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])

        def dump(option: str) -> str:
            command = [nvidia.cuobjdump.path, option, cubin]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        found = re.findall(r"(REG|STACK|LOCAL):(\d+)", dump("--dump-resource-usage"))
        usage = {key: int(value) for key, value in found}
        spills = len(re.findall(r"\b(?:LDL|STL)\b", dump("-sass")))
    shared, warps = kernel.metadata.shared, kernel.metadata.num_warps
    blocks = chip.blocks(usage["REG"], shared, warps, kernel.metadata.tmem_size or 0)
    return Compiled(
        chip.capability, name, inputs, config, usage["REG"], usage["STACK"] + usage["LOCAL"], spills, shared,
        chip.matrix_instruction in kernel.asm["ptx"], blocks, blocks * warps / WARPS_PER_SM,
    )  # fmt: skip


def table(rows: list[Compiled]) -> str:
    """Markdown, one line per kernel, inputs, configuration and chip."""
    lines = [
        f"Triton {triton.__version__}; nothing was run. Generated by `python -m benchmarks.static_report`.",
        "",
        "Configuration of fused kernels: block rows x columns x depth x group x warps x stages.",
        "",
        "| chip | kernel | inputs | configuration | registers | spills | shared | matrix units | blocks | occupancy |",
        "|---|---|---|---|---:|---:|---:|---|---:|---:|",
    ]
    for r in rows:
        instruction = CHIPS[r.chip].matrix_instruction if r.matrix else ""
        lines.append(
            f"| sm_{r.chip} | {r.kernel} | {r.inputs} | {r.config} | {r.registers} | {r.spills} "
            f"| {r.shared / 1024:.0f} KiB | {instruction} | {r.blocks} | {r.occupancy:.0%} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/triton_static"), help=".md and .json")
    parser.add_argument("--chip", type=int, choices=list(CHIPS), action="append", help="default: all")
    args = parser.parse_args()
    rows: list[Compiled] = []
    for chip in (CHIPS[c] for c in args.chip or CHIPS):
        for dtype in triton_.DTYPES:
            for variant in VARIANTS:
                for columns in (4096, 16384):
                    rows += compile_rows(chip, dtype, columns, variant)
                rows += compile_fused(chip, dtype, variant)
                print(f"sm_{chip.capability} {describe(dtype, variant)}: {len(rows)} so far", file=sys.stderr)
    args.out.with_suffix(".md").write_text(table(rows))
    args.out.with_suffix(".json").write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n")
    bad = [f"sm_{r.chip} {r.kernel} {r.inputs} {r.config}: {'; '.join(r.complaints)}" for r in rows if r.complaints]
    sys.exit("\n".join(bad) or None)


if __name__ == "__main__":
    main()
