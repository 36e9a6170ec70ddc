"""Re-attention's Triton kernels beside those of an older commit, both counted by the rules of predict.py.

    python benchmarks/predict_against.py 6c620a9

The older one is taken from a git worktree in a temporary folder, in a process of its own. It may have the
layout of 6c620a9, or today's. bfloat16, B = 128, N = 197, d = 64, no norm, packed q, k and v.
"""

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEADS = 12, 6, 3
QUANTITIES = {
    "forward rows: instructions of the loop": "loop fwd",
    "backward rows: instructions a pair": "pair bwd",
    "MB copied, forward": "copied fwd",
    "MB copied, backward": "copied bwd",
    "launches, forward and backward": "launches",
    "ms predicted, forward": "ms fwd",
    "ms predicted, forward and backward": "ms both",
}


def older_layout():
    """Gives the modules of 6c620a9 the names that they have now; its launches get their grid."""
    module = importlib.import_module("vitdiv_kernels.ops._triton")
    as_now = type("Launch", (), {})
    record = module.launch

    def launch(kernel, grid, *arguments, **options):
        record(kernel, grid, *arguments, **options)
        if module._recorded is not None:
            launches, one = module._recorded[0], as_now()
            one.grid = grid
            for name, value in launches[-1]._asdict().items():
                setattr(one, name, value)
            launches[-1] = one

    module.launch = launch
    module.OPTIONS = {}
    package = importlib.import_module("vitdiv_kernels.ops")
    package._launch = sys.modules["vitdiv_kernels.ops._launch"] = module
    maps = types.ModuleType("vitdiv_kernels.ops.maps")
    maps.reattention = importlib.import_module("vitdiv_kernels.ops.reattention")
    maps.reattention.triton_kernels = importlib.import_module("vitdiv_kernels.ops.reattention.triton_kernels")
    sys.modules |= {
        "vitdiv_kernels.ops.maps": maps,
        "vitdiv_kernels.ops.maps.reattention": maps.reattention,
    }


def add_streaming(calls):
    """What predict_calls is to know of the kernels that walked the keys, which are no more."""
    for kernel in ("softmax_sweep", "output_sweep"):
        calls.LOOPS[kernel, "j0"] = lambda a: calls.ceil(a["M"], a["BC"])
        calls.MOVED[kernel] = lambda a: {
            "q": (1, 1), "k": (1, a["tiles"]), "v": (1, a["tiles"]), "out": (1, 1)
        }  # fmt: skip
    calls.LOOPS["products", "c0"] = lambda a: calls.ceil(a["D"], a["DB"])


def counted(heads, gpu_name):
    """The quantities of one number of heads."""
    import predict
    import predict_calls

    gpu, shape = predict.GPUS[gpu_name], (128, heads, 197, 64)
    found = {"launches": 0}
    for mode in ("fwd", "bwd"):
        launches, others = predict_calls.launches_of("reattention", shape, mode, gpu.capability, packed=True)
        took = sum(predict.of_torch(other, gpu) for other in others)
        for launch, result in predict.compiled(launches, gpu.capability):
            took += predict.seconds(launch, result, gpu)[0]
            if launch.kernel.__name__ in ("forward_rows", "backward_rows", "output_sweep"):
                loop = result["loops"][0]["issued"]
                constants = launch.arguments
                per_pass = constants.get("SHARE", 1) * heads * constants.get("BLOCK", 1)
                found[f"loop {mode}"] = loop
                # of all warps, for each (i, j) of a head
                found[f"pair {mode}"] = loop * launch.num_warps * 32 / per_pass
        copies = [moved for name, moved, _ in others if name == "copy_"]
        found[f"copied {mode}"] = sum(copies) / 2e6  # read and written
        found[f"ms {mode}"] = took * 1e3
        found["launches"] += len(launches) + len(others)
    return found | {"ms both": found["ms fwd"] + found["ms bwd"]}


def of_tree(tree, gpu):
    """{heads: quantities} of the package in that folder."""
    sys.path.insert(0, str(tree))
    importlib.import_module("vitdiv_kernels")
    old = not (Path(tree) / "vitdiv_kernels/ops/_launch.py").exists()
    if old:
        older_layout()
    sys.path[:0] = [str(ROOT / name) for name in ("tests", "tests/support", "benchmarks")]
    import predict_calls

    if old:
        add_streaming(predict_calls)
    return {heads: counted(heads, gpu) for heads in HEADS}


def in_process(tree, gpu):
    command = [sys.executable, __file__, "--tree", str(tree), "--gpu", gpu]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tree)
    if run.returncode:
        raise SystemExit(f"{tree} could not be counted: {run.stderr[-2000:]}")
    return json.loads(run.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("commit", nargs="?", default="6c620a9")
    parser.add_argument("--gpu", default="H200", choices=("H200", "A100"))
    parser.add_argument("--tree", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.tree:
        print(json.dumps(of_tree(args.tree, args.gpu)))
        return
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--detach", "--quiet", str(tree), args.commit], check=True)
        try:
            before, now = in_process(tree, args.gpu), in_process(ROOT, args.gpu)
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)
    print(f"{args.gpu}, {args.commit} -> now (ratio)")
    for title, name in QUANTITIES.items():
        cells = []
        for heads in map(str, HEADS):
            old, new = before[heads].get(name), now[heads].get(name)
            ratio = f" ({new / old:.2f})" if old and new is not None else ""
            cells.append(f"H = {heads}: {old:.3g} -> {new:.3g}{ratio}")
        print(f"{title}: " + ", ".join(cells))


if __name__ == "__main__":
    main()
