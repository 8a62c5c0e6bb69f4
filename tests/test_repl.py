"""The chat: conversations by themselves, then the real program on a pipe and on a pseudo-terminal."""

from __future__ import annotations

import io
import json
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from halfturn import command
from halfturn.conversation import Conversation
from halfturn.error import Error
from halfturn.job import Output, Piece, Timings
from halfturn.repl import Repl
from halfturn.sampling import SamplingParams

TESTS = Path(__file__).parent

# The chat on the plain-Python engine. The reply names the length of the prompt, so that tests see what was sent;
# a prompt that ends in the word "slow" is answered slowly and at length.
PROGRAM = """
import sys, time
sys.path.insert(0, sys.argv.pop(1))
import fake_native
from pathlib import Path
from halfturn.model import Model
from halfturn.tokenizer import Tokenizer
from halfturn.cli import main
folder = Path(sys.argv.pop(1))

def load(path, context=None, **settings):
    model = fake_native.load(folder, context=context or 512, pages=64)
    spell = model.tokenizer.encode
    def script(seen, drawn):
        prompt = seen[: len(seen) - drawn]
        text = model.tokenizer.decode(prompt, skip_special_tokens=False)
        users = text.split("<|im_start|>user\\n")[1:]
        last = users[-1].split("<|im_end|>")[0] if users else ""
        if last.endswith("slow"):
            time.sleep(0.02)
            reply = spell("tick " * 200)
        else:
            system = "system, " if "<|im_start|>system" in text else ""
            reply = spell(f"{system}{len(users)} users, last {last!r}")
        return reply[drawn] if drawn < len(reply) else 258
    model.native.script = script
    return model

Model.load = load
main()
"""


# ---- conversations


def encode(messages: Any) -> list[int]:
    """10 tokens a message and one more for each character."""
    return [0] * sum(10 + len(message["content"]) for message in messages)


def talk(turns: int) -> Conversation:
    conversation = Conversation("S")
    for turn in range(turns):
        conversation.say("user", f"u{turn}")
        conversation.say("assistant", f"a{turn}")
    return conversation


def test_a_conversation_keeps_its_order() -> None:
    assert [m["content"] for m in talk(2).messages] == ["S", "u0", "a0", "u1", "a1"]
    assert Conversation().messages == []


def test_undo_takes_back_one_exchange() -> None:
    conversation = talk(2)
    assert conversation.undo() == "u1"
    assert [m["content"] for m in conversation.turns] == ["u0", "a0"]
    conversation.undo()
    with pytest.raises(Error, match="nothing to take back"):
        conversation.undo()


def test_fit_leaves_out_nothing_that_fits() -> None:
    conversation = talk(2)
    conversation.say("user", "now")
    length = len(encode(conversation.prompt))
    assert conversation.fit(encode, length + 5, 5) == 0
    assert conversation.prompt == conversation.messages


def test_fit_leaves_out_whole_turns_from_the_oldest() -> None:
    conversation = talk(4)  # 11 tokens of system, 24 a turn
    conversation.say("user", "now")  # 13 tokens: 120 in all
    assert conversation.fit(encode, 100, 10) == 2  # a quarter of the context is made free: 72 of 75
    assert [m["content"] for m in conversation.prompt] == ["S", "u2", "a2", "u3", "a3", "now"]
    assert len(conversation.messages) == 10  # nothing is forgotten
    conversation.say("assistant", "yes")
    conversation.say("user", "more")
    assert conversation.fit(encode, 110, 10) == 0  # the next turn still fits, so its prefix is unchanged


def test_fit_refuses_a_message_that_can_never_fit() -> None:
    conversation = talk(3)
    conversation.say("user", "x" * 200)
    with pytest.raises(Error, match="this message alone takes 221 tokens and the context holds 100"):
        conversation.fit(encode, 100, 10)


def test_undo_after_turns_were_left_out() -> None:
    conversation = talk(4)
    conversation.say("user", "now")
    conversation.fit(encode, 60, 10)
    for _ in range(5):
        conversation.undo()
    conversation.say("user", "again")
    assert [m["content"] for m in conversation.prompt] == ["S", "again"]


