"""The command line with a model that says what it is told, at its pace: run by test_generate.py and test_chat.py.

Usage: scripted_model.py SCRIPT.json ARGUMENTS...

The model computes as always, keys and values included; only the logits of the last position are replaced, so that
the next token of the script is the likeliest. {"answers": [[id, ...], ...], "pause": seconds per token}
"""

import functools
import json
import signal
import sys
import time
from pathlib import Path

from transformers import GptOssForCausalLM

# a parent that runs in the background leaves SIGINT ignored
signal.signal(signal.SIGINT, signal.default_int_handler)
script = json.loads(Path(sys.argv.pop(1)).read_text())
state = {"answer": -1, "at": 0}
forward = GptOssForCausalLM.forward


@functools.wraps(forward)
def scripted(self, *args, **kwargs):
    out = forward(self, *args, **kwargs)
    asked = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
    if asked.shape[1] > 1:
        state.update(answer=state["answer"] + 1, at=0)
    answer = script["answers"][state["answer"]]
    token = answer[state["at"]] if state["at"] < len(answer) else self.config.eos_token_id
    out.logits[:, -1] = -100.0
    out.logits[:, -1, token] = 100.0
    state["at"] += 1
    time.sleep(script["pause"])
    return out


GptOssForCausalLM.forward = scripted

from gptoss_quantize.cli import main  # noqa: E402

main()
