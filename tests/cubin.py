"""What nvcc made of the CUDA kernels: their resources, as ptxas reports them, and their instructions."""

import collections
import re
import struct
import subprocess

# The low 12 bits of an instruction of 16 bytes, the same from sm_80 to sm_100.
OPCODES = {0x23C: "HMMA", 0x23F: "DMMA", 0x83B: "LDSM", 0xFAE: "LDGSTS"}
RESOURCES = {
    "stack": r"(\d+) bytes stack frame",
    "spilled": r"(\d+) bytes spill stores",
    "registers": r"Used (\d+) registers",
    "static shared": r"(\d+) bytes smem",
}


def compile_for(architecture, source, folder):
    """Resources and instructions of each kernel of a source, by its mangled name."""
    cubin = folder / f"{source.stem}_{architecture}.cubin"
    command = ["nvcc", "-std=c++20", "-O3", f"-arch=sm_{architecture}", "-Xptxas", "-v", "-cubin"]
    run = subprocess.run([*command, str(source), "-o", str(cubin)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    instructions = count_instructions(cubin.read_bytes())
    kernels = {}
    for part in re.split(r"Compiling entry function '", run.stderr)[1:]:
        found = {key: re.search(pattern, part) for key, pattern in RESOURCES.items()}
        name = part.split("'")[0]
        kernels[name] = {key: int(match[1]) if match else 0 for key, match in found.items()}
        kernels[name]["instructions"] = instructions[name]
    return kernels


def count_instructions(elf):
    """How often each kernel has the instructions of OPCODES; its code is the ELF section .text.<name>."""
    table = struct.unpack_from("<Q", elf, 0x28)[0]
    size, count, names_index = struct.unpack_from("<HHH", elf, 0x3A)
    # name, type, flags, address, offset, size
    sections = [struct.unpack_from("<IIQQQQ", elf, table + i * size) for i in range(count)]
    names = sections[names_index][4]
    counts = {}
    for name_at, _, _, _, offset, length in sections:
        name = elf[names + name_at : elf.index(b"\0", names + name_at)].decode()
        if name.startswith(".text."):
            opcodes = (elf[i] | (elf[i + 1] & 0xF) << 8 for i in range(offset, offset + length, 16))
            counts[name[6:]] = collections.Counter(OPCODES[o] for o in opcodes if o in OPCODES)
    return counts
