"""What nvcc made of the CUDA kernels: their resources and their instructions, read from the built library.

python tests/cubin.py     # a line for each kernel and architecture
"""

import collections
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).with_name("support")))

from elf import sections as elf_sections

# The low 12 bits of an instruction of 16 bytes, the same from sm_80 to sm_120; of stores to device memory
# bits 73 to 75 say how wide they are.
OPCODES = {0x23C: "HMMA", 0x23F: "DMMA", 0x83B: "LDSM", 0xFAE: "LDGSTS", 0x986: "STG"}
WIDTHS = {0: ".U8", 1: ".U8", 2: ".U16", 3: ".U16", 4: ".32", 5: ".64", 6: ".128"}
RESOURCES = {"registers": r"REG:(\d+)", "stack": r"STACK:(\d+)", "static shared": r"SHARED:(\d+)"}


def cuobjdump():
    """The program of the CUDA toolkit, of which Triton brings a copy; None where there is neither."""
    if found := shutil.which("cuobjdump"):
        return found
    triton = importlib.util.find_spec("triton")
    brought = triton and Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"
    return str(brought) if brought and brought.exists() else None


def kernels_of(library, folder):
    """Resources and instructions of each kernel, by its mangled name: {architecture: {name: {..}}}."""
    subprocess.run([cuobjdump(), "-xelf", "all", library], cwd=folder, check=True, capture_output=True)
    architectures = {}
    for file in sorted(folder.glob("*.cubin")):
        kernels = architectures.setdefault(int(re.search(r"sm_(\d+)", file.name)[1]), {})
        instructions = count_instructions(file.read_bytes())
        for name, resources in usage_of(file).items():
            kernels[name] = resources | {"instructions": instructions[name]}
    return architectures


def usage_of(file):
    """Resources of each kernel in a cubin, by its mangled name."""
    command = [cuobjdump(), "--dump-resource-usage", file]
    usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {
        name: {key: int(re.search(pattern, found)[1]) for key, pattern in RESOURCES.items()}
        for name, found in re.findall(r"Function (\S+):\s+(.*)", usage)
    }


def count_instructions(elf):
    """How often each kernel has the instructions of OPCODES, STG by its width; its code is the ELF section
    .text.<name>.
    """
    counts = {}
    for name, offset, length, _ in elf_sections(elf):
        if name.startswith(".text."):
            counts[name[6:]] = collections.Counter(
                named(elf, i) for i in range(offset, offset + length, 16) if opcode(elf, i) in OPCODES
            )
    return counts


def opcode(elf, at):
    return elf[at] | (elf[at + 1] & 0xF) << 8


def named(elf, at):
    name = OPCODES[opcode(elf, at)]
    return name + WIDTHS[elf[at + 9] >> 1 & 7] if name == "STG" else name


def print_kernels(library):
    with tempfile.TemporaryDirectory() as folder:
        architectures = kernels_of(library, Path(folder))
    for architecture, kernels in sorted(architectures.items()):
        for name, found in sorted(kernels.items()):
            resources = ", ".join(f"{found[key]} {key}" for key in RESOURCES)
            counts = ", ".join(f"{count} {each}" for each, count in sorted(found["instructions"].items()))
            print(f"sm_{architecture} {name}: {resources}; {counts}")


if __name__ == "__main__":
    built = Path(__file__).resolve().parents[1] / "vitdiv_kernels/libvitdiv.so"
    if cuobjdump() is None:
        sys.exit("there is no cuobjdump: install the CUDA toolkit, or Triton, which brings it")
    try:
        print_kernels(built)
    except subprocess.CalledProcessError:
        sys.exit(f"{built} has no CUDA kernels: put nvcc on PATH and run VITDIV_CUDA=1 make build")
