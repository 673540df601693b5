#!/usr/bin/env bash
# Installs NVIDIA's compiler and libraries from PyPI into a folder with the layout of CUDA_HOME,
# to build with `--features cuda` on machines without the CUDA toolkit.
#
#   deploy/cuda_toolkit.sh target/cuda/toolkit     prints the folder to use as CUDA_HOME
set -euo pipefail

folder=$(realpath -m "${1:?the folder to fill}")
# One release for all: the compiler refuses headers of other releases.
RELEASE=13.0

if [ ! -e "$folder/.complete" ]; then
    rm -rf "$folder"
    python3 -m pip install --quiet --target "$folder" \
        "nvidia-cuda-nvcc==$RELEASE.*" "nvidia-cuda-crt==$RELEASE.*" "nvidia-nvvm==$RELEASE.*" \
        "nvidia-cuda-runtime==$RELEASE.*" "nvidia-cuda-cccl==$RELEASE.*" \
        "nvidia-cuda-nvrtc==$RELEASE.*" "nvidia-cublas==13.*" "nvidia-curand==10.*" >&2
    home=$folder/nvidia/cu13
    # The wheels have the libraries under their versioned names only.
    for library in cudart nvrtc cublas cublasLt curand; do
        versioned=$(basename "$(ls "$home/lib/lib$library.so".*)")
        ln -sf "$versioned" "$home/lib/lib$library.so"
    done
    # The driver's library comes with the driver. To link without one, a stub with the symbols
    # that its header declares takes its place; it is never loaded.
    mkdir -p "$home/lib/stubs"
    echo '#include <cuda.h>' | cc -E -I"$home/include" - \
        | grep -oE '\bcu[A-Z][A-Za-z0-9_]*\(' | tr -d '(' | sort -u \
        | sed 's/.*/void &(void) {}/' \
        | cc -shared -fPIC -w -Wl,-soname,libcuda.so.1 -x c - -o "$home/lib/stubs/libcuda.so"
    touch "$folder/.complete"
fi
echo "$folder/nvidia/cu13"
