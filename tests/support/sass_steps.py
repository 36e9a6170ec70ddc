"""What instructions do to the registers of a warp, as far as kernels decide by them where to go: integers,
predicates, and the float32 that divisions of integers are made of. Values are arrays of 32 lanes, unsigned.
"""

import re
import struct

import numpy as np
from sass_code import PREDICATE, results, targets, words

LANES = 32
FULL = np.ones(LANES, bool)
LOW = 0xFFFFFFFF
INFINITY = 0x7F800000

COMPARISONS = {
    "EQ": np.equal, "NE": np.not_equal, "LT": np.less, "LE": np.less_equal, "GT": np.greater,
    "GE": np.greater_equal,
}  # fmt: skip
JOINS = {"AND": np.logical_and, "OR": np.logical_or, "XOR": np.logical_xor}


def lanes_of(values):
    return np.array(list(values), np.int64)


def signed(x):
    return np.where(x >= 1 << 31, x - (1 << 32), x)


def next_register(name):
    kind, number = re.match(r"(U?R)(\d+|Z)", name).groups()
    return name if number == "Z" else f"{kind}{int(number) + 1}"


def as_bits(number):
    return struct.unpack("<I", struct.pack("<f", number))[0]


class Operand:
    """Called with a warp: the value of an operand in each lane."""

    def __init__(self, text):
        number = bool(re.match(r"-(0x)?[\d.]", text))
        self.negated = text.startswith("-") and not number
        self.inverted = text.startswith("~")
        self.absolute = "|" in text
        text = text if number else text.strip("-~|")
        register = re.fullmatch(r"(U?R(?:\d+|Z))(?:\.(\w+))?", text)
        constant = re.fullmatch(r"c\[0x0\]\[(.*)\]", text)
        self.register = register and register[1]
        self.shift = 16 if register and (register[2] or "").startswith("H1") else 0
        self.constant, self.offset_register, self.number = None, None, None
        if constant:
            offset = re.search(r"U?R\d+", constant[1])
            self.offset_register = offset and offset[0]
            self.constant = int((re.findall(r"0x[\da-f]+", constant[1]) or ["0"])[-1], 16)
        elif not register:
            self.number = self._number(text)

    @staticmethod
    def _number(text):
        if "INF" in text or "QNAN" in text:
            return INFINITY
        return int(text, 16) if "0x" in text else as_bits(float(text))  # decimal numbers are floats

    def word(self, warp, which=0):
        """Without its sign; of a pair of registers or constants the second with which = 1."""
        if self.register:
            name = next_register(self.register) if which else self.register
            return warp.get(name) >> self.shift
        if self.constant is not None:
            offset = int(warp.get(self.offset_register)[0]) if self.offset_register else 0
            return np.full(LANES, warp.constant(self.constant + offset + 4 * which), np.int64)
        return np.full(LANES, self.number >> 32 * which & LOW, np.int64)

    def __call__(self, warp, complement=False):
        """`complement`: a sign means all bits inverted, to which a carry is added."""
        value = self.word(warp)
        if self.absolute:
            value = np.abs(signed(value))
        if self.inverted or (self.negated and complement):
            return ~value & LOW
        return -value & LOW if self.negated else value

    def pair(self, warp):
        """64 bits, as integers of Python."""
        high = self.word(warp, 1)
        found = [int(a) | int(b) << 32 for a, b in zip(self.word(warp), high, strict=True)]
        return [-value for value in found] if self.negated else found

    def float32(self, warp):
        value = self.word(warp).astype(np.uint32).view(np.float32).astype(np.float64)
        value = np.abs(value) if self.absolute else value
        return -value if self.negated else value


def predicate(text):
    name = text.lstrip("!")

    def value(warp):
        found = FULL if name.endswith("T") else warp.get(name)
        return ~found if text.startswith("!") else found

    return value


def read(one):
    """(operands, predicates) of what an instruction reads."""
    texts = one.operands[len(targets(one)) :]
    return (
        [Operand(text) for text in texts if not re.fullmatch(f"!?{PREDICATE}", text)],
        [predicate(text) for text in texts if re.fullmatch(f"!?{PREDICATE}", text)],
    )


def target_of(one):
    return next(text for text in targets(one) if not re.fullmatch(PREDICATE, text))


def carries(one):
    return [text for text in targets(one) if re.fullmatch(PREDICATE, text)]


def looked_up(table, x, y, z, mask):
    """The function of three bits that a table of eight bits gives, of each bit."""
    found = np.zeros(LANES, np.int64)
    for i in range(8):
        if table >> i & 1:
            found |= (x if i & 4 else ~x) & (y if i & 2 else ~y) & (z if i & 1 else ~z)
    return found & mask


