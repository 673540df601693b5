# The two commands of a newcomer are `make run` and `make test`; the rest is
# what they are made of. `make help` lists them.

ANDON := target/release/andon
VENV  := target/venv
HTTP  ?= 127.0.0.1:8000
GRPC  ?= 127.0.0.1:8001
ADMIN ?= 127.0.0.1:8002
# The oldest device that the build is for: 80 is the A100's generation.
CUDA_COMPUTE_CAP ?= 80

.DEFAULT_GOAL := help
.PHONY: help run build build-cuda models fleet test check bench bench-peers chaos

help: ## Lists the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

run: build models ## Builds, brings the demo models, and serves them
	$(ANDON) serve --repository models --http-addr $(HTTP) --grpc-addr $(GRPC) --admin-addr $(ADMIN)

build: ## Builds the release binary
	cargo build --release --locked -p cli

build-cuda: ## Builds for NVIDIA devices; NVIDIA's compiler comes from PyPI
	home=$$(bash deploy/cuda_toolkit.sh target/cuda/toolkit) && \
	PATH=$$home/bin:$$PATH CUDA_HOME=$$home NVCC=$$home/bin/nvcc CUDA_COMPUTE_CAP=$(CUDA_COMPUTE_CAP) \
	cargo build --release --locked -p cli --features cuda --target-dir target/cuda

models: ## Brings the demo models into models/
	python3 demo/fetch_models.py models

fleet: build models ## Runs a gateway and three workers as processes on loopback
	python3 demo/fleet.py $(ANDON)

test: ## Installs what the tests need and runs them all
	bash tests/run.sh

check: ## Format, clippy, licences, protos, structure, manifests
	bash tests/check.sh

bench: build models ## Measures; writes docs/benchmarks.md
	bash benches/setup.sh
	cargo build --release --locked -p fleet-tests --bins
	$(VENV)/bin/python benches/run.py

bench-peers: build models ## Measures beside other libraries and servers; writes docs/benchmarks.md
	bash benches/setup.sh benches/requirements.txt benches/peers/requirements.txt
	cargo build --release --locked -p engine --example library
	$(VENV)/bin/python benches/run_peers.py

bench-turn: build models ## Compares the gateway with that of BASE=path-or-commit, in turn
	bash benches/setup.sh --debian
	cargo build --release --locked -p fleet-tests --bins
	python3 benches/turn.py $(BASE)

chaos: build models ## Breaks a fleet for some minutes and reports what was lost
	cargo build --release --locked -p fleet-tests --bins
	target/release/chaos
