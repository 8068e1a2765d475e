# Open-Yaongi for NVIDIA GPUs, with pinned packages and the CUDA kernels.
#   docker build -t yaongi .
#   docker run --gpus all --ipc host -v $PWD/data:/yaongi/data -v $PWD/runs:/yaongi/runs yaongi ./run_all_vessl.sh
# This image was never built here: tests compare its pins, and run its pip lines in a fresh environment.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04
RUN apt-get update && apt-get install -y --no-install-recommends python3-dev python3-venv cmake ninja-build git \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /yaongi
RUN python3 -m venv .venv
ENV PATH=/yaongi/.venv/bin:$PATH PIP_NO_CACHE_DIR=1
RUN pip install torch==2.11.0
COPY requirements-dev.txt .
RUN pip install -r requirements-dev.txt && (echo torch==2.11.0 && cat requirements-dev.txt) >.venv/installed.txt
COPY . .
RUN YAONGI_CUDA=1 pip install --no-deps --no-build-isolation --editable .
CMD ["bash"]
