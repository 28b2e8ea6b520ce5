# syntax=docker/dockerfile:1
# gptoss-quantize on NVIDIA cards; torch's wheels bring CUDA, the driver is the host's. From the checkout's root:
#   docker build -f docker/cuda.Dockerfile -t gptoss-quantize:cuda .
#   docker run --rm -it --gpus all -v "$PWD:/work" gptoss-quantize:cuda chat my-int4 --device cuda
FROM python:3.12-slim-bookworm

# g++ for the C++ loops, gcc for Triton, both at first use
RUN apt-get update && apt-get install -y --no-install-recommends g++ gcc && rm -rf /var/lib/apt/lists/*

# the checkout is there while this runs, and leaves no layer behind; rw: pip builds in it
RUN --mount=type=bind,target=/src,rw pip install --no-cache-dir -c /src/constraints.txt '/src[eval]'

RUN useradd --create-home user && install -d -o user /work /home/user/.cache
USER user
WORKDIR /work
ENTRYPOINT ["gptoss-quantize"]
CMD ["--help"]
