"""The one date of chat templates, and what a template asks of messages."""

import datetime

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gptoss_quantize.calibration.chat import DATE, dated_template, left_out, render, render_chat
from gptoss_quantize.calibration.messages import RowError
from gptoss_quantize.calibration.rows import Conversation
from gptoss_quantize.errors import InputError

USER, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", "thinking": "T"}
LINES = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def tokenizer(template: str | dict | None) -> PreTrainedTokenizerFast:
    """Return a tokenizer of single bytes with a template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken("<e>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<e>", chat_template=template)


@pytest.mark.parametrize(
    "code", ["%Y-%m-%d", "%d %b %Y", "%B %d, %Y", "%A, %d.%m.%y", "%a %e", "%-d/%-m", "%j", "%F", "%H:%M:%S", "%I %p"]
)
def test_templates_see_one_date_in_whatever_form_they_ask_for_it(code: str) -> None:
    expected = datetime.datetime.fromisoformat(DATE).strftime(code)
    template = "{{ strftime_now('" + code + "') }}|" + LINES
    assert render_chat([USER], tokenizer(template), "here") == f"{expected}|user: Q\n"


def test_the_template_to_hand_on_has_the_date_and_is_else_the_tokenizers_own() -> None:
    assert dated_template(tokenizer(LINES), "here") == LINES
    made = tokenizer("{{ strftime_now('%Y') }}" + LINES)
    direct = made.apply_chat_template([USER], chat_template=dated_template(made, "here"), tokenize=False)
    assert direct == render_chat([USER], made, "here") == f"{DATE[:4]}user: Q\n"


def test_a_tokenizer_whose_template_is_not_to_be_told_is_refused() -> None:
    with pytest.raises(InputError, match=r"here: .*no chat template.*chat_template.jinja"):
        dated_template(tokenizer(None), "here")
    with pytest.raises(InputError, match="does not say which chat template"):
        dated_template(tokenizer({"one": LINES, "two": LINES}), "here")
    assert dated_template(tokenizer({"default": LINES, "two": "x"}), "here") == LINES
    with pytest.raises(InputError, match="the chat template is not valid"):
        render_chat([USER], tokenizer("{% for %}"), "here")


def test_the_opening_of_an_answer_is_there_where_it_is_asked_for() -> None:
    made = tokenizer(LINES + "{% if add_generation_prompt %}assistant: {% endif %}")
    assert render_chat([USER], made, "here", answer_next=True) == "user: Q\nassistant: "


def test_thinking_goes_under_the_name_that_a_template_knows() -> None:
    for name in ("thinking", "reasoning_content", "reasoning"):
        template = "{% for m in messages %}[{{ m." + name + " }}]{{ m.content }}{% endfor %}"
        assert render_chat([USER, ANSWER], tokenizer(template), "here") == "[]Q[T]A"


def test_messages_of_system_and_developer_are_joined_only_where_one_would_be_lost() -> None:
    messages = [{"role": "system", "content": "S"}, {"role": "developer", "content": "D"}, USER]
    assert render_chat(messages, tokenizer(LINES), "here") == "system: S\ndeveloper: D\nuser: Q\n"
    first = "{{ messages[0].content }}{% for m in messages[1:] if m.role == 'user' %}{{ m.content }}{% endfor %}"
    assert render_chat(messages, tokenizer(first), "here") == "S\n\nDQ"
    strict = "{% for m in messages %}{% if m.role == 'developer' %}{{ raise_exception('no') }}{% endif %}{% endfor %}"
    assert render_chat(messages, tokenizer(strict + LINES), "here") == "system: S\n\nD\nuser: Q\n"


def test_what_a_template_passes_over_is_found_whatever_it_says() -> None:
    late = Conversation([USER, {"role": "system", "content": "Q"}, {"role": "critic", "content": "u"}])
    assert left_out(late, tokenizer(LINES), "here") == []
    users = "{% for m in messages if m.role == 'user' %}user {{ m.content }}{% endfor %}"
    assert left_out(late, tokenizer(users), "here") == [1, 2]


def test_calls_stay_together_where_a_template_writes_them_all() -> None:
    calls = [{"function": {"name": name, "arguments": {}}} for name in "fg"]
    messages = [USER, {"role": "assistant", "tool_calls": calls}, {"role": "tool", "content": "R"}]
    every = "{% for m in messages %}<{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}>{% endfor %}"
    assert render_chat(messages, tokenizer(every), "here") == "<><fg><>"
    first = "{% for m in messages %}<{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}{% endif %}>{% endfor %}"
    assert render_chat(messages, tokenizer(first), "here") == "<><f><><g>"


def test_variables_of_a_row_reach_the_template_and_cannot_take_its_place() -> None:
    made = tokenizer("{{ effort }}" + LINES)
    extras = {"effort": "high", "chat_template": "mine", "tokenize": True, "messages": []}
    assert render(Conversation([USER], extras=extras), made, "here") == "highuser: Q\n"


def test_a_refusal_says_where_and_why() -> None:
    made = tokenizer("{{ raise_exception('never') }}")
    with pytest.raises(RowError, match=r"refuses the conversation \(never\)"):
        render(Conversation([USER]), made, "here")
    with pytest.raises(InputError, match=r"here: the chat template refuses .*never.*correct or delete"):
        render_chat([USER], made, "here")
