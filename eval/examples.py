"""A checkpoint loaded whole, asked, and its greedy answers: of `generate`, and the examples of a comparison."""

import time
from typing import Any

import psutil
import torch
from transformers import PreTrainedTokenizerBase

from gptoss_quantize.calibration.text import render_chat
from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.eval.whole import whole_model

LARGEST_SHARE = 0.5
PROMPTS = (
    "What is the capital of France, and what is it known for?",
    "Write two sentences about the sea.",
    "Name three animals that can fly.",
)


def load_model(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """Return the transformers model of a checkpoint, its adapter merged; our int4 experts stay packed in memory."""
    return whole_model(checkpoint, dtype)


def too_large(checkpoint: Checkpoint) -> str | None:
    """Return why a checkpoint cannot be loaded whole for examples, None where it fits half of the free memory.

    Everything else is streamed; only generation needs a whole model. Ours stay packed, others become bfloat16.
    """
    shapes = checkpoint.shapes().values()
    parameters = sum(int(torch.Size(shape).numel()) for shape in shapes)
    stored = sum(path.stat().st_size for path in checkpoint.files())
    needed = stored if checkpoint.layout.packed else 2 * parameters
    free = psutil.virtual_memory().available
    if needed <= LARGEST_SHARE * free:
        return None
    return f"needs {needed / 2**30:.1f} GiB whole, {free / 2**30:.1f} GiB are free"


def ask(prompt: str, tokenizer: PreTrainedTokenizerBase, where: str, *, raw: bool) -> Any:
    """Return the inputs of a prompt, [1, S] each: a user's turn in the chat template, or plain text when `raw`.

    The template sees the fixed date of `calibration.text`, so the same prompt is the same tokens every day.
    """
    if raw:
        return tokenizer(prompt, return_tensors="pt")
    text = render_chat([{"role": "user", "content": prompt}], tokenizer, where, answer_next=True)
    return tokenizer(text, return_tensors="pt", add_special_tokens=False)


@torch.inference_mode()
def continuation(model: Any, inputs: Any, new_tokens: int) -> torch.Tensor:
    """Return the ids [N] that a model adds greedily."""
    ids: torch.Tensor = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=new_tokens,
        do_sample=False,
    )
    return ids[0, inputs["input_ids"].shape[1] :]


def answer(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: tuple[str, ...], new_tokens: int
) -> list[dict[str, Any]]:
    """Return {"prompt", "answer", "tokens", "seconds"} per prompt, in the chat template where there is one."""
    out = []
    for prompt in prompts:
        inputs = ask(prompt, tokenizer, "an example", raw=tokenizer.chat_template is None)
        started = time.perf_counter()
        ids = continuation(model, inputs, new_tokens)
        out.append(
            {
                "prompt": prompt,
                "answer": str(tokenizer.decode(ids, skip_special_tokens=True)),
                "tokens": len(ids),
                "seconds": round(time.perf_counter() - started, 3),
            }
        )
    return out
