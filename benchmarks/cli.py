"""The command line of every benchmark."""

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from harness import DTYPES, HERE, Settings, Unavailable, Workload, measure_modes, peak_extra_mb
from measure import MODES, copy_bytes_per_second, gemm_flops_per_second
from rows import append, check_columns, origin, table


def _list_of(*known: str) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is unknown here; known are {', '.join(known)}")
        return names

    return parse


def _shapes(letters: str) -> Callable[[str], list[tuple[int, ...]]]:
    def parse(text: str) -> list[tuple[int, ...]]:
        shapes = [shape.split("x") for shape in text.split(",")]
        for shape in shapes:
            if len(shape) != len(letters) or not all(n.isdecimal() and int(n) > 0 for n in shape):
                given = f"{'x'.join(shape)!r} is not a shape {'x'.join(letters)}"
                raise argparse.ArgumentTypeError(f"{given} of {len(letters)} positive numbers")
        return [tuple(map(int, shape)) for shape in shapes]

    return parse


def _threads(text: str) -> list[int]:
    counts = text.split(",")
    if not all(count.isdecimal() and int(count) > 0 for count in counts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of positive thread counts")
    return [int(count) for count in counts]


def parser(description: str, *, providers: Sequence[str], threads: Sequence[int] = ()) -> ArgumentParser:
    """The options of every benchmark. `threads`: its thread counts, if not torch's own."""
    result = ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = result.add_argument
    names = ", ".join(providers)
    add("--providers", type=_list_of(*providers), help=f"comma-separated, of {names}; default: all here")
    modes = f"comma-separated, of {', '.join(MODES)}; default: fwd,fwd+bwd"
    add("--modes", type=_list_of(*MODES), default=["fwd", "fwd+bwd"], help=modes)
    add("--dtype", choices=DTYPES, default="float32", help="of the inputs; default: float32")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    counts = list(threads) or [torch.get_num_threads()]
    default = ",".join(map(str, counts))
    add("--threads", type=_threads, default=counts, help=f"comma-separated; default: {default}")
    add("--repeats", type=int, default=15, help="rounds of alternating samples; default: 15")
    memory = "measure peak memory, in a process of its own for each row; default: yes"
    add("--memory", action=argparse.BooleanOptionalAction, default=True, help=memory)
    add("--check", action="store_true", help="run the operation's tests first; report no speed if one fails")
    add("--out", type=Path, help="CSV file that the rows are appended to")
    budget = "start no workload after so many seconds; those left out are named"
    add("--budget", type=float, default=float("inf"), help=budget)
    only = "print the peak extra MB of the first shape, provider and mode; time nothing"
    add("--peak-memory-only", action="store_true", help=only)
    result.set_defaults(all_providers=list(providers))
    return result


def add_shapes(parser: ArgumentParser, letters: str, suites: dict, **options: Sequence[str]) -> None:
    """--suite, or --shapes together with the operation's own options, the first value of each its default."""
    suite = "named shapes; default: readme, the rows of the README's table"
    parser.add_argument("--suite", choices=suites, default="readme", help=suite)
    form = "x".join(letters)
    parser.add_argument("--shapes", type=_shapes(letters), help=f"comma-separated {form}, instead of a suite")
    for name, values in options.items():
        text = f"with --shapes: comma-separated, of {', '.join(values)}; default: {values[0]}"
        parser.add_argument(f"--{name.replace('_', '-')}", type=_list_of(*values), help=text)


def workloads(
    parser: ArgumentParser, args: Namespace, make: Callable[..., Workload], suites: dict, *options: str
) -> list[Workload]:
    """`make(shape, **option values)` for what the command line asks for."""
    given = {name: getattr(args, name) for name in options if getattr(args, name)}
    if args.shapes is None:
        if given:
            parser.error(f"--{next(iter(given)).replace('_', '-')} goes with --shapes; a suite fixes its own")
        return [make(shape, **values) for shape, values in suites[args.suite]]
    return [
        make(shape, **dict(zip(given, values, strict=True)))
        for shape in args.shapes
        for values in itertools.product(*given.values())
    ]


def run(parser: ArgumentParser, args: Namespace, chosen: list[Workload]) -> list[dict]:
    """Measure, print the table, append the CSV rows; at the end exit with what failed, if anything did."""
    _refuse(parser, args)
    names = args.providers or args.all_providers
    found = {workload: available(workload, names, args.device) for workload in chosen}
    for name in args.providers or ():
        reasons = [reasons[name] for _, reasons in found.values() if name in reasons]
        if len(reasons) == len(chosen):
            parser.error(f"provider {name!r} is not available: {reasons[0]}")
    if args.peak_memory_only:
        settings = {"dtype": args.dtype, "device": args.device, "threads": args.threads[0]}
        peak = peak_extra_mb(chosen[0], args.providers[0], args.modes[0], **settings)
        print(json.dumps({"peak_extra_mb": peak}))
        return []
    if args.check:
        _check(sorted({workload.op for workload in chosen}))
    start, facts, rows, failures = time.monotonic(), origin(args.device), [], []
    settings = Settings(args.dtype, args.device, args.repeats, args.memory, _floors(args))
    for workload, (names, reasons) in found.items():
        if time.monotonic() - start > args.budget:
            print(f"{workload}: left out, the budget of {args.budget:.0f} s is spent")
            continue
        for name, reason in reasons.items():
            print(f"{workload}: no {name}: {reason}")
        if not names:
            continue
        new = []
        for measured, failed in measure_modes(workload, names, args.modes, settings):
            failures += failed
            for failure in failed:
                print(failure, file=sys.stderr, flush=True)
            new += [row | facts for row in measured]
            if args.out:
                append(args.out, new[len(new) - len(measured) :])
        if new:
            print(table(new), flush=True)
        rows += new
    if failures:
        sys.exit(f"no speed reported of what failed, {len(failures)} in all, named above")
    return rows


def _floors(args: Namespace) -> dict[int, tuple[float, float]]:
    device, floors = torch.device(args.device), {}
    for threads in args.threads:
        torch.set_num_threads(threads)
        floors[threads] = copy_bytes_per_second(device), gemm_flops_per_second(device, DTYPES[args.dtype])
    return floors


def _refuse(parser: ArgumentParser, args: Namespace) -> None:
    if args.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {args.repeats}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here")
    if args.peak_memory_only and not args.providers:
        parser.error("--peak-memory-only needs --providers")
    reads_proc = args.device == "cpu" and (args.memory or args.peak_memory_only)
    if reads_proc and not os.access("/proc/self/clear_refs", os.W_OK):
        parser.error(
            "peak memory on the CPU is read from /proc/self/clear_refs, which is not here; pass --no-memory"
        )
    if args.out:
        try:
            check_columns(args.out)
        except ValueError as error:
            parser.error(f"--out {error}")


def available(workload: Workload, names: Iterable[str], device: str) -> tuple[list[str], dict[str, str]]:
    from vitdiv_kernels import _dispatch

    here, reasons = [], {}
    for name in names:
        backend = name.partition("-")[0]
        why_not = None
        if backend in _dispatch.BACKENDS:
            why_not = _dispatch.missing(backend, device, operation=workload.op)
        if why_not is not None:
            reasons[name] = why_not
            continue
        try:
            workload.providers.get(name, _no_such_form)()
            here.append(name)
        except Unavailable as reason:
            reasons[name] = str(reason)
    return here, reasons


def _no_such_form():
    raise Unavailable("this workload has no such form")


# How the files of tests begin, where not as the workload is called.
TESTS = {"models": "nn"}


def _check(ops: list[str]) -> None:
    tests = []
    for op in ops:
        stem = f"test_{TESTS.get(op, op)}*.py"
        if not (found := sorted(map(str, HERE.parent.glob(f"tests/*/{stem}")))):
            sys.exit(f"the folders of {HERE.parent / 'tests'} have no {stem}: no speed reported")
        tests += found
    if subprocess.run([sys.executable, "-m", "pytest", "-q", *tests]).returncode:
        sys.exit(f"tests of {', '.join(ops)} fail: no speed reported")
