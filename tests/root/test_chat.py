"""`chat`: channels told apart, the cache kept where the prefix is the same, Ctrl-C, terminals and pipes."""

import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import gptoss_quantize as gq
from gptoss_quantize.api_talk import Conversation, Speaker, open_speaker, turn_ends
from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.eval.examples import Sampling
from gptoss_quantize.talk import Channels, Piece, Plain, Spoken, reader

# python 3.12 warns of forks beside threads; what follows the fork here is exec
pytestmark = pytest.mark.filterwarnings("ignore:.*forkpty:DeprecationWarning")
HERE = Path(__file__).parent
MARKS = ["<|channel|>", "<|return|>", "<|call|>", "<|constrain|>"]
THOUGHT = "<|channel|>analysis<|message|>Hm 🎉.<|end|>"
SAID = "<|start|>assistant<|channel|>final<|message|>Blue — sky.<|return|>"
CALLED = "<|start|>assistant to=functions.look<|channel|>commentary <|constrain|>json<|message|>{}<|call|>"


@pytest.fixture(scope="module")
def harmony(tiny, tmp_path_factory) -> Path:
    """Return the tiny model with a tokenizer and template of Harmony's shape, and room for a conversation."""
    path = tiny.copy("float32", tmp_path_factory.mktemp("harmony") / "model")
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS})
    tokenizer.chat_template = (HERE.parent / "data" / "harmony.jinja").read_text()
    tokenizer.save_pretrained(path)
    tiny.edit_json(path / "config.json", max_position_embeddings=1024)
    return path


@pytest.fixture(scope="module")
def tokenizer(harmony):
    return AutoTokenizer.from_pretrained(harmony)


def read(words, ids: list[int]) -> list[Piece]:
    """Return what a reader makes of tokens, pieces of one part joined."""
    out: list[Piece] = []
    for piece in [*(piece for i in ids for piece in words.add(i)), *words.rest()]:
        if out and (out[-1].channel, out[-1].recipient) == (piece.channel, piece.recipient):
            piece = Piece(out.pop().text + piece.text, piece.channel, piece.recipient)
        out.append(piece)
    return out


# ---- channels


def ids_of(tokenizer, text: str) -> list[int]:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    return ids


@pytest.mark.parametrize(
    ("text", "pieces", "done"),
    [
        (THOUGHT, [Piece("Hm 🎉.", "analysis")], False),
        (THOUGHT + SAID, [Piece("Hm 🎉.", "analysis"), Piece("Blue — sky.")], True),
        # what comes after <|end|> of a final message is never the answer's
        ("<|channel|>final<|message|>Yes.<|end|>", [Piece("Yes.")], True),
        (THOUGHT + CALLED, [Piece("Hm 🎉.", "analysis"), Piece("{}", "commentary", "functions.look")], True),
        ("<|channel|>commentary<|message|>I look.<|end|>", [Piece("I look.", "commentary")], False),
        # a recipient behind the channel, as gpt-oss writes it too
        (
            "<|channel|>commentary to=functions.look <|constrain|>json<|message|>{<|call|>",
            [Piece("{", "commentary", "functions.look")],
            True,
        ),
        # cut off in a message, and in a header
        ("<|channel|>final<|message|>Bl", [Piece("Bl")], False),
        (THOUGHT + "<|start|>assistant<|channel|>fin", [Piece("Hm 🎉.", "analysis")], False),
        # a model that knows nothing of channels
        ("Blue sky.", [Piece("Blue sky.")], False),
        ("<|message|>Blue.<|end|>", [Piece("Blue.")], True),
    ],
)
def test_channels(tokenizer, text, pieces, done):
    words = reader(tokenizer, ids_of(tokenizer, "<|start|>user<|message|>Q<|end|><|start|>assistant"))
    assert isinstance(words, Channels)
    assert read(words, ids_of(tokenizer, text)) == pieces
    assert words.done == done


def test_a_model_that_plays_the_user_is_stopped(tokenizer):
    words = reader(tokenizer)
    for token in ids_of(tokenizer, THOUGHT + "<|start|>user<|message|>"):
        assert not words.done
        words.add(token)
    assert words.done


def test_a_template_may_open_the_channel(tokenizer):
    opening = ids_of(tokenizer, "<|start|>user<|message|>Q<|end|><|start|>assistant<|channel|>analysis<|message|>")
    words = reader(tokenizer, opening)
    assert read(words, ids_of(tokenizer, "T<|end|>" + SAID)) == [Piece("T", "analysis"), Piece("Blue — sky.")]