def test_what_was_left_out_for_a_message_comes_back_with_it() -> None:
    """One that can never fit leaves out everything before it is refused."""
    conversation = talk(3)
    conversation.say("user", "x" * 200)
    with pytest.raises(Error, match="this message alone"):
        conversation.fit(encode, 100, 10)
    conversation.undo()
    assert conversation.prompt == talk(3).messages


def test_undo_leaves_what_came_before_the_first_message() -> None:
    conversation = Conversation()
    conversation.say("assistant", "Welcome")
    with pytest.raises(Error, match="nothing to take back"):
        conversation.undo()
    assert [m["content"] for m in conversation.turns] == ["Welcome"]


def test_save_and_load_are_inverse(tmp_path: Path) -> None:
    conversation = talk(2)
    conversation.say("user", 'é "quoted"\nline')
    conversation.save(tmp_path / "chat.json")
    again = Conversation()
    again.load(tmp_path / "chat.json")
    assert again.messages == conversation.messages
    assert again.system == "S"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not a saved conversation"),
        ("{}", 'has no list "messages"'),
        ('[{"role": "robot", "content": "x"}]', 'message 1 of .* needs a "role"'),
        ('[{"role": "user"}]', 'message 1 of .* needs a "role"'),
        ("[3]", 'message 1 of .* needs a "role"'),
        ("[" * 200_000, "nested too deep"),
        ('[{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]', "message 2 of .* is a system"),
    ],
)
def test_load_refuses_other_files(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    file.write_text(text)
    conversation = talk(1)
    with pytest.raises(Error, match=message):
        conversation.load(file)
    assert len(conversation.turns) == 2  # as before


def test_half_a_surrogate_pair_is_saved_as_the_escape_that_it_was(tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    file.write_text('[{"role": "user", "content": "a\\ud800"}]')
    conversation = Conversation()
    conversation.load(file)
    conversation.save(file)
    again = Conversation()
    again.load(file)
    assert again.messages == [{"role": "user", "content": "a\ud800"}]


@pytest.mark.parametrize("name", ["n" * 300, "no\0name", "gone/x.json", "loop", "."])
def test_save_refuses_a_name_that_can_be_no_file(name: str, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(Error, match=r"can't be written: .*[a-z]"):
        talk(1).save(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loop"]


def test_a_disk_that_fills_leaves_what_was_saved_before(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    file = tmp_path / "chat.json"
    talk(1).save(file)
    before = file.read_text()
    conversation = talk(1)
    conversation.say("user", "x" * 100_000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(Error, match="can't be written: File too large"):
            conversation.save(file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["chat.json"]


def test_a_saved_file_keeps_its_place_and_mode(tmp_path: Path) -> None:
    file, link = tmp_path / "chat.json", tmp_path / "link"
    talk(1).save(file)
    (tmp_path / "other").write_text("")
    assert file.stat().st_mode == (tmp_path / "other").stat().st_mode
    file.chmod(0o640)
    link.symlink_to(file)
    talk(2).save(link)
    assert link.is_symlink() and len(json.loads(file.read_text())["messages"]) == 5
    assert file.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("fails", [ValueError("odd"), RecursionError("deep"), OSError(5, "Input/output error")])
def test_no_failure_of_a_command_ends_a_terminal_chat(fails: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: str) -> None:
        raise fails

    typed, out = io.StringIO("/fail\n/undo\n"), io.StringIO()
    monkeypatch.setattr(typed, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", typed)
    model: Any = SimpleNamespace(context=512)
    nothing: Any = None
    repl = Repl(model, nothing, nothing, out=out)
    repl.commands["/fail"] = fail
    repl.conversation.say("user", "kept")
    repl.run()
    assert f"error: {command.explain(fails)}\n" in out.getvalue()
    assert "[taken back: kept]" in out.getvalue()


def test_a_retry_that_fails_keeps_the_reply_before(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(sys, "stdin", io.StringIO())
    engine: Any = SimpleNamespace(context=512, encode_chat=fail)
    params: Any = SimpleNamespace(max_tokens=None)
    repl = Repl(engine, engine, params, out=io.StringIO())
    repl.conversation = talk(2)
    with pytest.raises(OSError, match="Input/output error"):
        repl.handle("/retry")
    assert repl.conversation.messages == talk(2).messages


def test_a_retry_that_is_stopped_before_the_first_word_keeps_the_reply_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    engine: Any = SimpleNamespace(context=512)
    repl = Repl(engine, engine, engine, out=io.StringIO())
    repl.conversation = talk(2)
    monkeypatch.setattr(repl, "_stream", lambda: SimpleNamespace(text="", token_ids=[], finish_reason="cancelled"))
    repl.handle("/retry")
    assert repl.conversation.messages == talk(2).messages
    assert repl.out.getvalue().endswith("[stopped before the first word; the reply before it stays]\n")


@pytest.mark.parametrize(("shown", "kept"), [(["Hel", "lo"], "Hello"), ([], None)])
def test_what_ctrl_c_leaves_is_what_was_shown(
    shown: list[str], kept: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine is some tokens ahead of the screen."""

    class Job:
        def __iter__(self) -> Iterator[Piece]:
            yield from (Piece(text, [1]) for text in shown)
            raise KeyboardInterrupt

        def cancel(self) -> None: ...

        def result(self) -> Output:
            return Output("Hello there", [1] * 9, "stop", 4, None, None, Timings(0, 0, 0, None, 0))

    typed, out = io.StringIO("Hi\n"), io.StringIO()
    monkeypatch.setattr(typed, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", typed)
    model: Any = SimpleNamespace(context=512, encode_chat=lambda _: [1, 2])
    generator: Any = SimpleNamespace(submit=lambda **_: Job())
    repl = Repl(model, generator, SamplingParams(), out=out)
    repl.run()
    assert [m["content"] for m in repl.conversation.turns if m["role"] == "assistant"] == ([kept] if kept else [])
    assert (f"{kept}\n[stopped]" if kept else "your message was taken back") in out.getvalue()


def test_escape_sequences_of_a_loaded_file_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("/system\n/undo\n"))
    out, nothing = io.StringIO(), SimpleNamespace()
    repl = Repl(nothing, nothing, nothing, system="a\x1b[2Jb", out=out)  # type: ignore[arg-type]
    repl.conversation.say("user", "c\x9b2Jd")
    repl.run()
    assert out.getvalue() == "[system message: a[2Jb]\n[taken back: c2Jd]\n"


def test_ctrl_c_while_the_prompt_is_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message is taken back, and that is said."""

    def stopped(_: object) -> list[int]:
        raise KeyboardInterrupt

    typed, out = io.StringIO("Hi\n"), io.StringIO()
    monkeypatch.setattr(typed, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", typed)
    model: Any = SimpleNamespace(context=512, encode_chat=stopped)
    repl = Repl(model, SimpleNamespace(), SamplingParams(), out=out)  # type: ignore[arg-type]
    repl.run()
    assert repl.conversation.turns == []
    assert "[stopped before the first word; your message was taken back]" in out.getvalue()


@pytest.mark.parametrize("most", [50, None])
def test_lengths_are_what_the_context_leaves(most: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(Exception):
        pass

    def submit(params: SamplingParams, **_: Any) -> None:
        assert (params.max_tokens, params.min_tokens) == (24, 24)
        raise Full

    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n"))
    model: Any = SimpleNamespace(context=64, encode_chat=lambda _: [1] * 40)
    generator: Any = SimpleNamespace(submit=submit)
    with pytest.raises(Full):
        Repl(model, generator, SamplingParams(max_tokens=most, min_tokens=30), out=io.StringIO()).run()


# ---- the program on a pipe


def pipe(folder: Path, text: str, *flags: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-c", PROGRAM, str(TESTS), str(folder), "chat", "MODEL", *flags]
    return subprocess.run(argv, input=text, capture_output=True, text=True, timeout=60)


def test_piped_lines_are_messages_with_history(tmp_path: Path) -> None:
    done = pipe(tmp_path, "one\n\ntwo\n")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "1 users, last 'one'\n2 users, last 'two'\n"


def test_settings_out_of_range_are_refused_before_the_first_message(tmp_path: Path) -> None:
    done = pipe(tmp_path, "", "--temperature", "200")
    assert (done.returncode, done.stderr[:29]) == (1, "error: temperature is 200.0: ")


def test_several_lines_make_one_message(tmp_path: Path) -> None:
    done = pipe(tmp_path, 'a\\\nb\n"""c\n\nd"""\n"""e"""\n"""f\ng')
    assert done.stdout.splitlines() == [
        r"1 users, last 'a\nb'",
        r"2 users, last 'c\n\nd'",
        "3 users, last 'e'",
        r"4 users, last 'f\ng'",
    ]


def test_commands(tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    text = "one\n/system Be brief\ntwo\n/undo\n/retry\n"
    text += f"/save {file}\n/clear\n//slash\n/load {file}\nthree\n/stats\n/help\n"
    lines = pipe(tmp_path / "model", text).stdout.splitlines()
    assert lines[:6] == [
        "1 users, last 'one'",
        "[system message: Be brief]",
        "system, 2 users, last 'two'",
        "[taken back: two]",
        "system, 1 users, last 'one'",
        f"[3 messages saved to {file}]",
    ]
    assert lines[6:10] == [
        "[started over]",
        "system, 1 users, last '/slash'",
        f"[3 messages loaded from {file}]",
        "system, 2 users, last 'three'",
    ]
    stats = "\n".join(lines[10:])
    assert "5 replies, " in stats
    assert "tokens/s" in stats and "already in the cache" in stats and "kv cache" in stats
    assert "/retry" in stats
    saved = json.loads(file.read_text())["messages"]
    assert [m["role"] for m in saved] == ["system", "user", "assistant"]


def test_stats_of_one_reply(tmp_path: Path) -> None:
    assert " 1 reply, " in pipe(tmp_path, "one\n/stats\n").stdout


def test_later_turns_reuse_the_prefix(tmp_path: Path) -> None:
    done = pipe(tmp_path, f"{'long ' * 40}\nnext\n/stats\n", "--context", "2048")
    prompt, cached = re.findall(r"prompt +(\d+) tokens, (\d+) of them", done.stdout)[0]
    assert int(cached) > 200 and int(cached) > 0.8 * int(prompt)


def test_a_full_context_leaves_out_the_oldest_turns_and_says_so(tmp_path: Path) -> None:
    done = pipe(tmp_path, f"{'a' * 60}\n{'b' * 60}\n{'c' * 60}\n", "--context", "256")
    assert "[the context of 256 tokens is full: the oldest turn is no longer sent]" in done.stdout
    assert "1 users, last 'aaa" in done.stdout and "2 users, last 'ccc" not in done.stdout
    assert done.returncode == 0


def test_save_does_not_replace_a_file_of_others(tmp_path: Path) -> None:
    file = tmp_path / "diary"
    file.write_text("mine")
    done = pipe(tmp_path / "model", f"one\n/save {file}\n")
    assert done.returncode == 1
    assert f"error: {file} exists" in done.stderr
    assert file.read_text() == "mine"


def test_an_unknown_command_ends_a_pipe_with_1(tmp_path: Path) -> None:
    done = pipe(tmp_path, "/nope\nnever\n")
    assert done.returncode == 1
    assert done.stderr == "error: there is no command /nope: /help lists them, and // begins a message with a slash\n"


def test_json_gives_one_object_on_stdout(tmp_path: Path) -> None:
    done = pipe(tmp_path, "one\n", "--json", "--system", "Be brief")
    value = json.loads(done.stdout)
    assert value["messages"] == [
        {"role": "system", "content": "Be brief"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "system, 1 users, last 'one'"},
    ]
    assert value["turns"] == 1 and value["tokens"] == 28
    assert "last 'one'" in done.stderr


@pytest.mark.parametrize("loaded", [[], [{"role": "system", "content": "Be long"}]])
def test_a_system_message_stands_in_place_of_a_loaded_one(loaded: list[dict[str, str]], tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    file.write_text(json.dumps(loaded))
    done = pipe(tmp_path / "model", "", "--json", "--system", "Be brief", "--load", str(file))
    assert json.loads(done.stdout)["messages"] == [{"role": "system", "content": "Be brief"}]


def test_max_tokens_cuts_and_says_so(tmp_path: Path) -> None:
    done = pipe(tmp_path, "one\n", "--max-tokens", "7")
    assert done.stdout == "1 users\n[cut after 7 tokens]\n"


# ---- the program on a pseudo-terminal


class Terminal:
    """Types into the program and reads its screen, without line discipline tricks: what a person would see."""

    def __init__(self, folder: Path, *flags: str, **environment: str) -> None:
        import fcntl
        import pty
        import termios

        self.master, slave = pty.openpty()
        argv = [sys.executable, "-c", PROGRAM, str(TESTS), str(folder), "chat", "MODEL", *flags]
        self.process = subprocess.Popen(
            argv,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl-C becomes SIGINT
            env={**os.environ, "TERM": "xterm", **environment},
        )
        os.close(slave)
        self.seen = ""
        self.place = 0

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def expect(self, text: str, seconds: float = 20) -> str:
        """Waits until `text` comes after what was expected before; returns what lies between."""
        deadline = time.monotonic() + seconds
        while text not in self.seen[self.place :]:
            left = deadline - time.monotonic()
            assert left > 0, f"{text!r} did not come in {self.seen[self.place :]!r}"
            if select.select([self.master], [], [], left)[0]:
                self.seen += os.read(self.master, 4096).decode(errors="replace")
        start = self.place
        self.place = self.seen.index(text, start) + len(text)
        return self.seen[start : self.place - len(text)]

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.master)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    pytest.importorskip("termios")
    opened = Terminal(tmp_path)
    opened.expect("> ")
    yield opened
    opened.close()


def test_terminal_streams_a_reply(terminal: Terminal) -> None:
    terminal.type("hello\r")
    terminal.expect("1 users, last 'hello'")
    terminal.expect("> ")
    terminal.type("/exit\r")
    assert terminal.process.wait(timeout=20) == 0


def test_ctrl_c_stops_only_the_reply(terminal: Terminal) -> None:
    terminal.type("slow\r")
    terminal.expect("tick tick")
    terminal.type("\x03")
    terminal.expect("[stopped]")
    terminal.expect("> ")
    terminal.type("still here\r")
    terminal.expect("2 users, last 'still here'")  # the stopped reply is part of the conversation
    terminal.expect("> ")
    terminal.type("\x04")
    assert terminal.process.wait(timeout=20) == 0


def test_ctrl_c_at_the_prompt_says_how_to_leave(terminal: Terminal) -> None:
    terminal.type("half a mess")
    terminal.expect("half a mess")
    time.sleep(0.1)  # a signal that comes before readline waits for keys is seen at the next key only
    terminal.type("\x03")
    terminal.expect("[/exit or Ctrl-D leaves]")
    terminal.expect("> ")
    terminal.type("whole\r")
    terminal.expect("1 users, last 'whole'")


def test_errors_do_not_end_a_terminal_chat(terminal: Terminal) -> None:
    terminal.type("/load /no/such/file\r")
    terminal.expect("error: /no/such/file can't be read")
    terminal.expect("> ")
    terminal.type("go on\r")
    terminal.expect("1 users, last 'go on'")


def test_bad_names_of_files_do_not_end_a_terminal_chat(terminal: Terminal, tmp_path: Path) -> None:
    deep = tmp_path / "deep.json"
    deep.write_text("[" * 200_000)
    (tmp_path / "loop").symlink_to("loop")
    terminal.type("kept\r")
    terminal.expect("1 users, last 'kept'")
    for line in ("/save ~nouser/x.json", f"/save {'n' * 300}", f"/save {tmp_path}/loop", f"/load {deep}"):
        terminal.expect("> ")
        terminal.type(f"{line}\r")
        terminal.expect("error: ")
    terminal.expect("> ")
    terminal.type("go on\r")
    terminal.expect("2 users, last 'go on'")


def test_a_dumb_terminal_gets_no_escape_sequences(tmp_path: Path) -> None:
    pytest.importorskip("termios")
    terminal = Terminal(tmp_path, TERM="dumb")
    terminal.expect("> ")
    terminal.type("hello\r")
    terminal.expect("1 users, last 'hello'")
    terminal.expect("> ")
    terminal.type("/exit\r")
    assert terminal.process.wait(timeout=20) == 0
    terminal.close()
    assert "\x1b" not in terminal.seen


def test_a_paste_of_several_lines_is_one_message(terminal: Terminal) -> None:
    terminal.type("\x1b[200~one\rtwo\r\x1b[201~\r")
    assert "last" not in terminal.expect("1 users, last 'one")
    terminal.expect("two")


def test_line_editing_works(terminal: Terminal) -> None:
    terminal.type("helo\x1b[Dl\r")  # left arrow, then an l before the o
    terminal.expect("1 users, last 'hello'")
