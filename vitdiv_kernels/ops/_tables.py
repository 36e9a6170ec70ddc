"""How the tables of tiles are read. They are data, a row a line, whose key says what it covers; nothing is
tuned at run time.

Rows end alike: `warps` and `stages` of a program; where it is not left to ptxas, `maxnreg`, the registers of
a thread at most (None: ptxas aims at 128 or 168, and may spill a little to get there); `source`: "cost model"
for a choice by counting, "aot" for one that ahead-of-time compilation showed to be free of spills, "measured
on <device>" once a benchmark made it.
"""

ANY = 1 << 30  # of a size that may be as large as it likes


def first_row(table, covers):
    """The row of the first key that covers a call, as covers(*key) says; None if none does."""
    return next((row for key, row in table.items() if covers(*key)), None)


def options(row):
    """What a launch takes of a row."""
    return dict(num_warps=row.warps, num_stages=row.stages, maxnreg=row.maxnreg)