def test_text_without_a_header_comes_before_the_end(tokenizer):
    words = reader(tokenizer)
    ids = ids_of(tokenizer, "word and so on, " * 20)
    given_out = [piece for i in ids for piece in words.add(i)]
    assert len(given_out) > 100 and len(given_out[0].text) < 200
    assert "".join(piece.text for piece in [*given_out, *words.rest()]) == "word and so on, " * 20


def test_other_templates_have_one_channel(tiny):
    plain = AutoTokenizer.from_pretrained(tiny.path("bf16"))
    words = reader(plain)
    assert isinstance(words, Plain)
    assert read(words, ids_of(plain, "Blue — sky.<|end|>")) == [Piece("Blue — sky.")]
    # <|end|> is not among the model's own ends, and ends a turn of its template
    assert turn_ends(plain, "here") == plain.convert_tokens_to_ids(["<|end|>"])


def test_harmony_has_no_turn_end_of_its_own(tokenizer):
    assert turn_ends(tokenizer, "here") == []


def test_what_was_said_is_kept_by_channel():
    said = Spoken()
    for piece in (Piece("A", "analysis"), Piece("B", "commentary"), Piece("C"), Piece("{}", "commentary", "look")):
        said.add(piece)
    assert (said.thinking, said.content, said.called) == ("AB", "C", {"look"})


# ---- the cache


def silent(piece: Piece) -> None:
    """Take no notice."""


def fresh(speaker: Speaker, messages: list, question: str, **how):
    """Return the answer of a conversation that begins with the same messages and has read nothing."""
    talk = Conversation(speaker, **how)
    talk.messages = list(messages)
    return talk.ask(question, silent)


@pytest.fixture(scope="module")
def speaker(harmony, tokenizer) -> Speaker:
    return open_speaker(Checkpoint(harmony), tokenizer, "float32", "cpu")


@pytest.fixture(scope="module")
def plain(harmony, tiny) -> Speaker:
    """Return the same model with a template that leaves every earlier token as it was."""
    plain = AutoTokenizer.from_pretrained(tiny.path("float32"))
    return open_speaker(Checkpoint(harmony), plain, "float32", "cpu")


def test_what_was_read_is_not_read_again(plain):
    talk, how = Conversation(plain, max_new_tokens=20), {"max_new_tokens": 20}
    replies = []
    for turn, question in enumerate(["The sea was calm", "The rain came", "and the ships"]):
        expected = fresh(plain, talk.messages, question, **how)
        reply = talk.ask(question, silent)
        # beyond the window of 16, and with the model's own cache in `fresh`'s first turn
        assert reply.prompt > 16 and reply.said.content == expected.said.content, turn
        assert expected.made.read == reply.prompt
        replies.append(reply)
    assert replies[0].made.read == replies[0].prompt
    for before, after in pairwise(replies):
        # all of the earlier prompt was in the cache; of its answer as much as is written the same again
        assert 1 < after.made.read <= after.prompt - before.prompt


def test_the_cache_equals_transformers_own(plain):
    text, asked = "The sea was calm, and the rain", {"max_new_tokens": 24, "dtype": "float32", "device": "cpu"}
    reply = Conversation(plain, max_new_tokens=24).ask(text, silent)
    path = plain.path
    shutil.copyfile(path / "chat_template.jinja", path / "kept.jinja")
    try:
        (path / "chat_template.jinja").write_text(plain.tokenizer.chat_template)
        assert gq.generate(path, text, **asked) == reply.said.content
    finally:
        (path / "kept.jinja").replace(path / "chat_template.jinja")


def test_another_beginning_is_read_anew(plain):
    talk = Conversation(plain, max_new_tokens=12)
    talk.ask("The sea was calm", silent)
    first = talk.messages
    talk.reset()
    assert talk.messages == []
    reply = talk.ask("A ship passed", silent)
    assert reply.said.content == fresh(plain, [], "A ship passed", max_new_tokens=12).said.content
    # only the template's opening is the same
    assert reply.prompt - 5 <= reply.made.read <= reply.prompt
    talk.messages = [{"role": "user", "content": "Before"}, *first[1:]]
    reply = talk.ask("The rain came", silent)
    assert reply.made.read >= reply.prompt - 5
    talk.messages = [{"role": "user", "content": "Before"}, *first[1:]]
    # the whole prompt is in the cache: its last token is read again
    assert talk.ask("The rain came", silent).made.read == 1


def test_a_system_prompt_survives_a_reset(plain):
    talk = Conversation(plain, system="Be brief", max_new_tokens=4)
    before = talk.ask("The sea", silent)
    talk.reset()
    after = talk.ask("The sea", silent)
    assert talk.messages[0] == {"role": "system", "content": "Be brief"}
    assert (before.prompt, before.said.content) == (after.prompt, after.said.content)


