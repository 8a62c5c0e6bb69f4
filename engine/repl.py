"""`halfturn chat`: messages in, replies streamed out, and commands that begin with a slash."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from halfturn.command import explain
from halfturn.console import megabytes, obeys, speed, visible, write
from halfturn.conversation import Conversation, reason
from halfturn.error import Error, quoted

if TYPE_CHECKING:
    from halfturn.generator import Generator
    from halfturn.job import Output
    from halfturn.model import Model
    from halfturn.sampling import SamplingParams

PROMPT, MORE = "> ", ". "
QUOTES = '"""'
# Tokens kept free for a reply where --max-tokens doesn't say, at most a quarter of the context.
REPLY_ROOM = 256

HELP = '''\
/retry           another reply to the last message
/undo            take back the last message and its reply
/system [TEXT]   show or set the system message; /system - removes it
/save FILE       write the conversation as JSON
/load FILE       go on with a saved conversation
/clear           start over, with the same system message
/stats           tokens, speed, context and memory
/help            this list
/exit            leave, as Ctrl-D does
A line that ends in \\ goes on in the next one; """ begins and ends a message of several lines; pasted text stays whole.
Ctrl-C stops a reply; what was shown so far is kept. A message that begins with a slash is written with two.'''


class Lines:
    """Reads messages of one or several lines from a terminal (with line editing) or from a pipe."""

    def __init__(self, out: TextIO) -> None:
        self.out = out
        self.interactive = sys.stdin.isatty()
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="replace")
        self.edited = self.interactive and obeys(sys.stdout) and _line_editing()

    def line(self, prompt: str) -> str:
        """One line without its end. Raises EOFError at the end of input."""
        if self.edited:
            return input(prompt)
        if self.interactive:
            write(prompt, self.out)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\r\n")

    def message(self) -> str:
        """One message; raises EOFError at the end of input, KeyboardInterrupt where it's given up."""
        line = self.line(PROMPT)
        if line.startswith(QUOTES):
            return self._quoted(line[len(QUOTES) :])
        parts = [line]
        while parts[-1].endswith("\\"):
            parts[-1] = parts[-1][:-1]
            try:
                parts.append(self.line(MORE))
            except EOFError:
                break
        return "\n".join(parts)

    def _quoted(self, line: str) -> str:
        parts = [line]
        while not parts[-1].rstrip().endswith(QUOTES):
            try:
                parts.append(self.line(MORE))
            except EOFError:
                return "\n".join(parts).strip("\n")
        parts[-1] = parts[-1].rstrip()[: -len(QUOTES)]
        return "\n".join(parts).strip("\n")


def _line_editing() -> bool:
    """Turns on the arrow keys and the history of input(); False where Python has no readline."""
    try:
        import readline
    except ImportError:
        return False
    if "libedit" not in (readline.__doc__ or ""):
        # A paste of several lines arrives as one message instead of one message a line.
        readline.parse_and_bind("set enable-bracketed-paste on")
    return True


