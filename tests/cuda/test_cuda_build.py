"""The CUDA kernels as nvcc compiled them, and the build with and without nvcc. No GPU is needed."""

import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import cubin
import pytest
import sass_model
import torch
from emulation_build import KERNELS, ROOT

from vitdiv_kernels import _native

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")

WITH_PRODUCTS = "(_tile|softmax_rows|weighted_product)"
# The instructions that kernels whose mangled names match must have; those of no such name have no products.
TENSOR_CORES = {
    f"{WITH_PRODUCTS}I.*(half_t|bf16_t)": {"HMMA", "LDSM"},
    f"{WITH_PRODUCTS}If": {"HMMA"},
    f"{WITH_PRODUCTS}Id": {"DMMA"},
    "((gram|similarity|rows|reattention|registers|maps|heads|products)_tile|softmax_rows)I": {"LDGSTS"},
    "weighted_productI": {"LDGSTS"},
    "attention_gram.*gradient_tileI": {"LDGSTS"},
}
# Stores of one or two bytes, each a transaction of its own, in the code of a kernel of 16-bit numbers, by
# its file and the first name that is of the file. Numbers may only fall, and where there are none the row
# goes.
NARROW_STORES = {
    ("attention_gram_bwd", "gradient_tile"): 24,
    ("pairwise_cosine_bwd", "gradient_tile"): 32,
    ("pairwise_cosine_signed", "signed_gradient"): 7,
    ("reattention", "reattention_tile"): 1,  # rows that are no whole pieces of 16 bytes
    ("reattention_bwd_products", "products_tile"): 1,  # likewise
    ("weighted_product", "weighted_product"): 32,
}


# Bytes of the stack, likewise. These are spilled once a tile, not in the loop of the products.
SPILLS = {(120, "pairwise_cosine", "similarity_tile"): 24, (120, "two_gram_bwd", "PenaltyWeights"): 8}
# Clocks of a multiprocessor for each pair that the model of the machine code may predict for sm_90 and
# bfloat16: 5 % above what it does.
CLOCKS = {
    ("reattention", "forward", (12, 197, 64)): 11.2,
    ("reattention", "forward", (6, 197, 64)): 5.0,
    ("reattention", "forward", (3, 197, 64)): 2.4,
    ("reattention", "forward", (12, 197, 32)): 8.0,
    ("reattention", "backward", (12, 197, 64)): 28,
    ("reattention", "backward", (6, 197, 64)): 14.5,
    ("reattention", "backward", (3, 197, 64)): 8.0,
}


def kernels_in(source, kernels):
    """Those of a source file, by their mangled names."""
    # the length of the file's name, and the name, stand in that of its anonymous namespace
    file = f"_{len(source.name)}_{source.stem}_cu_"
    return {name: found for name, found in kernels.items() if file in name}


def plain_name(mangled):
    found = re.search(r"_cu_\w*?\d([A-Za-z][A-Za-z_]*?)[IE]", mangled)
    return found and found[1]


