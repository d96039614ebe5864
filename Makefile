# make set-up     creates .venv with the pinned packages; the targets below do so first, except check- and
#                 bench-accelerator
# make demo       from images to an evaluated model, in five to ten minutes on two cores
# make test       the tests; make test-all runs the slow ones too
# make bench      speed beside other libraries, into out/bench; make bench PARTS="reading saves" runs some parts
# make peers      the peers of make bench that .venv lacks, each in an environment of its own, .venv-peers/NAME
# make check-accelerator   tells in SECONDS=180 whether one accelerator computes what it should, then measures
#                 speed with the seconds that are left; needs no network, but the wheels that make accelerator-wheels
#                 WHEELS_PYTHON=3.12 gathers on a machine that has one; TOY=--toy tries it on a CPU
# make bench-accelerator   speed only, in nine minutes
# make evidence   CIFAR10=cifar-10-python.tar.gz: trains small models and measures what the paper found with large ones;
#                 hours on two cores, can be stopped and started again; IMAGES=128000 continues the models
# make soak       KILLS=50 SEED=0: kills runs at random moments, resumes them, and compares the losses
# make lint       style and types

PYTHON ?= python3
BIN := .venv/bin
SET_UP := .venv/.set-up
DEMO ?= out/demo
RANKS ?= 2
# Training images of the demo's linear probes, of 10,000.
PROBED ?= 3000
PARTS ?=
WHEELS := out/accelerator-wheels
WHEELS_PYTHON ?= 3.12
SECONDS ?= 180
OUT ?= out/accelerator$(if $(TOY),-toy)
CIFAR10_JPEG ?=
EVIDENCE ?= out/evidence
CIFAR10 ?=
CIFAR10_RECIPE ?= configs/data/cifar10.yaml
IMAGES ?= 64000
JOBS ?= 2
KILLS ?= 50
SEED ?= 0
# Idle threads sleep instead of spinning: two ranks share two cores.
export OMP_WAIT_POLICY := passive

.PHONY: demo test test-all bench evidence accelerator-wheels accelerator-data accelerator-packages check-accelerator \
    bench-accelerator soak lint set-up peers
.DELETE_ON_ERROR:

set-up: $(SET_UP)

$(SET_UP): requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

demo: $(SET_UP)
	@echo "Five to ten minutes on two cores: cuts small images out of photographs, trains a toy Image GPT on $(RANKS) ranks"
	@echo "with ZeRO, exports and probes it, and completes half images. Expect edges and textures, not objects."
	@echo "An earlier demo in $(DEMO) is resumed; make demo RESTART=1 starts over."
	$(if $(RESTART)$(ANEW),rm -rf $(DEMO))
	$(BIN)/python -m data_prep shards --config configs/data/demo.yaml --out $(DEMO)/shards
	$(BIN)/python -m data_prep verify $(DEMO)/shards
	$(BIN)/python -m data_prep show $(DEMO)/shards --split train --out $(DEMO)/images.png
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc_per_node $(RANKS) -m -- pipeline train \
	    --config configs/demo.yaml --run $(DEMO)/run --data.shards $(DEMO)/shards
	$(BIN)/python -m pipeline export $(DEMO)/run --out $(DEMO)/model
	$(BIN)/python -m pipeline evaluate $(DEMO)/model --shards $(DEMO)/shards --tasks linear_probe --weights random \
	    --train_images $(PROBED) --out $(DEMO)/results/random_weights
	$(BIN)/python -m pipeline evaluate $(DEMO)/model --shards $(DEMO)/shards \
	    --tasks density,linear_probe,completions --train_images $(PROBED) --completions.distance_images 0 \
	    --out $(DEMO)/results
	@echo
	@echo "Done. Results:"
	@echo "  report       $(DEMO)/results/report.html"
	@echo "  completions  $(DEMO)/results/completions.png"
	@echo "  images       $(DEMO)/images.png"
	@echo "  curves       $(BIN)/tensorboard --logdir $(DEMO)/run/tensorboard"
	@echo "Next, with your own images (a folder with train/<class>/*):"
	@echo "  $(BIN)/python -m data_prep shards --config configs/data/image_folder.yaml --source.path IMAGES --out SHARDS"
	@echo "  $(BIN)/torchrun --standalone --nproc_per_node 8 -m -- pipeline train --config configs/igpt_s.yaml \\"
	@echo "      --run RUN --data.shards SHARDS"

