# make demo   the main job end to end on text that this machine already has, on a CPU
# make test   the tests
# make lint   style and types
# make bench  the benchmarks of a CPU
# make test-gpu    the tests of a GPU, in a Python that sees one (PYTHON=…)
# make test-slow   the tests that take minutes, and 1 GB of disk
# make test-slurm  the tests of Slurm, on one that they start here; needs Debian's slurm-wlm and munge, and root
# make bench-gpu   the benchmarks of a GPU, in a Python that sees one (PYTHON=…)
PYTHON ?= python3
BIN := .venv/bin

# The constraints file pins a PyTorch without CUDA packages, so that set-up takes minutes; it is installed first
# because a later resolver run would otherwise choose the newest build.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

.PHONY: setup demo test test-gpu test-slow test-slurm lint bench bench-gpu screenshot clean
setup: .venv/ready

demo: setup
	$(BIN)/python examples/demo_corpus.py demo/corpus.jsonl.zst
	$(BIN)/longsift run demo/corpus.jsonl.zst -o demo/calibrated --window 4096 --sample 40 --keep 0.25 --overwrite
	$(BIN)/longsift score demo/calibrated -o demo/ladm --method ladm --overwrite
	$(BIN)/longsift select demo/ladm --keep 0.25
	$(BIN)/longsift report demo/ladm --map-seconds 0
	$(BIN)/longsift report demo/calibrated --map-seconds 15 --against demo/ladm
	@echo "Look at demo/calibrated/report.html and demo/ladm/report.html; the selected windows are in demo/*/selected."

# A file of tests stays in one process, since its tests share what is dear to make.
PARALLEL := -n auto --maxprocesses 8 --dist loadfile
test: export OMP_NUM_THREADS := 1
test: setup
	$(BIN)/pytest $(PARALLEL)

# Only the files that hold such tests, since others need packages that such a machine may lack.
test-gpu:
	PYTHONPATH=src $(PYTHON) -m pytest -m gpu $$(grep -rl mark.gpu tests --include='test_*.py' | sort)

test-slow: setup
	$(BIN)/pytest $(PARALLEL) -m slow -rP

test-slurm: setup
	$(BIN)/pytest -m slurm -rs tests/engines/test_slurm.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python benchmarks/attention_cpu.py

bench-gpu:
	PYTHONPATH=src $(PYTHON) benchmarks/gpu.py

# The picture at the top of the README; needs Chromium.
screenshot: demo
	chromium --headless --no-sandbox --disable-gpu --disable-background-networking --hide-scrollbars \
		--force-device-scale-factor=2 --virtual-time-budget=20000 --window-size=1200,1150 \
		--screenshot=docs/demo-report.png file://$(CURDIR)/demo/calibrated/report.html

clean:
	rm -rf .venv demo
