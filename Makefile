# Millrace's tasks. Every target installs what it needs into .venv; nothing else is required than
# python3 >= 3.11, make and git. `buf` (lint and compatibility of the contract) also needs node and npm.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.synced
UV := .millrace/tools/uv/bin/uv
BUF_VERSION := 1.75.0
BUF := .millrace/tools/buf-$(BUF_VERSION)/node_modules/.bin/buf
PROTOS := $(sort $(wildcard protos/millrace/*/v1/*.proto))
SERVICES := $(filter %_service.proto,$(PROTOS))
SOURCES := core controlplane nodeagent router clients/python deploy tests
# The contract is compared with this revision; the last commit on main by default.
BREAKING_AGAINST ?= .git\#ref=HEAD

# Options of `make up`; each becomes an option of `millrace up`.
ROUTER_PORT ?= 8080
GRPC_PORT ?= 7600
GATEWAY_PORT ?= 7601
AGENT_PORT ?= 7610
ETCD_PORT ?= 2389
ROUTER_WORKERS ?= 1
ENGINE ?= vllm

.PHONY: help up down test test-unit test-integration test-e2e test-scheduler native test-native lint type gen fmt clean sync
.PHONY: bench bench-router bench-router-virtual bench-router-live bench-scheduler soak chaos

help: ## Show this help
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-21s %s\n", $$1, $$2}'
	@echo
	@echo "  Options of make up: ROUTER_PORT=$(ROUTER_PORT) GRPC_PORT=$(GRPC_PORT) GATEWAY_PORT=$(GATEWAY_PORT)"
	@echo "                      AGENT_PORT=$(AGENT_PORT) ETCD_PORT=$(ETCD_PORT) ROUTER_WORKERS=$(ROUTER_WORKERS) ENGINE=$(ENGINE) (or simulator)"

$(UV):
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Millrace needs python3 >= 3.11; this is %s. Say make PYTHON=/path/to/python3.11" % sys.version.split()[0])'
	@echo "==> installing uv"
	@$(PYTHON) -m venv .millrace/tools/uv
	@.millrace/tools/uv/bin/python -m pip install --quiet --disable-pip-version-check 'uv>=0.9'

$(STAMP): pyproject.toml protos/pyproject.toml clients/python/pyproject.toml uv.lock | $(UV)
	@echo "==> installing Millrace and its tools into $(VENV)"
	@UV_PYTHON_DOWNLOADS=never $(UV) sync --locked --quiet --python $$($(PYTHON) -c 'import sys; print(sys.executable)')
	@touch $@

sync: $(STAMP) ## Install everything into .venv

up: $(STAMP) ## Start a whole Millrace on this machine and ask its model a question
	@exec $(BIN)/millrace up --router-port $(ROUTER_PORT) --grpc-port $(GRPC_PORT) --gateway-port $(GATEWAY_PORT) \
		--agent-port $(AGENT_PORT) --etcd-port $(ETCD_PORT) --router-workers $(ROUTER_WORKERS) --engine $(ENGINE)

down: $(STAMP) ## Stop what `make up` started, from another terminal
	@$(BIN)/millrace down

test: $(STAMP) ## All tests: unit, properties, contract, integration, real vLLM end to end, the compiled router
	@$(BIN)/python -m deploy.local.engine_environment
	@$(BIN)/python -m pytest tests/unit tests/properties tests/contract -n 2
	@$(BIN)/python -m pytest tests/integration tests/chaos tests/e2e
	@if command -v cc >/dev/null; then $(MAKE) test-native; else echo "no C compiler: the compiled router is not tested"; fi

test-unit: $(STAMP) ## Unit and property tests only (under a minute)
	@$(BIN)/python -m pytest tests/unit tests/properties -n 2

test-integration: $(STAMP) ## Contract and integration tests: real etcd, real processes
	@$(BIN)/python -m pytest tests/contract tests/integration tests/chaos

test-e2e: $(STAMP) ## End to end on real vLLM
	@$(BIN)/python -m deploy.local.engine_environment
	@$(BIN)/python -m pytest tests/e2e

# Generated clusters and histories; `make test` takes a few dozen of them.
EXAMPLES ?= 10000
test-scheduler: $(STAMP) ## The scheduler's promises against 10,000 generated clusters (EXAMPLES=N)
	@MILLRACE_SCHEDULER_EXAMPLES=$(EXAMPLES) $(BIN)/python -m pytest tests/properties/test_scheduler_safety.py tests/properties/test_scheduler_preemption.py -n 2 --timeout=0

bench: $(STAMP) ## Measure: declaration to ready, fail-over, rolling updates
	@$(BIN)/python -m tests.bench
	@$(BIN)/python -m tests.bench.rollout

# A trace in Mooncake's format, for instance TRACE=mooncake-conversation.jsonl; without it the loads are generated.
TRACE ?=
LOADS := one-prefix shared-prefix multi-turn random
bench-router: bench-router-virtual bench-router-live ## All about the router: virtual time, then live beside its peers (TRACE=FILE)

bench-router-virtual: $(STAMP) ## Compare picking strategies in virtual time (TRACE=FILE), and measure the prefix index
	@if [ -n "$(TRACE)" ]; then for rate in 45 60; do for routers in 1 2; do \
		$(BIN)/python -m tests.bench.router_trace --trace "$(TRACE)" --rate $$rate --routers $$routers; done; done; fi
	@for load in $(LOADS); do \
		$(BIN)/python -m tests.bench.router_trace --load $$load; done
	@for slowness in "1 1 1" "1 2 4"; do \
		$(BIN)/python -m tests.bench.router_chats --slowness $$slowness; done
	@$(BIN)/python -m tests.bench.prefix_index

# gRPC talks on standard error about every process that is started beside it.
LIVE := GRPC_VERBOSITY=ERROR $(BIN)/python -m
bench-router-live: $(STAMP) ## Live, beside peers from PyPI: speed, replay (TRACE=FILE), real vLLM, faults (half an hour)
	@$(LIVE) tests.bench.router_live.speed
	@if [ -n "$(TRACE)" ]; then for rate in 45 60; do \
		$(LIVE) tests.bench.router_live.replay --trace "$(TRACE)" --rate $$rate --routers 1 2; done; fi
	@for load in $(LOADS); do $(LIVE) tests.bench.router_live.replay --load $$load --requests 1500; done
	@$(LIVE) tests.bench.router_live.real_vllm || echo "(e) is left out"
	@$(LIVE) tests.bench.router_faults

SECONDS ?= 3600
soak: $(STAMP) ## Keep a router under load and look for leaks (SECONDS=3600)
	@$(LIVE) tests.bench.router_soak --seconds $(SECONDS)

bench-scheduler: $(STAMP) ## Measure full plans and rounds of the loop (1000 nodes, 5000 replicas), and a thousand agents
	@$(BIN)/python -m tests.bench.scheduler --profile
	@$(BIN)/python -m tests.bench.agents

chaos: $(STAMP) ## Hurt every process of a real cluster in every way, and check what holds (about 15 minutes)
	@$(BIN)/python -m tests.chaos

$(BUF):
	@command -v npm >/dev/null || { echo "buf needs node and npm, and npm is not on PATH: install nodejs and npm, then run this again"; exit 1; }
	@echo "==> installing buf $(BUF_VERSION)"
	@mkdir -p .millrace/tools/buf-$(BUF_VERSION)
	@cd .millrace/tools/buf-$(BUF_VERSION) && npm install --silent --no-audit --no-fund --prefix . @bufbuild/buf@$(BUF_VERSION) >/dev/null

lint: $(STAMP) $(BUF) ## ruff, import-linter, size limits, buf lint/format/breaking, generated code up to date
	@$(BIN)/ruff check $(SOURCES)
	@$(BIN)/ruff format --check $(SOURCES)
	@$(BIN)/lint-imports --no-cache
	@$(BIN)/python -m tests.support.size_limits
	@$(BUF) lint
	@$(BUF) format --diff --exit-code
	@if git ls-tree -r --name-only HEAD 2>/dev/null | grep -q '^protos/.*[.]proto$$'; then $(BUF) breaking --against '$(BREAKING_AGAINST)'; fi
	@$(MAKE) check-gen

# Tests of the same sources run on both; `import router` must find the compiled tree first.
native: $(STAMP) ## Compile the router's hot path (needs a C compiler): PYTHONPATH=.millrace/native millrace-router
	@$(BIN)/python -m deploy.native

test-native: native ## The router's tests on the compiled hot path
	@$(BIN)/python -m pytest -o 'pythonpath=.millrace/native .' tests/unit/router tests/properties/test_wire_strictness.py \
		tests/contract/test_openai_surface.py tests/integration/test_router_forwarding.py \
		tests/integration/test_router_failover.py tests/integration/test_router_wire.py tests/integration/test_router_upstream.py \
		tests/integration/test_exchange.py tests/properties/test_access_lines.py tests/properties/test_usage_reading.py

type: $(STAMP) ## mypy --strict, tests included
	@$(BIN)/mypy core controlplane nodeagent router clients/python deploy/local deploy/etcd deploy/native tests

fmt: $(STAMP) $(BUF) ## Format Python and protos
	@$(BIN)/ruff check --fix --quiet $(SOURCES) || true
	@$(BIN)/ruff format --quiet $(SOURCES)
	@$(BUF) format --write

gen: $(STAMP) ## Generate the Python stubs of protos/
	@$(call generate,protos)

.PHONY: check-gen
check-gen: $(STAMP)
	@rm -rf .millrace/gen && mkdir -p .millrace/gen
	@$(call generate,.millrace/gen)
	@for file in $$(cd .millrace/gen && find . -name '*_pb2*'); do \
		cmp -s .millrace/gen/$$file protos/$$file || { echo "protos/$$file is not what protos/ generates: run make gen"; exit 1; }; done

define generate
cd protos && PATH=$(CURDIR)/$(BIN):$$PATH $(CURDIR)/$(BIN)/python -m grpc_tools.protoc -I. \
	--python_out=$(CURDIR)/$(1) --mypy_out=quiet:$(CURDIR)/$(1) $(PROTOS:protos/%=%) && \
PATH=$(CURDIR)/$(BIN):$$PATH $(CURDIR)/$(BIN)/python -m grpc_tools.protoc -I. \
	--grpc_python_out=$(CURDIR)/$(1) --mypy_grpc_out=quiet:$(CURDIR)/$(1) $(SERVICES:protos/%=%)
endef

clean: ## Remove what was built and the local state (.venv, .millrace, caches)
	@test ! -f .millrace/local.json || { echo "Millrace runs here: make down first"; exit 1; }
	@rm -rf $(VENV) .millrace .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
