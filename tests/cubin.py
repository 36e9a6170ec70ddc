"""What nvcc made of the CUDA kernels: their resources and their instructions, read from the built library."""

import collections
import importlib.util
import re
import shutil
import struct
import subprocess
from pathlib import Path

# The low 12 bits of an instruction of 16 bytes, the same from sm_80 to sm_100.
OPCODES = {0x23C: "HMMA", 0x23F: "DMMA", 0x83B: "LDSM", 0xFAE: "LDGSTS"}
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
        command = [cuobjdump(), "--dump-resource-usage", file]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        for name, found in re.findall(r"Function (\S+):\s+(.*)", usage):
            resources = {key: int(re.search(pattern, found)[1]) for key, pattern in RESOURCES.items()}
            kernels[name] = resources | {"instructions": instructions[name]}
    return architectures


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
