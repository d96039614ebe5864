# make demo       sets up, then the whole way from pictures to a measured model, in five to ten minutes on two cores
# make test       sets up, then the tests; make test-all runs the slow ones too
# make bench      speed against the peers, as ratios; make bench PARTS="model starting" some of it
# make bench-accelerator   the same on one accelerator, in nine minutes; on a machine without a network too, with the
#                 wheels that make accelerator-wheels WHEELS_PYTHON=3.12 gathered on another
# make soak       KILLS=50 SEED=0: kills runs at random moments, goes on with them, and compares
# make lint       style and types

PYTHON ?= python3
BIN := .venv/bin
SET_UP := .venv/.set-up
DEMO ?= out/demo
RANKS ?= 2
PARTS ?=
WHEELS := out/accelerator-wheels
WHEELS_PYTHON ?= 3.11
KILLS ?= 50
SEED ?= 0
# Idle threads sleep instead of spinning: two ranks share two cores.
export OMP_WAIT_POLICY := passive

.PHONY: demo test test-all bench accelerator-wheels bench-accelerator soak lint set-up
.DELETE_ON_ERROR:

set-up: $(SET_UP)

$(SET_UP): requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

demo: $(SET_UP)
	@echo "Five to ten minutes on two cores: small pictures are cut out of photographs, a toy Image GPT learns them on $(RANKS)"
	@echo "ranks with ZeRO, is exported, probed, and completes half pictures. Expect colours and edges, no objects."
	@echo "What is in $(DEMO) from an earlier run is resumed; make demo RESTART=1 starts over."
	$(if $(RESTART)$(ANEW),rm -rf $(DEMO))
	$(BIN)/python -m data_prep shards --config configs/data/demo.yaml --out $(DEMO)/shards
	$(BIN)/python -m data_prep verify $(DEMO)/shards
	$(BIN)/python -m data_prep show $(DEMO)/shards --split train --out $(DEMO)/pictures.png
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc_per_node $(RANKS) -m -- pipeline train \
	    --config configs/demo.yaml --run $(DEMO)/run --data.shards $(DEMO)/shards
	$(BIN)/python -m pipeline export $(DEMO)/run --out $(DEMO)/model
	$(BIN)/python -m pipeline evaluate $(DEMO)/model --shards $(DEMO)/shards \
	    --tasks density,linear_probe,completions --completions.distance_images 0 --out $(DEMO)/results
	@echo
	@echo "Done. What came out:"
	@echo "  report       $(DEMO)/results/report.html"
	@echo "  completions  $(DEMO)/results/completions.png"
	@echo "  pictures     $(DEMO)/pictures.png"
	@echo "  curves       $(BIN)/tensorboard --logdir $(DEMO)/run/tensorboard"
	@echo "Next, on your own pictures (a folder with train/<class>/*):"
	@echo "  $(BIN)/python -m data_prep shards --config configs/data/image_folder.yaml --source.path PICTURES --out SHARDS"
	@echo "  $(BIN)/torchrun --standalone --nproc_per_node 8 -m -- pipeline train --config configs/igpt_s.yaml \\"
	@echo "      --run RUN --data.shards SHARDS"

test: $(SET_UP)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

test-all: $(SET_UP)
	$(BIN)/python -m pytest -m "slow or not slow"

bench: $(SET_UP)
	$(BIN)/python -m tests.benchmarks $(PARTS)

# What the benchmark needs beside torch and transformers; deepspeed is published as source.
accelerator-wheels: $(SET_UP)
	mkdir -p $(WHEELS)
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir $(WHEELS) \
	    $$(grep ^deepspeed== requirements.txt)
	$(BIN)/python -m pip download --quiet --no-deps --only-binary=:all: --python-version $(WHEELS_PYTHON) --dest $(WHEELS) \
	    $$($(BIN)/python -m pip freeze | grep --extended-regexp --ignore-case \
	    "^(annotated.types|einops|torchao|hjson|jsonargparse|msgpack|ninja|psutil|py.cpuinfo|pydantic|pydantic.core|typing.inspection)==")

# With the python that has torch with CUDA and transformers: make bench-accelerator PYTHON=...
bench-accelerator:
	@$(PYTHON) -c "import torch, transformers" 2>/dev/null || \
	    { echo "error: $(PYTHON) has no torch or no transformers; make bench-accelerator PYTHON=... names one that has."; exit 2; }
	@ls $(WHEELS)/*.whl >/dev/null 2>&1 || \
	    { echo "error: $(WHEELS) holds no wheels; make accelerator-wheels gathers them."; exit 2; }
	$(PYTHON) -m pip install --quiet --no-index --no-deps --upgrade --target out/accelerator-packages $(WHEELS)/*.whl
	PYTHONPATH=.:out/accelerator-packages $(PYTHON) -m tests.benchmarks.accelerator $(TOY)

soak: $(SET_UP)
	$(BIN)/python -m tests.soak --kills $(KILLS) --seed $(SEED)

lint: $(SET_UP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck --external-sources --source-path slurm slurm/*.sh slurm/lib/*.sh
