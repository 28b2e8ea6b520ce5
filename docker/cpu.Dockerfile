# syntax=docker/dockerfile:1
# gptoss-quantize on processors. Build from the checkout's root:
#   docker build -f docker/cpu.Dockerfile -t gptoss-quantize .
#   docker run --rm -it -v "$PWD:/work" gptoss-quantize quantize my-finetune my-int4
FROM python:3.12-slim-bookworm

# the C++ loops are compiled at first use; without a compiler everything runs in torch, many times slower
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*

# the checkout is there while this runs, and leaves no layer behind; rw: pip builds in it
RUN --mount=type=bind,target=/src,rw pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu -c /src/constraints.txt \
    '/src[eval,llamacpp]'

RUN useradd --create-home user && install -d -o user /work /home/user/.cache
USER user
WORKDIR /work
ENTRYPOINT ["gptoss-quantize"]
CMD ["--help"]
