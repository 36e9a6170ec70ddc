"""The model of machine code: what instructions do, which way warps go, and what they take."""

import re

import cubin
import numpy as np
import pytest
import sass_clock
import sass_code
import sass_model
import sass_steps
import sass_trace
import torch
from emulated_operators import emulator

from vitdiv_kernels import _native

GPU = sass_clock.GPUS[90]


def instruction(text, address=0, stall=1, writes=7, reads=7, waits=0):
    high = stall << 41 | writes << 46 | reads << 49 | waits << 52
    return sass_code.decoded(address, text, high)


class Registers(dict):
    """Of a warp: what steps need of one."""

    def get(self, name):
        return self[name]

    def put(self, name, value, lanes):
        self[name] = np.where(lanes, value, self.get(name) if name in self else 0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("IADD3 R0, P0, R1, R2, RZ", {"R0": 4, "P0": True}),
        ("IADD3 R0, P0, R2, -R3, RZ", {"R0": 0xFFFFFFFE, "P0": False}),  # 5 - 7 borrows
        ("IADD3 R0, P0, R3, -R2, RZ", {"R0": 2, "P0": True}),
        ("IADD3 R0, P0, R3, -RZ, RZ", {"R0": 7, "P0": True}),
        ("IADD3.X R0, R2, ~R3, RZ, P1, !PT", {"R0": 0xFFFFFFFE}),
        ("IMAD R0, R2, -0x2, R3", {"R0": 0xFFFFFFFD}),
        ("IMAD.WIDE R0, R1, 0x4, R2", {"R0": 1, "R1": 7}),  # (7:5) - 4
        ("IMAD.WIDE.U32 R0, R1, 0x4, R2", {"R0": 1, "R1": 11}),
        ("IMAD.HI.U32 R0, R1, R2, RZ", {"R0": 4}),
        ("IMAD.HI R0, R1, R2, RZ", {"R0": 0xFFFFFFFF}),
        ("IMAD.X R0, RZ, RZ, ~R2, P1", {"R0": 0xFFFFFFFB}),
        ("IMAD.MOV R0, RZ, RZ, -R2", {"R0": 0xFFFFFFFB}),
        ("LEA R0, P0, R1, R2, 0x1", {"R0": 3, "P0": True}),
        ("LEA.HI R0, R1, R2, RZ, 0x1", {"R0": 6}),
        ("LEA.HI.X R0, R1, R2, R3, 0x1, P1", {"R0": 5 + 15 + 1}),
        ("LEA.HI.X.SX32 R0, R1, R2, 0x1, P1", {"R0": 5}),
        ("SHF.R.S32.HI R0, RZ, 0x1f, R1", {"R0": 0xFFFFFFFF}),
        ("SHF.R.U32.HI R0, RZ, 0x4, R1", {"R0": 0x0FFFFFFF}),
        ("SHF.L.U32 R0, R2, 0x3, RZ", {"R0": 40}),
        ("SHF.L.U64.HI R0, R1, 0x2, R2", {"R0": 23}),
        ("LOP3.LUT P0, R0, R2, 0x2, RZ, 0xc0, !PT", {"R0": 0, "P0": False}),
        ("LOP3.LUT R0, R2, R3, RZ, 0x3c, !PT", {"R0": 2}),
        ("ISETP.GE.AND P0, PT, R1, RZ, PT", {"P0": False}),
        ("ISETP.GE.U32.AND P0, P2, R1, RZ, P1", {"P0": True, "P2": False}),
        ("ISETP.NE.OR P0, PT, R1, R1, P1", {"P0": True}),
        ("ISETP.GE.U32.AND.EX P0, PT, R2, 0x5, PT, P1", {"P0": True}),
        ("ISETP.GE.U32.AND.EX P0, PT, R2, 0x5, PT, !P1", {"P0": False}),
        ("ISETP.LT.AND.EX P0, PT, R2, R3, PT, !P1", {"P0": True}),
        ("ISETP.NE.AND.EX P0, PT, RZ, RZ, PT, P1", {"P0": True}),
        ("PLOP3.LUT P0, PT, P1, PT, PT, 0x2a, 0x0", {"P0": False}),
        ("PLOP3.LUT P0, PT, P1, PT, PT, 0x80, 0x0", {"P0": True}),
        ("SEL R0, R2, R3, !P1", {"R0": 7}),
        ("VIMNMX R0, R1, R2, PT", {"R0": 0xFFFFFFFF}),
        ("VIMNMX.U32 R0, R1, R2, PT", {"R0": 5}),
        ("VIADDMNMX R0, R2, 0x4, R3, !PT", {"R0": 9}),
        ("IABS R0, R1", {"R0": 1}),
        ("PRMT R0, R2, 0x5410, R3", {"R0": 7 << 16 | 5}),
        ("I2F.RP R0, R2", {"R0": sass_steps.as_bits(5.0)}),
        ("MUFU.RCP R0, R4", {"R0": sass_steps.as_bits(0.25)}),
        ("F2I.FTZ.U32.TRUNC.NTZ R0, R4", {"R0": 4}),
        ("POPC R0, R1", {"R0": 32}),
        ("FLO.U32 R0, R2", {"R0": 2}),
        ("UIADD3 UR0, UR1, 0xf, URZ", {"UR0": 18}),
        ("ULEA UR0, UR1, UR1, 0x18", {"UR0": 3 + (3 << 24)}),
    ],
)
def test_what_instructions_do(text, expected):
    one = instruction(text)
    numbers = {"R1": 0xFFFFFFFF, "R2": 5, "R3": 7, "R4": sass_steps.as_bits(4.0), "UR1": 3, "RZ": 0, "URZ": 0}
    warp = Registers({name: np.full(32, value, np.int64) for name, value in numbers.items()})
    warp["P1"] = np.ones(32, bool)
    sass_steps.step_of(one)(warp, sass_steps.FULL)
    assert {name: warp[name][3] for name in expected} == expected
    assert set(expected) <= set(sass_code.results(one))


