"""vLLM's predictions: its engine, asked once or several times.

`python -m gptoss_quantize.runtimes.vllm_engine ASKED.json FOLDER`; ASKED is a list of questions, each with "model" (a
directory), "prompts" (lists of token ids), "what" and "options" (of vllm.LLM: dtype, moe_backend, ...). The answer of
question i is FOLDER/i.safetensors, or the reason why there is none, FOLDER/i.txt. What is written:

    what = "next"      "log_probs" [P, V]: the whole vocabulary's log-probabilities after each prompt
    what = "prompts"   "log_probs" [tokens]: of each prompt's own tokens but its first, prompt after prompt

In a process of its own, since vLLM sets up process-wide state and keeps the card's memory. Written against vLLM 0.32
and 0.33.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from gptoss_quantize.errors import InputError


def next_tokens(engine: Any, prompts: list[dict[str, list[int]]]) -> torch.Tensor:
    """Return what the engine predicts after each prompt [P, V]."""
    from vllm import SamplingParams

    asked = SamplingParams(max_tokens=1, temperature=0.0, logprobs=-1, detokenize=False)
    rows = []
    for answer in engine.generate(prompts, asked, use_tqdm=False):
        found = answer.outputs[0].logprobs[0]
        row = torch.full((max(found) + 1,), -torch.inf)
        row[list(found)] = torch.tensor([entry.logprob for entry in found.values()])
        rows.append(row)
    return torch.stack(rows)


def own_tokens(engine: Any, prompts: list[dict[str, list[int]]]) -> torch.Tensor:
    """Return the log-probability of every token of every prompt but the first ones."""
    from vllm import SamplingParams

    asked = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
    found = []
    for prompt, answer in zip(prompts, engine.generate(prompts, asked, use_tqdm=False), strict=True):
        tokens = zip(prompt["prompt_token_ids"], answer.prompt_logprobs, strict=True)
        found += [entry[token].logprob for token, entry in list(tokens)[1:]]
    return torch.tensor(found)


# refusals, of ours and of vLLM, and its worker processes that ended
FAILURES = (ValueError, KeyError, TypeError, AssertionError, NotImplementedError, RuntimeError, OSError)
WHAT = {"next": next_tokens, "prompts": own_tokens}


def reason(error: BaseException) -> str:
    """Return what an exception says: the refusal of ours that it wraps, if there is one."""
    text = str(error)
    return text if isinstance(error, InputError) else f"{type(error).__name__}: {text}"


def main() -> None:
    """Ask each question, write each answer."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    questions = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    for number, asked in enumerate(questions):
        out = Path(sys.argv[2], str(number))
        prompts = [{"prompt_token_ids": ids} for ids in asked["prompts"]]
        options = {"enforce_eager": True, "max_model_len": max(map(len, asked["prompts"])) + 1} | asked["options"]
        try:
            engine = LLM(model=asked["model"], max_logprobs=-1, logprobs_mode="raw_logprobs", **options)
            save_file({"log_probs": WHAT[asked["what"]](engine, prompts)}, out.with_suffix(".safetensors"))
        except FAILURES as error:
            out.with_suffix(".txt").write_text(reason(error), encoding="utf-8")
        engine = None
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main()
