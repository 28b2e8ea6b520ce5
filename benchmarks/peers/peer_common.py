"""What every peer run shares: the command line, the measured child process, and the dequantized export.

A peer is measured the way a user meets it: a fresh Python process that imports the tool, loads the model,
quantizes and saves in the tool's own format. Its wall clock is that whole process and its memory is the kernel's
own high-water mark for it (`wait4`), so neither the harness nor the export below is billed to the tool. Afterwards,
and unmeasured, the packed file is turned back into an ordinary gpt-oss directory with float32 experts, so that one
evaluator can score every tool without any of their loaders.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from peer_weights import ExpertLinear, LayerCheck, check_layer, fuse_gate_up
from safetensors import safe_open
from safetensors.torch import save_file

INDEX_NAME = "model.safetensors.index.json"
EMBEDDING_NAME = "model.embed_tokens.weight"
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Job:
    """One measured run, as given on the command line."""

    model: Path
    tokens: Path
    out: Path
    group_size: int
    method: str
    keep_packed: bool
    reuse_packed: bool

    @property
    def packed(self) -> Path:
        """Where the tool writes its own format; beside the output, so that OUT_DIR holds one model only."""
        return self.out.with_name(self.out.name + ".packed")


def parse_job(description: str, methods: tuple[str, ...], group_sizes: tuple[int, ...]) -> Job:
    """The command line all run_*.py share; the first method and group size are the defaults."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("model", type=Path, help="gpt-oss directory with bf16 experts")
    parser.add_argument("tokens", type=Path, help="int64 array [N, seq_len] of calibration token ids (.npy)")
    parser.add_argument("out", type=Path, help="output directory (dequantized model and bench.json)")
    parser.add_argument("--group-size", type=int, choices=group_sizes, default=group_sizes[0])
    parser.add_argument("--method", choices=methods, default=methods[0])
    parser.add_argument("--keep-packed", action="store_true", help="keep the tool's own files in OUT_DIR.packed")
    parser.add_argument(
        "--reuse-packed", action="store_true", help="read OUT_DIR.packed of an earlier run instead of quantizing"
    )
    args = parser.parse_args()
    if not (args.model / "config.json").is_file():
        parser.error(f"{args.model} holds no config.json")
    tokens = np.load(args.tokens)
    if tokens.dtype != np.int64 or tokens.ndim != 2:
        parser.error(f"{args.tokens} is {tokens.dtype} {tokens.shape}, expected int64 [N, seq_len]")
    if args.out.exists():
        parser.error(f"{args.out} exists; remove it or choose another name")
    paths = (args.model.resolve(), args.tokens.resolve(), args.out.resolve())
    return Job(*paths, args.group_size, args.method, args.keep_packed, args.reuse_packed)


def measure(job: Job, worker: str, extra_env: dict[str, str]) -> dict[str, object]:
    """Run the worker script in a process of its own and return what it cost."""
    cost_path = job.packed / "cost.json"
    if job.reuse_packed:
        return json.loads(cost_path.read_text())
    shutil.rmtree(job.packed, ignore_errors=True)
    job.packed.mkdir(parents=True)
    log_path = job.packed / "worker.log"
    script = Path(__file__).resolve().parent / worker
    command = [sys.executable, str(script), str(job.model), str(job.tokens), str(job.packed)]
    command += [str(job.group_size), job.method]
    environment = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", **extra_env, **os.environ}
    load_before = os.getloadavg()[0]
    start = time.perf_counter()
    with log_path.open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
    wall_s = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        tail = log_path.read_text(errors="replace")[-4000:]
        raise SystemExit(f"{tail}\n{worker} ended with exit code {process.returncode}; whole log in {log_path}")
    worker_report = json.loads((job.packed / "worker.json").read_text())
    cost = {
        "wall_s": round(wall_s, 2),
        **worker_report,
        # ru_maxrss of a child covers the child and every process it waited for, the largest of them
        "peak_rss_mib": round(usage.ru_maxrss / 1024, 1),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 2),
        "omp_num_threads": environment.get("OMP_NUM_THREADS"),
        "nice": os.nice(0),
        "load_before": round(load_before, 2),
    }
    cost_path.write_text(json.dumps(cost))
    return cost


def describe(job: Job, tool: str, package: str | None) -> dict[str, object]:
    """The settings half of bench.json."""
    tokens = np.load(job.tokens)
    return {
        "tool": tool,
        "version": metadata.version(package) if package else None,
        "torch": torch.__version__,
        "method": job.method,
        "group_size": job.group_size,
        "model": str(job.model),
        "calibration_shape": list(tokens.shape),
        "calibration_sha256": hashlib.sha256(tokens.tobytes()).hexdigest(),
    }


