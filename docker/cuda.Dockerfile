# gptoss-quantize on NVIDIA cards; torch's wheels bring CUDA, the driver is the host's. From the checkout's root:
#   docker build -f docker/cuda.Dockerfile -t gptoss-quantize:cuda .
#   docker run --rm -it --gpus all -v "$PWD:/work" gptoss-quantize:cuda chat my-int4 --device cuda
FROM python:3.12-slim-bookworm

# g++ for the C++ loops, gcc for Triton, both at first use
RUN apt-get update && apt-get install -y --no-install-recommends g++ gcc && rm -rf /var/lib/apt/lists/*

COPY . /src
RUN pip install --no-cache-dir -c /src/constraints.txt '/src[eval]' && rm -rf /src

RUN useradd --create-home user
USER user
WORKDIR /work
ENTRYPOINT ["gptoss-quantize"]
CMD ["--help"]
