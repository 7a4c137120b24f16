"""Kernels that were compiled are launched directly, and in Triton's own way where that fails."""

import pytest

pytest.importorskip("triton")
from gradclip.clipping.kernels import triton_launch


class Program:
    """A jit function of some version of Triton, and the kernel that it compiles to."""

    def __init__(self, refusal=None, at=None):
        self.launches = []
        self._refusal, self._at = refusal, at

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            self.launches.append(("jit", grid, arguments, constants["BLOCK"]))
            return Compiled(self)

        return launch

    def refuse(self, where):
        if self._at == where:
            raise self._refusal


class Compiled:
    def __init__(self, program):
        self._program = program

    def __getitem__(self, grid):
        self._program.refuse("look up")

        def launch(*arguments):
            self._program.refuse("launch")
            self._program.launches.append(("direct", grid, arguments[:-1], arguments[-1]))

        return launch


@pytest.fixture
def launched(monkeypatch):
    """Launch a program three times, and return how."""
    monkeypatch.setattr(triton_launch, "_DIRECT", True)

    def launch(program):
        launcher = triton_launch.Launcher()
        for number in range(3):
            launcher(program, (7,), "table", number, BLOCK=16)
        assert [arguments for _, _, arguments, _ in program.launches] == [
            ("table", number) for number in range(3)
        ]
        return [how for how, *_ in program.launches]

    return launch


def test_the_second_launch_is_direct(launched):
    program = Program()
    assert launched(program) == ["jit", "direct", "direct"]
    assert program.launches[1][1] == (7, 1, 1)


@pytest.mark.parametrize("at", ["look up", "launch"])
@pytest.mark.parametrize("refusal", [TypeError("takes 9 arguments"), AttributeError("function")])
def test_a_triton_that_takes_no_direct_launch_launches_in_its_own_way(launched, refusal, at):
    assert launched(Program(refusal, at)) == ["jit", "jit", "jit"]


def test_an_error_of_the_launch_itself_is_not_hidden(launched):
    with pytest.raises(RuntimeError, match="illegal memory access"):
        launched(Program(RuntimeError("illegal memory access"), "launch"))
