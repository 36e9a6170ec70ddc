"""Which functions of a compiled x86-64 library hold AVX or AVX-512 instructions."""

import re
import subprocess
from pathlib import Path

FUNCTION = re.compile(r"^[0-9a-f]+ <(.*)>:$")
INSTRUCTION = re.compile(r"^ *[0-9a-f]+:\t([0-9a-f]{2}) [0-9a-f ]*\t(\w+)")


def wide_code(library: Path) -> dict[str, set[str]]:
    """Demangled function name -> the extensions in its code, a subset of {"avx", "avx512"}.

    Read from the first byte of each instruction. In 64-bit code 0x62 is the EVEX encoding, thus AVX-512, and
    nothing else; 0xc4 and 0xc5 are VEX: AVX, AVX2 and the mask instructions of AVX-512 (kmov, ...).
    """
    command = ["objdump", "--disassemble", "--wide", "--demangle", str(library)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[str, set[str]] = {}
    function = ""
    for line in listing.splitlines():
        if header := FUNCTION.match(line):
            function = header[1]
        elif instruction := INSTRUCTION.match(line):
            byte, mnemonic = instruction.groups()
            if byte == "62" or mnemonic.startswith("k"):
                found.setdefault(function, set()).add("avx512")
            elif byte in ("c4", "c5"):
                found.setdefault(function, set()).add("avx")
    return found


def leaks(code: dict[str, set[str]]) -> dict[str, set[str]]:
    """The functions with instructions that their namespace does not promise the processor to have."""
    allowed = {"cpu_avx512::": {"avx", "avx512"}, "cpu_avx2::": {"avx"}}
    return {
        function: found
        for function, found in code.items()
        # clang's bodies of parallel regions have no namespace in their names; they are local to their object
        if not function.startswith(".omp_outlined.")
        and not any(space in function and found <= extensions for space, extensions in allowed.items())
    }
