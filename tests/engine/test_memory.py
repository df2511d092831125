"""How much memory and how many cores there are: the machine's, or the container's where that is less."""

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mptserve.engine import memory
from mptserve.engine.memory import available_bytes, available_cores, give_back_freed

CPU = torch.device("cpu")
MACHINE = 10**12


@pytest.fixture
def cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that writes the files of a container, on a machine with a terabyte free and 16 cores."""
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    monkeypatch.setattr(memory, "_machine_bytes", lambda: MACHINE)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))

    def write(**files: str) -> None:
        for name, content in files.items():
            (tmp_path / name.replace("_", ".")).write_text(content, encoding="utf-8")

    return write


@pytest.mark.usefixtures("cgroup")
def test_without_a_container_all_is_the_machines() -> None:
    assert (available_bytes(CPU), available_cores()) == (MACHINE, 16)


def test_container_without_limits_is_the_machine(cgroup: Callable[..., None]) -> None:
    cgroup(memory_max="max\n", memory_current="5000\n", cpu_max="max 100000\n")
    assert (available_bytes(CPU), available_cores()) == (MACHINE, 16)


def test_containers_limit_less_what_it_uses_is_free(cgroup: Callable[..., None]) -> None:
    cgroup(memory_max="8000\n", memory_current="5000\n")
    assert available_bytes(CPU) == 3000
    cgroup(memory_current="9000\n")
    assert available_bytes(CPU) == 0


def test_cached_files_of_the_container_are_free(cgroup: Callable[..., None]) -> None:
    """A model that was just downloaded fills the container's page cache, which the kernel gives back."""
    stat = "anon 1000\nfile 6500\nkernel 10\nshmem 500\nactive_anon 1500\ninactive_file 4000\nactive_file 2000\n"
    cgroup(memory_max="8000\n", memory_current="7500\n", memory_stat=stat)
    assert available_bytes(CPU) == 8000 - 7500 + 6000


def test_machine_may_have_less_than_the_container_allows(cgroup: Callable[..., None]) -> None:
    cgroup(memory_max=f"{2 * MACHINE}\n", memory_current="0\n")
    assert available_bytes(CPU) == MACHINE


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("400000 100000", 4), ("250000 100000", 2), ("50000 100000", 1), ("9900000 100000", 16), ("x", 16)],
)
def test_cores_are_the_containers_whole_ones_at_least_one(cgroup: Callable[..., None], quota: str, cores: int) -> None:
    cgroup(cpu_max=f"{quota}\n")
    assert available_cores() == cores


def test_this_machine_has_some_of_both() -> None:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < available_bytes(CPU) <= total
    assert 1 <= available_cores() <= (os.cpu_count() or 1)


def test_machine_says_in_kilobytes_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    content = "MemTotal:       24000 kB\nMemFree:          100 kB\nMemAvailable:    2048 kB\nBuffers: 5 kB\n"
    monkeypatch.setattr(Path, "read_text", lambda self: {"/proc/meminfo": content}[str(self)])
    assert memory._machine_bytes() == 2048 * 1024


def test_gpu_says_itself_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: {"cuda:1": (5, 10)}[str(device)])
    assert available_bytes(torch.device("cuda:1")) == 5


@pytest.mark.parametrize(("count", "cores"), [(6, 6), (None, 1)])
@pytest.mark.usefixtures("cgroup")
def test_system_without_affinity_has_all_its_cores(
    monkeypatch: pytest.MonkeyPatch, count: int | None, cores: int
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: count)
    assert available_cores() == cores


def test_machine_that_does_not_say_what_is_free_has_half(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_file(self: Path) -> str:
        raise FileNotFoundError(self)

    monkeypatch.setattr(Path, "read_text", no_file)
    assert memory._machine_bytes() == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc")
def test_freed_memory_below_what_is_in_use_goes_back_to_the_system() -> None:
    """As when layers are laid out anew: what is freed lies between what stays."""
    kept = [torch.ones(25_000) for _ in range(2_000)][::20]  # 100 kB each, which come from the heap
    before = anonymous_bytes()
    give_back_freed()
    assert before - anonymous_bytes() > 100e6
    assert len(kept) == 100


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))
