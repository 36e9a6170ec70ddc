"""A Triton cache that was filled without a GPU, for another machine."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from places import ROOT

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

import triton

# The two kernels of this workload, launched by Triton's own JIT for a GPU that only compiles.
LAUNCHES = """
import sys
sys.path[:0] = ["benchmarks", "tests"]
import compile_cache
import fake_driver
from gpu_rows import Entry
from triton import knobs

found = []
knobs.compilation.listener = lambda *, cache_hit, src, **_: found.append((src.name, cache_hit))
fake_driver.install(90)
for shape in ((256, 196, 384), (256, 100, 64)):
    compile_cache.run_on_meta_tensors(Entry("pairwise_cosine", shape, {"penalty": "signed"}))
print(found)
"""


# The machine with the GPU may have no more.
WITH_TORCH_AND_TRITON_ALONE = """
import runpy, sys
sys.path[:0] = ["benchmarks", "tests"]
sys.modules |= dict.fromkeys(("tqdm", "pytest", "hypothesis", "matplotlib"))
"""


def python(*arguments, **environment):
    command = [sys.executable, *map(str, arguments)]
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(command, cwd=ROOT, env=kept | environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    return run.stdout


def test_another_process_finds_its_kernels(tmp_path):
    kernels = "rows_kernel,_closed_backward_kernel"
    tool = "benchmarks/compile_cache.py"
    said = python(tool, "--out", tmp_path / "filled", "--of", "pairwise_cosine", "--kernels", kernels)
    count = len(list((tmp_path / "filled").glob("*/*.cubin")))
    assert said.startswith(f"{count} kernels in {tmp_path / 'filled'}, {count} of this call: "), said
    left = {path.suffix for path in (tmp_path / "filled").rglob("*") if path.is_file()}
    assert left == {".cubin", ".json"}
    shutil.move(tmp_path / "filled", tmp_path / "moved")
    script = f"sys.argv[1:] = ['--moved', {str(tmp_path / 'moved')!r}]; "
    script += f"runpy.run_path({tool!r}, run_name='__main__')"
    assert python("-c", WITH_TORCH_AND_TRITON_ALONE + script).startswith(f"{count} kernels lie in ")
    found = python("-c", LAUNCHES, TRITON_CACHE_DIR=str(tmp_path / "moved"))
    assert sorted(eval(found)) == [("_closed_backward_kernel", True), ("rows_kernel", True)]


@pytest.fixture
def compile_cache(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import compile_cache

    return compile_cache


def test_the_key_of_a_triton_that_is_not_imported(compile_cache):
    installed = Path(triton.__file__).parent
    files = {
        str(path.relative_to(installed)): path.read_bytes
        for path in installed.rglob("*")
        if path.suffix in compile_cache.EXTENSIONS
    }
    assert compile_cache.compiler_key(files, triton.__version__) == triton.runtime.cache.triton_key()


def test_files_of_a_wheel(compile_cache, tmp_path):
    wheel = tmp_path / "triton-3.6.0-cp312-cp312-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("triton/language/core.py", "text")
    with pytest.raises(SystemExit, match=r"expected a wheel of Triton, found no triton/_C/libtriton.so"):
        compile_cache.files_of(wheel)
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("triton/_C/libtriton.so", "compiled")
        archive.writestr("triton/backends/nvidia/bin/ptxas", "program")
    files = compile_cache.files_of(wheel)
    assert {name: read() for name, read in files.items()} == {
        "language/core.py": b"text",
        "_C/libtriton.so": b"compiled",
    }
    assert compile_cache.version_of(wheel) == "3.6.0"


def test_what_is_gone_is_left_out_of_a_moved_cache(compile_cache, tmp_path):
    folder = tmp_path / "KEY"
    folder.mkdir()
    (folder / "k.json").touch()
    names = {name: f"/elsewhere/KEY/{name}" for name in ("k.json", "k.cubin")}
    (folder / "__grp__k.json").write_text(json.dumps({"child_paths": names}))
    assert len(compile_cache.move(tmp_path)) == 1
    assert json.loads((folder / "__grp__k.json").read_text()) == {
        "child_paths": {"k.json": str(folder / "k.json")}
    }
