"""Which of the two schedules runs a call: the table of ../triton_configs.py, or what `schedule` says."""

import contextlib

from ..... import _checks
from ...._launch import capability
from ..._triton.tiles import MOST_WIDTH, most_heads, too_large
from ..triton_configs import schedule_for

SCHEDULES = ("streaming", "workspace")
_chosen = None


@contextlib.contextmanager
def schedule(name):
    """Within the block every call, forward and backward, takes the schedule "streaming" or "workspace".

    For tests and benchmarks. It holds for all threads, so for autograd's too; blocks nest. Raises ValueError
    for an unknown name; a call raises it where it has more heads, or wider ones, than a tile of "streaming"
    holds.
    """
    _checks.one_of("schedule", name, SCHEDULES)
    global _chosen
    outer, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = outer


def chosen(direction, q, k, extras=False):
    """The schedule of a call: "forward" or "backward", with or without layer norm or pre-mix (`extras`)."""
    heads, width, gpu = q.shape[1], q.shape[3], capability(q)
    large = too_large(heads, width, q.dtype, extras, gpu)
    if _chosen == "streaming" and large:
        most = most_heads(q.dtype, extras, gpu)
        takes = f"at most {most} heads of {q.dtype}" if most else f"no {q.dtype}"
        given = " with layer norm or pre-mix" if extras else ""
        got = f"{heads} of width {width}"
        raise ValueError(
            f'the schedule "streaming" takes {takes}{given}, at most {MOST_WIDTH} wide, got {got}; '
            'take "workspace"'
        )
    if _chosen is not None:
        return _chosen
    if large:
        return "workspace"
    return schedule_for(direction, heads, width, k.shape[2], q.dtype, gpu)
