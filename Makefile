# Start with `make run` and `make test`; `make help` lists all commands.

ANDON := target/release/andon
VENV  := target/venv
HTTP  ?= 127.0.0.1:8000
GRPC  ?= 127.0.0.1:8001
ADMIN ?= 127.0.0.1:8002
# The oldest compute capability to build for: 80 is the A100's.
CUDA_COMPUTE_CAP ?= 80

.DEFAULT_GOAL := help
.PHONY: help run build build-cuda models fleet test golden soak check bench bench-peers bench-turn chaos

help: ## List the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

run: build models ## Build, fetch the demo models and serve them
	$(ANDON) serve --repository models --http-addr $(HTTP) --grpc-addr $(GRPC) --admin-addr $(ADMIN)

build: ## Build the release binary
	cargo build --release --locked -p cli

build-cuda: ## Build for NVIDIA devices, with the compiler from PyPI
	home=$$(bash deploy/cuda_toolkit.sh target/cuda/toolkit) && \
	PATH=$$home/bin:$$PATH CUDA_HOME=$$home NVCC=$$home/bin/nvcc CUDA_COMPUTE_CAP=$(CUDA_COMPUTE_CAP) \
	cargo build --release --locked -p cli --features cuda --target-dir target/cuda

models: ## Fetch the demo models into models/
	python3 demo/fetch_models.py models

fleet: build models ## Run a gateway and three workers on loopback
	python3 demo/fleet.py $(ANDON)

test: ## Install the test dependencies and run all tests
	bash tests/run.sh

golden: models ## Make tests/golden anew, with the reference implementations
	python3 -m venv target/golden
	target/golden/bin/pip install --quiet -r tests/golden/requirements.txt
	target/golden/bin/python tests/python/golden.py
	target/golden/bin/python tests/python/golden_folders.py
	target/golden/bin/python tests/python/train_digits.py --check

soak: ## Run the tests that have a long form in that form
	SOAK=1 bash tests/run.sh --profile soak --workspace -E 'test(no_generated_call_breaks_the_document) + test(memory_stays_level) + test(generated_calls_stay_within_their_budgets) + test(the_page_works)'

check: ## Check format, lints, licences, protos, structure, manifests
	bash tests/check.sh

bench: build models ## Run the benchmarks; writes docs/benchmarks.md
	bash benches/setup.sh
	cargo build --release --locked -p fleet-tests --bins
	$(VENV)/bin/python benches/run.py

bench-peers: build models ## Compare with other libraries and servers; writes docs/benchmarks.md
	bash benches/setup.sh benches/requirements.txt benches/peers/requirements.txt
	cargo build --release --locked -p engine --example library
	$(VENV)/bin/python benches/run_peers.py

bench-turn: build models ## Compare the gateway with that of BASE=path-or-commit, in turn
	bash benches/setup.sh --debian
	cargo build --release --locked -p fleet-tests --bins
	python3 benches/turn.py $(BASE)

chaos: build models ## Inject faults into a fleet for some minutes and report
	cargo build --release --locked -p fleet-tests --bins
	target/release/chaos
