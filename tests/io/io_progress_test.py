"""Progress bars: silent off a terminal, alive on one, fed from compiled code."""

import io
import os
import pty
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxrl_suite.io import progress

ROOT = Path(__file__).resolve().parents[2]


def test_passes_items_on_and_is_silent_off_a_terminal(capfd):
    assert list(progress.progress(range(4), "steps")) == [0, 1, 2, 3]
    assert list(progress.progress(iter("ab"), "letters", total=2)) == ["a", "b"]
    with progress.ProgressBar("steps") as bar:
        bar.advance(3, loss=0.5)
    assert bar.completed == 3
    assert capfd.readouterr() == ("", "")


def test_needs_no_rich_off_a_terminal(monkeypatch):
    for name in ("rich", "rich.progress", "rich.console"):
        monkeypatch.setitem(sys.modules, name, None)
    assert list(progress.progress(range(2), "steps")) == [0, 1]
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with pytest.raises(ImportError, match=r'rich.*pip install "jaxrl-suite\[experiments\]"'), progress.ProgressBar("x"):
        pass


def test_counts_from_compiled_code_in_any_order():
    with progress.ProgressBar("steps", total=60) as bar:
        tick = progress.progress_callback(bar)

        @jax.jit
        def loop(x):
            def body(carry, _):
                jax.debug.callback(tick, 1, loss=carry)
                return carry + 1, None

            return jax.lax.scan(body, x, None, length=10)[0]

        loop(0.0)
        jax.jit(jax.vmap(loop))(jnp.zeros(5))  # a lane counts like a loop of its own
    assert bar.completed == 60  # leaving the block waits for callbacks


def test_leaving_waits_for_slow_programs():
    @jax.jit
    def slow(x):
        x = jax.lax.fori_loop(0, 30, lambda _, y: y @ x, x)
        jax.debug.callback(tick, 1, loss=x[0, 0])

    with progress.ProgressBar("steps", total=1) as bar:
        tick = progress.progress_callback(bar)
        slow(jnp.eye(500))
    assert bar.completed == 1


class LetsOthersIn:
    """A count in whose conversion another thread gets its turn."""

    def __int__(self):
        time.sleep(0)
        return 1


def test_counts_from_threads():
    with progress.ProgressBar("steps") as bar:
        threads = [threading.Thread(target=lambda: [bar.advance(LetsOthersIn()) for _ in range(500)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert bar.completed == 2000


@pytest.mark.subprocess
def test_on_a_terminal_shows_rate_and_time_left_and_keeps_standard_output_clean():
    code = """
import time
from jaxrl_suite.io.progress import ProgressBar, progress
for _ in progress(range(2), "studies"):  # nested bars share the terminal
    with ProgressBar("episodes [x]", total=20) as bar:
        for i in range(20):
            time.sleep(0.02)
            bar.advance(loss=i / 4)
try:
    with ProgressBar("failing", total=2):
        raise KeyError("inside")
except KeyError:
    print("result")
"""
    leader, follower = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "120"}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=follower, env=environment, text=True
    ) as child:
        os.close(follower)
        shown = b""
        while True:
            try:
                part = os.read(leader, 4096)
            except OSError:  # the child closed its end
                break
            if not part:
                break
            shown += part
        assert child.stdout.read() == "result\n"
    os.close(leader)
    assert child.returncode == 0
    text = shown.decode()
    for piece in ("studies", "episodes [x]", "20/20", "2/2", "/s", "left", "0:00:0", "loss 4.75", "failing"):
        assert piece in text, piece
    assert text.rstrip().endswith("\x1b[?25h")  # the cursor is back, also after an exception
