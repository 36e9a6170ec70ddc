"""Clocks that a multiprocessor takes for warps whose ways through the machine code are known (sass_trace.py).

Each of four schedulers issues at most one instruction a clock, of a warp whose control codes allow it: the
stall count of its last instruction is over, and the scoreboards that it waits for are clear. Beyond that an
instruction waits for its pipe. Memory answers after a fixed time, and gives so many bytes a clock at most.

No GPU has calibrated it. What it leaves out: caches of instructions and constants, banks of registers,
conflicts of shared memory's banks, sectors that are moved for fewer bytes.
"""

import heapq
from collections import Counter
from typing import NamedTuple

from sass_code import width_of

SCHEDULERS = 4
WARPS, BLOCKS, REGISTERS = 64, 32, 65536  # of a multiprocessor
SHARED_OF_BLOCK = 1024  # bytes that each block takes beside its own
TAKEN_BRANCH = 4  # clocks until the next instruction is there
BARRIER = 20  # clocks from the last warp's coming to the first one's going on
FIXED = 4  # clocks of arithmetic whose end the stall counts know

# Clocks until a result is there: Luo et al. 2024 (arXiv:2402.13499, tables of Hopper) for shared memory, L2
# and products; Abdelkhalik et al. 2022 (arXiv:2208.11174) for special functions; others as between these.
LATENCY = {
    "LDS": 29, "LDSM": 33, "STS": 19, "SHFL": 25, "LDC": 36, "LDCU": 36, "ULDC": 12, "LDG": 262,
    "LDGSTS": 270, "STG": 20, "LDL": 40, "HMMA": 33, "DMMA": 40, "MUFU": 24, "I2F": 24, "F2I": 24, "F2F": 24,
    "FLO": 20, "POPC": 20, "S2R": 28, "S2UR": 28, "R2UR": 12, "VOTE": 12, "IMMA": 33, "DADD": 16, "DMUL": 16,
    "DFMA": 16, "DSETP": 16,
}  # fmt: skip


class Gpu(NamedTuple):
    """Of a compute capability. Results a clock: CUDA C++ Programming Guide, Arithmetic Instructions."""

    shared: int  # bytes of shared memory of a multiprocessor
    product: float  # clocks of a scheduler's tensor core for mma.m16n8k16 of 16-bit numbers
    float32: int  # clocks of a scheduler's pipe for a warp's float32 instruction
    float64: int
    l2: float  # bytes a clock
    reserved: int = SHARED_OF_BLOCK


GPUS = {
    # 2048 multiply-adds a clock, of which mma.sync reaches 0.62 (Luo et al.)
    90: Gpu(228 << 10, 4 / 0.62, 1, 2, 24),
    80: Gpu(164 << 10, 8, 2, 2, 30),
}

_ALU = {
    "IADD3", "VIADD", "LOP3", "ISETP", "SEL", "FSEL", "FMNMX", "PRMT", "SHF", "LEA", "VIMNMX", "IMNMX",
    "FSETP", "PLOP3", "F2FP", "IABS", "VIADDMNMX", "MOV", "SGXT", "BMSK", "P2R", "R2P", "I2FP", "CS2R",
}  # fmt: skip
_SPECIAL = {"MUFU", "I2F", "F2I", "F2F", "FLO", "POPC", "BREV"}
_SHARED = {"LDS", "STS", "LDSM", "STSM", "SHFL", "ATOMS"}
_FAR = {"LDG", "STG", "LDGSTS", "LDL", "STL", "RED", "ATOMG"}


