"""The installation and the compiled library: instruction sets, threads, a machine without a compiler."""

import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import isa_leaks
import pytest
import torch
from places import ROOT

from vitdiv_kernels import _dispatch, _native

CAPABILITIES = ["default", "avx2", "avx512"]

x86_64_only = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="x86-64 instruction sets"
)
needs_objdump = pytest.mark.skipif(
    shutil.which("objdump") is None, reason="objdump (binutils) is not installed"
)


def python(code, **environment):
    """Run code in a fresh process; a value of None removes the variable."""
    env = {k: v for k, v in {**os.environ, **environment}.items() if v is not None}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=ROOT)


@x86_64_only
@needs_objdump
def test_wide_instructions_stay_in_their_namespaces(library):
    code = isa_leaks.wide_code(_native.OPERATORS)
    assert isa_leaks.leaks(code) == {}
    assert any("cpu_avx2::" in function and "avx" in found for function, found in code.items())
    assert any("cpu_avx512::" in function and "avx512" in found for function, found in code.items())


@x86_64_only
@needs_objdump
@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_leaks_are_found(tmp_path):
    source = """
    typedef double V8 __attribute__((vector_size(64)));
    typedef double V4 __attribute__((vector_size(32)));
    #define AVX2 __attribute__((target("avx2")))
    #define AVX512 __attribute__((target("avx512f")))
    namespace cpu_avx512 { AVX512 void fine(V8* x) { *x += *x; } }
    namespace cpu_avx2 { AVX2 void fine(V4* x) { *x += *x; } AVX512 void leak_a(V8* x) { *x += *x; } }
    namespace cpu_default { AVX2 void leak_b(V4* x) { *x += *x; } void fine(V4* x) { *x += *x; } }
    AVX512 void leak_c(V8* x) { *x += *x; }
    """
    (tmp_path / "leaks.cpp").write_text(source)
    compile_it = ["g++", "-O2", "-shared", "-fPIC", "-Wno-psabi", "leaks.cpp", "-o", "leaks.so"]
    subprocess.run(compile_it, cwd=tmp_path, check=True)
    found = isa_leaks.leaks(isa_leaks.wide_code(tmp_path / "leaks.so"))
    assert {function.split("(")[0] for function in found} == {
        "cpu_avx2::leak_a",
        "cpu_default::leak_b",
        "leak_c",
    }


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("limit", [None, *CAPABILITIES])
def test_the_instruction_set_is_the_processors_and_can_be_lowered(limit):
    code = (
        "import torch; from vitdiv_kernels import _native;"
        "print(torch.backends.cpu.get_cpu_capability().lower(), _native.library().cpu_capability())"
    )
    run = python(code, VITDIV_CPU_CAPABILITY=limit, ATEN_CPU_CAPABILITY=None)
    assert run.returncode == 0, run.stderr
    processor, taken = (CAPABILITIES.index(c) if c in CAPABILITIES else 0 for c in run.stdout.split())
    assert taken == (processor if limit is None else min(processor, CAPABILITIES.index(limit)))


@pytest.mark.usefixtures("library")
def test_an_unknown_instruction_set_is_refused():
    code = "import torch, vitdiv_kernels as v; v.pairwise_cosine(torch.ones(1, 2, 3), backend='native')"
    run = python(code, VITDIV_CPU_CAPABILITY="mmx")
    assert run.returncode != 0
    message = run.stderr.strip().splitlines()[-1]
    for word in ("VITDIV_CPU_CAPABILITY", "mmx", *CAPABILITIES):
        assert word in message


def test_loops_run_on_torchs_threads(library, threads):
    assert library.num_threads() == threads


def test_the_library_names_the_torch_it_was_built_for(library):
    assert library.built_for_torch.split(".")[:2] == torch.__version__.split(".")[:2]


def test_the_library_names_its_cuda_architectures(library):
    registered = torch._C._dispatch_has_kernel_for_dispatch_key("vitdiv::attention_gram_fwd", "CUDA")
    assert library.with_cuda == registered == bool(library.cuda_architectures)


@pytest.fixture
def source_tree(tmp_path):
    """A copy to build from, so that the build folder of the checkout stays as it is."""
    for name in (
        "pyproject.toml",
        "setup.py",
        "CMakeLists.txt",
        "README.md",
        "LICENSE",
        "cmake",
        "csrc",
        "vitdiv_kernels",
    ):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        ignore = (
            {"ignore": shutil.ignore_patterns("_C.*", "libvitdiv.*", "_build.json")}
            if copy is shutil.copytree
            else {}
        )
        copy(ROOT / name, tmp_path / name, **ignore)
    return tmp_path


def build_wheel(tree, **environment):
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", "wheels"]
    command = [sys.executable, "-m", "pip", "wheel", *options, "."]
    env = {k: v for k, v in os.environ.items() if k not in ("CXX", "VITDIV_SKIP_BUILD")} | environment
    return subprocess.run(command, capture_output=True, text=True, cwd=tree, env=env)


