"""From a row's fields to a text or a conversation: what the shapes are in which people keep their data.

`document(row, column, prefer)` looks at the fields before anything is rendered, in this order:

1. the named column, whose content may have any of the shapes below (as a value, or as JSON text);
2. `messages`, else `text` (the other way round where no chat template is wanted); one that is null or empty gives
   way to the other;
3. a conversation under another name: `conversations` (ShareGPT), `conversation`, `dialogue`, `dialog`, `chat`;
4. a question and its answer: prompt/completion (each a text or messages; `response`, `chosen`, `answer`, `output`),
   question/answer, Alpaca's instruction/input/output with `system` and `history`.

Beside a conversation, `tools` (or `functions`), `system` and `chat_template_kwargs` of the row count. The messages
themselves are brought into one form by `calibration.messages`.

Fields of null inside messages and tools are left out: parquet, and what `datasets` writes, give every struct every
field that any other row has. What was kept as JSON text keeps its nulls.
"""

import ast
import re
import warnings
from dataclasses import dataclass, field
from typing import Any

from gptoss_quantize.calibration.messages import RowError, messages_of, text_of, tools_of, without_nulls
from gptoss_quantize.calibration.sources import JsonError, parse_json

CONVERSATIONS = ("conversations", "conversation", "dialogue", "dialog", "chat")
QUESTIONS = ("instruction", "prompt", "question", "query", "problem")
ANSWERS = ("output", "completion", "response", "answer", "chosen", "solution")
CONTEXTS = ("input", "context")
SYSTEMS = ("system", "system_prompt")
THOUGHTS = ("thinking", "reasoning_content", "reasoning")
TOOLS = ("tools", "functions")
EXTRAS = "chat_template_kwargs"
FIELDS = (
    "messages", "text", *CONVERSATIONS, *QUESTIONS, *ANSWERS, *CONTEXTS, *SYSTEMS, *THOUGHTS, *TOOLS, EXTRAS,
    "history",
)  # fmt: skip
MARKER = re.compile(r"<\|[a-z_]*(start|begin|user|system)[a-z_]*\|>")


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in the one form of `calibration.messages`, and what the chat template is given beside them."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    extras: dict[str, Any] = field(default_factory=dict)


def document(row: Any, column: str | None = None, prefer: str = "messages") -> str | Conversation | None:
    """Return the text or the conversation that a row holds, None where it is empty; RowError says why not.

    column: the only field to look at, if given. prefer: `messages` or `text`, the first of the two to be looked at.
    """
    try:
        if isinstance(row, list):  # a line that is a conversation, without an object around it
            row = {"messages": row}
        if isinstance(row, str) and column is None:
            return _filled(row)
        if _empty(row):
            return None
        if not isinstance(row, dict):
            raise RowError(f'a {type(row).__name__}; expected an object, such as {{"text": "..."}}')
        return _document(row, column, prefer)
    except RecursionError as error:
        raise RowError("nested without end; expected a text or messages") from error


def _document(row: dict[str, Any], column: str | None, prefer: str) -> str | Conversation | None:
    if column is not None:
        if column not in row:
            raise RowError(f"no column {column!r}, only {list(row)}; name the one that holds the text (--column)")
        value = row[column]
        return _any_shape(_unquoted(value) if isinstance(value, str) else value, "text", row, prefer)
    second = "messages" if prefer == "text" else "text"
    for name in (prefer, second, *CONVERSATIONS):
        if not _empty(row.get(name)):
            found = _any_shape(row[name], name, row, prefer)
            if found is not None:
                return found
    if any(name in row for name in (*QUESTIONS, *ANSWERS)):
        return _question_and_answer(row)
    if any(name in row for name in ("messages", "text", *CONVERSATIONS)):
        return None
    raise RowError(
        f"no column 'messages' or 'text', nor another that is known, only {list(row)}; name the one that holds the "
        "text or the messages (--column)"
    )


def _any_shape(value: Any, name: str, row: dict[str, Any], prefer: str) -> str | Conversation | None:
    """Return the document under one name of a row: a text, messages, or a row inside the row."""
    if isinstance(value, str) and name != "text":
        value = _unquoted(value)
    if _empty(value):
        return None
    if isinstance(value, str):
        return _filled(value)
    if isinstance(value, dict) and not value.keys() & {"role", "from"}:
        if all(isinstance(item, list) for item in value.values()) and value.keys() & {"role", "from"}:
            value = _transposed(value)
        elif value.keys() & set(FIELDS):
            return _document({**_beside(row), **value}, None, prefer)
    if isinstance(value, dict) and value.keys() & {"role", "from"}:
        value = _transposed(value) if isinstance(value.get("role", value.get("from")), list) else [value]
    if not isinstance(value, list):
        raise RowError(
            f"a {type(value).__name__}; expected a text or a list of messages; name the column that "
            "holds them (--column)"
        )
    return _conversation(value, row)


