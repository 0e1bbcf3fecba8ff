"""What a kernel became on a chip, read from its machine code: registers, spills, shared memory, and what follows."""

import contextlib
import io
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from triton.compiler import make_backend
from triton.knobs import nvidia

REGISTERS_PER_SM, WARPS_PER_SM, TENSOR_COLUMNS = 65_536, 64, 512
MATRIX = re.compile(r"\b(?:HMMA|HGMMA|UTC\w*MMA)\b")  # of sm_80, sm_90 and sm_100
THREADS = {"cuda.topk": 512}  # of a block of the extension, where they are not 128
LOCAL = re.compile(r"\b(?:LDL|STL)\b")


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
    loop_spills: int | None  # those in its `busy_loops`; None if it has no loop
    serialised: bool  # a wait after every wgmma, so that nothing runs beside the matrix unit
    shared: int  # bytes
    instructions: list[str]  # those of the expected ones that it has
    missing: list[str]  # and has not
    blocks: int  # on a multiprocessor at a time
    occupancy: float  # warps on a multiprocessor over the most it holds

    @property
    def complaints(self) -> list[str]:
        """Why this configuration must not be used."""
        limit, reasons = CHIPS[self.chip].shared_per_block, []
        if self.loop_spills is None and (self.spills or self.stack):
            reasons.append(f"{self.spills} accesses to local memory, {self.stack} bytes of stack")
        if self.loop_spills:
            reasons.append(f"{self.loop_spills} accesses to local memory in its loop")
        if self.serialised:
            reasons.append("serialised: it waits after every wgmma")
        if self.shared > limit:
            reasons.append(f"{self.shared} bytes of shared memory, the chip has {limit}")
        reasons += [f"no {instruction}" for instruction in self.missing]
        return reasons

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
        code = instructions_of(cuobjdump(cubin, "-sass"))
    metadata, loops = kernel.metadata, busy_loops(code)
    said = "wgmma" in kernel.asm["ptx"] and serialisation(ptxas_log(kernel))
    blocks = chip.blocks(usage["REG"], metadata.shared, metadata.num_warps, metadata.tmem_size or 0)
    missing = [i for i in instructions if i not in kernel.asm["ptx"]]
    if instructions and not any(map(has_product, loops)):
        missing.append("loop around the matrix product")
    return Compiled(
        chip.capability, name, dtype, variant, config,
        registers=usage["REG"],
        stack=usage["STACK"] + usage["LOCAL"],
        spills=local_accesses(code),
        loop_spills=sum(map(local_accesses, loops)) if loops else None,
        serialised=said or any(map(waits_after_each, loops)),
        shared=metadata.shared,
        instructions=[i for i in instructions if i not in missing],
        missing=missing,
        blocks=blocks,
        occupancy=blocks * metadata.num_warps / WARPS_PER_SM,
    )  # fmt: skip


def architectures(module: Path) -> dict[int, str]:
    """What a module that nvcc built has machine code for: `{90: "sm_90a"}`."""
    pairs = re.findall(r"arch = (sm_(\d+)a?)\n", cuobjdump(module, "--dump-resource-usage"))
    return {int(capability): arch for arch, capability in pairs}


