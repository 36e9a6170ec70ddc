"""The rows that a benchmark leaves: their columns, where they come from, the CSV file, the printed table."""

import csv
import datetime
import platform
import subprocess
from pathlib import Path

import torch

COLUMNS = (
    *("op", "variant", "provider", "mode", "shape", "dtype", "device", "threads", "repeats"),
    *("ms", "p20", "p80", "ratio_eager", "ratio_compile", "ratio_floor", "ratio_gemm", "peak_extra_mb"),
    *("floor_ms", "copy_gb_s", "gemm_gflop_s"),
    *("torch", "vitdiv_kernels", "python", "machine", "cpu_capability", "commit", "date"),
)
# Of the printed table: column, width, number format.
LAST_CELLS = (
    ("ratio_eager", 9, ".2f"),
    ("ratio_compile", 11, ".2f"),
    ("ratio_floor", 10, ".2f"),
    ("ratio_gemm", 9, ".2f"),
    ("peak_extra_mb", 10, ".1f"),
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
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def append(path: Path, rows: list[dict]) -> None:
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        if new:
            writer.writeheader()
        for row in rows:
            # What was not measured stays empty.
            cells = {key: value for key, value in row.items() if value is not None}
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in cells.items()})


def table(rows: list[dict]) -> str:
    """What a person reads; the CSV has more."""
    lines, last = [], None
    for row in rows:
        head = " ".join(filter(None, (row["op"], row["variant"], row["shape"], row["dtype"], row["device"])))
        if head != last:
            lines += [f"\n{head}", f"{'mode':8}{'provider':11}{'threads':>7}{'ms':>10}{'p20':>10}{'p80':>10}"]
            lines[-1] += f"{'x eager':>9}{'x compile':>11}{'of floor':>10}{'of gemm':>9}{'extra MB':>10}"
            last = head
        line = f"{row['mode']:8}{row['provider']:11}{row['threads']:7}"
        line += "".join(f"{row[key]:10.4g}" for key in ("ms", "p20", "p80"))
        for key, width, form in LAST_CELLS:
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
