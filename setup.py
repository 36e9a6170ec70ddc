"""Builds libvitdiv and the module vitdiv_kernels._C by CMake. Everything else is in pyproject.toml and
CMakeLists.txt.

Environment: VITDIV_SKIP_BUILD=1 installs without the extension; VITDIV_CUDA (0: no CUDA kernels, 1: not
without them, auto: if there is an nvcc), TORCH_CUDA_ARCH_LIST, CXX, DEBUG, MAX_JOBS and CMAKE_ARGS mean what
they usually do. torch is located, never imported. Without any C++ compiler the package is installed without
the extension and runs on its reference backend; where there is a compiler, the kernels must compile or the
installation fails.
"""

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, PlatformError

ROOT = Path(__file__).resolve().parent
PRINT_TORCH = "import importlib.util as u; print(*u.find_spec('torch').submodule_search_locations)"


def find_torch() -> Path | None:
    """The folder of the torch package to build for: that of this process, else the target environment's."""
    spec = importlib.util.find_spec("torch")
    if spec is not None:
        return Path(spec.submodule_search_locations[0])
    # pip isolates a build by PYTHONPATH only: this interpreter without it sees the target environment.
    target = subprocess.run([sys.executable, "-E", "-c", PRINT_TORCH], capture_output=True, text=True)
    return Path(target.stdout.strip()) if target.returncode == 0 else None


def find_tool(name: str) -> str:
    """A build tool of this environment, whose bin folder need not be on PATH, else of PATH."""
    path = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    if path is None:
        raise PlatformError(f"{name} is needed to compile the kernels: pip install cmake ninja")
    return path


def why_not_built() -> str | None:
    if os.environ.get("VITDIV_SKIP_BUILD", "0") != "0":
        return "the package was installed with VITDIV_SKIP_BUILD, without its compiled kernels"
    # A compiler that the user names must work; otherwise one of the names that CMake looks for is enough.
    if "CXX" not in os.environ and not any(map(shutil.which, ("c++", "g++", "clang++", "icpx"))):
        return (
            "no C++ compiler was found when the package was installed: install g++ or clang++ and reinstall"
        )
    return None


def is_of_another_tree_or_compiler(cache: Path) -> bool:
    """CMake refuses a build folder whose source tree was moved or copied, and there goes on with the compiler
    of the first time, whatever CXX says now."""
    if not cache.exists():
        return False
    lines = cache.read_text().splitlines()
    compiler = shlex.split(os.environ.get("CXX", ""))[:1]
    used = next((line.partition("=")[2] for line in lines if line.startswith("CMAKE_CXX_COMPILER:")), None)
    another = any(used != (shutil.which(name) or name) for name in compiler)
    return another or f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT.as_posix()}" not in lines


class CMakeBuild(build_ext):
    def run(self) -> None:
        package = (ROOT if self.inplace else Path(self.build_lib)) / "vitdiv_kernels"
        package.mkdir(parents=True, exist_ok=True)
        reason = why_not_built()
        if reason is not None:
            self.warn(f"vitdiv_kernels will run on its slower reference backend: {reason}.")
            for earlier in (*package.glob("_C.*"), *package.glob("libvitdiv.*")):
                earlier.unlink()
            (package / "_build.json").write_text(json.dumps({"torch": None, "reason": reason}) + "\n")
            return
        try:
            build = self.compile()
        except subprocess.CalledProcessError:
            raise CompileError(
                "the kernels could not be compiled, for the reason above. VITDIV_SKIP_BUILD=1 installs the "
                "package without them; it then runs on its slower reference backend."
            ) from None
        self.leave(build, package)
        # Python that is started in the source tree imports the package there, also after `pip install .`.
        sources = ROOT / "vitdiv_kernels"
        if not self.inplace and os.access(sources, os.W_OK):
            self.leave(build, sources)

    def leave(self, build: Path, package: Path) -> None:
        """The compiled files, beside the modules of the package."""
        module = Path(self.get_ext_filename("_C")).name
        library = "libvitdiv.dylib" if sys.platform == "darwin" else "libvitdiv.so"
        for name in (library, module, "_build.json"):
            # Renamed over the old file: overwriting it would crash a process that has it loaded.
            self.copy_file(str(build / name), str(package / f"{name}.new"))
            os.replace(package / f"{name}.new", package / name)

    def compile(self) -> Path:
        """Configure and build, in a folder that is kept, so that the next run compiles only what changed."""
        torch = find_torch()
        if torch is None:
            raise PlatformError("no torch was found to compile the kernels for: install torch first")
        debug = self.debug or os.environ.get("DEBUG", "").upper() in ("1", "ON", "Y", "YES", "TRUE")
        build_type = "Debug" if debug else "Release"
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}-{build_type.lower()}"
        if is_of_another_tree_or_compiler(build / "CMakeCache.txt"):
            shutil.rmtree(build)
        cmake, ninja = find_tool("cmake"), find_tool("ninja")
        options = {
            "CMAKE_MAKE_PROGRAM": ninja,
            "CMAKE_BUILD_TYPE": build_type,
            "Python_EXECUTABLE": sys.executable,
            "TORCH_ROOT": torch.as_posix(),
            "VITDIV_CUDA": os.environ.get("VITDIV_CUDA", "auto"),
            "TORCH_CUDA_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST", ""),
        }
        configure = [
            cmake,
            "-S",
            str(ROOT),
            "-B",
            str(build),
            "-GNinja",
            *(f"-D{k}={v}" for k, v in options.items()),
        ]
        subprocess.run(configure + shlex.split(os.environ.get("CMAKE_ARGS", "")), check=True)
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        subprocess.run([cmake, "--build", str(build), *jobs], check=True)
        return build


setup(
    ext_modules=[Extension("vitdiv_kernels._C", [])],
    cmdclass={"build_ext": CMakeBuild},
    # Only where pip is about to install torch anyway: the kernels need one to be compiled for.
    setup_requires=[] if why_not_built() or find_torch() else ["torch>=2.8"],
)
