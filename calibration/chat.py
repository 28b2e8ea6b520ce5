"""Conversations as the model sees them: the tokenizer's chat template, on one date.

The rule about the date: Harmony's system message (and other templates) state the current date, which would give
other tokens every day. Wherever this project renders a chat template, the date is `DATE`, the day gpt-oss came out:
in calibration, evaluation, tasks, `generate`, `verify` and the demo. Nothing reads the clock; whoever wants another
date renders the text and gives it as text.

`render` writes messages of the one form of `calibration.messages`, after changes that a template asks for:

* thinking goes under the name that the template knows (`thinking`; `reasoning_content` in Qwen's and others);
* a template that writes only the first of several calls (Harmony: `tool_calls[0]`) gets a message per call, each
  followed by its result; one that refuses content beside thinking in a call gets both as thinking;
* several messages of system and developer at the beginning are joined where it would lose one (as Harmony does).

Messages that a template does not write (Harmony: a system message later on) are counted by the caller.
"""

import re
from dataclasses import replace
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from gptoss_quantize.calibration.messages import RowError, messages_of
from gptoss_quantize.calibration.rows import Conversation
from gptoss_quantize.errors import InputError

DATE = "2025-08-05"
_PARTS = {
    "%Y": "2025", "%m": "08", "%d": "05", "%y": "25", "%B": "August", "%b": "Aug", "%A": "Tuesday", "%a": "Tue",
    "%e": " 5", "%-d": "5", "%-m": "8", "%j": "217", "%F": DATE, "%H": "00", "%I": "12", "%M": "00", "%S": "00",
    "%p": "AM",
}  # fmt: skip
# a macro in front hides the function of this name that transformers gives to templates; a function passed as
# a variable would not arrive, since variables are reduced to plain data
FIXED_DATE = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f"|replace({code!r}, {value!r})" for code, value in _PARTS.items())
    + " }}{% endmacro %}"
)
LEADING = ("system", "developer")
EVERYWHERE = ("user", "assistant", "tool")


def dated_template(tokenizer: PreTrainedTokenizerBase, where: str) -> str:
    """Return the tokenizer's chat template, its date fixed; InputError where it has none.

    For `apply_chat_template(chat_template=...)`: use this wherever `render_chat` is not enough.
    """
    if tokenizer.chat_template is None:
        raise InputError(
            f"{where}: holds a conversation, and the tokenizer has no chat template to render it with; "
            "put the model's chat_template.jinja beside tokenizer.json, or join the contents without one "
            "(--no-chat-template)"
        )
    try:
        template = str(tokenizer.get_chat_template())
    except ValueError as error:  # several templates, none of them called default
        raise InputError(f"{where}: the tokenizer does not say which chat template to take ({error})") from error
    return FIXED_DATE + template if "strftime_now" in template else template


def render_chat(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, where: str, *, answer_next: bool = False
) -> str:
    """Return messages in the tokenizer's chat template on the fixed date, with the opening of an answer if asked for.

    The text holds the special tokens: tokenize it with add_special_tokens=False.
    """
    try:
        return render(Conversation(messages_of(messages)), tokenizer, where, answer_next=answer_next)
    except RowError as error:
        raise InputError(f"{where}: {error}; correct or delete the record") from error


def render(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, where: str, *, answer_next: bool = False
) -> str:
    """Return a conversation in the chat template; RowError where the template refuses it."""
    template = dated_template(tokenizer, where)
    messages = _suited(conversation.messages, template)

    def written(messages: list[dict[str, Any]]) -> str:
        return _written(conversation, messages, tokenizer, template, answer_next)

    leading = next((i for i, m in enumerate(messages) if m["role"] not in LEADING), len(messages))
    if leading < 2:
        return written(messages)
    try:
        # some templates raise for the second one, others leave it out
        text = written([{**m, "content": _probe(i)} for i, m in enumerate(messages[:leading])] + messages[leading:])
        joined = any(_probe(i) not in text for i in range(leading))
    except RowError:
        joined = True
    if not joined:
        return written(messages)
    content = "\n\n".join(m.get("content", "") for m in messages[:leading])
    return written([{"role": messages[0]["role"], "content": content}, *messages[leading:]])


