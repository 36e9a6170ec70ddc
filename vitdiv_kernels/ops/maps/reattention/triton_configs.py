"""Which schedule the Triton kernels of re-attention run with; the tiles are in ../_triton."""

from typing import NamedTuple

from ..._tables import ANY, first_row


class Schedule(NamedTuple):
    name: str
    source: str


# docs/kernels counts 9 clocks a pair forward and 56 backward for streaming at 12 heads of 64, from L2 and
# shared memory, and 4 to 5 and 8 to 11 for the workspace, whatever the width.
# Direction, least compute capability, most bytes of an element, most heads, most width, most keys.
SCHEDULES = {
    ("forward", (0, 0), 2, 8, 64, ANY): Schedule("streaming", "cost model"),
    ("forward", (0, 0), 8, ANY, ANY, ANY): Schedule("workspace", "cost model"),
    ("backward", (0, 0), 8, ANY, ANY, ANY): Schedule("workspace", "cost model"),
}


def schedule_for(direction, heads, width, keys, dtype, capability):
    """ "streaming" or "workspace"."""
    return first_row(
        SCHEDULES,
        lambda of, least_capability, most_bytes, most_heads, most_width, most_keys: (
            of == direction
            and capability >= least_capability
            and dtype.itemsize <= most_bytes
            and heads <= most_heads
            and width <= most_width
            and keys <= most_keys
        ),
    ).name