def blocks_at_once(gpu, registers, shared, threads):
    of_warp = -(-registers * 32 // 256) * 256
    warps = threads // 32
    fit = REGISTERS // (of_warp * warps), gpu.shared // (shared + gpu.reserved), WARPS // warps, BLOCKS
    return min(fit)


class Cost(NamedTuple):
    """Of one instruction, before it is known which lanes take part."""

    pipe: str  # of the scheduler; "": none
    clocks: float  # for which it keeps that
    latency: int
    memory: str  # "shared", "far" or ""
    bytes: int  # of a lane


def cost(one, gpu):
    kind = one.short
    latency = LATENCY.get(kind, FIXED)
    if kind in ("HMMA", "IMMA"):
        return Cost("tensor", gpu.product, latency, "", 0)
    if kind == "DMMA":
        return Cost("tensor", 8, latency, "", 0)
    if kind in _SPECIAL:
        return Cost("special", 8, latency, "", 0)
    if kind in _SHARED:
        return Cost("", 0, latency, "shared", width_of(one.name) // 8)
    if kind in _FAR:
        return Cost("", 0, latency, "far", width_of(one.name) // 8)
    if kind in ("DADD", "DMUL", "DFMA", "DSETP"):
        return Cost("float64", gpu.float64, latency, "", 0)
    if kind in ("FADD", "FMUL", "FFMA", "HFMA2", "HADD2", "HMUL2"):
        return Cost("float32", gpu.float32, latency, "", 0)
    if kind.startswith("IMAD"):
        return Cost("float32", 2, latency, "", 0)
    if kind in _ALU:
        return Cost("alu", 2, latency, "", 0)
    return Cost("", 0, latency, "", 0)


class Found(NamedTuple):
    clocks: float  # from the first instruction to the last
    issued: int
    busy: dict  # clocks of each pipe, of the busiest scheduler or of the multiprocessor
    waits: Counter  # clocks that warps waited, by the place of the instruction


def clocks_of(code, blocks, gpu):
    """Found, of blocks that start together; a block is a list of warps, each [(index, lanes, ..)]."""
    costs = [cost(one, gpu) for one in code]
    free = [Counter() for _ in range(SCHEDULERS)]  # when a scheduler and its pipes are free again
    memory = {"shared": 0.0, "far": 0.0}
    busy = Counter()
    waits = Counter()
    traces = [(number, trace) for number, block in enumerate(blocks) for trace in block]
    left = Counter(number for number, _ in traces)  # warps of a block that go on
    places = [0] * len(traces)
    boards = [[0.0] * 6 for _ in traces]
    copies = [[0.0] for _ in traces]  # when each group of copies is there; the last is open
    came = {}  # (block, barrier): the warps that have come
    queue = [(0.0, i) for i in range(len(traces))]
    heapq.heapify(queue)
    issued, end = 0, 0.0
    asked = [0.0] * len(traces)  # since when the next instruction could be issued but for what it waits for
    while queue:
        now, i = heapq.heappop(queue)
        number, trace = traces[i]
        at, lanes, *barrier = trace[places[i]]
        one, price = code[at], costs[at]
        slot = free[i % SCHEDULERS]
        start = max(now, slot["issue"], slot[price.pipe] if price.pipe else 0.0)
        if start > now:
            heapq.heappush(queue, (start, i))
            continue
        waits[at] += now - asked[i]
        issued += 1
        end = max(end, now)
        slot["issue"] = now + 1
        busy["issue", i % SCHEDULERS] += 1
        done = (
            now + price.latency if lanes else now
        )  # what a guard keeps from all lanes takes its issue alone
        if price.pipe and lanes:
            slot[price.pipe] = now + price.clocks
            busy[price.pipe, i % SCHEDULERS] += price.clocks
        if price.memory and lanes:
            took = lanes * price.bytes / (128 if price.memory == "shared" else gpu.l2)
            took = max(took, 1.0)
            begun = max(now, memory[price.memory])
            memory[price.memory] = begun + took
            busy[price.memory, 0] += took
            done = begun + took + price.latency
        if one.short == "LDGSTS" and lanes:
            copies[i][-1] = max(copies[i][-1], done)
            done = now + 20
        elif one.short == "LDGDEPBAR":
            copies[i].append(0.0)
        board = boards[i]
        if one.writes != 7:
            board[one.writes] = max(board[one.writes], done)
        if one.reads != 7:
            board[one.reads] = max(board[one.reads], now + min(price.latency, 16))
        following = now + max(one.stall, 1)
        if one.short == "DEPBAR" and len(one.operands) > 1:
            groups_left = int(one.operands[1], 16)
            waited = copies[i][: len(copies[i]) - 1 - groups_left]
            following = max([following, *waited])
        places[i] += 1
        if places[i] == len(trace):
            left[number] -= 1
            end = max(end, done)
        elif one.short in ("BRA", "CALL", "RET") and trace[places[i]][0] != at + 1:
            following += TAKEN_BRANCH
        if one.short == "BAR" or places[i] == len(trace):
            _arrive(came, left, number, i, one, barrier, now, queue, traces, places, code, boards, asked)
            if one.short == "BAR":
                continue
        if places[i] < len(trace):
            asked[i] = following
            heapq.heappush(queue, (_ready(code, trace[places[i]][0], board, following), i))
    return Found(end, issued, _summary(busy), waits)


def _ready(code, at, board, following):
    waits = code[at].waits
    for b in range(6):
        if waits >> b & 1 and board[b] > following:
            following = board[b]
    return following


def _arrive(came, left, number, i, one, barrier, now, queue, traces, places, code, boards, asked):
    """A warp has come to a barrier or has ended: whom does that let go on?"""
    if one.short == "BAR":
        which, threads = barrier
        came.setdefault((number, which, threads), []).append(i)
    for (block, which, threads), warps in list(came.items()):
        if block == number and len(warps) >= (threads // 32 if threads else left[number]):
            del came[block, which, threads]
            for warp in warps:
                trace, at = traces[warp][1], places[warp]
                if at < len(trace):
                    asked[warp] = now
                    heapq.heappush(queue, (_ready(code, trace[at][0], boards[warp], now + BARRIER), warp))


def _summary(busy):
    found = {}
    for (pipe, _), clocks in busy.items():
        found[pipe] = max(found.get(pipe, 0), clocks)
    return found
