"""Memory layouts that hypothesis draws for sets of vectors."""

from hypothesis import strategies as st


def draw_layout(data, axes):
    """A function that gives a tensor of so many axes another order in memory, and its rows a step."""
    order = data.draw(st.permutations(range(axes)), "order of the axes in memory")
    step = data.draw(st.integers(1, 2), "step")

    def laid_out(x):
        x = x.permute(order).contiguous().permute([order.index(axis) for axis in range(axes)])
        return x.repeat_interleave(step, -2)[..., ::step, :]

    return laid_out
