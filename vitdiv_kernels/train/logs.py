"""What a run tells while it trains: a CSV file, and a progress bar where tqdm is installed."""

import contextlib
import csv
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


@contextlib.contextmanager
def csv_log(
    path: Path | None, columns: Sequence[str], rows: Sequence[Row]
) -> Iterator[Callable[[Row], None]]:
    """A function that appends a row to the CSV file at once; without a path it does nothing.

    The file is written anew with the rows so far, so that a killed and resumed run has no row twice.
    """
    if path is None:
        yield lambda row: None
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)

        def append(row: Row) -> None:
            writer.writerow(row)
            file.flush()

        yield append


@contextlib.contextmanager
def progress(label: str, total: int, start: int = 0) -> Iterator[Callable[..., None]]:
    """A function that moves the bar: `move(step, **shown)`."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda step, **shown: None
        return
    with tqdm(
        total=total, initial=start, desc=label, unit="step", dynamic_ncols=True, mininterval=0.5
    ) as bar:

        def move(step: int, **shown: str) -> None:
            if shown:
                bar.set_postfix(shown, refresh=False)
            bar.update(step - bar.n)

        yield move
