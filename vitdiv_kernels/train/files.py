"""Files of a run, written whole or not at all."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from .errors import TrainError


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Says in a sentence that the file can't be written: a full disk, a folder that is not there."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError where a write fails
        if isinstance(error, TrainError):
            raise
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise TrainError(f"{path} can't be written: {reason}") from error


@contextlib.contextmanager
def replacing(path: Path, mode: str = "wb", **options: Any) -> Iterator[IO]:
    """A file beside the path, which takes its place at the end: what was there stays whole until then."""
    part = path.with_name(path.name + ".part")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(part, mode, **options) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except BaseException:
            with contextlib.suppress(OSError):
                part.unlink()
            raise
