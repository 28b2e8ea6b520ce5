"""Messages of every make, brought into one form: what a chat template of today takes.

    role            system, developer, user, assistant, tool; ShareGPT's `from` and its names are translated
    content         a text; a list of text parts is joined; absent beside tool calls where it was null
    thinking        what an assistant thinks before its content: also `reasoning_content`, `reasoning`, parts of
                    that type, and whole messages on the `analysis` or `commentary` channel, which belong to the
                    assistant's message that follows them
    tool_calls      [{"type": "function", "function": {"name", "arguments"}}], the arguments an object; also
                    `function_call`, ShareGPT's function_call turns, and Harmony's `recipient`

Anything else in a message is handed to the template as it is.
"""

import json
from typing import Any

from gptoss_quantize.calibration.sources import JsonError, parse_json

ROLES = {
    "human": "user", "prompter": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant",
    "model": "assistant", "ai": "assistant", "function": "tool", "observation": "tool", "tool_response": "tool",
    "function_response": "tool", "function_result": "tool", "ipython": "tool",
}  # fmt: skip
CALLS = ("function_call", "tool_call")
TEXT_PARTS = ("text", "input_text", "output_text")
THINKING_PARTS = ("thinking", "reasoning")
TEXTS = ("content", "value", "text", "parts")


class RowError(Exception):
    """What is wrong with a row; the row is skipped and counted."""


def messages_of(value: list[Any]) -> list[dict[str, Any]]:
    """Return the messages of a conversation in the one form; RowError names the message that has none."""
    made: list[dict[str, Any]] = []
    thoughts: list[str] = []
    for i, item in enumerate(value):
        if item is None:  # parquet pads nothing, but a null in a list is no message
            continue
        message = _message(item, f"message {i}")
        channel = message.pop("channel", None)
        aside = channel in ("analysis", "commentary") and "tool_calls" not in message
        if message["role"] == "assistant" and aside:
            thoughts.extend(message[key] for key in ("thinking", "content") if message.get(key))
            continue
        if thoughts:
            if message["role"] != "assistant":
                raise RowError(
                    f"message {i}: no answer after the analysis before it; expected an assistant's message"
                )
            message["thinking"] = "\n\n".join([*thoughts, *filter(None, [message.get("thinking")])])
            thoughts = []
        made.append(message)
    if thoughts:
        raise RowError("the conversation ends with analysis; expected an answer after it")
    return made


def _message(item: Any, where: str) -> dict[str, Any]:
    role = _role(item) if isinstance(item, dict) else None
    if not isinstance(role, str):
        raise RowError(f'{where}: expected {{"role": ..., "content": ...}}, found {str(item)[:80]!r}')
    fields = without_nulls({k: v for k, v in item.items() if k not in ("role", "from", "author", *TEXTS)})
    try:
        return _filled(role, fields, next((item[key] for key in TEXTS if item.get(key) is not None), None))
    except RowError as error:
        raise RowError(f"{where}: {error}") from error


def _role(item: dict[str, Any]) -> Any:
    role = item.get("role", item.get("from", item.get("author")))
    role = role.get("role") if isinstance(role, dict) else role
    return ROLES.get(role.strip().lower(), role.strip().lower()) if isinstance(role, str) else role


def _filled(role: str, fields: dict[str, Any], content: Any) -> dict[str, Any]:
    """Return a message from its role, its other fields and its content of any kind."""
    if role in CALLS:
        return {"role": "assistant", "tool_calls": tool_calls_of(content)}
    if isinstance(content, list | dict) and role == "tool" and not _is_parts(content):
        content = to_json(content)
    text, thought = _content(content)
    thoughts = [*(fields.pop(key, None) for key in ("thinking", "reasoning_content", "reasoning")), thought]
    calls, text = _calls(role, fields, text)
    message: dict[str, Any] = {"role": role, **fields}
    if text is not None and (text or not calls):
        message["content"] = text
    thinking = text_of(next((t for t in thoughts if t), ""), "thinking")
    if thinking and not thinking.isspace():
        message["thinking"] = thinking
    if calls:
        message["tool_calls"] = tool_calls_of(calls)
    if role == "tool":
        message.setdefault("content", "")
    if not message.keys() & {"content", "thinking", "tool_calls"}:
        raise RowError("has no content; expected a text under 'content'")
    return message


def _calls(role: str, fields: dict[str, Any], text: str | None) -> tuple[Any, str | None]:
    """Take the calls of tools out of a message's fields; Harmony writes one as a content with a recipient."""
    calls = [fields.pop(key, None) for key in ("tool_calls", "function_call")]
    recipient = fields.pop("recipient", None)
    if role == "assistant" and isinstance(recipient, str) and recipient not in ("", "all", "assistant"):
        fields.pop("content_type", None)
        return [{"name": recipient.removeprefix("functions."), "arguments": text}], None
    return calls[0] or calls[1], text


def _is_parts(content: Any) -> bool:
    items = content if isinstance(content, list) else content.get("parts")
    return isinstance(items, list) and bool(items) and all(isinstance(x, str) or _part_type(x) for x in items)


