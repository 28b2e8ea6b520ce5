"""vLLM's predictions: its engine, on token prefixes, with the whole vocabulary's log-probabilities.

`python -m gptoss_quantize.runtimes.vllm_engine MODEL BACKEND PREFIXES.json OUT.safetensors`; BACKEND is vLLM's
`--moe-backend` ("auto" leaves the choice to vLLM). In a process of its own, since vLLM sets up process-wide state and
keeps the card's memory. Written against vLLM 0.32 and 0.33.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file


def main() -> None:
    """Write "log_probs" [P, V]: what the engine predicts after each prefix."""
    from vllm import LLM, SamplingParams

    model, backend, prefixes, out = sys.argv[1:]
    prompts = json.loads(Path(prefixes).read_text(encoding="utf-8"))
    options = {} if backend == "auto" else {"moe_backend": backend}
    engine = LLM(
        model=model,
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=max(map(len, prompts)) + 1,
        max_logprobs=-1,
        logprobs_mode="raw_logprobs",
        **options,
    )
    asked = SamplingParams(max_tokens=1, temperature=0.0, logprobs=-1, detokenize=False)
    answers = engine.generate([{"prompt_token_ids": ids} for ids in prompts], asked, use_tqdm=False)
    rows = []
    for answer in answers:
        found = answer.outputs[0].logprobs[0]
        row = torch.full((max(found) + 1,), -torch.inf)
        row[list(found)] = torch.tensor([entry.logprob for entry in found.values()])
        rows.append(row)
    save_file({"log_probs": torch.stack(rows)}, out)


if __name__ == "__main__":
    main()
