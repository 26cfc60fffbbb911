# The quickstart in a container, without a GPU:
#   docker build -f docker/cpu.Dockerfile -t verl_trb:cpu .
#   docker run --rm --shm-size=2g -v "$PWD/runs:/app/runs" verl_trb:cpu recipe=quickstart
FROM python:3.11-slim-bookworm
RUN apt-get update && apt-get install -y --no-install-recommends git make libnuma1 libgomp1 procps \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /app
# The lock first: a change of the code does not install everything again.
COPY pyproject.toml README.md LICENSE Makefile ./
COPY scripts scripts
COPY recipes recipes
COPY verl_trb verl_trb
RUN PIP_NO_CACHE_DIR=1 make setup
ENTRYPOINT [".venv/bin/python", "-m", "verl_trb.main"]
CMD ["recipe=quickstart"]