def kernel(text):
    """A Kernel of lines; a label is a line that ends with a colon, and a branch names it."""
    lines, places = [], {}
    for line in filter(None, (line.strip() for line in text.splitlines())):
        if line.endswith(":"):
            places[line[:-1]] = 16 * len(lines)
        else:
            lines.append(line)
    named = [re.sub(r"\b[a-z]+$", lambda found: f"{places[found[0]]:#x}", line) for line in lines]
    return sass_trace.Kernel([instruction(line, 16 * i) for i, line in enumerate(named)])


def way(code, first_thread=0, arguments=b""):
    return [at for at, *_ in kernel(code).warp(arguments, 90, 0, first_thread, 64)]


def test_a_loop_turns_as_often_as_an_argument_says():
    code = """
        LDC R1, c[0x0][0x214]
        MOV R0, RZ
        again:
        VIADD R0, R0, 0x1
        FFMA R3, R3, R3, R3
        ISETP.GE.AND P0, PT, R0, R1, PT
        @!P0 BRA again
        EXIT
    """
    found = kernel(code).warp(b"\0\0\0\0\5\0\0\0", 90, 0, 0, 32)
    assert [at for at, _ in found] == [0, 1, *[2, 3, 4, 5] * 5, 6]
    assert {lanes for at, lanes in found if at != 5} == {32}


def test_lanes_that_part_meet_again():
    code = """
        S2R R0, SR_TID.X
        ISETP.GE.AND P0, PT, R0, 0x24, PT
        BSSY B0, together
        @P0 BRA aside
        NOP
        BRA together
        aside:
        NOP
        NOP
        together:
        BSYNC B0
        BAR.SYNC 0x0
        EXIT
    """
    found = kernel(code).warp(b"", 90, 0, 32, 64)
    assert [(at, lanes) for at, lanes, *_ in found] == [
        (0, 32), (1, 32), (2, 32), (3, 28), (4, 4), (5, 4), (6, 28), (7, 28), (8, 32), (9, 32), (10, 32),
    ]  # fmt: skip
    assert found[-2][2:] == (0, 0)


def test_lanes_that_end_keep_nobody_waiting():
    code = """
        S2R R0, SR_LANEID
        ISETP.GE.AND P0, PT, R0, 0x8, PT
        BSSY B0, together
        @P0 EXIT
        together:
        BSYNC B0
        EXIT
    """
    assert way(code) == [0, 1, 2, 3, 4, 5]


def test_only_what_branches_need_is_computed():
    code = [
        instruction(text)
        for text in ("MOV R0, 0x1", "FMUL R1, R2, R2", "ISETP.GE.AND P0, PT, R0, 0x1, PT", "@P0 EXIT")
    ]
    assert sass_code.needed(code) == {0, 2, 3}


def timed(*lines, warps=1, lanes=32):
    code = [instruction(**line) if isinstance(line, dict) else instruction(line) for line in lines]
    trace = [(at, lanes) for at in range(len(code))]
    return sass_clock.clocks_of(code, [[trace] * warps], GPU)


def test_a_warp_waits_as_its_control_codes_say():
    # four clocks each for a chain of ten; the end of the last is not waited for
    chain = [dict(text="FFMA R0, R0, R0, R0", stall=4)] * 10
    assert timed(*chain).clocks == pytest.approx(36 + sass_clock.FIXED, abs=1)
    load, use = dict(text="LDS R0, [R1]", writes=0), dict(text="FADD R1, R0, R0", waits=1)
    assert timed(load, use).clocks == pytest.approx(sass_clock.LATENCY["LDS"] + 1 + sass_clock.FIXED, abs=2)


