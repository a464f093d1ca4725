import signal
import subprocess
import sys
import weakref

import pytest

from fmdeploy import interrupt


class Thing:
    pass


def drop_with_a_callback_that_raises(error: BaseException) -> None:
    def callback(_: weakref.ref[Thing]) -> None:
        raise error

    thing = Thing()
    kept = weakref.ref(thing, callback)
    del thing
    assert kept() is None


def test_a_child_started_inside_the_block_never_sees_ctrl_c() -> None:
    with interrupt.hidden_from_children():
        child = subprocess.Popen([sys.executable, "-c", "print(1, flush=True); input()"], stdin=subprocess.PIPE,
                                 stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdin is not None
    child.stdout.readline()
    child.send_signal(signal.SIGINT)
    child.communicate(b"\n", timeout=30)
    assert child.returncode == 0
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_a_ctrl_c_that_python_cannot_raise_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    with interrupt.remembered():
        drop_with_a_callback_that_raises(KeyboardInterrupt())
    assert capsys.readouterr().err == ""


def test_other_errors_that_python_cannot_raise_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with interrupt.remembered():
        drop_with_a_callback_that_raises(ValueError("seen"))
    assert "ValueError: seen" in capsys.readouterr().err
