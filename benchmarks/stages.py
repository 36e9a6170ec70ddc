"""The processes of gpu-check: what they print and tell is kept as it comes; a deadline interrupts them."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

LONGEST_TEXT = 1 << 20
GRACE = 10.0  # seconds between SIGINT, at which a process still says what it has, and SIGKILL


class Kept:
    """The folder of results. What is written is on disk when the call returns; what cannot be written is told
    once for each file, and stops nothing.
    """

    def __init__(self, folder: Path):
        self.folder, self.lost = folder, {}
        self._files, self._lock = {}, threading.RLock()

    def probe(self) -> None:
        """Raises OSError where the folder cannot be written to, or less than a megabyte is left."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / ".probe"
        try:
            path.write_bytes(bytes(2**20))
        finally:
            path.unlink(missing_ok=True)

    def write(self, name: str, text: str | bytes) -> None:
        """Append to the file of that name."""
        data = text.encode() if isinstance(text, str) else text
        with self._lock, self._telling(name):
            if name not in self._files:
                self._files[name] = (self.folder / name).open("ab", buffering=0)
            self._files[name].write(data)

    def replace(self, name: str, text: str) -> None:
        with self._lock, self._telling(name):
            (self.folder / name).write_text(text)

    def say(self, line: str) -> None:
        with self._lock:
            print(line, flush=True)
            self.write("log.txt", line + "\n")

    @contextlib.contextmanager
    def _telling(self, name):
        try:
            yield
        except OSError as error:
            if name not in self.lost:
                self.lost[name] = error.strerror
                print(f"{name} cannot be written: {error.strerror}", flush=True)


class Ended(NamedTuple):
    status: int | None  # None: interrupted
    text: str  # the end of what it printed


class Stage:
    """A process whose output goes to a log. `take`, if given, gets each event that it tells: a line of JSON
    in the file that takes the place of EVENTS in its command.
    """

    EVENTS = "EVENTS"

    def __init__(self, kept: Kept, log: str, stop: threading.Event, root: Path):
        self.kept, self.log, self.stop, self.root = kept, log, stop, root

    def run(
        self,
        command: list[str],
        until: Callable[[], float],
        take: Callable[[dict], None] | None = None,
        **environment: str,
    ) -> Ended:
        """It is interrupted at the time `until()`, which is asked again and again, or because `stop` was set.
        The process and all that it started are gone then.
        """
        self.kept.write(self.log, f"$ {' '.join(command)}\n")
        reader, writer = os.pipe()
        command = [f"/dev/fd/{writer}" if word == self.EVENTS else word for word in command]
        process = subprocess.Popen(
            command,
            cwd=self.root,
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(writer,),
            **_GROUP,
        )
        os.close(writer)
        text = bytearray()
        pumps = [
            threading.Thread(target=self._pump_output, args=(process.stdout, text), daemon=True),
            threading.Thread(target=_pump_events, args=(reader, take or (lambda event: None)), daemon=True),
        ]
        for pump in pumps:
            pump.start()
        try:
            status = self._status(process, until)
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # what it left behind
            process.wait()
            for pump in pumps:
                pump.join(2)
        return Ended(status, text.decode(errors="replace"))

    def _status(self, process, until):
        try:
            while not self.stop.is_set() and time.monotonic() < until():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return process.wait(0.1)
        finally:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE)
        return None

    def _pump_output(self, pipe, text):
        with pipe:
            while data := os.read(pipe.fileno(), 1 << 16):
                self.kept.write(self.log, data)
                text += data
                del text[:-LONGEST_TEXT]


# Of its own, so that it can be killed with all that it started; but not a session, which would outlive ours.
_GROUP = {"process_group": 0} if sys.version_info >= (3, 11) else {"start_new_session": True}


def _pump_events(reader, take):
    with os.fdopen(reader, errors="replace") as lines:
        for line in lines:
            with contextlib.suppress(json.JSONDecodeError):  # the half line of a process that was killed
                take(json.loads(line))
