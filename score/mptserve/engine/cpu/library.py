"""The library of kernels.c: compiled once on the machine that runs it, and loaded.

It needs GCC and an x86-64 processor with AVX2. The compiled library is kept in ~/.cache/mptserve under a name that
depends on everything that it was made of.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).with_name("kernels.c")
FLAGS = ("-O3", "-march=native", "-std=gnu11", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC")
_TIMEOUT_S = 120


class Unavailable(Exception):
    """Why there is no library."""


@cache
def library() -> ctypes.CDLL:
    """Return the library; raises Unavailable."""
    if platform.machine() not in ("x86_64", "AMD64"):
        raise Unavailable(f"they are for x86 processors, not for {platform.machine()}")
    conda_bin = Path(sys.executable).parent  # where a conda environment has its own compiler
    compiler = shutil.which("gcc") or shutil.which("gcc", path=str(conda_bin))
    if compiler is None:
        raise Unavailable("there is no gcc")
    try:
        _share_openmp()
        version = subprocess.run([compiler, "--version"], capture_output=True, timeout=_TIMEOUT_S, check=True).stdout
        inputs = (SOURCE.read_bytes(), version, " ".join(FLAGS).encode(), _processor())
        name = f"cpu_kernels-{hashlib.sha256(b'|'.join(inputs)).hexdigest()[:16]}.so"
        folder = _cache_folder()
        if folder is not None and (folder / name).exists():
            loaded = ctypes.CDLL(str(folder / name))
        else:
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                compiled = _compile(compiler, Path(scratch))
                loaded = ctypes.CDLL(str(compiled))
                if folder is not None:
                    compiled.replace(folder / name)
    except subprocess.SubprocessError as exc:
        output = (getattr(exc, "stderr", None) or b"").decode(errors="replace").strip()
        raise Unavailable(f"gcc failed: {output.splitlines()[0] if output else exc}") from exc
    except OSError as exc:
        raise Unavailable(f"{type(exc).__name__}: {exc}") from exc
    pointer, number, real, large = ctypes.c_void_p, ctypes.c_int, ctypes.c_float, ctypes.c_int64
    loaded.layout.argtypes = (pointer, pointer)
    loaded.linear.argtypes = (*[number] * 4, *[pointer] * 3, real, *[pointer] * 4, number, pointer)
    loaded.store.argtypes = (*[number] * 5, pointer, large, *[pointer] * 3)
    loaded.attend.argtypes = (*[number] * 5, pointer, large, *[pointer] * 5, real, pointer)
    loaded.attend_tiles.argtypes = (*[number] * 5, pointer, large, *[pointer] * 4, real, pointer)
    return loaded


def _compile(compiler: str, folder: Path) -> Path:
    """Return the library, compiled in `folder`.

    Linked without -fopenmp, so that it takes the threads of the OpenMP that PyTorch brought, not another set.
    """
    compiled, linked = folder / "cpu_kernels.o", folder / "cpu_kernels.so"
    for command in (
        [*FLAGS, "-c", str(SOURCE), "-o", str(compiled)],
        ["-shared", str(compiled), "-o", str(linked), "-lm"],
    ):
        subprocess.run([compiler, *command], capture_output=True, timeout=_TIMEOUT_S, check=True)
    return linked


def _share_openmp() -> None:
    """Make the OpenMP library that PyTorch has loaded visible to libraries loaded from now on."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    for path in sorted({line.split(maxsplit=5)[5] for line in lines if line.count("/") and "omp" in line}):
        if Path(path).name.startswith(("libgomp", "libiomp", "libomp")):
            ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)


def _processor() -> bytes:
    """Return what -march=native depends on."""
    lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    return b"|".join(sorted({line for line in lines if line.startswith((b"model", b"vendor_id", b"flags"))}))


def _cache_folder() -> Path | None:
    """Return the folder to keep the library in, which nobody else can write to; None without one."""
    try:
        folder = Path.home() / ".cache" / "mptserve"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = folder.stat()
    except (OSError, RuntimeError):  # RuntimeError: no home
        return None
    mine = about.st_uid == os.getuid() and not about.st_mode & 0o022
    return folder if mine and os.access(folder, os.W_OK) else None
