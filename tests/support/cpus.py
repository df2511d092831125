"""Run the tests that depend on the processor as this machine and as older ones.

    python tests/support/cpus.py [pytest options]

Settings of PyTorch (ATEN_CPU_CAPABILITY), oneDNN (ONEDNN_MAX_CPU_ISA) and the compiler (-march, set by a wrapper of
gcc) limit the instructions that are used. Only processors with fewer instructions can be emulated.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

TESTS = Path(__file__).parents[1] / "engine"
FILES = (
    "test_cpu_kernels.py",
    "test_quantization.py",
    "test_gptq.py",
    "test_model.py",
    "test_sampling.py",
    "test_loader.py",
    "test_engine.py",
    "test_speculation.py",
    "test_paged_attention.py",
)
"""Kernels, quantization, model, sampling, engine: the tests whose code depends on the processor."""


@dataclass(frozen=True)
class Processor:
    """A processor to emulate.

    needs: flags of /proc/cpuinfo that this machine must have.  march: compiler option for the kernels; None: no
    change, "": compiling fails.  variables: for PyTorch and oneDNN.
    """

    name: str
    needs: frozenset[str] = frozenset()
    march: str | None = None
    variables: dict[str, str] = field(default_factory=dict)


AVX_512 = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq"})
PROCESSORS = (
    Processor("this machine"),
    Processor(
        "AVX-512 with VNNI, without bfloat16",
        AVX_512 | {"avx512_vnni"},
        "-march=cascadelake",
        {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI", "ATEN_CPU_CAPABILITY": "avx512"},
    ),
    Processor(
        "AVX-512 without VNNI and bfloat16",
        AVX_512,
        "-march=x86-64-v4",
        {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "ATEN_CPU_CAPABILITY": "avx512"},
    ),
    Processor(
        "AVX2 with VNNI",
        frozenset({"avx2", "avx_vnni"}),
        "-march=x86-64-v3 -mavxvnni",
        {"ONEDNN_MAX_CPU_ISA": "AVX2_VNNI", "ATEN_CPU_CAPABILITY": "avx2"},
    ),
    Processor(
        "AVX2",
        frozenset({"avx2", "fma"}),
        "-march=x86-64-v3",
        {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
    ),
    Processor(
        "no AVX2, no compiler",
        march="",
        variables={"ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default"},
    ),
)


def main() -> int:
    """Return 0 if the tests pass as every processor that this machine can emulate."""
    flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    failed = []
    for processor in PROCESSORS:
        if missing := sorted(processor.needs - flags):
            print(f"\n== {processor.name}: skipped, this processor has no {', '.join(missing)}", flush=True)
            continue
        print(f"\n== {processor.name}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "pytest", *(str(TESTS / file) for file in FILES), *sys.argv[1:]]
            if subprocess.run(command, env=environment(processor, Path(folder)), check=False).returncode:
                failed.append(processor.name)
    print(f"\nfailed as: {', '.join(failed)}" if failed else "\npassed as every processor that this one can emulate")
    return bool(failed)


def environment(processor: Processor, folder: Path) -> dict[str, str]:
    """Return the environment that emulates `processor`. folder: an empty folder, for the compiler wrapper."""
    variables = os.environ | processor.variables
    if processor.march is not None:
        compiler = folder / "gcc"
        compiler.write_text(_compiler(processor.march), encoding="utf-8")
        compiler.chmod(0o755)
        variables["PATH"] = f"{folder}{os.pathsep}{variables['PATH']}"
    return variables


def _compiler(march: str) -> str:
    """Return a gcc wrapper that replaces -march=native by `march`.

    It prints another version, so that compiled kernels are cached under another name.
    """
    if not march:
        return '#!/bin/sh\necho "no compiler here" >&2\nexit 1\n'
    return f"""#!/bin/sh
[ "$1" = --version ] && echo "for {march}"
for argument; do
    shift
    [ "$argument" = -march=native ] && set -- "$@" {march} || set -- "$@" "$argument"
done
exec {shutil.which("gcc")} "$@"
"""


if __name__ == "__main__":
    sys.exit(main())
