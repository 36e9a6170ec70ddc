"""The machine code of CUDA kernels: instructions, what they read and write, which of them branches need."""

import re
import subprocess
from typing import NamedTuple

from cubin import cuobjdump

PREDICATE = r"U?P[\dT]+"

_INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,6})\*/\s+(.*?);\s+/\* 0x([0-9a-f]{16}) \*/")
_SECOND_WORD = re.compile(r"\s+/\* 0x([0-9a-f]{16}) \*/")
_GUARD = re.compile(r"@(!?)(U?P[T0-9]+)\s+")
_REGISTER = re.compile(r"\b(U?[RP]\d+)\b")


class Instruction(NamedTuple):
    address: int
    guard: tuple  # (predicate, negated); () where there is none
    name: str
    operands: tuple
    stall: int  # clocks before the warp's next instruction
    writes: int  # scoreboard that is cleared when the result is there; 7: none
    reads: int  # when the operands have been read
    waits: int  # bits of the scoreboards to wait for

    @property
    def short(self):
        return self.name.split(".")[0]


def function(cubin, name):
    """[Instruction] of a kernel, by its mangled name."""
    command = [cuobjdump(), "-sass", "-fun", name, str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    code, pending = [], None
    for line in text.splitlines():
        if first := _INSTRUCTION.match(line):
            pending = first
        elif (second := _SECOND_WORD.match(line)) and pending:
            code.append(decoded(int(pending[1], 16), pending[2], int(second[1], 16)))
            pending = None
    return code


def decoded(address, text, high):
    guard = ()
    if given := _GUARD.match(text):
        guard, text = (given[2], given[1] == "!"), text[given.end() :]
    name, _, operands = text.strip().partition(" ")
    operands = tuple(one.strip() for one in operands.replace(".reuse", "").split(",") if one.strip())
    # bits 105 on of the 128: stall, yield, write and read scoreboard, mask of those to wait for
    stall, writes, reads, waits = high >> 41 & 15, high >> 46 & 7, high >> 49 & 7, high >> 52 & 63
    return Instruction(address, guard, name, operands, stall, writes, reads, waits)


def _span(name, number):
    """The registers R4, R5, .. of a result or operand of several words."""
    kind, first = re.match(r"(U?R)(\d+)", name).groups()
    return [f"{kind}{int(first) + i}" for i in range(number)]


def words(one):
    """32-bit words of the result."""
    parts = one.name.split(".")
    if parts[0] in ("HMMA", "DMMA", "LDSM") or "128" in parts:
        return 4
    wide = "WIDE" in parts or "64" in parts or parts[0] in ("CS2R", "DADD", "DMUL", "DFMA")
    return 2 if wide and "32" not in parts else 1


_NO_RESULT = {
    "BRA", "EXIT", "BSSY", "BSYNC", "STS", "STG", "STL", "BAR", "NOP", "WARPSYNC", "LDGSTS", "LDGDEPBAR",
    "DEPBAR", "RET", "CALL", "BREAK", "ENDCOLLECTIVE", "ERRBAR", "MEMBAR", "CCTL", "BPT", "KILL", "YIELD",
    "NANOSLEEP", "FENCE", "RED", "BRX", "STSM",
}  # fmt: skip


_TWO_RESULTS = {"ISETP", "UISETP", "FSETP", "DSETP", "HSETP2", "PLOP3", "UPLOP3"}
_ALSO_CARRIES = {"IADD3", "UIADD3", "LEA", "ULEA", "LOP3", "ULOP3"}


def targets(one):
    """The first operands, as many as are written."""
    if one.short in _NO_RESULT or not one.operands:
        return ()
    if one.short in _TWO_RESULTS:
        return one.operands[:2]
    number = 1
    if one.short in _ALSO_CARRIES:  # a predicate before the result, carries after it
        number += bool(re.fullmatch(PREDICATE, one.operands[0]))
        while re.fullmatch(PREDICATE, one.operands[number]):
            number += 1
    return one.operands[:number]


def results(one):
    """Registers and predicates that an instruction writes."""
    written = []
    for operand in targets(one):
        for name in _REGISTER.findall(operand):
            written += _span(name, words(one)) if "R" in name else [name]
    return written


def sources(one):
    """Registers and predicates that an instruction reads."""
    read = [one.guard[0]] if one.guard else []
    product = one.short in ("IMAD", "UIMAD") and ("WIDE" in one.name or "HI" in one.name)
    operands = one.operands[len(targets(one)) :]
    for i, operand in enumerate(operands):
        wide = ".64" in operand or (product and i == 2)
        for name in _REGISTER.findall(operand):
            read += _span(name, 2) if wide and "R" in name else [name]
    return read


_FLOAT_TESTS = "FSETP", "FCHK", "DSETP", "HSETP2"  # false
_ROOTS = "BRA", "EXIT", "BREAK", "RET", "BRX", "BAR"


def needed(code):
    """Indices of the instructions whose results a branch, a guard of an access or a barrier may depend on."""
    numbers = {}  # of a register's name, a bit
    for one in code:
        for name in (*results(one), *sources(one)):
            numbers.setdefault(name, 1 << len(numbers))
    written = [sum({numbers[name] for name in results(one)}) for one in code]
    read = [0 if one.short in _FLOAT_TESTS else sum({numbers[name] for name in sources(one)}) for one in code]
    guards = [numbers.get(one.guard[0], 0) if one.guard else 0 for one in code]
    follow = followers(code)
    before = [0] * len(code)  # registers that are needed there
    found, changed = set(), True
    while changed:
        changed = False
        for i in range(len(code) - 1, -1, -1):
            after = 0
            for each in follow[i]:
                after |= before[each]
            here = after if guards[i] else after & ~written[i]
            if code[i].short in _ROOTS or written[i] & after:
                found.add(i)
                here |= read[i]
            else:
                here |= guards[i]
            if here != before[i]:
                before[i], changed = here, True
    return found


def followers(code):
    """Where each instruction may go on."""
    places = {one.address: i for i, one in enumerate(code)}
    after_calls = [i + 1 for i, one in enumerate(code) if one.short == "CALL"]
    follow = []
    for i, one in enumerate(code):
        ways = (
            []
            if one.short in ("RET", "CALL") or (one.short in ("EXIT", "BRA") and not one.guard)
            else [i + 1]
        )
        if one.short == "BRA" and len(one.operands) > 1:
            ways = [i + 1]
        if one.short in ("BRA", "CALL"):
            ways.append(places[int(one.operands[-1], 16)])
        follow.append([way for way in ways if way < len(code)] + (after_calls if one.short == "RET" else []))
    return follow


def width_of(name):
    """Bits that an instruction moves for each thread."""
    parts = name.split(".")
    if parts[0] in ("LDSM", "STSM"):  # one, two or four matrices of 8 x 8 elements of 16 bits
        return 32 * int(parts[-1]) if parts[-1] in ("2", "4") else 32
    for part, bits in (("128", 128), ("64", 64), ("U16", 16), ("S16", 16), ("U8", 8), ("S8", 8)):
        if part in parts:
            return bits
    return 32