def _beside(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in (*TOOLS, *SYSTEMS, EXTRAS) if name in row}


def _unquoted(text: str) -> Any:
    """Return the messages or the row that a text holds as JSON (or as Python writes a list), else the text."""
    if text.lstrip()[:1] not in ("[", "{"):
        return text
    value = parse_json(text)
    if isinstance(value, JsonError):
        try:
            with warnings.catch_warnings():  # about escapes that Python does not know
                warnings.simplefilter("ignore")
                value = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            return text
    if isinstance(value, list) and (not value or all(_like_a_message(item) for item in value)):
        return value
    return value if isinstance(value, dict) and value.keys() & {"messages", *CONVERSATIONS, "role", "from"} else text


def _like_a_message(item: Any) -> bool:
    return isinstance(item, dict) and bool(item.keys() & {"role", "from", "author"})


def _transposed(value: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a list of messages from one list per field, as older `datasets` keep a sequence of structs."""
    lists = {key: items for key, items in value.items() if isinstance(items, list)}
    count = len(lists.get("role", lists.get("from", [])))
    return [{key: items[i] for key, items in lists.items() if i < len(items)} for i in range(count)]


def _conversation(value: list[Any], row: dict[str, Any]) -> Conversation | None:
    messages = messages_of(value)
    system = _first(row, SYSTEMS)
    if system and not any(m["role"] in ("system", "developer") for m in messages):
        messages = [{"role": "system", "content": text_of(system)}, *messages]
    if not any(m.get("content") or m.get("thinking") or m.get("tool_calls") for m in messages):
        return None
    extras = row.get(EXTRAS)
    extras = _unquoted_object(extras) if isinstance(extras, str) else extras
    return Conversation(messages, tools_of(_first(row, TOOLS)), without_nulls(extras) if _is_names(extras) else {})


def _is_names(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


def _unquoted_object(text: str) -> Any:
    value = parse_json(text)
    return None if isinstance(value, JsonError) else value


def _question_and_answer(row: dict[str, Any]) -> str | Conversation | None:
    """Return prompt and completion, or instruction, input and output, as a conversation.

    Texts that hold special tokens were rendered before: they are joined as they are.
    """
    asked, answered, context = _first(row, QUESTIONS), _first(row, ANSWERS), _first(row, CONTEXTS)
    if asked is None:
        asked, context = context, None
    if asked is None and answered is None:
        return None
    asked, answered = (_unquoted(x) if isinstance(x, str) else x for x in (asked, answered))
    if isinstance(asked, str) and isinstance(answered, str | None) and MARKER.search(asked):
        return asked + (answered or "")
    before = _history(row.get("history"))
    if asked is None and isinstance(answered, list):  # the whole conversation under `chosen`
        return _conversation([*before, *answered], row)
    asked = asked if isinstance(asked, list) else [{"role": "user", "content": _joined(asked, context, row)}]
    if answered is None and not any(isinstance(m, dict) and m.get("role") == "assistant" for m in asked):
        raise RowError(f"a question without an answer, only {list(row)}; expected one of {', '.join(ANSWERS)}")
    if isinstance(answered, dict):
        answered = [answered]
    if isinstance(answered, list):
        # a preference set keeps the whole conversation under `chosen`
        if len(answered) > 1 and answered[: len(asked)] == asked:
            asked = []
        return _conversation([*before, *asked, *answered], row)
    if answered is None:
        return _conversation([*before, *asked], row)
    answer = {"role": "assistant", "content": text_of(answered), "thinking": _first(row, THOUGHTS)}
    return _conversation([*before, *asked, answer], row)


def _joined(asked: Any, context: Any, row: dict[str, Any]) -> str:
    if asked is None:
        raise RowError(f"an answer without a question, only {list(row)}; expected one of {', '.join(QUESTIONS)}")
    return "\n\n".join(text_of(part) for part in (asked, context) if not _empty(part))


def _history(value: Any) -> list[dict[str, Any]]:
    """Return the messages of Alpaca's `history`: pairs of question and answer."""
    if _empty(value):
        return []
    if not isinstance(value, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        raise RowError("history: expected a list of [question, answer]")
    return [
        {"role": role, "content": text_of(content)}
        for pair in value
        for role, content in zip(("user", "assistant"), pair, strict=True)
    ]


def _first(row: dict[str, Any], names: tuple[str, ...]) -> Any:
    return next((row[name] for name in names if not _empty(row.get(name))), None)


def _filled(text: str) -> str | None:
    return text if text and not text.isspace() else None


def _empty(value: Any) -> bool:
    """Say whether a field holds nothing: null, NaN (what pandas writes for null), or a blank text, list or object."""
    if isinstance(value, str):
        return not value or value.isspace()
    # NaN is not equal to itself
    return (
        value is None
        or (isinstance(value, float) and value != value)
        or (isinstance(value, list | dict) and not value)
    )
