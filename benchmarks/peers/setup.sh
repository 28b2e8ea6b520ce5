#!/usr/bin/env bash
# One virtual environment per peer (their pins contradict each other), and llama.cpp's tools.
#   benchmarks/peers/setup.sh ENV_ROOT PEERS_DIR [gptqmodel|llmcompressor|autoround|llamacpp ...]
# Measured with ENV_ROOT=/work/env and PEERS_DIR=/work/peers. About 1.5 GB and a minute each; llama.cpp builds for
# about 15 minutes on one core.
set -euo pipefail

env_root=${1:?usage: setup.sh ENV_ROOT PEERS_DIR [TOOL ...]}
peers=${2:?usage: setup.sh ENV_ROOT PEERS_DIR [TOOL ...]}
shift 2
tools=("$@")
if [ ${#tools[@]} -eq 0 ]; then tools=(gptqmodel llmcompressor autoround llamacpp); fi
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}

make_environment() {
  "$python" -m venv "$env_root/$1"
  # first and alone, so that nothing later can pull a CUDA build of several gigabytes
  "$env_root/$1/bin/python" -m pip install torch==2.13.0
  # the files pin everything; resolving again would trip over GPTQModel's torch>=2.14.1
  "$env_root/$1/bin/python" -m pip install --no-deps -r "$here/requirements-$1.txt"
}

build_llama_cpp() {
  mkdir -p "$peers/src"
  "$python" -m pip download --no-deps --no-binary llama-cpp-python llama-cpp-python==0.3.36 -d "$peers/src"
  tar xzf "$peers/src/llama_cpp_python-0.3.36.tar.gz" -C "$peers/src"
  cmake -S "$peers/src/llama_cpp_python-0.3.36/vendor/llama.cpp" -B "$peers/llama.cpp-build" -G Ninja \
    -DCMAKE_BUILD_TYPE=Release -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF \
    -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=OFF
  nice -n 15 cmake --build "$peers/llama.cpp-build" -j "${JOBS:-1}" \
    --target llama-quantize llama-imatrix llama-perplexity llama-tokenize
}

for tool in "${tools[@]}"; do
  make_environment "$tool"
  case $tool in
    # its packing kernel is compiled at first use (half a minute), which would count as quantization time
    gptqmodel) "$env_root/$tool/bin/python" -c \
      'from gptqmodel import extension; print(extension.load(name="pack_block_cpu"))' ;;
    llamacpp) build_llama_cpp ;;
  esac
done