def test_without_a_compiler_the_package_installs_and_runs_on_reference(source_tree):
    (source_tree / "empty").mkdir()
    built = build_wheel(source_tree, PATH=str(source_tree / "empty"))
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = (source_tree / "wheels").iterdir()
    zipfile.ZipFile(wheel).extractall(source_tree / "site")
    site = source_tree / "site/vitdiv_kernels"
    assert not [*site.glob("_C*"), *site.glob("libvitdiv*")]
    code = (
        f"import sys; sys.path.insert(0, {str(source_tree / 'site')!r}); import torch, vitdiv_kernels as v;"
        "print(v.__file__, v.pairwise_cosine(torch.ones(1, 2, 3)).item())"
    )
    run = python(code, VITDIV_BACKEND=None)
    assert run.returncode == 0, run.stderr
    assert str(source_tree) in run.stdout
    assert run.stdout.split()[-1].startswith(("1.0", "0.99999"))
    assert "no C++ compiler was found" in run.stderr


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"CXX": "false"}, ["VITDIV_SKIP_BUILD=1"]),
        ({"VITDIV_CUDA": "1", "CUDACXX": "no-nvcc"}, ["VITDIV_CUDA=1", "no nvcc that works was found"]),
    ],
)
def test_a_build_that_fails_is_not_swallowed(source_tree, environment, words):
    built = build_wheel(source_tree, **environment)
    assert built.returncode != 0
    log = " ".join((built.stdout + built.stderr).split())
    assert all(word in log for word in words), log


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_without_openmp_the_package_that_brings_it_is_named(source_tree):
    compiler = source_tree / "no-openmp-c++"
    compiler.write_text('#!/bin/sh\ncase "$*" in *openmp*) exit 1;; esac\nexec g++ "$@"\n')
    compiler.chmod(0o755)
    another = shutil.copy(compiler, source_tree / "another-c++")
    for named in (compiler, another):  # the second time in the build folder of the first
        built = build_wheel(source_tree, CXX=str(named), VITDIV_CUDA="0")
        assert built.returncode != 0
        log = " ".join((built.stdout + built.stderr).split())
        for words in (f"OpenMP does not work with {named}", "-dev (or libomp-dev)", "brew install libomp"):
            assert words in log


def test_an_uncompiled_source_tree_names_the_compiled_copy(source_tree, library):
    installed = source_tree / "site/vitdiv_kernels"
    installed.mkdir(parents=True)
    shutil.copy(Path(library.__file__).with_name("_build.json"), installed)
    command = [sys.executable, "-m", "vitdiv_kernels.info"]
    for path, words in (
        (
            installed.parent,
            f"the compiled copy in {installed}: start it in a folder other than {source_tree}",
        ),
        (source_tree, "the kernels are not compiled: run `pip install .`"),
    ):
        env = os.environ | {"PYTHONPATH": str(path)}
        run = subprocess.run(command, capture_output=True, text=True, env=env, cwd=source_tree)
        assert run.returncode == 0, run.stderr
        assert words in run.stderr
        assert f"absent: {'Python took' if path == installed.parent else 'the kernels'}" in run.stdout


# setup.py, with compiled files that are there already.
COMPILED = """
import runpy, sys, setuptools
from pathlib import Path
def setup(**options):
    options["cmdclass"]["build_ext"].compile = lambda self: Path("compiled")
    real(**options)
real, setuptools.setup = setuptools.setup, setup
sys.argv = ["setup.py", "-q", *sys.argv[1:]]
runpy.run_path("setup.py", run_name="__main__")
"""


def test_an_installation_leaves_the_kernels_in_the_source_tree_too(source_tree, library):
    names = {_native.OPERATORS.name, Path(library.__file__).name, "_build.json"}
    (source_tree / "compiled").mkdir()
    for name in names:
        shutil.copy(_native.OPERATORS.with_name(name), source_tree / "compiled")
    env = {name: value for name, value in os.environ.items() if name != "VITDIV_SKIP_BUILD"}

    def run(*command):
        done = subprocess.run(command, capture_output=True, text=True, cwd=source_tree, env=env)
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    run(sys.executable, "-c", COMPILED, "bdist_wheel")
    (wheel,) = (source_tree / "dist").glob("*.whl")
    assert {f"vitdiv_kernels/{name}" for name in names} <= set(zipfile.ZipFile(wheel).namelist())
    assert all((source_tree / "vitdiv_kernels" / name).is_file() for name in names)
    assert not list((source_tree / "vitdiv_kernels").glob("*.new"))
    info = run(sys.executable, "-m", "vitdiv_kernels.info")
    assert f" in {source_tree / 'vitdiv_kernels'}\n" in info.stdout
    assert re.search("native, CPU +here: compiled for torch ", info.stdout)


def test_info_tells_what_is_here(library):
    run = python("import vitdiv_kernels.info as i; print(i.report())", VITDIV_BACKEND=None)
    assert run.returncode == 0, run.stderr
    assert f"torch           {torch.__version__}" in run.stdout
    assert f"here: compiled for torch {library.built_for_torch}; instruction set " in run.stdout
    assert re.search("native, CUDA  (absent|here): ", run.stdout)
    assert (f"; compiled for {library.cuda_architectures}: " in run.stdout) == library.with_cuda
    assert "every operation, export to ONNX or TorchScript  reference: what is exported" in run.stdout
    for operation in _dispatch.OPERATIONS:
        assert f"{operation}, cpu " in run.stdout
    overridden = python("import vitdiv_kernels.info as i; print(i.report())", VITDIV_BACKEND="reference")
    assert "were it not for VITDIV_BACKEND=reference" in overridden.stdout
