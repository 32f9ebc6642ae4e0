# make demo   train a real model on several replicas, with and without synchronized statistics
# make test   lint, type-check and test, in real processes under every engine
# make bench  time the layers and their peers under every engine (may take hours; BENCH=--quick: minutes)
# make docker-test  build the CPU image and train across two containers (docker or podman)
# make test-clients  test with models of other packages (from PyPI; no weights)
# make clean  remove what the others made
#
# Each needs Python 3.10 or later with venv, and make; `make test` and `make bench` also a C++ compiler, for Horovod.

PYTHON ?= python3
VENV ?= .venv
BUILD ?= build

bin := $(VENV)/bin
python := $(bin)/python
install := $(python) -m pip install -q --disable-pip-version-check

# Also for what pip builds in environments of its own.
export PIP_CONSTRAINT := constraints.txt

# The tests in which no Keras has a part run once.
keras_free := accuracy architecture docker_files ops oracle scaling

.PHONY: demo test test-clients bench docker-test clean

demo: $(VENV)/.demo
	$(python) launch/train_digits.py --compare --seeds 0 1 2 --picture $(BUILD)/digits.png

test: $(VENV)/.test
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy
	$(bin)/shellcheck launch/*.sh launch/slurm.sbatch docker/*.sh .ci/run
	$(bin)/hadolint docker/*.Dockerfile
	TF_USE_LEGACY_KERAS=0 $(python) -m pytest tests/single
	TF_USE_LEGACY_KERAS=1 $(python) -m pytest tests/single $(keras_free:%=--ignore=tests/single/test_%.py)
	$(python) -m pytest tests/launchers

test-clients: $(VENV)/.clients
	TF_USE_LEGACY_KERAS=0 $(python) -m pytest tests/clients
	TF_USE_LEGACY_KERAS=1 $(python) -m pytest tests/clients

bench: $(VENV)/.test
	$(python) -m benchmarks --out $(BUILD)/benchmarks $(BENCH)

docker-test:
	docker/test.sh

clean:
	rm -rf $(VENV) $(BUILD) .hypothesis .mypy_cache .pytest_cache .ruff_cache syncbn.egg-info

$(python):
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "venv is required: apt-get install python3-venv"; exit 1; }

$(VENV)/.demo: $(python) pyproject.toml constraints.txt
	$(install) -e '.[demo]'
	touch $@

$(VENV)/.test: $(python) pyproject.toml constraints.txt launch/install_horovod.sh
	$(install) -e '.[test]'
	launch/install_horovod.sh --python $(python)
	touch $@

$(VENV)/.clients: $(python) pyproject.toml constraints.txt
	$(install) -e '.[clients]'
	touch $@
