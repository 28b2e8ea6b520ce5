"""The commands that talk: generate, chat, env."""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from gptoss_quantize import cli_early as early
from gptoss_quantize.cli_options import DeviceOpt, Dtype, DtypeOpt
from gptoss_quantize.cli_words import next_step, starting
from gptoss_quantize.errors import InputError

ModelArg = Annotated[str, typer.Argument(help="An int4 checkpoint of ours, any gpt-oss directory, or a hub name.")]
TemperatureOpt = Annotated[
    float, typer.Option(min=0, help="0: the likeliest token each time. 1: as the model has it.")
]
TopPOpt = Annotated[float, typer.Option("--top-p", help="Draw among the likeliest tokens with this share together.")]
TopKOpt = Annotated[int, typer.Option("--top-k", min=0, help="Draw among so many of the likeliest; 0: all.")]
SeedOpt = Annotated[int | None, typer.Option(min=0, help="Seed of the draws.")]
INTERRUPTED = 130
PROMPT = "> "
HELP = """\
/reset      forget the conversation, but for the system prompt
/save FILE  write it as a row of JSON lines, as --calibration and --text take it
/help       this
/quit       leave; Ctrl-D too, and Ctrl-C twice
Ctrl-C      stop the answer; what was said of it stays part of the conversation
"""


def note(words: str) -> None:
    """Say something that is no part of an answer."""
    print(words, file=sys.stderr, flush=True)


def speed_line(made: Any, prompt: int | None = None) -> str:
    """Return prompt and answer in tokens and tokens per second; `prompt` counts what was in the cache too."""
    of = "" if prompt in (None, made.read) else f" of {prompt}"
    rate = "" if made.speed is None else f", {made.speed:.1f} tokens/s"
    return f"prompt: {made.read}{of} tokens, {made.read_speed:.1f} tokens/s; answer: {len(made.ids)} tokens{rate}"


def generate(
    model: ModelArg,
    prompt: Annotated[str, typer.Option(help="The user's message, or plain text with --raw.")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 60,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as text, without the chat template.")
    ] = False,
    temperature: TemperatureOpt = 0.0,
    top_p: TopPOpt = 1.0,
    top_k: TopKOpt = 0,
    seed: SeedOpt = None,
    device: DeviceOpt = "auto",
    dtype: DtypeOpt = Dtype.bfloat16,
) -> None:
    """Answer a prompt, printed as it comes, and say how fast; int4 experts stay packed in memory."""
    early.check_input(model)
    early.check_numbers(device=device)
    starting()
    from gptoss_quantize.api_talk import pick_sampling, speak

    sampling = pick_sampling(temperature, top_p, top_k, seed)
    screen = Screen()
    try:
        answer = speak(
            model,
            prompt,
            max_new_tokens,
            raw=raw,
            sampling=sampling,
            on=(device, dtype.value),
            on_text=screen.write,
        )
    except KeyboardInterrupt:
        screen.end()
        raise typer.Exit(INTERRUPTED) from None
    screen.write("\n")
    note(speed_line(answer.made))
    if raw:
        next_step("generate", model, "--raw", "--prompt", prompt, "--max-new-tokens", 2 * max_new_tokens)
    else:
        next_step("chat", model)


class Screen:
    """Where an answer is written: stdout, piece by piece; dim and erasable only where a terminal can do that."""

    def __init__(self, show_thinking: bool = False) -> None:
        self.terminal = sys.stdout.isatty()
        plain = os.environ.get("TERM", "dumb") == "dumb" or "NO_COLOR" in os.environ
        self.colour = self.terminal and not plain
        self.show_thinking = show_thinking
        self._at_start = True
        self._part: tuple[str, str | None] | None = None
        self._waiting = False
        with suppress(AttributeError, ValueError):
            # a locale without the character: a question mark, not the end
            sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]

    def write(self, text: str) -> None:
        """Write text at once; on a terminal without the control characters that a model may have made up."""
        if self.terminal:
            text = "".join(c for c in text if c.isprintable() or c in "\n\t")
        if text:
            self._at_start = text.endswith("\n")
            print(text, end="", flush=True)

    def _code(self, code: str) -> None:
        if self.colour:
            print(code, end="", flush=True)

    def piece(self, piece: Any) -> None:
        """Write a piece of an answer, told apart from those of other channels."""
        part = (piece.channel, piece.recipient)
        aside = piece.channel != "final" or piece.recipient is not None
        if piece.channel == "analysis" and not self.show_thinking:
            if self.colour and not self._waiting:
                self._waiting = True
                self._code("\x1b[2mthinking ...\x1b[0m")
            return
        self._clear()
        if part != self._part:
            self._change(part, aside)
        self.write(piece.text)

    def _change(self, part: tuple[str, str | None], aside: bool) -> None:
        if not self._at_start:
            self.write("\n")
        channel, recipient = part
        label = f"[{channel} to {recipient}] " if recipient else f"[{channel}] "
        # dim text needs no name where it can only be thinking; after it the answer needs one where nothing is dim
        named = recipient is not None or (aside and channel != "analysis") or (not self.colour and self._names(aside))
        if aside or self._part is not None:
            self._code("\x1b[2m" if aside else "\x1b[0m")
        if named:
            self.write(label)
            self._at_start = False
        self._part = part

    def _names(self, aside: bool) -> bool:
        return aside or self._part is not None

    def _clear(self) -> None:
        if self._waiting:
            self._code("\r\x1b[K")
            self._waiting = False

    def end(self) -> None:
        """End an answer: on a new line, with nothing dim."""
        self._clear()
        if self._part is not None:
            self._code("\x1b[0m")
        if not self._at_start:
            self.write("\n")
        self._part = None


