"""Which schedule and which tiles the Triton kernels of re-attention run with. Nothing is tuned at run time.

source: "cost model" for a choice by counting (README.md), "aot" for one that ahead-of-time compilation showed
to be free of spills, "measured on <device>" once a benchmark made it. Rows are searched in order.
"""

from typing import NamedTuple

import torch

_BITS = {torch.float16: 16, torch.bfloat16: 16, torch.float32: 32, torch.float64: 64}
_ANY = 1 << 30


class ScheduleRow(NamedTuple):
    direction: str
    capability: tuple | None  # the first that it holds for, (major, minor)
    bits: int  # of the inputs' dtype
    most_heads: int
    most_width: int
    most_keys: int
    schedule: str
    source: str


# README.md counts 9 clocks a pair forward and 56 backward for streaming at 12 heads of 64, from L2 and shared
# memory, and 4 to 5 and 8 to 11 for the workspace, whatever the width.
SCHEDULES = (
    ScheduleRow("forward", None, 16, 8, 64, _ANY, "streaming", "cost model"),
    ScheduleRow("forward", None, 64, _ANY, _ANY, _ANY, "workspace", "cost model"),
    ScheduleRow("backward", None, 64, _ANY, _ANY, _ANY, "workspace", "cost model"),
)


def schedule_for(direction, heads, width, keys, dtype, capability):
    """ "streaming" or "workspace": the first row of SCHEDULES that covers the call."""
    for row in SCHEDULES:
        if (
            row.direction == direction
            and (row.capability is None or capability >= row.capability)
            and _BITS[dtype] <= row.bits
            and heads <= row.most_heads
            and width <= row.most_width
            and keys <= row.most_keys
        ):
            return row.schedule
    raise AssertionError("the last rows of the table match every call")