class SourceModel:
    """Tensor by tensor access to a safetensors directory, sharded or not."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        # kept open: a peer's file lists thousands of tensors, and each opening reads that list again
        self.handle_of: dict[str, safe_open] = {}
        for path in sorted(directory.glob("*.safetensors")):
            handle = safe_open(path, "pt")
            self.handle_of.update(dict.fromkeys(handle.keys(), handle))
        if not self.handle_of:
            raise SystemExit(f"{directory} holds no safetensors file")

    def __contains__(self, name: str) -> bool:
        return name in self.handle_of

    def names(self) -> list[str]:
        """All tensor names."""
        return list(self.handle_of)

    def get(self, name: str) -> torch.Tensor:
        """One tensor, read now."""
        return self.handle_of[name].get_tensor(name)


LinearReader = Callable[[int, int, str], ExpertLinear]


@dataclass(frozen=True)
class Peer:
    """How to read back what a tool wrote."""

    read: LinearReader
    # True where "gate_proj" and "up_proj" are the first and second half of the interleaved rows (GPTQModel)
    halves: bool
    # the tool's own copy of everything else, or None to take it from the source
    others: SourceModel | None
    # True where the tool moves scales between tensors (AWQ): norms and biases then differ on purpose
    rescales: bool


def export_dequantized(job: Job, peer: Peer) -> dict[str, object]:
    """Write OUT_DIR; return exact bits and errors against the original, or stop at the first wrong tensor."""
    source = SourceModel(job.model)
    config = json.loads((job.model / "config.json").read_text())
    n_layers, n_experts = config["num_hidden_layers"], config["num_local_experts"]
    job.out.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    n_files = n_layers + 1
    checks: list[LayerCheck] = []
    stored_bits = payload_bits = weights = 0
    for layer in range(n_layers):
        prefix = f"model.layers.{layer}.mlp.experts."
        linears = {p: [peer.read(layer, expert, p) for expert in range(n_experts)] for p in PROJECTIONS}
        tensors = _fuse_layer(prefix, linears, peer.halves)
        checks.append(check_layer(layer, tensors, prefix, source.get, peer.rescales))
        for linear in (entry for column in linears.values() for entry in column):
            stored_bits += linear.stored_bits
            payload_bits += linear.payload_bits
            weights += linear.weight.numel()
        _save(job.out, tensors, layer, n_files, weight_map)
    others, changed = _other_tensors(source, peer)
    _save(job.out, others, n_layers, n_files, weight_map)
    (job.out / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}, indent=1))
    for path in job.model.iterdir():
        if path.is_file() and path.suffix in {".json", ".jinja", ".txt", ".model"} and path.name != INDEX_NAME:
            shutil.copy2(path, job.out / path.name)
    return {
        # everything the file holds for the expert matrices, zero points and index tables included
        "bits_per_weight_stored": stored_bits / weights,
        # what a symmetric decoder needs: codes and scales
        "bits_per_weight": payload_bits / weights,
        "quantized_weights": weights,
        "weight_relative_error_mean": round(float(np.mean([c.mean for c in checks])), 5),
        "weight_relative_error_max": round(float(max(c.max for c in checks)), 5),
        "changed_other_tensors": changed,
    }


def _fuse_layer(prefix: str, linears: dict[str, list[ExpertLinear]], halves: bool) -> dict[str, torch.Tensor]:
    """Per-expert matrices [out, in] back into transformers' fused, transposed, interleaved tensors."""
    gates, ups, downs = (linears[p] for p in PROJECTIONS)
    pairs = list(zip(gates, ups, strict=True))
    gate_up = [fuse_gate_up(gate.weight, up.weight, halves).T for gate, up in pairs]
    gate_up_bias = [fuse_gate_up(gate.bias, up.bias, halves) for gate, up in pairs]
    return {
        f"{prefix}gate_up_proj": torch.stack(gate_up).contiguous(),
        f"{prefix}gate_up_proj_bias": torch.stack(gate_up_bias).contiguous(),
        f"{prefix}down_proj": torch.stack([d.weight.T for d in downs]).contiguous(),
        f"{prefix}down_proj_bias": torch.stack([d.bias for d in downs]).contiguous(),
    }


def _other_tensors(source: SourceModel, peer: Peer) -> tuple[dict[str, torch.Tensor], list[str]]:
    """All tensors but the experts, as the tool left them, and the names of those it changed."""
    tensors: dict[str, torch.Tensor] = {}
    changed = []
    for name in source.names():
        if ".mlp.experts." in name:
            continue
        original = source.get(name)
        tensors[name] = original
        if peer.others is None:
            continue
        if name not in peer.others:
            if name == "lm_head.weight" and torch.equal(original, peer.others.get(EMBEDDING_NAME)):
                # llm-compressor saves one table where both hold the same values
                continue
            raise SystemExit(f"{name} is missing from the files the tool wrote in {peer.others.directory}")
        written = peer.others.get(name)
        if not torch.equal(written.float(), original.float()):
            changed.append(name)
            tensors[name] = written
    if changed and not peer.rescales:
        raise SystemExit(f"the tool changed tensors outside the experts: {changed[:4]} ({len(changed)} in all)")
    return tensors, changed


def _save(out: Path, tensors: dict[str, torch.Tensor], index: int, n_files: int, weight_map: dict[str, str]) -> None:
    name = f"model-{index + 1:05d}-of-{n_files:05d}.safetensors"
    save_file(tensors, out / name, metadata={"format": "pt"})
    weight_map.update(dict.fromkeys(tensors, name))


def finish(job: Job, report: dict[str, object]) -> None:
    """Write bench.json, keep the worker's log, drop the packed files unless asked to keep them."""
    (job.out / "bench.json").write_text(json.dumps(report, indent=1) + "\n")
    shutil.copy2(job.packed / "worker.log", job.out / "worker.log")
    if not job.keep_packed:
        shutil.rmtree(job.packed)
    print(json.dumps(report, indent=1))
