"""Whether a call gets all threads or one."""

from __future__ import annotations

from tvm_backend.pace import Pace


class Machine:
    """Calls of a function, one behind the other, which take as long as a number of threads takes at present."""

    def __init__(self, alone: float, together: float) -> None:
        self.pace, self.now = Pace(4), 0.0
        self.alone, self.together = alone, together

    def calls(self, count: int) -> list[int]:
        found = []
        for _ in range(count):
            threads = self.pace.threads(self.now)
            ended = self.now + (self.alone if threads == 1 else self.together)
            self.pace.took(threads, self.now, ended)
            self.now = ended
            found.append(threads)
        return found


def test_with_the_processors_to_itself_all_threads_are_used_but_for_two_calls():
    machine = Machine(alone=2.0, together=1.0)
    assert machine.calls(8) == [4, 1, 4, 1, 4, 4, 4, 4]


def test_where_threads_wait_for_processors_one_is_used_and_all_are_tried_now_and_then():
    machine = Machine(alone=0.002, together=0.04)
    assert machine.calls(4)[2:] == [4, 1]
    found = machine.calls(5000)
    assert 2 < found.count(4) < 20  # in ten seconds
    assert machine.now < 12


def test_all_threads_are_used_again_when_the_processors_are_free():
    machine = Machine(alone=0.002, together=0.04)
    machine.calls(2000)
    machine.together = 0.001
    machine.calls(2000)  # as long as the longest pause
    assert set(machine.calls(100)) == {4}


def test_a_first_call_says_nothing():
    machine = Machine(alone=1.0, together=50.0)
    machine.calls(1)
    machine.together = 0.5
    assert machine.calls(6) == [1, 4, 1, 4, 4, 4]


def test_one_thread_that_became_slower_too_is_noticed():
    """A processor shared by two programs takes twice as long for everything."""
    machine = Machine(alone=1.0, together=0.6)
    machine.calls(10)
    machine.alone, machine.together = 3.0, 1.6
    found = machine.calls(40)
    assert found[-1] == 4