def compare(one):
    parts = one.name.split(".")
    comparison = next(part for part in parts if part in COMPARISONS)
    join = next(JOINS[part] for part in parts if part in JOINS)
    (x, y), (beside, *low_words) = read(one)

    def step(warp, lanes):
        a, b = x(warp), y(warp)
        if "U32" not in parts:
            a, b = signed(a), signed(b)
        if "EX" not in parts:
            found = COMPARISONS[comparison](a, b)
        elif comparison == "NE":
            found = (a != b) | low_words[0](warp)
        else:  # the high words; equal ones leave it to the low
            strict = {"L": np.less, "G": np.greater}.get(comparison[0], lambda a, b: np.zeros(LANES, bool))
            found = strict(a, b) | (a == b) & low_words[0](warp)
        other = beside(warp)
        for place, value in zip(one.operands, (found, ~found), strict=False):
            warp.put(place, join(value, other), lanes)

    return step


def predicates(one):
    x, y, z = map(predicate, one.operands[2:5])

    def step(warp, lanes):
        bits = [each(warp).astype(np.int64) for each in (x, y, z)]
        for place, table in zip(one.operands[:2], one.operands[5:7], strict=True):
            warp.put(place, looked_up(int(table, 16), *bits, 1) != 0, lanes)

    return step


def logic(one):
    *xyz, table = one.operands[len(targets(one)) :][:4]
    xyz = [Operand(text) for text in xyz]

    def step(warp, lanes):
        found = looked_up(int(table, 16), *(x(warp) for x in xyz), LOW)
        warp.put(target_of(one), found, lanes)
        for place in carries(one):
            warp.put(place, found != 0, lanes)

    return step


def add(one):
    terms, carried = read(one)
    extended = ".X" in one.name

    def step(warp, lanes):
        # x - y is x + ~y + 1, where the 1 of X stands in what it is carried from
        total = sum(term(warp, complement=True) + (term.negated and not extended) for term in terms)
        if extended:
            total = total + sum(carry(warp).astype(np.int64) for carry in carried)
        warp.put(target_of(one), total & LOW, lanes)
        for i, place in enumerate(carries(one)):
            warp.put(place, total >> 32 > i, lanes)

    return step


def multiply_add(one):
    parts = one.name.split(".")
    (x, y, z), carried = read(one)
    as_signed = "U32" not in parts

    def step(warp, lanes):
        a, b = x(warp), y(warp)
        if "WIDE" in parts or "HI" in parts:
            a, b = (signed(a), signed(b)) if as_signed else (a, b)
            whole = [int(i) * int(j) + k for i, j, k in zip(a, b, z.pair(warp), strict=True)]
            high = lanes_of(value >> 32 & LOW for value in whole)
            if "HI" in parts:
                return warp.put(target_of(one), high, lanes)
            warp.put(target_of(one), lanes_of(value & LOW for value in whole), lanes)
            return warp.put(next_register(target_of(one)), high, lanes)
        total = signed(a) * signed(b) + z(warp, complement="X" in parts)
        if "X" in parts:
            total = total + carried[-1](warp)
        warp.put(target_of(one), total & LOW, lanes)

    return step


def shift_add(one):
    """LEA: (x << n) + y; with HI the upper half of the shifted pair."""
    parts = one.name.split(".")
    operands, carried = read(one)
    x, y, *above = operands[:-1]
    n = operands[-1].number

    def step(warp, lanes):
        a = x(warp)
        moved = a << n & LOW
        if "HI" in parts:
            high = signed(a) >> 31 & LOW if "SX32" in parts else above[0](warp)
            moved = (high << n | a >> 32 - n) & LOW
        total = moved + y(warp, complement="X" in parts)
        if "X" in parts:
            total = total + carried[-1](warp)
        warp.put(target_of(one), total & LOW, lanes)
        for place in carries(one):
            warp.put(place, total >> 32 > 0, lanes)

    return step


def shift(one):
    """SHF: the pair (high, low) moved, of which HI takes the upper half."""
    parts = one.name.split(".")
    low, by, high = read(one)[0]

    def step(warp, lanes):
        top = high(warp)
        top = signed(top) if "S32" in parts or "S64" in parts else top
        moved = []
        for a, n, b in zip(low(warp), by(warp), top, strict=True):
            a, n, b = int(a), min(int(n), 63), int(b)
            if "L" in parts:
                moved.append((b << 32 | a) << n >> (32 if "HI" in parts else 0))
            else:
                moved.append(b >> n if "HI" in parts else (b << 32 | a) >> n)
        warp.put(target_of(one), lanes_of(value & LOW for value in moved), lanes)

    return step


def special(one):
    return lambda warp, lanes: warp.put(target_of(one), warp.special(one.operands[-1]), lanes)


