"""What `make gpu-check` measures on a GPU, in one process, what matters most first: the order of ENTRIES.

Each row is in rows.csv, or in micro.csv, as soon as it is measured. Entries are begun until the seconds are
spent; the plain formula compiled by torch takes tens of seconds, so it is timed apart. Events, one a line in
JSON, tell a file what is being measured, for whoever waits for this process.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import NamedTuple

import bench_attention_gram
import bench_pairwise_cosine
import bench_reattention
import micro
import rows as csv_rows
import torch
from cli import available
from harness import DTYPES, Settings, Workload, measure_modes
from measure import copy_bytes_per_second, gemm_flops_per_second

from vitdiv_kernels import _dispatch

BENCHMARKS = {
    "reattention": bench_reattention.workload,
    "attention_gram": bench_attention_gram.workload,
    "pairwise_cosine": bench_pairwise_cosine.workload,
}
TRITON = ("eager", "triton")
BOUNDED = ("eager", "sdpa", "triton")
COMPILED = ("eager", "compile", "triton")
NATIVE = ("eager", "native")
DEVICE_LOST = 75  # the exit status after an error that no call of this process survives


class Entry(NamedTuple):
    op: str  # "micro": the section of micro.py
    shape: tuple[int, ...]
    options: dict
    providers: tuple[str, ...] = TRITON
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        options = " ".join(f"{name}={value}" for name, value in self.options.items())
        return " ".join(filter(None, (self.op, options, shape, self.dtype, ",".join(self.providers))))


REATTENTION, GRAM, COSINE = (128, 12, 197, 64), (128, 12, 197, 64), (256, 196, 384)
ENTRIES = (
    Entry("reattention", REATTENTION, {}, BOUNDED),
    Entry("attention_gram", GRAM, {}),
    Entry("pairwise_cosine", COSINE, {}),
    Entry("reattention", REATTENTION, {"norm": "batch"}, BOUNDED),
    Entry("reattention", REATTENTION, {"packed": "yes"}, BOUNDED),
    Entry("micro", REATTENTION, {}, ()),
    Entry("reattention", (128, 6, 197, 64), {}, BOUNDED),
    Entry("reattention", (128, 3, 197, 64), {}, BOUNDED),
    Entry("reattention", REATTENTION, {"norm": "layer"}),
    Entry("reattention", (32, 12, 577, 64), {}, BOUNDED),
    Entry("reattention", REATTENTION, {}, COMPILED),
    Entry("attention_gram", GRAM, {}, COMPILED),
    Entry("pairwise_cosine", COSINE, {}, COMPILED),
    Entry("reattention", REATTENTION, {"norm": "batch"}, COMPILED),
    Entry("reattention", REATTENTION, {}, NATIVE),
    Entry("attention_gram", GRAM, {}, NATIVE),
    Entry("pairwise_cosine", COSINE, {}, NATIVE),
    Entry("reattention", (128, 6, 197, 64), {}, NATIVE),
    Entry("reattention", REATTENTION, {"norm": "batch"}, NATIVE),
    Entry("reattention", REATTENTION, {"norm": "batch", "packed": "yes"}),
    Entry("pairwise_cosine", (64, 1024, 768), {}),
    Entry("attention_gram", GRAM, {"function": "cosine"}),
    Entry("reattention", REATTENTION, {"pre_mix": "yes"}),
    Entry("reattention", (128, 12, 197, 32), {"norm": "batch"}),
    Entry("reattention", REATTENTION, {}, BOUNDED, "float16"),
    Entry("reattention", REATTENTION, {}, TRITON, "float32"),
    Entry("pairwise_cosine", COSINE, {"penalty": "square"}, ("eager", "triton")),
    Entry("pairwise_cosine", COSINE, {"penalty": "signed"}, ("eager", "closed", "triton")),
    Entry("attention_gram", (8, 16, 1025, 64), {}),
    Entry("reattention", (8, 16, 1025, 64), {"norm": "batch"}),
    Entry("reattention", (1, 12, 4096, 64), {}),
    Entry("pairwise_cosine", (8, 4096, 1024), {}),
    Entry("reattention", (128, 12, 197, 35), {"norm": "batch"}),
    Entry("attention_gram", GRAM, {}, TRITON, "float16"),
    Entry("pairwise_cosine", COSINE, {}, TRITON, "float16"),
    Entry("reattention", REATTENTION, {}, ("eager", "reference", "conv2d")),
)


def workload_of(entry: Entry) -> Workload:
    options = {"dtype": entry.dtype} if entry.op == "reattention" else {}
    return BENCHMARKS[entry.op](entry.shape, **entry.options, **options)


class Run:
    """One process of measurements: where its rows go, and what it says of them."""

    def __init__(self, folder: Path, device: str, events: Path | None, deadline: float, repeats: int):
        self.folder, self.device, self.deadline, self.repeats = folder, device, deadline, repeats
        self.events = events and events.open("a", buffering=1)
        self.failed, self.floors, self.facts = False, {}, csv_rows.origin(device)

    def tell(self, event: str, **more) -> None:
        if self.events:
            print(json.dumps({"event": event, **more}), file=self.events)

    def fail(self, sentence: str) -> None:
        self.failed = True
        print(sentence, flush=True)
        self.tell("failed", text=sentence)

    def keep(self, name: str, rows: list[dict]) -> None:
        """The rows, on disk; printed where that cannot be."""
        try:
            csv_rows.append(self.folder / name, rows, csv_rows.FILES[name])
        except (OSError, ValueError) as error:
            self.fail(f"{name} could not be written, so its rows stand here: {error}")
            for row in rows:
                print(json.dumps({key: value for key, value in row.items() if value is not None}), flush=True)

    def measure(self, entry: Entry) -> None:
        if entry.op == "micro":
            self.micro(entry)
            return
        workload = workload_of(entry)
        names, reasons = available(workload, entry.providers, self.device)
        for name, reason in reasons.items():
            print(f"{workload}: no {name}: {reason}", flush=True)
        wanted = entry.providers[-1]
        if wanted in reasons:  # the one that the entry is for
            self.tell("absent", text=f"{entry}: {reasons[wanted]}")
            return
        floors, memory = self.floor(entry.dtype), self.device == "cuda"
        settings = Settings(entry.dtype, self.device, self.repeats, memory, floors)
        for measured, failures in measure_modes(workload, names, ["fwd", "fwd+bwd"], settings):
            self.keep("rows.csv", [row | self.facts for row in measured])
            self.tell("rows", count=len(measured))
            print(csv_rows.table(measured), flush=True)
            for failure in failures:
                self.fail(failure)

    def micro(self, entry: Entry) -> None:
        triton = _dispatch.missing("triton", self.device) is None
        large = 8192 if self.device == "cuda" else 64
        for row in micro.rows(self.device, DTYPES[entry.dtype], entry.shape, large, 10, triton):
            self.keep("micro.csv", [row | self.facts])
            self.tell("rows", count=1)
            print(", ".join(f"{key} {value}" for key, value in row.items() if value is not None), flush=True)

    def floor(self, dtype: str) -> dict[int, tuple[float, float]]:
        if dtype not in self.floors:
            device = torch.device(self.device)
            self.floors[dtype] = copy_bytes_per_second(device), gemm_flops_per_second(device, DTYPES[dtype])
        return {torch.get_num_threads(): self.floors[dtype]}

    def lost(self) -> bool:
        """Whether the device answers no more: after an illegal access no call of this process succeeds."""
        if self.device != "cuda":
            return False
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            self.fail(f"the device is lost: {str(error).splitlines()[0]}")
            return True
        return False


def measure_all(run: Run, entries: dict[int, Entry]) -> int:
    run.tell("entries", entries={index: str(entry) for index, entry in entries.items()})
    for index, entry in entries.items():
        if time.monotonic() > run.deadline:
            break
        run.tell("start", index=index, compiles="compile" in entry.providers)
        try:
            run.measure(entry)
        except Exception as error:  # of many kinds, and none keeps the others from being measured
            run.fail(f"{entry}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        if run.lost():
            return DEVICE_LOST
        if run.device == "cuda":
            torch.cuda.empty_cache()
        run.tell("finish", index=index)
    return int(run.failed)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--results", type=Path, required=True, help="folder of rows.csv and micro.csv")
    add("--device", choices=("cpu", "cuda"), default="cuda", help="default: cuda")
    add("--seconds", type=float, default=380, help="begin no entry after so many; default: 380")
    add("--from", type=int, default=0, dest="first", help="number of the first entry; default: 0")
    add("--repeats", type=int, default=15, help="rounds of alternating samples; default: 15")
    add("--without", default="", help="comma-separated providers that are not to run")
    add("--events", type=Path, help="file that tells what is being measured, a line of JSON each")
    args = parser.parse_args()
    run = Run(args.results, args.device, args.events, time.monotonic() + args.seconds, args.repeats)
    without = args.without.split(",")
    entries = {
        index: entry._replace(providers=tuple(name for name in entry.providers if name not in without))
        for index, entry in enumerate(ENTRIES)
        if index >= args.first and not (entry.providers and entry.providers[-1] in without)
    }
    try:
        return measure_all(run, entries)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        return 130


if __name__ == "__main__":
    sys.exit(main())