@contextmanager
def on_interrupt(call: Callable[[], None]) -> Iterator[None]:
    """Call a function at Ctrl-C while it lasts; not where the process was told to ignore it."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        yield
        return
    signal.signal(signal.SIGINT, lambda number, frame: call())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def messages(interactive: bool) -> Iterator[str]:
    """Yield what the user says, line by line, until the end of input or a second Ctrl-C at the prompt."""
    leaving = False
    while True:
        try:
            line = input(PROMPT) if interactive else sys.stdin.readline()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            if leaving or not interactive:
                return
            leaving = True
            note("Ctrl-C again, or /quit, to leave")
            continue
        leaving = False
        if not interactive and not line:
            return
        if line.strip():
            yield line.strip()


def chat(
    model: ModelArg,
    system: Annotated[str | None, typer.Option(help="The system prompt.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer, thinking included.")] = 2048,
    temperature: TemperatureOpt = 0.0,
    top_p: TopPOpt = 1.0,
    top_k: TopKOpt = 0,
    seed: SeedOpt = None,
    show_thinking: Annotated[
        bool, typer.Option("--show-thinking", help="Show the analysis channel too, dimmed or under its name.")
    ] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Tokens per second after each answer.")] = False,
    device: DeviceOpt = "auto",
    dtype: DtypeOpt = Dtype.bfloat16,
) -> None:
    """Hold a conversation with MODEL in its chat template; Ctrl-C stops an answer, /quit leaves.

    From a pipe each line is a message, and answers are all that stands on stdout.
    """
    early.check_input(model)
    early.check_numbers(device=device)
    starting()
    from gptoss_quantize import api_talk
    from gptoss_quantize.checkpoint import Checkpoint
    from gptoss_quantize.hub import resolve

    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    with suppress(AttributeError, ValueError):
        sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
    sampling = api_talk.pick_sampling(temperature, top_p, top_k, seed)
    path = resolve(model)
    tokenizer = api_talk.chat_tokenizer(path)
    checkpoint = Checkpoint(path)
    for told in checkpoint.notes:
        note(f"note: {told}")
    if interactive:
        note(f"loading {path} ...")
        with suppress(ImportError):
            import readline  # noqa: F401 - input() edits lines and remembers them, where there is such a library
    speaker = api_talk.open_speaker(checkpoint, tokenizer, dtype.value, device)
    talk = api_talk.Conversation(speaker, system=system, max_new_tokens=max_new_tokens, sampling=sampling)
    if interactive:
        note("Ctrl-C stops an answer. /help lists the commands, /quit leaves.")
    screen, saved = Screen(show_thinking), set[Path]()
    for line in messages(interactive):
        if line == "/quit":
            return
        if line.startswith("/"):
            command(line, talk, saved)
            continue
        try:
            with on_interrupt(talk.interrupt):
                reply = talk.ask(line, screen.piece)
        except InputError as error:
            if not interactive:
                raise
            note(f"refused: {error}")
            continue
        screen.end()
        after(reply, stats)
        if reply.stopped and not interactive:
            raise typer.Exit(INTERRUPTED)


def after(reply: Any, stats: bool) -> None:
    """Say how an answer ended, where it did not end by itself, and how fast it came."""
    if reply.stopped:
        note("(stopped)" if reply.kept else "(stopped before the answer; your message is taken back)")
    elif not reply.kept:
        tools = f", but called {', '.join(sorted(reply.said.called))}" if reply.said.called else ""
        cut = "; --max-new-tokens allows more" if reply.cut else ""
        note(f"(the model gave no final answer{tools}; your message is taken back{cut})")
    elif reply.cut:
        note("(cut off at --max-new-tokens, or where the model's context ends)")
    if stats and reply.made is not None:
        note(speed_line(reply.made, reply.prompt))


def command(line: str, talk: Any, saved: set[Path]) -> None:
    """Do what a line that begins with / asks for."""
    name, _, rest = line.partition(" ")
    if name == "/reset":
        talk.reset()
        note("forgotten")
    elif name == "/help":
        note(HELP.rstrip())
    elif name == "/save" and rest.strip():
        file = Path(rest.strip()).expanduser()
        if file.exists() and file not in saved:
            note(f"{file}: is there already; choose another name")
            return
        try:
            talk.save(file)
        except OSError as error:
            note(f"{file}: cannot be written ({error}); choose another place")
            return
        saved.add(file)
        note(f"{file} written: {len(talk.messages)} messages")
    else:
        note(f"{name}: unknown; /help lists the commands" if name != "/save" else "/save FILE: give it a name")


def env(
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Print what a bug report needs: versions, processor, memory, cards, and which kernel would run and why."""
    starting("torch")
    from gptoss_quantize.env import lines, report

    found = report()
    print(json.dumps(found, indent=1) if as_json else "\n".join(lines(found)))
    next_step("plan", "20b")


COMMANDS: dict[str, Callable[..., Any]] = {"generate": generate, "chat": chat, "env": env}
