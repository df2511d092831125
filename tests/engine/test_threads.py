"""How many threads steps take: on an idle machine all, beside others one, and back again."""

from collections.abc import Callable

import pytest
import torch

from mptserve.engine.cpu.step_threads import StepThreads
from mptserve.engine.threads import ThreadSpeed


class Machine:
    """A clock, and steps that take as long as the machine lets them. late: seconds that meeting others costs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.late, self.taken = 0.0, 0.0, [0]
        self.threads = StepThreads(ThreadSpeed(1e-9, 1e-10), 10_000_000, 4, clock=lambda: self.now)
        monkeypatch.setattr(torch, "set_num_threads", self.taken.append)

    def steps(self, seconds: float, n_tokens: int = 2) -> list[int]:
        """Return the threads that steps took for so many seconds."""
        end, first = self.now + seconds, len(self.taken)
        while self.now < end:
            with self.threads.taking(n_tokens):
                self.now += 0.01 if self.taken[-1] == 1 else 0.01 / self.taken[-1] + self.late
        return self.taken[first:]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def share(taken: list[int], n: int) -> float:
    return taken.count(n) / len(taken)


def test_an_idle_machine_gets_all_threads_once_one_has_shown_its_speed(machine: Machine) -> None:
    taken = machine.steps(10)
    assert taken[0] == 1
    assert set(taken[1:]) == {4}


def test_beside_others_one_thread_works_and_the_rest_ask_ever_more_rarely(machine: Machine) -> None:
    machine.steps(1)
    machine.late = 0.1
    machine.steps(30)
    before = machine.now
    taken = machine.steps(60)
    assert share(taken, 1) > 0.99
    assert (machine.now - before) / len(taken) < 0.0105, "asking costs more than a twentieth"


def test_when_the_others_have_gone_all_threads_are_back_within_seconds(machine: Machine) -> None:
    machine.late = 0.1
    machine.steps(60)
    machine.late = 0.0
    machine.steps(8.2)
    assert set(machine.steps(10)) == {4}


def test_one_late_step_costs_a_moment_only(machine: Machine) -> None:
    machine.steps(1)
    machine.late = 0.2
    machine.steps(0.01)
    machine.late = 0.0
    assert share(machine.steps(2), 4) > 0.9


def test_long_steps_take_all_threads_at_once_and_kinds_of_steps_are_told_apart(machine: Machine) -> None:
    assert set(machine.steps(1, n_tokens=512)) == {4}  # 0.5 s of one thread's work
    machine.late = 0.1
    machine.steps(1)
    machine.late = 0.0
    taken = machine.steps(0.1, n_tokens=20)
    assert taken[0] == 1
    assert set(taken[1:]) == {4}


@pytest.mark.parametrize("most", [1, 3])
def test_the_setting_is_the_most(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    set_: Callable[[int], None] = taken.append
    monkeypatch.setattr(torch, "set_num_threads", set_)
    threads = StepThreads(ThreadSpeed(1e-9, 1e-10), 10_000_000, most)
    for _ in range(5):
        with threads.taking(3):
            pass
    assert max(taken) <= most
    assert taken[0] == 1


def test_a_step_that_fails_teaches_nothing(machine: Machine) -> None:
    def fail() -> None:
        with machine.threads.taking(2):
            machine.now += 5
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        fail()
    assert machine.steps(0.1)[0] == 1