class Repl:
    """The loop of a chat. On a terminal errors are shown and the chat goes on; from a pipe they end it.

    debug: faults of Halfturn itself are shown with their traceback.
    """

    def __init__(
        self,
        model: Model,
        generator: Generator,
        params: SamplingParams,
        system: str | None = None,
        out: TextIO | None = None,
        debug: bool = False,
    ) -> None:
        self.model, self.generator, self.params, self.debug = model, generator, params, debug
        self.conversation = Conversation(system)
        self.out = sys.stdout if out is None else out
        self.lines = Lines(self.out)
        self.last: Output | None = None
        self.tokens = self.turns = self.retries = 0
        self.files: set[Path] = set()  # loaded or saved in this chat: /save may replace them
        self.commands: dict[str, Callable[[str], None]] = {
            "/retry": self.retry,
            "/undo": self.undo,
            "/system": self.system,
            "/save": self.save,
            "/load": self.load,
            "/clear": self.clear,
            "/stats": self.stats,
            "/help": lambda _: self.say(HELP),
        }

    def say(self, text: str) -> None:
        """A line of Halfturn's own, not of the model's."""
        dim, plain = ("\x1b[2m", "\x1b[0m") if obeys(self.out, colours=True) else ("", "")
        self.out.write(f"{dim}{visible(text)}{plain}\n")  # it may quote a loaded file
        self.out.flush()

    def run(self) -> None:
        """Until /exit or the end of input."""
        if self.lines.interactive:
            self.say(
                f"context of {self.model.context} tokens; /help lists commands, Ctrl-C stops a reply, Ctrl-D leaves"
            )
        while True:
            try:
                message = self.lines.message()
            except EOFError:
                if self.lines.interactive:
                    write("\n", self.out)
                return
            except KeyboardInterrupt:
                if not self.lines.interactive:
                    raise
                write("\n", self.out)
                self.say("[/exit or Ctrl-D leaves]")
                continue
            if message.strip() in ("/exit", "/quit", "/bye"):
                return
            try:
                self.handle(message)
            except Exception as error:  # whatever it is, the conversation is worth more
                if not self.lines.interactive:
                    raise
                if self.debug and not isinstance(error, Error):
                    traceback.print_exc()
                self.say(f"error: {explain(error)}")
            except KeyboardInterrupt:  # between a reply and the prompt
                if not self.lines.interactive:
                    raise

    def handle(self, message: str) -> None:
        """One message or command."""
        if not message.strip():
            return
        if message.startswith("/") and not message.startswith("//"):
            name, _, rest = message.strip().partition(" ")
            if name not in self.commands:
                raise Error(f"there is no command {name}: /help lists them, and // begins a message with a slash")
            self.commands[name](rest.strip())
            return
        self.retries = 0
        self.conversation.say("user", message[1:] if message.startswith("//") else message)
        self.reply()

    def reply(self, otherwise: str = "your message was taken back") -> bool:
        """Streams the reply to the last message and adds it to the conversation; `otherwise`: what if there is none."""
        stopped = f"[stopped before the first word; {otherwise}]"
        try:
            output = self._stream()
        except BaseException as error:  # no reply: two messages of the user in a row would break many chat templates
            self.conversation.undo()
            if not isinstance(error, KeyboardInterrupt) or not self.lines.interactive:
                raise
            write("\n", self.out)
            self.say(stopped)
            return False
        self.last = output
        self.tokens += len(output.token_ids)
        if not output.text.endswith("\n"):
            write("\n", self.out)
        if output.finish_reason == "cancelled" and not output.text.strip():
            self.conversation.undo()
            self.say(stopped)
            return False
        self.turns += 1
        self.conversation.say("assistant", output.text)
        if output.finish_reason == "cancelled":
            self.say("[stopped]")
        elif output.finish_reason == "length":
            full = self.params.max_tokens is None or len(output.token_ids) < self.params.max_tokens
            self.say("[cut: the context is full]" if full else f"[cut after {self.params.max_tokens} tokens]")
        return True

    def _stream(self) -> Output:
        context = self.model.context
        room = min(self.params.max_tokens or REPLY_ROOM, max(1, context // 4))
        dropped = self.conversation.fit(self.model.encode_chat, context, room)
        if dropped:
            turns = "the oldest turn is" if dropped == 1 else f"the {dropped} oldest turns are"
            self.say(f"[the context of {context} tokens is full: {turns} no longer sent]")
        params = self.params
        left = context - len(self.model.encode_chat(self.conversation.prompt))
        most, least = min(params.max_tokens or left, left), min(params.min_tokens, left)
        params = replace(params, max_tokens=most, min_tokens=least)
        if params.seed is not None:
            params = replace(params, seed=params.seed + self.retries)
        job = self.generator.submit(messages=self.conversation.prompt, params=params)
        shown = ""
        try:
            for piece in job:
                shown += piece.text
                write(piece.text, self.out)
        except KeyboardInterrupt:
            job.cancel()
            if not self.lines.interactive:
                raise
            # The engine may be ahead of the screen: the conversation goes on from what the user has seen.
            return replace(job.result(), text=shown, finish_reason="cancelled")
        return job.result()

    def retry(self, _: str) -> None:
        turns, left_out = list(self.conversation.turns), self.conversation.left_out
        message = self.conversation.undo()
        self.retries += 1  # with a fixed seed the same message would get the same reply
        self.conversation.say("user", message)
        replied = False
        try:
            replied = self.reply("the reply before it stays")
        finally:
            if not replied:  # the one before stays
                self.conversation.turns, self.conversation.left_out = turns, left_out

    def undo(self, _: str) -> None:
        message = self.conversation.undo()
        self.say(f"[taken back: {message if len(message) <= 60 else message[:57] + '...'}]")

    def system(self, text: str) -> None:
        if text:
            self.conversation.system = None if text == "-" else text
        self.say(f"[system message: {self.conversation.system or 'none'}]")

    def save(self, name: str) -> None:
        path, real = _path(name, "/save")
        if real.exists() and real not in self.files:
            raise Error(f"{path} exists and is not of this chat: choose another name, or remove it first")
        self.conversation.save(path)
        self.files.add(real)
        self.say(f"[{len(self.conversation.messages)} messages saved to {path}]")

    def load(self, name: str) -> None:
        path, real = _path(name, "/load")
        self.conversation.load(path)
        self.files.add(real)
        self.say(f"[{len(self.conversation.messages)} messages loaded from {path}]")

    def clear(self, _: str) -> None:
        self.conversation.clear()
        self.say("[started over]")

    def stats(self, _: str) -> None:
        if self.last is None:
            self.say("[no reply yet]")
        else:
            used = self.last.prompt_tokens + len(self.last.token_ids)
            cached = self.last.timings.cached_prompt_tokens
            self.say(f"last reply  {speed(self.last)}")
            self.say(f"prompt      {self.last.prompt_tokens} tokens, {cached} of them already in the cache")
            self.say(f"context     {used} of {self.model.context} tokens")
        self.say(f"chat        {self.turns} {'reply' if self.turns == 1 else 'replies'}, {self.tokens} tokens")
        memory = self.model.native.memory()
        self.say("memory      " + ", ".join(f"{name.replace('_', ' ')} {megabytes(n)}" for name, n in memory.items()))


def _path(name: str, command: str) -> tuple[Path, Path]:
    """A file as it was named, and where it really lies; a name that can't be followed is refused."""
    if not name:
        raise Error(f"{command} needs the name of a file")
    try:
        path = Path(name).expanduser()
        real = path.resolve()
        real.exists()  # asks for what resolve() doesn't: folders that may not be searched
    except (OSError, RuntimeError, ValueError) as error:
        raise Error(f"{command} can't use {quoted(name)}: {reason(error)}; name another file") from None
    return path, real
