# `make train` and `make test` each do all the set-up they need.

PYTHON ?= python3
VENV ?= .venv
VENV_HYDRA_14 ?= $(VENV)-hydra-1.4
VENV_OPTUNA ?= $(VENV)-optuna
PYTEST_ARGUMENTS ?=
# Processes that run tests side by side; a file of tests stays in one of them.
WORKERS ?= 2
PARALLEL = -n $(WORKERS) --dist loadfile --no-loadscope-reorder
# Hundreds of processes would compile each module of this package again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: train test quick composition sweepers docs parity plan-accuracy crash gpu benchmark lint clean

# A small decoder on real text: eight processes on this machine, compiled.
train: $(VENV)/installed
	$(VENV)/bin/python examples/train.py parallel=fsdp8 compile=max

# Everything: linters, the composition tests on both Hydras, sweepers, Slurm. The times of the parts come last.
test: $(VENV)/installed $(VENV_HYDRA_14)/installed $(VENV_OPTUNA)/installed
	@$(VENV)/bin/python tests/run.py --workers $(WORKERS) --hydra-14 $(VENV_HYDRA_14)/bin/python \
		--optuna $(VENV_OPTUNA)/bin/python -- $(PYTEST_ARGUMENTS)

# What takes under two minutes.
quick: $(VENV)/installed
	$(VENV)/bin/python -m pytest $(PARALLEL) -m "not slow" $(PYTEST_ARGUMENTS)

# What composing, checking and explaining need, on the newer Hydra, where no torch is installed.
composition: $(VENV_HYDRA_14)/installed
	$(VENV_HYDRA_14)/bin/python -m pytest $(PARALLEL) -m composition $(PYTEST_ARGUMENTS)

# Sweepers that consume scores, on the newer Hydra.
sweepers: $(VENV_OPTUNA)/installed
	$(VENV_OPTUNA)/bin/python -m pytest -m sweeper $(PYTEST_ARGUMENTS)

# The documentation as a site, in site/; a warning is an error. It needs no network to be read.
docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict

# Layouts against one process, cell by cell, and layouts drawn at random.
parity: $(VENV)/installed
	$(VENV)/bin/python -m tests.distributed.matrix --random 6

# Peaks of memory as planned and as real ranks take them; writes docs/plan_accuracy.md.
plan-accuracy: $(VENV)/installed
	PYTHONPATH=examples $(VENV)/bin/python -m tests.plan.accuracy --write

# Kills 240 runs while they save, and says in which phase; then ranks of replica groups 30 times, in three runs. `make
# test` has a short form of both.
crash: $(VENV)/installed
	$(VENV)/bin/python -m tests.crash.run
	$(VENV)/bin/python -m tests.crash.group_killing

# What is promised of accelerators, on one card in eight minutes, with this machine's own torch and the packages that
# pyproject.toml requires. `$(PYTHON) -m tests.gpu --device cpu --size tiny` tries the script where there is none.
gpu:
	$(PYTHON) -m tests.gpu

benchmark: $(VENV)/installed
	$(VENV)/bin/python benchmarks/step_overhead.py
	$(VENV)/bin/python benchmarks/observers.py
	$(VENV)/bin/python benchmarks/layouts.py
	$(VENV)/bin/python benchmarks/startup.py
	$(VENV)/bin/python benchmarks/checkpoints.py
	$(VENV)/bin/python benchmarks/submission.py
	$(VENV)/bin/python benchmarks/preflight.py
	$(VENV)/bin/python benchmarks/growth.py

lint: $(VENV)/installed
	$(VENV)/bin/python tests/run.py lint

# torch goes first and alone: a range would make pip look for its newest build, gigabytes with CUDA. Python compiles what
# is imported; pip would compile all of torch, which takes as long as to install it.
$(VENV)/installed: pyproject.toml constraints/hydra-1.3.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --no-compile --constraint constraints/hydra-1.3.txt torch
	$(VENV)/bin/python -m pip install --quiet --no-compile --constraint constraints/hydra-1.3.txt --editable ".[dev]"
	touch $@

$(VENV_HYDRA_14)/installed: pyproject.toml constraints/hydra-1.4.txt
	$(PYTHON) -m venv $(VENV_HYDRA_14)
	$(VENV_HYDRA_14)/bin/python -m pip install --quiet --no-compile --constraint constraints/hydra-1.4.txt \
		hydra-core rich pytest pytest-xdist hypothesis editables
	$(VENV_HYDRA_14)/bin/python -m pip install --quiet --no-compile --no-deps --editable .
	touch $@

$(VENV_OPTUNA)/installed: pyproject.toml constraints/hydra-optuna.txt
	$(PYTHON) -m venv $(VENV_OPTUNA)
	$(VENV_OPTUNA)/bin/python -m pip install --quiet --no-compile --constraint constraints/hydra-optuna.txt torch
	$(VENV_OPTUNA)/bin/python -m pip install --quiet --no-compile --constraint constraints/hydra-optuna.txt \
		hydra-core hydra-optuna-sweeper torchdata rich scikit-learn torchmetrics pytest editables
	$(VENV_OPTUNA)/bin/python -m pip install --quiet --no-compile --no-deps --editable .
	touch $@

clean:
	rm -rf $(VENV) $(VENV_HYDRA_14) $(VENV_OPTUNA) dist build site .pytest_cache .hypothesis .mypy_cache .ruff_cache
