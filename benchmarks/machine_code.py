"""What a kernel became on a chip, read from its machine code: registers, spills, shared memory, and what follows."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from triton.knobs import nvidia

REGISTERS_PER_SM, WARPS_PER_SM, TENSOR_COLUMNS = 65_536, 64, 512


@dataclass(frozen=True)
class Chip:
    """What bounds a program, from the CUDA programming guide's "Compute Capabilities"."""

    capability: int
    matrix_instruction: str  # as the PTX writes it
    shared_per_block: int
    shared_per_sm: int

    def blocks(self, registers: int, shared: int, warps: int, tensor_columns: int = 0) -> int:
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
    dtype: str
    variant: str
    config: str
    registers: int
    stack: int  # bytes
    spills: int  # instructions that read or write local memory
    shared: int  # bytes
    instructions: list[str]  # those of the expected ones that it has
    missing: list[str]  # and has not
    blocks: int  # on a multiprocessor at a time
    occupancy: float  # warps on a multiprocessor over the most it holds

    @property
    def complaints(self) -> list[str]:
        """Why this configuration must not be used."""
        limit, found = CHIPS[self.chip].shared_per_block, []
        if self.spills or self.stack:
            found.append(f"{self.spills} accesses to local memory, {self.stack} bytes of stack")
        if self.shared > limit:
            found.append(f"{self.shared} bytes of shared memory, the chip has {limit}")
        found += [f"no {instruction}" for instruction in self.missing]
        return found

    def __str__(self) -> str:
        return f"sm_{self.chip} {self.kernel} {self.dtype}, {self.variant}, {self.config}"


def inspect_triton(
    chip: Chip, kernel, instructions: tuple[str, ...], *, name: str, dtype: str, variant: str, config: str
) -> Compiled:
    """Reads a `triton.CompiledKernel`; `instructions` are what its PTX must have."""
    with tempfile.TemporaryDirectory() as directory:
        cubin = Path(directory) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        (usage,) = resource_usage(cubin).values()
        spills = local_accesses(cuobjdump(cubin, "-sass"))
    metadata = kernel.metadata
    blocks = chip.blocks(usage["REG"], metadata.shared, metadata.num_warps, metadata.tmem_size or 0)
    found = [i for i in instructions if i in kernel.asm["ptx"]]
    return Compiled(
        chip.capability, name, dtype, variant, config, usage["REG"], usage["STACK"] + usage["LOCAL"], spills,
        metadata.shared, found, [i for i in instructions if i not in found], blocks,
        blocks * metadata.num_warps / WARPS_PER_SM,
    )  # fmt: skip


def inspect_extension(chip: Chip, module: Path, threads: int) -> list[Compiled]:
    """Every kernel of a module that nvcc built, `threads` a block; none if it has no machine code for this chip."""
    architectures = re.findall(r"arch = (sm_\d+a?)\n", cuobjdump(module, "--dump-resource-usage"))
    arch = next((a for a in architectures if a.rstrip("a") == f"sm_{chip.capability}"), None)
    if arch is None:
        return []
    functions = re.split(r"Function : ", cuobjdump(module, "-sass", "-arch", arch))[1:]
    code = {text.split(maxsplit=1)[0]: text for text in functions}
    rows = []
    for mangled, usage in resource_usage(module, "-arch", arch).items():
        name, dtype = readable(mangled)
        blocks = chip.blocks(usage["REG"], usage["SHARED"], threads // 32)
        stack = usage["STACK"] + usage["LOCAL"]
        rows.append(
            Compiled(
                chip.capability, name, dtype, "all", f"{threads} threads", usage["REG"], stack,
                local_accesses(code[mangled]), usage["SHARED"], [], [], blocks, blocks * threads / 32 / WARPS_PER_SM,
            )
        )  # fmt: skip
    return rows


def readable(mangled: str) -> tuple[str, str]:
    """`(kernel, dtype)` of a mangled name, whose template argument, if any, is the dtype."""
    match = re.search(r"\d([a-z_]+)_kernel(I\d*(f|__half|__nv_bfloat16)E)?", mangled)
    if not match:
        raise ValueError(f"{mangled} is no kernel of this package")
    types = {"f": "float32", "__half": "float16", "__nv_bfloat16": "bfloat16", None: "float32"}
    return f"cuda.{match[1]}", types[match[3]]


def resource_usage(binary: Path, *options: str) -> dict[str, dict[str, int]]:
    found = re.findall(r"Function (\S+):\s+(REG:.*)", cuobjdump(binary, "--dump-resource-usage", *options))
    return {name: {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", usage)} for name, usage in found}


def local_accesses(sass: str) -> int:
    return len(re.findall(r"\b(?:LDL|STL)\b", sass))


def cuobjdump(binary: Path, *options: str) -> str:
    """The tool that Triton ships."""
    command = [nvidia.cuobjdump.path, *options, binary]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