@pytest.mark.parametrize(
    ("text", "clocks"),
    [
        ("FFMA R0, R0, R0, R0", 1),  # 128 a clock and multiprocessor
        ("IADD3 R0, R0, R0, R0", 2),  # 64
        ("MUFU.EX2 R0, R0", 8),  # 16
        ("HMMA.16816.F32.BF16 R0, R4, R8, R0", GPU.product),
        ("LDS R0, [R1]", 4),  # 128 bytes a clock for all four schedulers
        ("LDS.128 R0, [R4]", 16),
        ("LDSM.16.M88.4 R0, [R4]", 16),
        ("STG.E [R0.64], R4", 4 * 128 / GPU.l2),
    ],
)
def test_many_warps_are_bound_by_a_pipe(text, clocks):
    number, each = 64, 50
    found = timed(*[text] * each, warps=number)
    a_scheduler = number * each / sass_clock.SCHEDULERS
    assert found.clocks == pytest.approx(clocks * a_scheduler, rel=0.1)


def test_a_barrier_waits_for_all_warps():
    code = [instruction(text) for text in ("MUFU.EX2 R0, R0", "BAR.SYNC 0x0", "EXIT")]
    short, long = [(1, 32, 0, 0), (2, 32)], [*[(0, 32)] * 100, (1, 32, 0, 0), (2, 32)]
    found = sass_clock.clocks_of(code, [[long, short]], GPU)
    assert found.clocks == pytest.approx(800 + sass_clock.BARRIER, abs=16)
    ended = sass_clock.clocks_of(code, [[long, [(2, 32)]]], GPU)  # who has ended is not waited for
    assert ended.clocks == found.clocks


def test_copies_are_waited_for_by_groups():
    code = [
        instruction(text)
        for text in (
            "LDGSTS.E.BYPASS.128 [R0], [R2.64]",
            "LDGDEPBAR",
            "DEPBAR.LE SB0, 0x1",
            "DEPBAR.LE SB0, 0x0",
        )
    ]
    first, second = [(0, 32), (1, 32)], [*[(0, 32)] * 50, (1, 32)]
    early = sass_clock.clocks_of(code, [[[*first, *second, (2, 32), (2, 32)]]], GPU).clocks
    late = sass_clock.clocks_of(code, [[[*first, *second, (3, 32), (3, 32)]]], GPU).clocks
    assert late - early > 40 * 512 / GPU.l2


def test_blocks_that_fit_a_multiprocessor():
    assert sass_clock.blocks_at_once(GPU, registers=168, shared=100 << 10, threads=384) == 1  # registers
    assert sass_clock.blocks_at_once(GPU, registers=64, shared=100 << 10, threads=128) == 2  # shared memory
    assert sass_clock.blocks_at_once(GPU, registers=32, shared=0, threads=256) == 8  # warps


@pytest.fixture(scope="module")
def model():
    if cubin.cuobjdump() is None:
        pytest.skip("there is no cuobjdump, which comes with CUDA and with Triton")
    if not _native.CUDA_OPERATIONS:
        pytest.skip("the extension was built without CUDA kernels")
    model = sass_model.Model([_native.OPERATORS])
    if not model.places:
        pytest.skip("the extension was not built for sm_90")
    return model


# Of a backward in float64 or with pre_mix a branch asks about floats: there the model goes another way.
@pytest.mark.parametrize(
    ("operation", "shape", "mode", "dtype", "directions"),
    [
        ("reattention", (3, 21, 32), "none", torch.bfloat16, ("forward", "backward")),
        ("reattention", (12, 21, 16), "layer", torch.float16, ("forward", "backward")),
        ("reattention", (4, 30, 48), "pre_mix", torch.bfloat16, ("forward",)),
        ("reattention", (3, 21, 16), "none", torch.float64, ("forward",)),
        ("attention_gram", (6, 21, 32), "none", torch.float16, ("forward", "backward")),
        ("pairwise_cosine", (70, 40), "none", torch.bfloat16, ("forward", "backward")),
        ("two_gram", (70, 40), "none", torch.float32, ("forward", "backward")),
    ],
)
def test_as_many_products_as_the_emulated_kernels_make(model, operation, shape, mode, dtype, directions):
    calls = sass_model.Calls(operation, 1, shape, dtype, mode)
    for direction in directions:
        with emulator().counting() as counts:
            calls.calls[direction]()
        found = 0
        for launch in calls.launches(direction):
            kernel = model.code(launch.name).kernel
            for block in range(launch.blocks):
                for first in range(0, launch.threads, 32):
                    way = kernel.warp(launch.arguments, 90, block, first, launch.threads)
                    found += sum(
                        lanes > 0 and kernel.code[at].short in ("HMMA", "DMMA") for at, lanes, *_ in way
                    )
        assert found == counts["mma"] > 0