# while the question is read, and while the answer is made; behind the first layer, and behind the last
@pytest.mark.parametrize("call", [1, 6])
@pytest.mark.parametrize("layer", [0, 2])
def test_an_interrupted_step_leaves_a_cache_that_is_right(plain, layer, call):
    talk = Conversation(plain, max_new_tokens=20)
    talk.ask("The sea was calm", silent)
    calls = []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt

    hook = plain.model.model.layers[layer].register_forward_hook(interrupt)
    try:
        stopped = talk.ask("The rain came", silent)
    finally:
        hook.remove()
    assert stopped.stopped and stopped.made is None and not stopped.cut and stopped.kept == (call > 1)
    messages = list(talk.messages)
    reply = talk.ask("and the ships", silent)
    assert reply.said.content == fresh(plain, messages, "and the ships", max_new_tokens=20).said.content
    assert reply.made.read < reply.prompt


def test_a_turn_ends_where_the_template_says_so(plain):
    whole = Conversation(plain, max_new_tokens=12).ask("The sea", silent)
    ids = whole.made.ids.tolist()
    talk = Conversation(plain, max_new_tokens=12)
    talk.stops = [ids[5]]
    reply = talk.ask("The sea", silent)
    assert reply.made.ids.tolist() == ids[: ids.index(ids[5]) + 1] and whole.cut and not reply.cut


def test_a_seed_makes_a_conversation_repeat(plain):
    def both(seed: int) -> list[str]:
        talk = Conversation(plain, max_new_tokens=12, sampling=Sampling(temperature=1.0, seed=seed))
        return [talk.ask("The sea", silent).said.content for _ in range(2)]

    assert both(1) == both(1) != both(2)


def test_a_conversation_that_is_too_long_is_refused(plain):
    talk = Conversation(plain, max_new_tokens=2)
    with pytest.raises(gq.InputError, match=r"takes fewer than 1024; begin a new one \(/reset\)"):
        talk.ask("é" * 600, silent)
    assert talk.messages == [] and talk.ask("The sea", silent).prompt < 100


# ---- as a person sees it


class Terminal:
    """A process on a terminal of its own."""

    def __init__(self, command: list, term: str):
        self.pid, self.fd = pty.fork()
        if not self.pid:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            changed = {"TERM": term, "PYTHONSAFEPATH": "1", "PYTHONIOENCODING": "utf-8", "COLUMNS": "80"}
            os.environ.pop("NO_COLOR", None)
            os.execve(sys.executable, list(map(str, command)), os.environ | changed)
        self.text = ""

    def until(self, words: str, timeout: float = 120) -> str:
        """Return what is shown up to `words`, and take it off what was shown."""
        end = time.monotonic() + timeout
        raw = self.text.encode()
        while words not in raw.decode(errors="ignore"):
            assert time.monotonic() < end, f"no {words!r} in {raw!r}"
            if select.select([self.fd], [], [], 0.2)[0]:
                try:
                    raw += os.read(self.fd, 4096)
                except OSError as error:
                    raise AssertionError(f"ended without {words!r}: {raw!r}") from error
        before, _, self.text = raw.decode(errors="ignore").partition(words)
        return before + words

    def interrupt_until(self, words: str) -> None:
        """Press Ctrl-C at a prompt; once more where it came just before Python waited for keys, which loses it."""
        self.send("\x03")
        raw = self.text
        try:
            self.until(words, timeout=30)
        except AssertionError:
            self.text = raw
            self.send("\x03")
            self.until(words)

    def send(self, keys: str) -> None:
        os.write(self.fd, keys.encode())

    def ended(self) -> tuple[str, int]:
        """Return what is shown at the end, and the exit code."""
        raw = self.text.encode()
        while True:
            try:
                more = os.read(self.fd, 4096)
            except OSError:
                break
            if not more:
                break
            raw += more
        os.close(self.fd)
        return raw.decode(errors="ignore"), os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.fixture
def command(harmony, tokenizer, tmp_path):
    """Return the command line of a chat with a model that gives the answers told."""

    def make(answers: list[str], pause: float, *more: str) -> list:
        script = {"answers": [ids_of(tokenizer, text) for text in answers], "pause": pause}
        (tmp_path / "script.json").write_text(json.dumps(script))
        return [sys.executable, HERE / "scripted_model.py", tmp_path / "script.json", "chat", harmony, *more]

    return make


