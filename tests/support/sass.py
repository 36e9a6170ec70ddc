"""The machine code of a compiled kernel: instructions, loops, and counts by what carries them out."""

import ast
import functools
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import triton
from sass_code import width_of

BINARIES = Path(triton.__file__).parent / "backends/nvidia/bin"

LABEL = re.compile(r"\s*\.(L_x_\d+):")
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?);")
TARGET = re.compile(r"`\(\.(L_x_\d+)\)")
LINE = re.compile(r'//## File "([^"]*)", line (\d+)')

# What the pipes of a streaming multiprocessor take besides the issue slot: by the first part of the name.
KINDS = {
    "HMMA": "tensor", "IMMA": "tensor", "DMMA": "tensor", "HGMMA": "tensor", "UTCHMMA": "tensor",
    "MUFU": "mufu", "LDG": "global", "STG": "global", "LDGSTS": "global", "LDS": "shared", "STS": "shared",
    "LDSM": "shared", "STSM": "shared", "ATOMS": "shared", "SHFL": "shuffle", "LDC": "constant",
    "LDL": "local", "STL": "local", "BAR": "barrier", "WARPSYNC": "barrier",
}  # fmt: skip
MOVES = ("LDG", "STG", "LDGSTS", "LDS", "STS", "LDSM", "STSM")
# (m, n, k) of a product whose name has them without an "x" between.
SHAPES = {"884": (8, 8, 4), "1684": (16, 8, 4), "1688": (16, 8, 8), "16816": (16, 8, 16)}
# Multiply-adds of 16 bits that take as long as one of these.
SLOWNESS = {"TF32": 2, "DMMA": 16}
# What hardly a call takes: of vectors far from 1.
RARE = {"_far_cosines", "_far_lengths", "_powers"}


class Instruction(NamedTuple):
    predicate: str
    name: str  # with what follows its dots
    operands: str
    line: tuple = ("", 0)  # of the source: file, number; of what was inlined its own

    @property
    def short(self):
        return self.name.split(".")[0]


class Loop(NamedTuple):
    first: int
    last: int  # the branch back, included
    depth: int  # loops around it
    source: tuple = ("", "", 0)  # function, variable ("" of a while) and line of the loop that it was made of


class Code(NamedTuple):
    instructions: list
    loops: list  # the longest first

    def counts(self, loop=None, rare=True):
        """Of a loop, those of the loops in it included, or of all: how many are issued, how many of each of
        KINDS, a warp's multiply-adds on tensor cores, as many as it could make of 16 bits in their time (of
        four warps together apart), and loads and stores by their width in bits.

        Not `rare`: without what hardly a call takes.
        """
        part = self.instructions if loop is None else self.instructions[loop.first : loop.last + 1]
        if not rare:
            part = [one for one in part if function_of(*one.line) not in RARE]
        found = Counter(issued=len(part))
        for one in part:
            kind = KINDS.get(one.short, "")
            if kind:
                found[kind] += 1
            if kind == "tensor":
                slowness = max([1, *(SLOWNESS.get(part, 1) for part in one.name.split("."))])
                together = "of warpgroups" if one.short == "HGMMA" else "multiply-adds"
                found[together] += multiply_adds(one.name) * slowness
            if one.short in MOVES:
                found[f"{one.short}.{width_of(one.name)}"] += 1
        return found


@functools.cache
def _functions(file):
    """(first line, last line, name) of each function, the inner ones last."""
    path = Path(file)
    if not path.is_file():
        return []
    functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    return [(node.lineno, node.end_lineno, node.name) for node in functions]


def function_of(file, line):
    """The name of the function that a line is in."""
    return next((name for first, last, name in reversed(_functions(file)) if first <= line <= last), "")


@functools.cache
def loop_at(file, line):
    """(function, variable, line) of the loop whose head is there: a branch back has the line of its head."""
    path = Path(file)
    head = path.read_text().splitlines()[line - 1] if path.is_file() else ""
    variable = re.match(r"\s*for (\w+) in", head)
    return function_of(file, line), variable[1] if variable else "", line


def multiply_adds(name):
    """Of a product on tensor cores, of one warp; 0 where the name does not tell."""
    for part in name.split(".")[1:]:
        shape = SHAPES.get(part) or tuple(map(int, part.split("x"))) if part[0].isdigit() else ()
        if len(shape) == 3:
            # HGMMA is issued by four warps together
            return shape[0] * shape[1] * shape[2] // (4 if name.startswith("HGMMA") else 1)
    return 0


def disassembled(cubin):
    """The Code of a cubin of one kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [BINARIES / "nvdisasm", "-c", "-g", file.name], capture_output=True, text=True, check=True
        ).stdout
    return parsed(text)


def parsed(text):
    labels, instructions, place = {}, [], ("", 0)
    for line in text.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif source := LINE.search(line):
            place = source[1], int(source[2])
        elif found := INSTRUCTION.search(line):
            instructions.append(Instruction(found[1] or "", found[2], found[3], place))
    spans = {}
    for i, one in enumerate(instructions):
        target = TARGET.search(one.operands) if one.short == "BRA" else None
        if target and labels.get(target[1], i + 1) < i:  # a branch to itself ends the code
            first = labels[target[1]]
            spans[first] = max(i, spans.get(first, i))
    loops = [
        Loop(
            first,
            last,
            sum(start <= first and last <= end for start, end in spans.items()) - 1,
            loop_at(*instructions[last].line),
        )
        for first, last in spans.items()
    ]
    return Code(instructions, sorted(loops, key=lambda loop: loop.first - loop.last))