def narrow_stores(found):
    return found["instructions"]["STG.U8"] + found["instructions"]["STG.U16"]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The kernels of the extension, by architecture."""
    if cubin.cuobjdump() is None:
        pytest.skip("there is no cuobjdump, which comes with CUDA and with Triton")
    library = _native.library()
    if library is None or not _native.CUDA_OPERATIONS:
        pytest.skip("the extension was built without CUDA kernels")
    return cubin.kernels_of(_native.OPERATORS, tmp_path_factory.mktemp("cubins"))


@pytest.mark.parametrize("architecture", [80, 90, 100, 120])
@pytest.mark.parametrize("source", KERNELS, ids=lambda source: source.stem)
def test_kernels_neither_spill_nor_miss_tensor_cores(built, source, architecture):
    if architecture not in built:
        pytest.skip(f"the extension was built for {', '.join(f'sm_{each}' for each in built)} alone")
    kernels = kernels_in(source, built[architecture])
    assert kernels
    for name, found in kernels.items():
        kernel = plain_name(name)
        # a spill is to the stack
        assert found["stack"] <= SPILLS.get((architecture, source.stem, kernel), 0), (name, found)
        # what the hardware keeps: launch.cpp allows kernels all that there is
        assert found["static shared"] <= 1 << 10, (name, found)
        assert 0 < found["registers"] <= 255, (name, found)
        needed = [instructions for pattern, instructions in TENSOR_CORES.items() if re.search(pattern, name)]
        assert needed or not {"HMMA", "DMMA"} & set(found["instructions"]), name
        assert all(instructions <= set(found["instructions"]) for instructions in needed), (name, found)
        assert narrow_stores(found) <= NARROW_STORES.get((source.stem, kernel), 0), (name, found)


@pytest.mark.parametrize("row", NARROW_STORES, ids="-".join)
def test_kernels_that_are_to_be_mended_are_there(built, row):
    file, kernel = row
    for kernels in built.values():
        found = kernels_in(Path(f"{file}.cu"), kernels)
        assert any(narrow_stores(each) for name, each in found.items() if plain_name(name) == kernel)


def test_spills_that_are_to_be_mended_are_there(built):
    for architecture, file, kernel in SPILLS:
        found = kernels_in(Path(f"{file}.cu"), built.get(architecture, {}))
        if not found:
            pytest.skip(f"the extension was not built for sm_{architecture}")
        assert any(each["stack"] for name, each in found.items() if plain_name(name) == kernel)


@needs_nvcc
@pytest.mark.skipif(cubin.cuobjdump() is None, reason="there is no cuobjdump")
@pytest.mark.parametrize("architecture", [80, 90, 100, 120])
def test_stores_are_counted_by_their_width(tmp_path, architecture):
    (tmp_path / "stores.cu").write_text("""
    template <class T> __global__ void store(T* x, T value) { x[threadIdx.x] = value; }
    template __global__ void store(unsigned char*, unsigned char);
    template __global__ void store(signed char*, signed char);
    template __global__ void store(short*, short);
    template __global__ void store(float*, float);
    template __global__ void store(float2*, float2);
    template __global__ void store(float4*, float4);
    """)
    command = ["nvcc", f"-arch=sm_{architecture}", "-cubin", "stores.cu"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    if "Unsupported gpu architecture" in run.stderr or "is not defined for option" in run.stderr:
        pytest.skip(f"nvcc does not know sm_{architecture}")
    assert run.returncode == 0, run.stderr
    found = cubin.count_instructions((tmp_path / "stores.cubin").read_bytes())
    stores = {re.search(r"storeI\d?(\w+?)E", name)[1]: counts for name, counts in found.items()}
    widths = {"h": "U8", "a": "U8", "s": "U16", "f": "32", "float2": "64", "float4": "128"}
    assert stores == {of: {f"STG.{width}": 1} for of, width in widths.items()}


def configure(folder, **options):
    """Run CMake without building; its log, and what it would compile."""
    cmake = shutil.which("cmake", path=sysconfig.get_path("scripts")) or shutil.which("cmake")
    ninja = shutil.which("ninja", path=sysconfig.get_path("scripts")) or shutil.which("ninja")
    if cmake is None or ninja is None:
        pytest.skip("cmake and ninja are not installed")
    options |= {
        "CMAKE_MAKE_PROGRAM": ninja,
        "Python_EXECUTABLE": sys.executable,
        "TORCH_ROOT": Path(torch.__file__).parent,
    }
    command = [cmake, "-S", ROOT, "-B", folder, "-GNinja", *(f"-D{k}={v}" for k, v in options.items())]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    rules = folder / "build.ninja"
    return (
        run.returncode,
        " ".join((run.stdout + run.stderr).split()),
        rules.read_text() if rules.exists() else "",
    )


@pytest.mark.parametrize(
    "without", [{"VITDIV_CUDA": "0"}, {"CMAKE_CUDA_COMPILER": ""}], ids=["not asked for", "no nvcc"]
)
def test_the_cpu_build_needs_no_nvcc(tmp_path, without, monkeypatch):
    if "VITDIV_CUDA" not in without:
        monkeypatch.setenv("CUDACXX", str(tmp_path / "nvcc"))  # is not there
    code, log, rules = configure(
        tmp_path / "build", **{k: v for k, v in without.items() if k == "VITDIV_CUDA"}
    )
    assert code == 0, log
    assert "attention_gram.cpp.o" in rules
    assert "attention_gram.cu.o" not in rules
    assert "cudart" not in rules


def test_cuda_kernels_that_are_asked_for_are_not_left_out(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDACXX", str(tmp_path / "nvcc"))  # is not there
    code, log, _ = configure(tmp_path / "build", VITDIV_CUDA="1")
    assert code != 0
    assert "VITDIV_CUDA=1 asks for CUDA kernels, but no nvcc that works was found" in log


@needs_nvcc
@pytest.mark.parametrize("asked", ["auto", "1"])
def test_an_nvcc_that_is_too_old_is_named(tmp_path, monkeypatch, asked):
    older = tmp_path / "older.h"
    older.write_text("#undef __CUDACC_VER_MAJOR__\n#define __CUDACC_VER_MAJOR__ 11\n")
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f'#!/bin/sh\nexec {shutil.which("nvcc")} --pre-include {older} "$@"\n')
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDACXX", str(nvcc))
    code, log, rules = configure(tmp_path / "build", VITDIV_CUDA=asked)
    assert (code == 0) == (asked == "auto"), log
    assert f"{nvcc} is of CUDA 11" in log
    assert "12 or later" in log
    if asked == "auto":
        assert "attention_gram.cpp.o" in rules
        assert "attention_gram.cu.o" not in rules


@pytest.fixture(scope="module")
def configured(tmp_path_factory):
    """A folder in which CMake has found its compilers once: half of a test's time."""
    return tmp_path_factory.mktemp("configured") / "build"