def test_ctrl_c_stops_the_answer_and_not_the_program(command):
    long = "<|channel|>final<|message|>" + "on and on, " * 30 + "<|return|>"
    terminal = Terminal(command([long, SAID.removeprefix("<|start|>assistant")], 0.05), "dumb")
    terminal.until("/quit leaves.")
    terminal.until("> ")
    terminal.send("hi\n")
    terminal.until("on and on")
    terminal.send("\x03")
    shown = terminal.until("(stopped)")
    assert shown.count("on and on") < 25
    terminal.until("> ")
    terminal.send("and now\n")
    terminal.until("Blue — sky.")
    terminal.until("> ")
    terminal.interrupt_until("Ctrl-C again, or /quit, to leave")
    terminal.until("> ")
    # let it wait for keys
    time.sleep(1)
    terminal.send("\x03")
    rest, code = terminal.ended()
    assert code == 0 and "Traceback" not in rest


def test_thinking_is_dim_where_that_can_be_seen(command):
    terminal = Terminal(command([THOUGHT + SAID] * 2, 0, "--show-thinking"), "xterm")
    terminal.until("> ")
    terminal.send("hi\n")
    shown = terminal.until("sky.")
    assert re.search(r"\x1b\[2mHm 🎉\.\r?\n\x1b\[0mBlue — sky\.$", shown), shown
    terminal.until("> ")
    # the end of input
    terminal.send("\x04")
    assert terminal.ended()[1] == 0


def test_thinking_is_hidden_and_a_dumb_terminal_gets_no_codes(command, tmp_path):
    terminal = Terminal(command([THOUGHT + CALLED, THOUGHT + SAID], 0, "--stats"), "dumb")
    terminal.until("> ")
    terminal.send("hi\n")
    shown = terminal.until("taken back)")
    assert "[commentary to functions.look] {}" in shown and "functions.look; your message is" in shown
    terminal.until("> ")
    terminal.send("again\n")
    shown += terminal.until("tokens/s")
    assert "Blue — sky." in shown and "Hm" not in shown and "\x1b" not in shown
    terminal.until("> ")
    terminal.send(f"/save {tmp_path}/talk.jsonl\n")
    terminal.until("2 messages")
    terminal.send("/help\n")
    terminal.until("/reset")
    terminal.send("/nonsense\n")
    terminal.until("/nonsense: unknown")
    terminal.send("/quit\n")
    assert terminal.ended()[1] == 0
    (row,) = (tmp_path / "talk.jsonl").read_text().splitlines()
    assert json.loads(row)["messages"] == [
        {"role": "user", "content": "again"},
        {"role": "assistant", "content": "Blue — sky.", "thinking": "Hm 🎉."},
    ]


def test_from_a_pipe_each_line_is_a_message(command, tmp_path):
    answers = [THOUGHT + SAID, "<|channel|>final<|message|>Green.<|return|>"]
    save = tmp_path / "talk.jsonl"
    lines = f"hi\n\nand grass?\n/save {save}\n/save /\n"
    done = subprocess.run(
        command(answers, 0, "--stats", "--show-thinking"),
        input=lines,
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        check=False,
        env=os.environ | {"PYTHONIOENCODING": "utf-8", "PYTHONSAFEPATH": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[analysis] Hm 🎉.\n[final] Blue — sky.\nGreen.\n"
    speeds = re.findall(r"^prompt: (\d+)(?: of (\d+))? tokens, .* answer: (\d+) tokens", done.stderr, re.MULTILINE)
    assert len(speeds) == 2 and speeds[0][1] == "" and int(speeds[1][0]) < int(speeds[1][1])
    assert len(json.loads(save.read_text())["messages"]) == 4
    assert "/: is there already" in done.stderr and ">" not in done.stdout


def test_refused_before_the_model_is_loaded(tiny, tmp_path):
    path = tiny.copy("bf16", tmp_path / "model")
    (path / "chat_template.jinja").unlink()
    done = subprocess.run(
        [sys.executable, "-m", "gptoss_quantize", "chat", path, "--top-p", "0.5"],
        capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 1 and "give --temperature too" in done.stderr
    from gptoss_quantize.api_talk import chat_tokenizer

    with pytest.raises(gq.InputError, match="no chat template"):
        chat_tokenizer(path)


@pytest.mark.parametrize("kind", ["bf16", "mxfp4", "int4"])
def test_every_form_of_a_model_talks(tiny, tmp_path, kind):
    path = tiny.path("bf16" if kind == "int4" else kind)
    if kind == "int4":
        gq.quantize(path, tmp_path / "int4", "rtn", device="cpu", progress=True)
        path = tmp_path / "int4"
    tokenizer = AutoTokenizer.from_pretrained(path)
    talk = Conversation(open_speaker(Checkpoint(path), tokenizer, "float32", "cpu"), max_new_tokens=6)
    replies = [talk.ask("The sea", silent) for _ in range(2)]
    assert all(len(reply.made.ids) > 0 for reply in replies) and replies[1].made.read < replies[1].prompt
    assert torch.is_tensor(replies[0].made.ids)