def _part_type(part: Any) -> str | None:
    return part["type"] if isinstance(part, dict) and isinstance(part.get("type"), str) else None


def _content(content: Any) -> tuple[str | None, str | None]:
    """Return (text, thinking) of a message's content: a text, or parts."""
    if content is None or isinstance(content, str):
        return content, None
    if isinstance(content, dict):  # ChatGPT's export: {"content_type": "text", "parts": [...]}; or a single part
        content = content["parts"] if isinstance(content.get("parts"), list) else [content]
    if not isinstance(content, list):
        raise RowError(f"content is a {type(content).__name__}; expected a text")
    texts, thoughts = [], []
    for part in content:
        kind = _part_type(part)
        if part is None:
            continue
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict) and kind in THINKING_PARTS:
            thoughts.append(text_of(part.get("thinking", part.get("reasoning", part.get("text"))), "thinking"))
        elif isinstance(part, dict) and kind in (*TEXT_PARTS, None) and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in TEXT_PARTS:
            raise RowError(f"content is a list with a part of type {kind!r} without text; expected a text")
        else:
            raise RowError(f"content is a list with a part of type {kind or type(part).__name__!r}; expected texts")
    return "".join(texts) if texts else None, "\n\n".join(thoughts) or None


def tool_calls_of(value: Any) -> list[dict[str, Any]]:
    """Return calls of tools in OpenAI's form, their arguments as objects."""
    value = _parsed(value, "tool_calls") if isinstance(value, str) else value
    calls = [value] if isinstance(value, dict) else value
    if not isinstance(calls, list) or not calls:
        raise RowError(f"tool_calls is a {type(value).__name__}; expected a list of calls")
    return [_tool_call(call) for call in calls]


def _tool_call(call: Any) -> dict[str, Any]:
    call = _parsed(call, "tool_calls") if isinstance(call, str) else call
    inner = call.get("function", call) if isinstance(call, dict) else None
    inner = {**call, "name": inner} if isinstance(inner, str) else inner
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise RowError(f"a tool call without a name: {str(call)[:80]!r}")
    arguments: Any = next(
        (inner[key] for key in ("arguments", "parameters", "input") if inner.get(key) is not None), {}
    )
    if not isinstance(arguments, str):
        arguments = without_nulls(arguments)
    for _ in range(2):  # JSON text, or JSON text of JSON text
        if isinstance(arguments, str):
            arguments = _parsed(arguments, "the arguments of a tool call") if arguments.strip() else {}
    if not isinstance(arguments, dict):
        raise RowError(f"the arguments of a tool call are a {type(arguments).__name__}; expected an object")
    rest = {key: inner[key] for key in ("content_type",) if isinstance(inner.get(key), str)}
    made: dict[str, Any] = {"type": "function", "function": {"name": inner["name"], "arguments": arguments, **rest}}
    return {"id": call["id"], **made} if isinstance(call.get("id"), str) else made


def tools_of(value: Any) -> list[dict[str, Any]] | None:
    """Return a row's tools in OpenAI's form, or None where there are none."""
    value = _parsed(value, "tools") if isinstance(value, str) else value
    value = [value] if isinstance(value, dict) else value
    if value is None or value == []:
        return None
    if not isinstance(value, list):
        raise RowError(f"tools is a {type(value).__name__}; expected a list of functions")
    return [_tool(item) for item in value if item is not None]


def _tool(item: Any) -> dict[str, Any]:
    item = _parsed(item, "tools") if isinstance(item, str) else without_nulls(item)
    inner = item.get("function", item) if isinstance(item, dict) else None
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise RowError(f"a tool without a name: {str(item)[:80]!r}")
    # parquet cannot keep schemata of many shapes, so they are often JSON text
    parameters = inner.get("parameters", inner.get("input_schema"))
    inner = {
        key: value for key, value in inner.items() if key != "input_schema" and (key != "type" or "function" in item)
    }
    if isinstance(parameters, str):
        parameters = _parsed(parameters, "the parameters of a tool") if parameters.strip() else None
    inner = {**inner, "parameters": parameters} if parameters is not None else inner
    return {"type": "function", "function": inner}


def text_of(value: Any, what: str = "content") -> str:
    """Return a text that may be given as parts."""
    text = value if isinstance(value, str) else _content(value)[0] if isinstance(value, list) else None
    if text is None:
        raise RowError(f"{what} is a {type(value).__name__}; expected a text")
    return text


def without_nulls(value: Any) -> Any:
    """Return a value whose objects have no fields of null, at any depth."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def _parsed(text: str, what: str) -> Any:
    value = parse_json(text)
    if isinstance(value, JsonError):
        raise RowError(f"{what}: not JSON ({value.reason})")
    return value


def to_json(value: Any) -> str:
    """Return a value as JSON text; what JSON does not know (dates of parquet) as its text."""
    return json.dumps(value, ensure_ascii=False, default=str)
