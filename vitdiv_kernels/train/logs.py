"""What a run tells while it trains: a CSV file, and a progress bar where tqdm is installed."""

import contextlib
import csv
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from .files import replacing, writing

Row = dict[str, Any]


class CsvFile:
    """A CSV file to which rows are added, each written at once.

    With the first one the file is written anew with the rows so far, so that a killed and resumed run has no
    row twice; until then it is left as it was.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: IO | None = None

    def add(self, row: Row, columns: Sequence[str], rows: Sequence[Row]) -> None:
        """Adds the row, which is the last of `rows`. Raises TrainError where the file can't be written."""
        if self.file is None:
            with replacing(self.path, "w", newline="") as file:
                writer = csv.DictWriter(file, columns)
                writer.writeheader()
                writer.writerows(rows)
            with writing(self.path):
                self.file = open(self.path, "a", newline="")  # noqa: SIM115
            return
        with writing(self.path):
            csv.DictWriter(self.file, columns).writerow(row)
            self.file.flush()

    def close(self) -> None:
        """It may be added to again."""
        if self.file is not None:
            with contextlib.suppress(OSError):  # the row that could not be written was told of
                self.file.close()
            self.file = None


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
