"""Run one quantization by several gloo ranks, forked from this process; used by test_ranks.py.

Usage: ranks_driver.py MODEL TOKENS OUT SCENARIOS, the last as JSON: a list of {"ranks", "method", "dest", "resume",
"polish", "lose", "apart"}, where "lose" is [rank, layer]: that rank kills itself after that layer,
and "apart" a rank that sees another OUT. Prints all ranks' messages.
"""

import json
import os
import signal
import socket
import sys
from dataclasses import replace
from pathlib import Path

import torch

from gptoss_quantize.calibration.text import Tokens
from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.errors import InputError
from gptoss_quantize.quantize.job import Job
from gptoss_quantize.quantize.ranks import joined
from gptoss_quantize.quantize.recipes import RECIPES
from gptoss_quantize.quantize.run import quantize_checkpoint


def work(rank: int, port: int, scenario: dict, model: str, ids: list, out: Path) -> str:
    """Be one rank; return "done" or the message of what was refused."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(scenario["ranks"]), "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    tokens = Tokens(ids=torch.tensor(ids), sha256="driver", source="driver", documents=1, separator=None)
    recipe = RECIPES[scenario["method"]]
    job = Job(
        # a folder of its own, as on a machine that does not share the file system
        dest=out / ("elsewhere" if scenario.get("apart") == rank else ".") / scenario["dest"],
        format=scenario.get("format", "int4"),
        group_size=32,
        method=scenario["method"],
        recipe=recipe,
        device="cpu",
        dtype=getattr(torch, scenario.get("dtype", "float32")),
        resume=scenario.get("resume", False),
        polish=scenario.get("polish", 0),
        size=scenario.get("size"),
        polish_text=replace(tokens, ids=tokens.ids.flip(1)) if "polish" in scenario else None,
        # only one rank may disagree
        dense="int8" if scenario.get("other") == rank else "source",
    )

    def on_layer(index: int) -> None:
        if scenario.get("lose") == [rank, index]:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        with joined("cpu") as ranks:
            quantize_checkpoint(
                Checkpoint(Path(model)), job, tokens if recipe.calibrated else None, on_layer, ranks=ranks
            )
    except InputError as error:
        return str(error)
    return "done"


def main() -> None:
    """Run the scenarios one after another."""
    model, ids, out, scenarios = sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3]), json.loads(sys.argv[4])
    results = []
    for scenario in scenarios:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        children = []
        for rank in range(scenario["ranks"]):
            reader, writer = os.pipe()
            pid = os.fork()
            if not pid:
                try:
                    os.write(writer, work(rank, port, scenario, model, ids, out).encode()[:60000])
                finally:
                    os._exit(0)
            os.close(writer)
            children.append((pid, reader))
        messages = []
        for pid, reader in children:
            with os.fdopen(reader, "rb") as pipe:
                messages.append(pipe.read().decode())
            os.waitpid(pid, 0)
        results.append(messages)
    sys.stdout.write(json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
