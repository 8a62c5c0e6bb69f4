"""The command line as a process: signals, pipes, and standard streams that are closed or full."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent

PROGRAM = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import fake_native
from pathlib import Path
from halfturn.model import Model
from halfturn.cli import main
folder = Path(sys.argv.pop(1))
Model.load = lambda path, **settings: fake_native.load(folder, 'word ' * 40, step_seconds=0.02)
main()
"""


def start(folder: Path, *arguments: str, **settings: Any) -> subprocess.Popen[str]:
    """The real program on a slow model: 200 tokens in 4 seconds."""
    argv = [sys.executable, "-c", PROGRAM, str(TESTS), str(folder), *arguments]
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(argv, text=True, **streams | settings)


def test_ctrl_c_ends_with_130_and_no_traceback(tmp_path: Path) -> None:
    process = start(tmp_path, "generate", "MODEL", "--prompt", "Hi")
    assert process.stdout is not None
    assert process.stdout.read(4) == "word"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130
    assert said == "stopped\n"


def test_ctrl_c_with_json_gives_one_object(tmp_path: Path) -> None:
    process = start(tmp_path, "chat", "MODEL", "--json", stdin=subprocess.PIPE)
    assert process.stdin is not None and process.stderr is not None
    process.stdin.write("Hi\n")
    process.stdin.flush()
    assert process.stderr.read(4) == "word"  # with --json the conversation is shown there
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=20)
    assert process.returncode == 130
    assert json.loads(printed) == {"error": "interrupted"}


def test_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    process = start(tmp_path, "generate", "MODEL", "--prompt", "Hi")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(1)
    os.close(process.stdout.fileno())
    deadline = time.monotonic() + 20
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.returncode == 141
    assert process.stderr.read() == ""


def redirected(folder: Path, streams: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The program with standard streams that a shell redirects."""
    argv = [
        "sh",
        "-c",
        f'exec "$@" {streams}',
        "sh",
        sys.executable,
        "-c",
        PROGRAM,
        str(TESTS),
        str(folder),
        *arguments,
    ]
    return subprocess.run(argv, input="", capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("streams", ["<&-", "2>&-", "<&- 2>&-"])
@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "MODEL", "--prompt", "Hi", "--max-tokens", "2"],
        ["chat", "MODEL"],
        ["bench", "MODEL", "--prompt-tokens", "4", "--new-tokens", "2", "--batch", "1", "--repeat", "1"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_json_is_one_object_with_closed_streams(arguments: list[str], streams: str, tmp_path: Path) -> None:
    done = redirected(tmp_path, streams, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1 and "error" not in json.loads(done.stdout)


def test_closed_streams_are_empty_and_take_everything(tmp_path: Path) -> None:
    done = redirected(tmp_path, ">&-", "generate", "MODEL", "--prompt", "Hi", "--max-tokens", "2")
    assert done.returncode == 0 and done.stderr.startswith("[2 tokens")
    done = redirected(tmp_path, "<&-", "generate", "MODEL")
    assert (done.returncode, done.stdout) == (1, "") and "the prompt is empty" in done.stderr
    done = redirected(tmp_path, "<&-", "chat", "MODEL")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("arguments", [["doctor", "--json"], ["doctor"], ["--version"]], ids=" ".join)
def test_a_full_disk_is_one_sentence(arguments: list[str], tmp_path: Path) -> None:
    done = redirected(tmp_path, "> /dev/full", *arguments)
    assert done.returncode == 1
    assert done.stderr == "error: the output can't be written: No space left on device\n"
    assert redirected(tmp_path, "> /dev/full 2> /dev/full", *arguments).returncode == 1
