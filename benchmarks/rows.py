"""The rows that a benchmark leaves: their columns, where they come from, the CSV file, the printed table."""

import csv
import datetime
import os
import platform
import subprocess
from pathlib import Path

import torch

# Where and from what a row was made.
ORIGIN = ("torch", "vitdiv_kernels", "python", "machine", "cpu_capability", "commit", "date")
COLUMNS = (
    *("op", "variant", "provider", "mode", "shape", "dtype", "device", "threads", "repeats"),
    *(
        "ms",
        "p20",
        "p80",
        "device_ms",
        "wall_ms",
        "ratio_eager",
        "ratio_compile",
        "ratio_floor",
        "ratio_gemm",
        "peak_extra_mb",
    ),
    *("floor_ms", "copy_gb_s", "gemm_gflop_s"),
    *ORIGIN,
)
MICRO_COLUMNS = ("section", "case", "dtype", "ms", "wall_ms", "gb_s", "gflop_s", *ORIGIN)
# What gpu-check writes, by name.
FILES = {"rows.csv": COLUMNS, "micro.csv": MICRO_COLUMNS}
# Of the printed table: column, title, width, number format.
LAST_CELLS = (
    ("device_ms", "device", 9, ".4g"),
    ("wall_ms", "wall", 9, ".4g"),
    ("ratio_eager", "x eager", 9, ".2f"),
    ("ratio_compile", "x compile", 11, ".2f"),
    ("ratio_floor", "of floor", 10, ".2f"),
    ("ratio_gemm", "of gemm", 9, ".2f"),
    ("peak_extra_mb", "extra MB", 10, ".1f"),
)


def origin(device: str) -> dict[str, str]:
    """The columns that say where and from what a row was made."""
    import vitdiv_kernels
    from vitdiv_kernels import _native

    native = _native.library()
    return {
        "torch": torch.__version__,
        "vitdiv_kernels": vitdiv_kernels.__version__,
        "python": platform.python_version(),
        "machine": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "cpu_capability": native.cpu_capability() if native else torch.backends.cpu.get_cpu_capability(),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str:
    """Of the checkout; of VITDIV_COMMIT where the files were copied without their history."""
    if os.environ.get("VITDIV_COMMIT"):
        return os.environ["VITDIV_COMMIT"]
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def append(path: Path, rows: list[dict], columns: tuple[str, ...] = COLUMNS) -> None:
    """Add rows, each on disk when this returns. A file of an earlier version gets the columns that it lacks.

    Raises ValueError for a file with columns that this version does not write.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    earlier = check_columns(path, columns)
    if earlier not in (None, columns):
        _write(path, "w", read(path, columns), columns, header=True)
    _write(path, "a", rows, columns, header=earlier is None)


def check_columns(path: Path, columns: tuple[str, ...] = COLUMNS) -> tuple[str, ...] | None:
    """Those of a CSV file, None where there is none. Raises ValueError where `append` does."""
    if not path.is_file():
        return None
    with path.open(newline="") as file:
        found = tuple(next(csv.reader(file), ()))
    if not set(found) <= set(columns):
        raise ValueError(f"{path} has other columns than this version writes; name a new file")
    return found or None


def read(path: Path, columns: tuple[str, ...] = COLUMNS) -> list[dict[str, str]]:
    """The rows of a CSV file of this version or of an earlier one, which lacks columns: their cells are
    empty. A line that was not written to its end is left out."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    whole = (row for row in rows if None not in row and None not in row.values())
    return [dict.fromkeys(columns, "") | row for row in whole]


def _write(path: Path, mode: str, rows: list[dict], columns: tuple[str, ...], header: bool) -> None:
    ends = mode == "w" or header or path.read_bytes().endswith(b"\n")
    with path.open(mode, newline="") as file:
        if not ends:  # behind the line of a process that was killed, or of a full disk
            file.write("\r\n")
        writer = csv.DictWriter(file, columns, restval="")
        if header:
            writer.writeheader()
        writer.writerows(map(rounded, rows))


def rounded(row: dict) -> dict:
    """The cells of a row; what was not measured stays empty."""
    cells = {key: value for key, value in row.items() if value is not None}
    return {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in cells.items()}


def table(rows: list[dict]) -> str:
    """What a person reads; the CSV has more."""
    lines, last = [], None
    for row in rows:
        head = " ".join(filter(None, (row["op"], row["variant"], row["shape"], row["dtype"], row["device"])))
        if head != last:
            lines += [f"\n{head}", f"{'mode':8}{'provider':11}{'threads':>7}{'ms':>10}{'p20':>10}{'p80':>10}"]
            lines[-1] += "".join(f"{title:>{width}}" for _, title, width, _ in LAST_CELLS)
            last = head
        line = f"{row['mode']:8}{row['provider']:11}{row['threads']:7}"
        line += "".join(f"{row[key]:10.4g}" for key in ("ms", "p20", "p80"))
        for key, _, width, form in LAST_CELLS:
            line += f"{'-' if row.get(key) is None else format(row[key], form):>{width}}"
        lines.append(line + _notes(row, rows))
    return "\n".join(lines).lstrip("\n")


def _notes(row: dict, rows: list[dict]) -> str:
    """Call overhead where the formula itself takes no time, and the gain from more threads."""
    note = ""
    eager_ms = row["ms"] * row["ratio_eager"] if row["ratio_eager"] else None
    if eager_ms and eager_ms < 0.5 and row["provider"] != "eager":
        note += f"  {(row['ms'] - eager_ms) * 1e3:+.1f} us over eager"
    same = ("op", "variant", "shape", "provider", "mode")
    fewest = min((r for r in rows if all(r[k] == row[k] for k in same)), key=lambda r: r["threads"])
    if fewest["threads"] < row["threads"]:
        note += f"  {fewest['ms'] / row['ms']:.2f} x {fewest['threads']} thread(s)"
    return note
