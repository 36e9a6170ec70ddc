"""Which way a block's warps take through the machine code of a kernel: it is carried out, with the arguments
of a launch, as far as branches depend on it.

What no branch depends on is not computed, memory reads as zeros, and comparisons of floats are false: the
branches of the kernels depend on arguments, block and thread alone.
"""

import re
import struct

import numpy as np
from sass_code import PREDICATE, needed
from sass_steps import FULL, LANES, Operand, predicate, step_of

PARAMETERS = {
    8: 0x160,
    9: 0x210,
    10: 0x380,
    12: 0x380,
}  # where arguments begin in the constants, by capability
LONGEST = 3_000_000  # instructions of a warp
_CONTROL = "BRA", "CALL", "RET", "EXIT", "BREAK", "BSYNC", "BSSY", "BAR"


class Kernel:
    """The code of a kernel, ready to be followed."""

    def __init__(self, code):
        self.code = code
        self.places = {one.address: i for i, one in enumerate(code)}
        used = needed(code)
        self.steps = [
            step_of(one) if i in used and one.short not in _CONTROL else None for i, one in enumerate(code)
        ]
        self.guards = [predicate("!" * one.guard[1] + one.guard[0]) if one.guard else None for one in code]
        self.branches = {i: self._branch(one) for i, one in enumerate(code) if one.short in ("BRA", "CALL")}

    def _branch(self, one):
        """(place, predicates that must hold besides the guard)"""
        conditions = [text for text in one.operands[:-1] if re.fullmatch(f"!?{PREDICATE}", text)]
        return self.places[int(one.operands[-1], 16)], [predicate(text) for text in conditions]

    def warp(self, arguments, capability, block, first_thread, threads):
        """[(index of the instruction, active lanes)] of the warp whose lanes are threads first_thread on.

        At a barrier of the block also its number, and for how many threads it waits; 0: all.
        """
        return _Warp(self, arguments, capability, block, first_thread, threads).run()


class _Warp:
    def __init__(self, kernel, arguments, capability, block, first_thread, threads):
        self.kernel, self.arguments, self.threads = kernel, arguments, threads
        self.parameters = PARAMETERS[capability // 10]
        lane = np.arange(LANES, dtype=np.int64)
        self.specials = {
            "SR_TID.X": first_thread + lane, "SR_LANEID": lane, "SR_CTAID.X": np.full(LANES, block, np.int64)
        }  # fmt: skip
        self.values = {}

    def get(self, name):
        found = self.values.get(name)
        return np.zeros(LANES, bool if "P" in name else np.int64) if found is None else found

    def put(self, name, value, lanes):
        if name[-1] not in "ZT":  # RZ, PT
            self.values[name] = value if lanes is FULL else np.where(lanes, value, self.get(name))

    def constant(self, offset):
        at = offset - self.parameters
        if 0 <= at <= len(self.arguments) - 4:
            return struct.unpack_from("<I", self.arguments, at)[0]
        return self.threads if offset == 0 else 0

    def special(self, name):
        return self.specials.get(name, np.zeros(LANES, np.int64))

    def run(self):
        kernel, code, trace = self.kernel, self.kernel.code, []
        groups = [(0, FULL)]  # of lanes that are at the same place; who is behind goes on first
        self.members, self.waiting = (
            {},
            {},
        )  # of a barrier: the lanes that will come, (place, lanes) that have
        while groups:
            groups.sort(key=lambda group: group[0])
            at, lanes = groups.pop(0)
            while groups and groups[0][0] == at:
                lanes = lanes | groups.pop(0)[1]
            lanes = FULL if lanes.all() else lanes
            number = int(lanes.sum())
            ahead = groups[0][0] if groups else len(code)
            while at < ahead:
                one, step, active = code[at], kernel.steps[at], lanes
                if kernel.guards[at] is not None:
                    active = lanes & kernel.guards[at](self)
                    trace.append((at, int(active.sum())))
                else:
                    trace.append((at, number))
                if one.short in _CONTROL:
                    if one.short == "BAR":
                        trace[-1] = (at, number, *self.barrier(one))
                    ways = self.ways(one, at, lanes, active)
                    if len(ways) != 1 or ways[0][1] is not lanes:
                        groups += ways
                        break
                    at = ways[0][0]
                    continue
                if step is not None and (active is lanes or active.any()):
                    step(self, active)
                at += 1
            else:
                groups.append((at, lanes))
            if len(trace) > LONGEST:
                raise RuntimeError(f"still on its way after {LONGEST} instructions")
        return trace

    def ways(self, one, at, lanes, active):
        """[(place, lanes)]: where the lanes that have come to a branch go on."""
        kind, further = one.short, (at + 1, lanes)
        if kind == "BSSY":
            self.members[one.operands[0]] = lanes
        elif kind == "BREAK":
            name = one.operands[-1]
            self.members[name] = self.members[name] & ~active
            return [further, *self.released()]
        elif kind == "BSYNC":
            name = one.operands[-1]
            come = self.waiting[name][1] | lanes if name in self.waiting else lanes
            self.waiting[name] = at, come
            return self.released(lanes)
        elif kind == "EXIT":
            self.members = {name: members & ~active for name, members in self.members.items()}
            rest = lanes & ~active
            return [(at + 1, rest)] * bool(rest.any()) + self.released()
        elif kind == "RET":
            register, _, offset = one.operands[0].partition(" ")
            address = int(self.get(register)[int(np.argmax(lanes))]) + int(offset, 16)
            return [(self.kernel.places[address], lanes)]
        elif one.name != "BRA.DIV" and kind in ("BRA", "CALL"):  # BRA.DIV is for lanes that have parted
            place, conditions = self.kernel.branches[at]
            for condition in conditions:
                active = active & condition(self)
            if active is lanes or (active == lanes).all():
                return [(place, lanes)]
            if active.any():
                return [(place, active), (at + 1, lanes & ~active)]
        return [further]

    def released(self, lanes=None):
        """[(place, lanes)] of the barriers of the warp to which all their lanes have come."""
        found = []
        for name, (at, come) in list(self.waiting.items()):
            members = self.members[name]
            if (come & members == members).all():
                del self.waiting[name], self.members[name]
                same = lanes is not None and (members == lanes).all()
                found += [(at + 1, lanes if same else members)] * bool(members.any())
        return found

    def barrier(self, one):
        numbers = [int(Operand(text)(self)[0]) for text in one.operands]
        return (*numbers, 0, 0)[:2]
