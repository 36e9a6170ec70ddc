"""The host code beside the CUDA kernels: launches, streams, and what the library needs."""

import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import elf
import emulation_build
import pytest
import torch
from emulation_build import EMULATION, ROOT

from vitdiv_kernels import _dispatch, _native, attention_gram

needs_compiler = pytest.mark.skipif(emulation_build.compiler() is None, reason="no C++ compiler")

LAUNCHES = [
    "two threads, two shapes",
    "nobody launches before it is set",
    "once for each kernel and device",
    "little is not asked for",
    "what is refused is asked for again",
    "the launch is the one asked for",
    "too large launches are refused",
    "the versions are the runtime's",
]
# Of the compiler and of the system; glibc before 2.34 has more files.
SYSTEM = "gcc_s|stdc\\+\\+|c\\+\\+|gomp|omp|c|m|dl|rt|pthread"
NEEDED = re.compile(rf"(lib(vitdiv|c10|torch|torch_cpu|torch_python|{SYSTEM})|ld-linux-[\w-]+)\.so(\.\d+)*")


def output_of(program, *arguments):
    run = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def launches():
    sources = EMULATION / "launches.cpp", ROOT / "csrc/cuda/core/launch.cpp"
    program = emulation_build.build(*sources, shared=False, libraries=["-pthread"])
    return dict(line.split("\t") for line in output_of(program).splitlines())


@needs_compiler
@pytest.mark.parametrize("name", LAUNCHES)
def test_launches(launches, name):
    assert launches[name] == "ok"


@needs_compiler
def test_all_launches_are_tested(launches):
    assert set(launches) == set(LAUNCHES)


@needs_compiler
def test_the_stream_is_torchs(tmp_path):
    library = tmp_path / "libtorch_cuda.so"
    source = (
        'extern "C" int aoti_torch_get_current_cuda_stream(int device, void** stream) {'
        " *stream = reinterpret_cast<void*>(0x100L + device); return device == 2; }"
    )
    command = [emulation_build.compiler(), "-shared", "-fPIC", "-x", "c++", "-", "-o", library]
    command.append("-Wl,-soname,libtorch_cuda.so")
    subprocess.run(command, input=source, text=True, check=True)
    program = emulation_build.build(EMULATION / "streams.cpp", shared=False, libraries=["-ldl"])
    assert output_of(program, library).split() == ["0x200", "0x201", "0x202", "0x100", "0x101", "none"]
    assert output_of(program).split() == ["0x200", "0x201", "0x202", "none", "none", "none"]


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("of", ["libvitdiv", "_C"])
def test_what_the_library_needs_is_here_without_cuda(of):
    """It loads beside a torch for CPUs, and finds nothing by what other libraries happen to bring."""
    path = Path(_native.OPERATORS if of == "libvitdiv" else _native.library().__file__)
    if path.suffix != ".so" or path.read_bytes()[:4] != b"\x7fELF":
        pytest.skip("not an ELF library")
    needed = elf.needed(path.read_bytes())
    assert [name for name in needed if not NEEDED.fullmatch(name)] == []
    assert {"libc10.so", "libtorch_cpu.so"} <= set(needed)
    assert ("libvitdiv.so" in needed) == (of == "_C")
    weak = elf.weak_undefined(path.read_bytes())
    assert [name for name in weak if re.search("torch|cuda|^cu[A-Z]", name)] == []


@needs_compiler
def test_other_needs_and_weak_symbols_are_seen(tmp_path):
    (tmp_path / "a.cpp").write_text(
        'extern "C" __attribute__((weak)) int cuda_f(); int a() { return cuda_f ? cuda_f() : 0; }'
    )
    (tmp_path / "b.cpp").write_text("int a(); int b() { return a(); }")
    for name, others in ("a", []), ("b", ["-L.", "-la"]):
        command = [emulation_build.compiler(), "-shared", "-fPIC", f"{name}.cpp", "-o", f"lib{name}.so"]
        subprocess.run([*command, *others], cwd=tmp_path, check=True)
    assert "cuda_f" in elf.weak_undefined((tmp_path / "liba.so").read_bytes())
    assert "liba.so" in elf.needed((tmp_path / "libb.so").read_bytes())
    assert not NEEDED.fullmatch("liba.so")
    assert not NEEDED.fullmatch("libcudart.so.13")


@pytest.mark.parametrize("kernels", ["native-cuda"])
def test_two_threads_with_two_shapes(kernels):
    """On a GPU, where their launches of one kernel need different amounts of shared memory."""
    why_not = _dispatch.missing("native", "cuda", operation="attention_gram")
    if why_not is not None:
        pytest.skip(why_not)
    inputs = [torch.randn(2, 2, H, 65, d, device="cuda").half() for H, d in ((12, 64), (6, 64))]

    def grams(qk, times):
        return [attention_gram(*qk, backend="native") for _ in range(times)]

    expected = [grams(qk, 1)[0] for qk in inputs]
    with ThreadPoolExecutor(2) as pool:
        for got, one in zip(pool.map(lambda qk: grams(qk, 300), inputs), expected, strict=True):
            assert all(torch.equal(x, one) for x in got)