def inspect_extension(chip: Chip, module: Path) -> list[Compiled]:
    """Every kernel of a module that nvcc built for this chip. None has a matrix product."""
    arch = architectures(module)[chip.capability]
    functions = re.split(r"Function : ", cuobjdump(module, "-sass", "-arch", arch))[1:]
    code = {text.split(maxsplit=1)[0]: text for text in functions}
    rows = []
    for mangled, usage in resource_usage(module, "-arch", arch).items():
        name, dtype, chunks = readable(mangled)
        threads = THREADS.get(name, 128)
        blocks = chip.blocks(usage["REG"], usage["SHARED"], threads // 32)
        rows.append(
            Compiled(
                chip.capability, name, dtype, "all", f"{threads} threads x {chunks}",
                registers=usage["REG"],
                stack=usage["STACK"] + usage["LOCAL"],
                spills=local_accesses(instructions_of(code[mangled])),
                loop_spills=None,
                serialised=False,
                shared=usage["SHARED"],
                instructions=[],
                missing=[],
                blocks=blocks,
                occupancy=blocks * threads / 32 / WARPS_PER_SM,
            )
        )  # fmt: skip
    return rows


def readable(mangled: str) -> tuple[str, str, int]:
    """`(kernel, dtype, chunks)` of a mangled name, whose template arguments, if any, are the last two."""
    match = re.search(r"\d([a-z_]+)_kernel(?:I(?:\d*(f|__half|__nv_bfloat16))?(?:Li(\d+)E)?E)?", mangled)
    if not match:
        raise ValueError(f"{mangled} is no kernel of this package")
    types = {"f": "float32", "__half": "float16", "__nv_bfloat16": "bfloat16", None: "float32"}
    return f"cuda.{match[1]}", types[match[2]], int(match[3] or 1)


def resource_usage(binary: Path, *options: str) -> dict[str, dict[str, int]]:
    usages = re.findall(r"Function (\S+):\s+(REG:.*)", cuobjdump(binary, "--dump-resource-usage", *options))
    return {name: {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", usage)} for name, usage in usages}


def instructions_of(sass: str) -> list[tuple[int, str]]:
    """`[(address, instruction)]` of one function."""
    return [(int(at, 16), text.strip()) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", sass)]


def local_accesses(code: list[tuple[int, str]]) -> int:
    return sum(bool(LOCAL.search(text)) for _, text in code)


def busy_loops(code: list[tuple[int, str]]) -> list[list[tuple[int, str]]]:
    """Where a kernel spends its time: the innermost loops around matrix instructions, or all loops if it has none.

    A loop lies between a branch back and its target. Blocks that are seldom entered, such as the second attempt of a
    wait, lie behind the kernel's exit. They branch back too, and close no loop.
    """
    where, ends = {at: i for i, (at, _) in enumerate(code)}, {}
    for end, (at, text) in enumerate(code):
        target = re.search(r"\bBRA\b.*\b0x([0-9a-f]+)$", text)
        if target and int(target[1], 16) < at:
            start = where[int(target[1], 16)]
            if not any(text.startswith("EXIT") for _, text in code[start : end + 1]):
                ends[start] = end
    # Where an outer loop's branch decides on the exit, only this tells: the second attempt jumps into a loop's middle.
    ends = {a: b for a, b in ends.items() if not any(c < a <= d < b for c, d in ends.items())}
    products = {a: b for a, b in ends.items() if has_product(code[a : b + 1])}

    def within(a: int, b: int, others: dict[int, int]) -> bool:
        return any(c <= a and b <= d and (a, b) != (c, d) for c, d in others.items())

    innermost = [(a, b) for a, b in products.items() if not any(within(c, d, {a: b}) for c, d in products.items())]
    outermost = [(a, b) for a, b in ends.items() if not within(a, b, ends)]
    return [code[start : end + 1] for start, end in innermost or outermost]


def has_product(code: list[tuple[int, str]]) -> bool:
    return any(MATRIX.search(text) for _, text in code)


def waits_after_each(loop: list[tuple[int, str]]) -> bool:
    """Whether every wgmma of a loop is waited for before the next: in a pipeline one wait follows the last of them."""
    marks = "".join("m" if "HGMMA" in t else "w" for _, t in loop if "HGMMA" in t or "WARPGROUP.DEPBAR" in t)
    return marks.count("m") > 1 and "mm" not in marks


def ptxas_log(kernel) -> str:
    """What ptxas says of a `triton.CompiledKernel`: it is called once more, as Triton calls it."""
    target, log = kernel.metadata.target, io.StringIO()
    with nvidia.scope(), contextlib.redirect_stdout(log):
        nvidia.dump_ptxas_log = True
        make_backend(target).make_cubin(kernel.asm["ptx"], {}, kernel.metadata, target.arch)
    return log.getvalue()


def serialisation(log: str) -> bool:
    """Whether ptxas reports it. Each cause has a message of its own: (C7510), (C7515) and others near them."""
    return "wgmma.mma_async instructions are serialized" in log


def cuobjdump(binary: Path, *options: str) -> str:
    """The tool that Triton ships."""
    command = [nvidia.cuobjdump.path, *options, binary]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
