"""From a user's words to token ids that the model has: what it cannot embed is refused, not crashed on."""

import torch

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


def check_prompt(prompt: str) -> None:
    """Raise InputError for a prompt that is no text: what a terminal in another encoding makes of one."""
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise InputError("the prompt is not UTF-8; give it in UTF-8 (--prompt)") from None