@needs_nvcc
@pytest.mark.parametrize(
    ("listed", "flags"),
    [
        (
            "",
            [
                "compute_80,code=[sm_80]",
                "compute_80,code=[sm_90]",
                "code=[compute_100,sm_100]",
                "compute_100,code=[sm_120]",
            ],
        ),
        ("8.0 9.0a+PTX", ["compute_80,code=[sm_80]", "code=[compute_90a,sm_90a]"]),
        ("7.5 8.0", ["compute_80,code=[sm_80]"]),
    ],
)
def test_architectures_are_those_that_are_listed(configured, listed, flags):
    code, log, rules = configure(configured, VITDIV_CUDA="1", TORCH_CUDA_ARCH_LIST=listed)
    assert code == 0, log
    assert all(flag in rules for flag in flags), rules
    assert rules.count("arch=compute_") == len(flags) * len(KERNELS) > 0
    assert "cudart_static" in rules


@needs_nvcc
@pytest.mark.parametrize(("listed", "words"), [("Ampere", "such as 8.0"), ("7.5", "8.0 or later")])
def test_architectures_that_cannot_be_built_are_named(configured, listed, words):
    code, log, _ = configure(configured, VITDIV_CUDA="1", TORCH_CUDA_ARCH_LIST=listed)
    assert code != 0
    assert words in log
    assert f"'{listed}'" in log


@needs_nvcc
def test_only_gpus_that_are_too_old_make_a_cpu_build(configured):
    code, log, rules = configure(configured, VITDIV_CUDA="auto", TORCH_CUDA_ARCH_LIST="7.0 7.5")
    assert code == 0, log
    assert "built for CPUs only" in log
    assert "'7.0 7.5'" in log
    assert "attention_gram.cu.o" not in rules


@pytest.fixture(scope="module")
def model(built):
    if 90 not in built:
        pytest.skip("the extension was not built for sm_90")
    return sass_model.Model([_native.OPERATORS])


@pytest.mark.parametrize("row", CLOCKS, ids=lambda row: f"{row[0]}-{row[1]}-{row[2]}")
def test_clocks_by_the_machine_code(model, row):
    operation, direction, shape = row
    clocks = sass_model.clocks_a_pair(model, sass_model.Calls(operation, 16, shape), direction)
    assert CLOCKS[row] * 0.9 < clocks < CLOCKS[row]