test: $(SET_UP)
	$(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

# The slow tests run one after the other: some take most of the memory, others stop nodes of a SLURM.
test-all: test
	$(BIN)/python -m pytest -m slow

# A peer that can't be installed is named with pip's error in the tables.
peers: $(SET_UP)
	$(BIN)/python -m tests.benchmarks.peers.install

bench: peers
	$(BIN)/python -m tests.benchmarks $(PARTS)

# The packages that the script needs in addition to torch, transformers and tensorboard; deepspeed is published as source.
accelerator-wheels: $(SET_UP)
	rm -rf $(WHEELS)
	mkdir -p $(WHEELS)
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir $(WHEELS) \
	    $$(grep ^deepspeed== requirements.txt)
	$(BIN)/python -m pip download --quiet --no-deps --only-binary=:all: --python-version $(WHEELS_PYTHON) --dest $(WHEELS) \
	    $$($(BIN)/python -m pip freeze | grep --extended-regexp --ignore-case "^($(CARRIED))==")

CARRIED := annotated.types|docstring.parser|einops|torchao|hjson|jsonargparse|msgpack|ninja|psutil|py.cpuinfo|pydantic|$\
    pydantic.core|typeshed.client|typing.extensions|typing.inspection

# CIFAR10_JPEG: an archive of train/<class>/*.jpg. The first 32,768 images are packed, in 30 MB.
accelerator-data: $(SET_UP)
	@test -f "$(CIFAR10_JPEG)" || { echo "error: name an archive of CIFAR-10 as JPEG files: CIFAR10_JPEG=..."; exit 2; }
	rm -rf out/cifar10-jpeg && mkdir -p out/cifar10-jpeg
	tar --extract --file "$(CIFAR10_JPEG)" --directory out/cifar10-jpeg
	$(BIN)/python -m data_prep shards --config configs/data/image_folder.yaml --source.path out/cifar10-jpeg \
	    --out out/cifar10-jpeg-shards
	$(BIN)/python -m tests.benchmarks.accelerator.pack out/cifar10-jpeg-shards out/accelerator-data/cifar10.tar.xz

# Whether PYTHON has these packages.
imports = $(PYTHON) -c "import sys; from importlib.util import find_spec; exit(not all(map(find_spec, sys.argv[1:])))" $(1)

# PYTHON must have torch with CUDA, transformers and tensorboard: make check-accelerator PYTHON=...
accelerator-packages:
	@$(call imports,torch transformers tensorboard) || \
	    { echo "error: $(PYTHON) lacks torch, transformers or tensorboard; name one that has them: PYTHON=..."; exit 2; }
	rm -rf out/accelerator-packages
	@$(call imports,deepspeed jsonargparse torchao docstring_parser typeshed_client psutil) || { ls $(WHEELS)/*.whl >/dev/null 2>&1 || \
	    { echo "error: $(WHEELS) contains no wheels; make accelerator-wheels gathers them."; exit 2; }; \
	    $(PYTHON) -m pip install --quiet --no-index --no-deps --no-compile --target out/accelerator-packages $(WHEELS)/*.whl; }

# At toy size the packages of .venv are used.
check-accelerator bench-accelerator: $(if $(TOY),$(SET_UP),accelerator-packages)
	PYTHONPATH=.$(if $(TOY),,:out/accelerator-packages) $(if $(TOY),$(BIN)/python,$(PYTHON)) -m tests.benchmarks.accelerator $(TOY) \
	    --seconds $(SECONDS) --out $(OUT) $(ONLY)

bench-accelerator: SECONDS := 540
bench-accelerator: ONLY := --only speed

# CIFAR10: the official archive, or with CIFAR10_RECIPE=configs/data/image_folder.yaml a folder of train/<class>/* and
# test/<class>/*. JOBS: processes at a time.
evidence: $(SET_UP)
	@test -f $(EVIDENCE)/shards/shards.json || test -n "$(CIFAR10)" || \
	    { echo "error: name the archive of CIFAR-10: CIFAR10=cifar-10-python.tar.gz (or a folder of images, see Makefile)"; exit 2; }
	@test -z "$(CIFAR10)" || $(BIN)/python -m data_prep shards --config $(CIFAR10_RECIPE) --source.path "$(CIFAR10)" \
	    --resolution 16 --out $(EVIDENCE)/shards
	$(BIN)/python -m tests.benchmarks.evidence --shards $(EVIDENCE)/shards --out $(EVIDENCE) --images $(IMAGES) --jobs $(JOBS)

soak: $(SET_UP)
	$(BIN)/python -m tests.soak --kills $(KILLS) --seed $(SEED)

lint: $(SET_UP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck --external-sources --source-path slurm slurm/*.sh slurm/lib/*.sh
