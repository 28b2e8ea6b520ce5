#!/usr/bin/env bash
# The honest timing run: GPTQModel, then llm-compressor, both GPTQ on the experts alone, same model, same tokens, same
# machine, two threads, nothing else running. Quantization only is timed (see peer_common.py).
#   benchmarks/peers/side_by_side.sh MODEL_DIR TOKENS.npy OUT_DIR
# Environments: ENV_ROOT (default /work/env), made by setup.sh. Group size: GROUP_SIZE (default 64).
set -euo pipefail

model=${1:?usage: side_by_side.sh MODEL_DIR TOKENS.npy OUT_DIR}
tokens=${2:?usage: side_by_side.sh MODEL_DIR TOKENS.npy OUT_DIR}
out=${3:?usage: side_by_side.sh MODEL_DIR TOKENS.npy OUT_DIR}
env_root=${ENV_ROOT:-/work/env}
here=$(cd "$(dirname "$0")" && pwd)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}

read -r load _ < /proc/loadavg
if awk -v load="$load" 'BEGIN { exit !(load > 0.7) }' && [ "${FORCE:-0}" != 1 ]; then
  echo "load average is $load: something else is running, so the times would not be comparable (FORCE=1 to go on)" >&2
  exit 1
fi
if [ ! -d "${XDG_CACHE_HOME:-$HOME/.cache}/gptqmodel/torch_extensions/pack_block_cpu" ]; then
  echo "GPTQModel's packing kernel is not compiled yet and would be timed; run setup.sh first" >&2
  exit 1
fi

mkdir -p "$out"
for tool in gptqmodel llmcompressor; do
  echo "== $tool, OMP_NUM_THREADS=$OMP_NUM_THREADS"
  "$env_root/$tool/bin/python" "$here/run_$tool.py" "$model" "$tokens" "$out/$tool" \
    --group-size "${GROUP_SIZE:-64}" --method gptq
done

"$env_root/gptqmodel/bin/python" - "$out" <<'PYTHON'
import json
import sys
from pathlib import Path

print("| tool | whole process s | quantize s | CPU s | peak RSS MiB | bits/weight (stored) |\n|---|---|---|---|---|---|")
for tool in ("gptqmodel", "llmcompressor"):
    b = json.loads(Path(sys.argv[1], tool, "bench.json").read_text())
    row = [f"{b['tool']} {b['version']} {b['method']}", b["wall_s"], b["wall_quantize_s"], b["cpu_s"], b["peak_rss_mib"]]
    print("| " + " | ".join(str(x) for x in row) + f" | {b['bits_per_weight']:.4f} ({b['bits_per_weight_stored']:.4f}) |")
PYTHON