def constant(one):
    place = Operand(one.operands[-1])
    mask = 0xFF if "U8" in one.name else 0xFFFF if "U16" in one.name else LOW

    def step(warp, lanes):
        name = target_of(one)
        for which in range(words(one)):
            warp.put(name, place.word(warp, which) & mask, lanes)
            name = next_register(name)

    return step


def float32(one):
    terms, kind = read(one)[0], one.short

    def step(warp, lanes):
        x, *others = (term.float32(warp) for term in terms)
        with np.errstate(all="ignore"):
            if kind == "FADD":
                x = x + others[0]
            elif kind != "MUFU":
                x = x * others[0] + (others[1] if kind == "FFMA" else 0)
            elif "RCP" in one.name:
                x = 1 / x
            found = x.astype(np.float32)
        warp.put(target_of(one), found.view(np.uint32).astype(np.int64), lanes)

    return step


def to_float(one):
    (x,) = read(one)[0]

    def step(warp, lanes):
        value = signed(x(warp)) if "S32" in one.name else x(warp)
        found = value.astype(np.float32)
        if "RP" in one.name:  # rounded up
            up = np.nextafter(found, np.float32(np.inf))
            found = np.where(found.astype(np.float64) < value, up, found)
        warp.put(target_of(one), found.view(np.uint32).astype(np.int64), lanes)

    return step


def to_integer(one):
    (x,) = read(one)[0]

    def step(warp, lanes):
        value = np.nan_to_num(np.trunc(x.float32(warp)), posinf=LOW)
        low, high = (0, LOW) if "U32" in one.name else (-(1 << 31), (1 << 31) - 1)
        warp.put(target_of(one), np.clip(value, low, high).astype(np.int64) & LOW, lanes)

    return step


def smaller_or_larger(one):
    """(V)IMNMX: the smaller where the predicate holds; VIADDMNMX: of x + y and z."""
    operands, (choose, *_) = read(one)

    def step(warp, lanes):
        *sum_of, last = (operand(warp) for operand in operands)
        x, y = sum(sum_of) & LOW, last
        if "U32" not in one.name:
            x, y = signed(x), signed(y)
        found = np.where(choose(warp), np.minimum(x, y), np.maximum(x, y))
        warp.put(target_of(one), found & LOW, lanes)

    return step


def permute(one):
    x, selector, y = read(one)[0]

    def bytes_of(a, s, b):
        parts = (int(a) | int(b) << 32).to_bytes(8, "little")
        chosen = [(parts[int(s) >> 4 * i & 7], int(s) >> 4 * i & 8) for i in range(4)]
        return int.from_bytes(bytes(255 * (byte >> 7) if sign else byte for byte, sign in chosen), "little")

    return _one_value(one, lambda warp: lanes_of(map(bytes_of, x(warp), selector(warp), y(warp))))


def select(one):
    (x, y), (choose,) = read(one)
    return _one_value(one, lambda warp: np.where(choose(warp), x(warp), y(warp)))


def simple(function):
    """A step that makes one value of the operands."""

    def step_of(one):
        operands = read(one)[0]
        return _one_value(one, lambda warp: function(*(operand(warp) for operand in operands)) & LOW)

    return step_of


def _one_value(one, value):
    return lambda warp, lanes: warp.put(target_of(one), value(warp), lanes)


def zeros(one):
    """Memory, products and floats: no branch of the kernels depends on them."""

    def step(warp, lanes):
        for name in results(one):
            warp.put(name, np.zeros(LANES, bool if "P" in name else np.int64), lanes)

    return step


STEPS = {
    "ISETP": compare, "PLOP3": predicates, "LOP3": logic, "IADD3": add, "IMAD": multiply_add,
    "LEA": shift_add, "SHF": shift, "S2R": special, "S2UR": special, "LDC": constant,
    "LDCU": constant, "FADD": float32,
    "FMUL": float32, "FFMA": float32, "MUFU": float32, "I2F": to_float, "I2FP": to_float, "F2I": to_integer,
    "IMNMX": smaller_or_larger, "VIMNMX": smaller_or_larger, "VIADDMNMX": smaller_or_larger,
    "PRMT": permute, "SEL": select, "MOV": simple(lambda x, *_: x), "R2UR": simple(lambda x: x),
    "VIADD": simple(lambda x, y: x + y), "IABS": simple(lambda x: np.abs(signed(x))),
    "POPC": simple(lambda x: lanes_of(int(value).bit_count() for value in x)),
    "FLO": simple(lambda x: lanes_of(int(value).bit_length() - 1 for value in x)),
    "BREV": simple(lambda x: lanes_of(int(f"{value:032b}"[::-1], 2) for value in x)),
}  # fmt: skip


def step_of(one):
    kind = one.short
    if kind.startswith("U") and kind not in STEPS:  # the same for all lanes
        kind = kind[1:]
    return STEPS.get(kind, zeros)(one)
