"""From a user's words to token ids that the model has: what it cannot embed is refused, not crashed on."""

from typing import Any

import torch
from jinja2 import TemplateError

from gptoss_quantize.errors import InputError


def check_ids(ids: torch.Tensor, vocab: int, where: str) -> None:
    """Raise InputError for token ids beyond a vocabulary: a tokenizer that was given more words than the model."""
    highest = int(ids.max()) if ids.numel() else 0
    if highest >= vocab:
        raise InputError(
            f"{where} has token id {highest}, the model's vocabulary ends at {vocab - 1}; tokenizer and model do not "
            "belong together: give the tokenizer that the model was trained with, or resize its embedding to the "
            "tokenizer (resize_token_embeddings) before training"
        )


def encode_prompt(tokenizer: Any, prompt: str, *, raw: bool, vocab: int, where: str) -> Any:
    """Return {"input_ids", "attention_mask"} [1, S] of a prompt, as a user's message unless `raw`."""
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise InputError("the prompt is not UTF-8; give it in UTF-8 (--prompt)") from None
    if raw:
        inputs = tokenizer(prompt, return_tensors="pt")
    else:
        try:
            inputs = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}],
                add_generation_prompt=True,
                return_tensors="pt",
                return_dict=True,
            )
        except TemplateError as error:
            raise InputError(
                f"{where}: its chat template does not render ({error}); correct chat_template.jinja, or continue the "
                "prompt as plain text with --raw"
            ) from None
    check_ids(inputs["input_ids"], vocab, f"{where}: the prompt")
    return inputs
