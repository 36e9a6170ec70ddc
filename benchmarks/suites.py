"""What is known of a run of the tests, or of the measurements, from the events that it tells."""

import time
from collections import Counter
from typing import NamedTuple

from stages import Kept

PASSED, FAILED, NOT_FINISHED, NOT_RUN = "passed", "FAILED", "not finished", "not run"
SHOWN = 20
BEAT = 20.0  # seconds between two lines of how far the tests are


class Result(NamedTuple):
    """`why`: lines, the first of which stands behind the state."""

    state: str
    why: tuple[str, ...] = ()


def some(names: list[str], most: int = SHOWN) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


class Tests:
    """A run of pytest with report_events.py: lines of tests.txt, tracebacks of failures.txt, as they come."""

    def __init__(self, name: str, kept: Kept):
        self.name, self.kept = name, kept
        self.collected, self.running, self.outcomes = [], {}, {}
        self.skipped, self.seconds = {}, Counter()
        self.beat = time.monotonic()
        kept.write("tests.txt", f"== {name}\n")

    def take(self, event: dict) -> None:
        test = event.get("test")
        if event["event"] == "collected":
            self.collected = event["tests"]
            self._line(event, f"collected {len(self.collected)}")
        elif event["event"] == "start":
            self.running[test] = event["at"]
            self._line(event, f"started   {test}")
        elif event["event"] == "finish":
            self.running.pop(test, None)
        else:
            self._report(test, event)
        if time.monotonic() > self.beat + BEAT:
            self.beat = time.monotonic()
            of = f"{len(self.outcomes)} of {len(self.collected)} after {event['at']:.0f} s"
            self.kept.say(f"{self.name}: {of}, {len(self.failed())} failed")

    def _report(self, test, event):
        outcome, text = event["outcome"], event["text"]
        first = self.outcomes.get(test) != "failed"
        if first:
            self.outcomes[test] = outcome
        self.seconds[test] += event["seconds"]
        where = f" on {event['worker']}" if event.get("worker") else ""
        said = f": {text}" if outcome == "skipped" else ""
        self._line(event, f"{outcome:9} {test} in {event['seconds']:.2f} s{where}{said}")
        if outcome == "skipped":
            self.skipped.setdefault(text, []).append(test)
        if outcome == "failed":
            self.kept.write("failures.txt", f"== {test}\n{text}\n")
            if first:
                self.kept.say(f"{self.name}: FAILED {test}")

    def _line(self, event, text):
        self.kept.write("tests.txt", f"{event['at']:8.2f} {text}\n")

    def failed(self) -> list[str]:
        return self._with("failed")

    def _with(self, outcome):
        return [test for test, found in self.outcomes.items() if found == outcome]

    def result(self, status: int | None) -> Result:
        """What to say of it, when pytest ended with this status; None: it was interrupted."""
        failed, passed = self.failed(), self._with("passed")
        left = [test for test in self.collected if test not in self.outcomes]
        running = [test for test in self.running if test not in self.outcomes]
        of = f"{len(passed)} of {len(self.collected)} passed"
        slow = [f"{test} {s:.0f} s" for test, s in self.seconds.most_common(5) if s >= 1]
        more = [f"slowest: {some(slow)}"] if slow else []
        more += [f"skipped, {text}: {some(tests, 5)}" for text, tests in self.skipped.items()]
        if status is None and not self.collected and not failed:
            return Result(NOT_FINISHED, ("interrupted before it knew its tests",))
        if status is None and left:
            more.insert(0, f"running when the time was spent: {some(running) or 'none'}")
            not_run = [test for test in left if test not in running]
            more.insert(1, f"not run: {len(not_run)}" + (f", as {some(not_run, 3)}" if not_run else ""))
            of += f", {len(left)} not finished"
        if failed:
            return Result(FAILED, (f"{of}, {len(failed)} failed", f"failed: {some(failed)}", *more))
        if status is None and left:
            return Result(NOT_FINISHED, (of, *more))
        if status not in (0, None):
            said = "no test was selected" if status == 5 else f"pytest ended with status {status}: tests.log"
            return Result(FAILED, (said, of, *more))
        if not passed:
            return Result(FAILED, ("no test ran", *more))
        return Result(PASSED, (of, *more))


class Measurements:
    """A run of gpu_rows.py, or several, each from behind the entry at which the last one ended."""

    ENTRY_SECONDS, COMPILED_SECONDS = 75.0, 150.0

    def __init__(self, kept: Kept):
        self.kept = kept
        self.waiting, self.current, self.began, self.compiles = {}, None, 0.0, False
        self.rows, self.failed, self.stuck, self.absent = 0, [], [], []

    def take(self, event: dict) -> None:
        kind = event["event"]
        if kind == "entries":
            self.waiting = {int(index): text for index, text in event["entries"].items()}
        elif kind == "start":
            self.current = event["index"], self.waiting.pop(event["index"])
            self.began, self.compiles = time.monotonic(), event["compiles"]
            self.kept.say(f"benchmarks: {self.current[1]}")
        elif kind == "finish":
            self.current = None
        elif kind == "rows":
            self.rows += event["count"]
        elif kind == "absent":
            self.absent.append(event["text"])
        elif kind == "failed":
            self.failed.append(event["text"])
            self.kept.say(f"benchmarks: FAILED {event['text']}")

    def until(self, end: float) -> float:
        """When to interrupt: an entry that takes far too long must not cost those behind it."""
        if self.current is None:
            return end
        return min(end, self.began + (self.COMPILED_SECONDS if self.compiles else self.ENTRY_SECONDS))

    def next_after(self, status: int | None) -> int | None:
        """Number of the entry to go on with, where the process ended in the middle of one."""
        if self.current is None:
            if status not in (0, 1, None):
                self.failed.append(f"the process ended with status {status}, see benchmarks.log")
            return None
        index, text = self.current
        self.current = None
        if status is None:
            self.stuck.append(text)
        else:
            self.failed.append(f"{text}: the process ended with status {status}, see benchmarks.log")
        return index + 1

    def result(self) -> Result:
        more = [f"failed: {sentence}" for sentence in self.failed]
        more += [f"not finished: {text}" for text in self.stuck]
        more += [f"not run: {text}: the time was spent" for text in self.waiting.values()]
        more += [f"not run: {text}" for text in self.absent]
        state = FAILED if self.failed else NOT_FINISHED if self.stuck or self.waiting else PASSED
        return Result(state, (f"{self.rows} rows", *more))
