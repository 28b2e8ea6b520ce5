"""Build vLLM's gpt-oss model, load a checkpoint by its own loader, and say where every expert tensor went.

`python -m gptoss_quantize.runtimes.vllm_loader DIR` prints one JSON object: version, backend, placed, wrong. Written
against vLLM 0.32 and 0.33. On a machine where vLLM has no int4 kernel for gpt-oss (every CPU but a few), building the
layer would raise before any weight is read; the kernel is then replaced by vLLM's own emulation, which changes the
parameters in nothing. Only loading is judged here, no product is computed.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from gptoss_quantize.checkpoint import Checkpoint

# values that no checkpoint of ours holds; every floating dtype gets NaN
SENTINEL = {torch.int32: -559038737, torch.uint8: 171, torch.int8: -128}
# parameters that belong to no tensor of any checkpoint of ours: vLLM sets them itself, or never reads them
OWN = (".q_scale", ".k_scale", ".v_scale", "_zero_point", "_weight_shape")
PARTS = ("w13_weight_packed", "w13_weight_scale", "w13_bias", "w2_weight_packed", "w2_weight_scale", "w2_bias")


def build(path: Path) -> tuple[Any, str]:
    """Return (vLLM's model with empty parameters, the name of the backend it chose for int4 experts)."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers.fused_moe.oracle import int_wna16
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_wna16 as method,
    )
    from vllm.model_executor.model_loader.utils import initialize_model

    config = EngineArgs(
        model=str(path), dtype="bfloat16", enforce_eager=True, max_model_len=128
    ).create_engine_config()
    chosen: list[str] = []
    select = method.select_wna16_moe_backend

    def select_or_emulate(*args: Any, **kwargs: Any) -> Any:
        try:
            backend, experts = select(*args, **kwargs)
        except (NotImplementedError, ValueError):
            backend = int_wna16.WNA16MoEBackend.EMULATION
            experts = int_wna16.backend_to_kernel_cls(backend)[0]
            chosen.append("no int4 kernel here, parameters as for emulation")
        else:
            chosen.append(str(backend))
        return backend, experts

    method.select_wna16_moe_backend = select_or_emulate
    with tempfile.TemporaryDirectory() as place, set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{place}/rendezvous", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        ours = type(config.quant_config).__module__.startswith("gptoss_quantize.")
        name = "our plugin" if ours else "none chosen"
        return initialize_model(vllm_config=config), chosen[0] if chosen else name


def unset(parameter: torch.Tensor) -> bool:
    """Return whether a part of a parameter still holds the sentinel; packed words are compared one by one instead."""
    if parameter.is_floating_point():
        return bool(torch.isnan(parameter).any())
    return parameter.dtype == torch.int8 and bool((parameter == SENTINEL[torch.int8]).any())


def main() -> None:
    """Load, compare, print."""
    import vllm

    checkpoint = Checkpoint(Path(sys.argv[1]))
    model, backend = build(checkpoint.path)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.data.fill_(SENTINEL.get(parameter.dtype, float("nan")))
    model.load_weights((name, checkpoint.read(name)) for name in checkpoint.names())
    placed, wrong = 0, []
    for layer in range(checkpoint.config.layers):
        for part in PARTS:
            (name,) = (n for n in parameters if f".layers.{layer}." in n and n.endswith(f".{part}"))
            for expert in range(checkpoint.config.experts):
                stored = checkpoint.read(f"model.layers.{layer}.mlp.experts.{expert}.{part}")
                there = parameters[name][expert]
                # biases and scales are cast to the model's dtype by vLLM
                if there.shape == stored.shape and torch.equal(there, stored.to(there.dtype)):
                    placed += 1
                else:
                    wrong.append(f"layer {layer} expert {expert} {part}")
    left = [
        f"{name} not loaded" for name, parameter in parameters.items() if not name.endswith(OWN) and unset(parameter)
    ]
    result = {"version": vllm.__version__, "backend": backend, "placed": placed, "wrong": wrong + left}
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