def _probe(i: int) -> str:
    return f"what-does-the-template-write-of-{i}-?"


def left_out(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, where: str) -> list[int]:
    """Return which messages a rendering does not hold the content of, of those that templates are known to pass over.

    These are messages of system and developer that are not the first, and of roles that are not known everywhere.
    """
    asked = [
        i
        for i, m in enumerate(conversation.messages)
        if m["role"] not in EVERYWHERE and (i or m["role"] not in LEADING)
    ]
    if not asked:
        return []
    probes = [{**m, "content": _probe(i)} if i in asked else m for i, m in enumerate(conversation.messages)]
    text = render(replace(conversation, messages=probes), tokenizer, where)
    return [i for i in asked if _probe(i) not in text]


def joined_contents(conversation: Conversation) -> str:
    """Return what was thought and said, without any template."""
    return "\n\n".join(m[key] for m in conversation.messages for key in ("thinking", "content") if m.get(key))


def _written(
    conversation: Conversation,
    messages: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    answer_next: bool,
) -> str:
    given = ("tools", "chat_template", "tokenize", "add_generation_prompt", "continue_final_message", "messages")
    extras = {key: value for key, value in conversation.extras.items() if key not in (*given, "conversation")}
    try:
        return str(
            tokenizer.apply_chat_template(
                messages,
                tools=conversation.tools,  # type: ignore[arg-type]
                chat_template=template,
                tokenize=False,
                add_generation_prompt=answer_next,
                **extras,
            )
        )
    except jinja2.TemplateSyntaxError as error:
        raise InputError(
            f"the chat template is not valid ({error}); take chat_template.jinja from the model"
        ) from error
    except (jinja2.TemplateError, TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
        raise RowError(
            f"the chat template refuses the conversation ({error}); expected roles and fields that the template "
            "knows; correct or delete the record"
        ) from error


def _suited(messages: list[dict[str, Any]], template: str) -> list[dict[str, Any]]:
    """Return messages with the changes that a template asks for, as far as its text tells."""
    if "tool_calls[0]" in template or "tool_calls | first" in template or "tool_calls|first" in template:
        messages = _call_by_call(messages)
    if "oth content and thinking" in template:
        messages = [_one_thought(m) if "tool_calls" in m else m for m in messages]
    names = [name for name in ("thinking", "reasoning_content", "reasoning") if re.search(rf"\b{name}\b", template)]
    if names and "thinking" not in names:
        messages = [{names[0] if key == "thinking" else key: value for key, value in m.items()} for m in messages]
    return messages


def _one_thought(message: dict[str, Any]) -> dict[str, Any]:
    if not (message.get("content") and message.get("thinking")):
        return message
    thought = f"{message['thinking']}\n\n{message['content']}"
    return {key: value for key, value in message.items() if key != "content"} | {"thinking": thought}


def _call_by_call(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a message per call, each followed by its result: the one of its id, else the next one without a call."""
    made: list[dict[str, Any]] = []
    at = 0
    while at < len(messages):
        message = messages[at]
        at += 1
        calls = message.get("tool_calls", [])
        if len(calls) < 2:
            made.append(message)
            continue
        results = []
        while at < len(messages) and messages[at]["role"] == "tool":
            results.append(messages[at])
            at += 1
        ids = [call["id"] for call in calls if "id" in call]
        for k, call in enumerate(calls):
            first = message if k == 0 else {"role": "assistant"}
            made.append({**first, "tool_calls": [call]})
            own = next((r for r in results if "id" in call and r.get("tool_call_id") == call["id"]), None)
            own = own or next((r for r in results if r.get("tool_call_id") not in ids), None)
            if own is not None:
                results.remove(own)
                made.append(own)
        made.extend(results)
    return made
