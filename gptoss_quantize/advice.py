"""What is said about MXFP4 after a quantization and by `plan`: from what was found in all experts of all layers.

Three kinds of sources: OpenAI's release itself, a fine-tune whose experts are still the release's (all, or those of
some layers), and everything else, of which nothing is said.
"""

from typing import Any

_WITHOUT = "int4 is for hardware and runtimes without MXFP4 kernels."


def after_quantizing(report: dict[str, Any]) -> str:
    """Return what a report tells of MXFP4, in rich's markup; empty where there is nothing to say."""
    settings, moved = report["settings"], sorted(map(int, report["off_mxfp4_grid"]))
    layers = len(report["layers"])
    if len(moved) == layers:
        return ""
    if settings["format"] == "mxfp4":
        if settings["method"] != "rtn":
            return "" if moved else _exact_by_rounding(settings)
        kept = "every expert" if not moved else f"the experts of all layers but {_listed(moved)}"
        return f"{kept} kept exactly: their weights were MXFP4 values, and still are the same."
    lost = _lost(report)
    if moved:
        return _mixed(moved, layers, lost)
    if report["source_experts"] == "mxfp4" and settings["adapter"] is None:
        return keep_release(lost)
    return (
        "[yellow]Every expert of the source is an MXFP4 value: the fine-tune left them as the release has them, and "
        f"int4 is never lossless for that{lost}.[/yellow] --format mxfp4 --method rtn (or --format auto) "
        f"keeps every expert exactly, at 4.25 bits as well, and needs no calibration; {_WITHOUT}"
    )


def before_quantizing(record: dict[str, Any]) -> str:
    """Return what `plan` tells of MXFP4 after a glance at one expert of every layer; empty for nothing to say."""
    if record["stored_as_mxfp4"]:
        return keep_release()
    moved, layers = record["moved_layers"], record["layers"]
    if len(moved) == layers:
        return ""
    if moved:
        return _mixed(moved, layers, "", "by a glance at one expert of each")
    return (
        "[yellow]By a glance at one expert of each layer, the experts of the source are MXFP4 values, as a fine-tune "
        "leaves them that trained something else; int4 is never lossless for that.[/yellow] --format auto looks at "
        f"all of them, and writes MXFP4 where it keeps every one exactly; {_WITHOUT}"
    )


def keep_release(lost: str = "") -> str:
    """Return what is said of int4 from the release itself, with how much was `lost` where that is known."""
    return (
        f"[yellow]The source is MXFP4, 4.25 bits already, and int4 is never lossless for it{lost}.[/yellow] "
        "Where MXFP4 kernels exist, keep the release; int4 is for hardware and runtimes without them."
    )


def _mixed(moved: list[int], layers: int, lost: str, how: str = "") -> str:
    seen = f" ({how})" if how else ""
    return (
        f"[yellow]The experts of {layers - len(moved)} of {layers} layers are MXFP4 values{seen}; those of "
        f"{_listed(moved)} were moved, by training or a merge. int4 is lossless for none of them{lost}.[/yellow] "
        "--format mxfp4 would round only what was moved (--method rtn keeps the others exactly); no format holds all "
        f"of it exactly at 4 bits. {_WITHOUT}"
    )


def _exact_by_rounding(settings: dict[str, Any]) -> str:
    return (
        "Every expert of the source is an MXFP4 value: --method rtn writes exactly these weights, without "
        f"calibration, where {settings['method']} has nothing to win."
    )


def _lost(report: dict[str, Any]) -> str:
    what, error = "the experts' outputs", report["mean_output_error"]
    if error is None:
        what, error = "the experts' weights", report["weight_error"]
    return "" if error is None else f" ({what} move by {100 * error**0.5:.1f} %, rms)"


def _listed(layers: list[int]) -> str:
    """Return "layer 3" or "layers 0-2, 5" for sorted numbers of layers."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    words = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return f"layer{'s' if len(layers) > 1 else ''} {words}"
