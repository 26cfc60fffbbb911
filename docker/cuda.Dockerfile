# For the recipes on GPUs (not built or run yet, see docs/gpu.md):
#   docker build -f docker/cuda.Dockerfile -t verl_trb:cuda .
#   docker run --rm --gpus all --ipc=host -v "$HOME/data:/root/data" verl_trb:cuda recipe=qwen3_1p7b
# CUDA 13.0, because PyPI's torch 2.13.0 is built with it and flash-attn is compiled here; the host needs driver R580.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04
RUN apt-get update && apt-get install -y --no-install-recommends python3.12 python3.12-venv python3.12-dev git ninja-build \
    && rm -rf /var/lib/apt/lists/*
ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1
RUN python3.12 -m venv /opt/venv && pip install torch==2.13.0 setuptools wheel packaging psutil ninja
WORKDIR /app
COPY pyproject.toml README.md LICENSE ./
COPY recipes recipes
COPY scripts scripts
COPY verl_trb verl_trb
# flash-attn is compiled against the torch that is there.
RUN pip install --no-build-isolation '.[gpu]'
ENTRYPOINT ["python", "-m", "verl_trb.main"]
