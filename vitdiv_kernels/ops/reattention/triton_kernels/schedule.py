"""Which of the two schedules runs a call: the table of ../triton_configs.py, or what `schedule` says."""

import contextlib

from ..._triton import capability
from ..._triton_tiles import most_heads
from ..triton_configs import schedule_for

SCHEDULES = ("streaming", "workspace")
_chosen = None


@contextlib.contextmanager
def schedule(name):
    """Within the block every call, forward and backward, takes the schedule "streaming" or "workspace".

    For tests and benchmarks. It holds for all threads, so for autograd's too; blocks nest. Raises ValueError
    for an unknown name; a call raises it where it has more heads than a tile of "streaming" holds.
    """
    if name not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(map(repr, SCHEDULES))}, got {name!r}")
    global _chosen
    outer, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = outer


def chosen(direction, q, k, extras=False):
    """The schedule of a call: "forward" or "backward", with or without layer norm or pre-mix (`extras`)."""
    heads, most = q.shape[1], most_heads(q.dtype, extras)
    if _chosen == "streaming" and heads > most:
        takes = f"at most {most} heads of {q.dtype}" if most else f"no {q.dtype}"
        given = " with layer norm or pre-mix" if extras else ""
        raise ValueError(f'the schedule "streaming" takes {takes}{given}, got {heads}; take "workspace"')
    if _chosen is not None:
        return _chosen
    if heads > most:
        return "workspace"
    return schedule_for(direction, heads, q.shape[3], k.shape[2], q.dtype, capability(q))
