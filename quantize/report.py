"""quantization_report.json: settings, hashes, tokens and errors per layer and expert, time and memory."""

import platform
from typing import Any

import psutil
import torch

from gptoss_quantize.calibration.text import Tokens
from gptoss_quantize.kernels import native
from gptoss_quantize.machine import peak_rss_mib
from gptoss_quantize.quantize.output import Output


def report_of(tokens: Tokens | None, output: Output, bits: float, seconds: float) -> dict[str, Any]:
    """Return the report of a run with all layers done: `bits` per expert weight, `seconds` of all its processes."""
    layers = output.state["layers"]
    entries = [(i, e) for i, layer in enumerate(layers) for e in layer.get("experts", [])]
    return {
        "schema": 1,
        "settings": output.state["settings"],
        "calibration": None if tokens is None else {**tokens.record(), "shape": list(tokens.ids.shape)},
        "expert_bits_per_weight": bits,
        # what the source makes of a little text; suspect: why it cannot predict any, where it cannot
        "sanity": output.state.get("sanity"),
        "suspect": (output.state.get("sanity") or {}).get("suspect"),
        # of every expert of every layer, as they were read
        "source_is_mxfp4": not any(layer["off_mxfp4_grid"] for layer in layers),
        "off_mxfp4_grid": {str(i): off for i, layer in enumerate(layers) if (off := layer["off_mxfp4_grid"])},
        # of plain rounding, where an expert is MXFP4: |error|^2 / |weights|^2
        "weight_error": _share([layer["weight_error"] for layer in layers if "weight_error" in layer]),
        "mean_output_error": _mean([e["output_error"] for _, e in entries if e["output_error"] is not None]),
        "bytes": output.state["bytes"],
        "crc32": output.state["crc32"],
        "experts_without_tokens": [[i, e["expert"]] for i, e in entries if e["tokens"] == 0],
        "experts_under_50_tokens": [[i, e["expert"]] for i, e in entries if 0 < e["tokens"] < 50],
        "hessians_with_extra_damping": [
            [i, e["expert"], e["extra_damping"]] for i, e in entries if "extra_damping" in e
        ],
        "polish": output.state.get("polish"),
        # what was chosen for --size
        "mixture": output.state.get("mixture"),
        "layers": layers,
        "seconds": round(seconds, 2),
        "seconds_by_phase": {k: round(v, 2) for k, v in output.state["seconds"].items()},
        "peak_rss_mib": peak_of(output),
        # of this process, on a card
        "peak_card_mib": torch.cuda.max_memory_allocated() >> 20 if torch.cuda.is_initialized() else None,
        "memory": output.state["budget"],
        "machine": {
            "cpu_threads": torch.get_num_threads(),
            "torch": torch.__version__,
            # why the compiled loops did not work, where they did not
            "native_kernels": native.problem() or "yes",
            "python": platform.python_version(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        },
    }


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _share(sums: list[list[float]]) -> float | None:
    error, size = sum(a for a, _ in sums), sum(b for _, b in sums)
    return error / size if size else None


def peak_of(output: Output) -> int | None:
    """Return the highest peak of the processes that this run has had."""
    peaks = [peak for peak in (output.state.get("peak_rss_mib"), peak_rss_mib()) if peak is not None]
    return max(peaks, default=None)
