"""The native kernels compile for aarch64, given nanobind and a cross-compiler: g++, or Clang as Zig brings it."""

import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import leannorm

SOURCES = sorted(Path(leannorm.__file__).with_name("backends").glob("cpu/csrc/*.cpp"))
OPENMP = 'extern "C" { int omp_get_max_threads(); int omp_get_thread_num(); int omp_in_parallel(); }'


def cross_compiler():
    if gcc := shutil.which("aarch64-linux-gnu-g++"):
        return [gcc]
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-linux-gnu"]
    return None


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_source_compiles_for_aarch64(source, tmp_path):
    compiler, nanobind = cross_compiler(), importlib.util.find_spec("nanobind")
    if compiler is None or nanobind is None:
        pytest.skip("nothing compiles for aarch64 here: pip install ziglang nanobind")
    headers = [sysconfig.get_path("include"), *(str(Path(p, "include")) for p in nanobind.submodule_search_locations)]
    (tmp_path / "omp.h").write_text(OPENMP)  # Zig brings none
    flags = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-fopenmp", "-DLEANNORM_ISA=portable", "-isystem", "."]
    include = [flag for folder in headers for flag in ("-isystem", folder)]
    found = subprocess.run(
        [*compiler, *flags, *include, "-c", source, "-o", "object.o"], cwd=tmp_path, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    assert (tmp_path / "object.o").read_bytes()[18:20] == b"\xb7\x00"  # the ELF header's machine: aarch64
