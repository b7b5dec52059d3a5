# A CPU image by default. For GPUs:
#   docker build --build-arg BASE=nvidia/cuda:13.0.2-devel-ubuntu24.04 --build-arg ENGINE=cuda -t vllm-selfspec .
ARG BASE=python:3.12-slim-bookworm
FROM ${BASE}
ARG ENGINE=cpu
ARG PIP_FLAGS=""

# g++: torch.compile builds its CPU kernels with it. libnuma: vLLM binds CPU threads and memory through it.
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ git libnuma1 make python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/vllm-selfspec
COPY . .
RUN make setup ENGINE=${ENGINE} PIP_FLAGS="--no-cache-dir ${PIP_FLAGS}"

ENV PATH=/opt/vllm-selfspec/.venv/bin:${PATH}
# Mount a volume on /work to keep results and compiled kernels between runs.
ENV XDG_CACHE_HOME=/work/.cache
WORKDIR /work
ENTRYPOINT ["vllm-selfspec"]
CMD ["rollout"]
