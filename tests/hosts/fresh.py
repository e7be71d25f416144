"""Interpreters that have imported neither the host nor the plugin: bare ones, and quick ones that know PyTorch."""

from __future__ import annotations

import atexit
import functools
import json
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

_SEED = """
import gc, importlib, json, os, sys, traceback
for name in ("torch", "torch._inductor", "sklearn.metrics", "pandas"):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        pass
gc.collect()
gc.freeze()
for line in sys.stdin:
    code, arguments, stdout, stderr = json.loads(line)
    child = os.fork()
    if child == 0:
        for path, number in ((stdout, 1), (stderr, 2)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
        sys.argv[1:] = arguments
        status = 0
        try:
            exec(compile(code, "<fresh>", "exec"), {"__name__": "__main__"})
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@functools.cache
def _seed() -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", _SEED],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(process.kill)
    return process


def bare(code: str) -> list[str]:
    """The lines that code prints in an interpreter that has imported nothing."""
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def fresh(code: str, *arguments: str) -> list[str]:
    """Run code in an interpreter of its own.

    It is forked from one that has imported what the host imports: four fifths of the time that the host takes.

    Parameters
    ----------
    code : str
        Python, indented as one likes.
    *arguments : str
        ``sys.argv`` behind its first entry.

    Returns
    -------
    list of str
        The lines that it prints.

    Raises
    ------
    AssertionError
        If it fails; with what it says.
    """
    seed = _seed()
    assert seed.stdin is not None
    assert seed.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        stdout, stderr = Path(folder, "stdout"), Path(folder, "stderr")
        request = [textwrap.dedent(code), arguments, str(stdout), str(stderr)]
        seed.stdin.write(json.dumps(request) + "\n")
        seed.stdin.flush()
        status = seed.stdout.readline().strip()
        assert status == "0", f"exit status {status or 'unknown'}:\n{stderr.read_text()[-3000:]}"
        return stdout.read_text().splitlines()
