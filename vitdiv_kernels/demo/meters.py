"""Seconds by the wall, and the resident set of this process. The benchmarks measure CPUs with the same."""

import gc
import time
from collections.abc import Callable, Iterable
from typing import Any


def seconds(calls: Iterable[Callable[[], Any]]) -> float:
    """Seconds that the calls take, one after the other, without garbage collection."""
    gc.disable()
    try:
        start = time.perf_counter()
        for call in calls:
            call()
        return time.perf_counter() - start
    finally:
        gc.enable()


class ResidentSet:
    """Linux's own figures of this process, in bytes; elsewhere all of it raises OSError.

    How far the peak rises above the current size is what a call takes only if freed blocks go back to the
    kernel at once, as under MALLOC_MMAP_THRESHOLD_=65536, or if there are none.
    """

    def current(self) -> int:
        return self._status("VmRSS")

    def peak(self) -> int:
        return self._status("VmHWM")

    def reset_peak(self) -> None:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")

    @staticmethod
    def _status(key: str) -> int:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith(key)) * 1024
