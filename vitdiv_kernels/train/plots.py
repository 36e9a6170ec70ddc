"""How the figures of the report and the demo are drawn."""

from typing import Any

from .errors import DataError


def pyplot(what: str) -> Any:
    """matplotlib.pyplot, set to write files, for `what` to draw with. Raises DataError where it is absent."""
    try:
        import matplotlib
    except ImportError:
        raise DataError(
            f"{what} draws with matplotlib, which is absent: pip install 'vitdiv-kernels[demo]'"
        ) from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.titlesize": 11})
    return plt


def add_grid(*axes: Any) -> None:
    for axis in axes:
        axis.grid(color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
