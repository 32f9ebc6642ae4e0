# make demo   train a real model on several replicas, with and without synchronized statistics
# make test   lint, type-check and test, in real processes under every engine
# make quick  lint, type-check and test in one process, on Keras 3, without the slowest; some minutes
# make test-wide  run more of the same tests on more engines and with the other Keras
# make test-control-flow  test every cell of docs/control-flow.md on every engine, and write it (hours)
# make bench  time the layers and their peers under every engine (may take hours; BENCH=--quick: minutes)
# make docker-test  build the CPU image and train across two containers (docker or podman)
# make docs   build the documentation site into build/docs
# make test-clients  test with models of other packages (from PyPI; no weights)
# make test-faults  make one rank of a job go wrong in every way, under every launcher (an hour)
# make test-newcomer  do what the start page and those on migration say, with a fresh environment and the wheel
# make test-matrix  test with other versions of Python, TensorFlow and Keras
# make coverage  say which lines the tests reach
# make dist   build what is published, into build/dist
# make clean  remove what the others made
#
# Each needs Python 3.10 or later with venv, and make; what tests or measures also a C++ compiler, for Horovod.

PYTHON ?= python3
VENV ?= .venv
BUILD ?= build
# How many tests run side by side.
JOBS ?= 2

bin := $(VENV)/bin
python := $(bin)/python
install := $(python) -m pip install -q --disable-pip-version-check

# Also for what pip builds in environments of its own.
export PIP_CONSTRAINT := constraints.txt

pytest := $(python) -m pytest -n $(JOBS)
# The tests of one process, by whole files, whose tests share models.
single := $(pytest) --dist loadfile tests/single
# Those that start processes, each as soon as there is room.
launchers := $(pytest) --dist load --maxschedchunk 1 tests/launchers

# The tests in which no Keras has a part run once; as do the contract's with threads for replicas, and
# with what XLA compiles for GPUs, which real engines have under either Keras.
keras_free := accuracy architecture cli clustering compiled docker_files fingerprints \
  flight_recorder forge_files horovod_settings job_start markdown ops oracle order patience properties \
  scaling shared statistics_errors watchdog

# The parts of `make test` and `make quick`, each also a target of its own. Where one fails the others
# are made all the same, and a table at the end says which.
test_parts := lint lint-scripts types docs test-keras-3 test-keras-2 test-launchers
quick_parts := lint lint-scripts types test-quickly
# What `make quick` leaves out of the tests of one process.
slow := clustering control_flow converted_files recalibrate saving

.PHONY: demo test quick docs test-wide test-clients test-control-flow test-faults test-matrix test-newcomer bench coverage dist docker-test clean
.PHONY: lint lint-scripts types test-keras-3 test-keras-2 test-launchers test-quickly

demo: $(VENV)/.demo
	$(python) launch/train_digits.py --compare --seeds 0 1 2 --picture $(BUILD)/digits.png

test: $(VENV)/.test
	@MAKE="$(MAKE)" .ci/parts $(test_parts)

quick: $(VENV)/.test
	@MAKE="$(MAKE)" .ci/parts $(quick_parts)

lint: $(VENV)/.test
	$(bin)/ruff check .
	$(bin)/ruff format --check .

lint-scripts: $(VENV)/.test
	$(bin)/shellcheck launch/*.sh launch/slurm.sbatch docker/*.sh .ci/run .ci/parts .ci/matrix
	$(bin)/hadolint docker/*.Dockerfile

types: $(VENV)/.test
	$(bin)/mypy

# A broken link, an example that Sphinx cannot read, a page that no menu leads to: all are errors.
docs: $(VENV)/.docs
	rm -rf $(BUILD)/docs docs/api
	CUDA_VISIBLE_DEVICES=-1 TF_CPP_MIN_LOG_LEVEL=3 $(python) -m sphinx -q -W --keep-going \
	  -d $(BUILD)/doctrees docs $(BUILD)/docs

test-keras-3: $(VENV)/.test
	TF_USE_LEGACY_KERAS=0 $(single)

test-keras-2: $(VENV)/.test
	TF_USE_LEGACY_KERAS=1 $(single) $(keras_free:%=--ignore=tests/single/test_%.py)

test-launchers: $(VENV)/.test
	$(launchers) -m "not wide"

test-wide: $(VENV)/.test
	$(launchers) -m wide

test-quickly: $(VENV)/.test
	TF_USE_LEGACY_KERAS=0 $(single) $(slow:%=--ignore=tests/single/test_%.py)

test-clients: $(VENV)/.clients
	TF_USE_LEGACY_KERAS=0 $(python) -m pytest tests/clients
	TF_USE_LEGACY_KERAS=1 $(python) -m pytest tests/clients

test-matrix:
	TF_USE_LEGACY_KERAS=0 .ci/matrix $(BUILD)/matrix -n $(JOBS) --dist loadfile tests/single \
	  $(slow:%=--ignore=tests/single/test_%.py)

test-control-flow: $(VENV)/.test
	PYTHONPATH=launch $(python) -m tests.control_flow_runs $(ENGINES)

test-faults: $(VENV)/.test
	$(python) -m pytest tests/faults

test-newcomer: $(VENV)/.test
	PYTHONPATH=launch $(python) -m tests.newcomer --python $(PYTHON)

bench: $(VENV)/.test
	$(python) -m benchmarks --out $(BUILD)/benchmarks $(BENCH)

# What the tests of one process and of the ranks of a job reach; launchers start too many processes.
coverage: $(VENV)/.coverage
	rm -rf $(BUILD)/coverage && mkdir -p $(BUILD)/coverage
	COVERAGE_FILE=$(BUILD)/coverage/data TF_USE_LEGACY_KERAS=0 $(python) -m coverage run -p -m pytest tests/single
	COVERAGE_FILE=$(BUILD)/coverage/data TF_USE_LEGACY_KERAS=0 SYNCBN_TEST_ENGINE=mpi $(bin)/mpirun --oversubscribe \
	  -np 2 $(python) -m coverage run -p -m pytest -q -p no:cacheprovider tests/parallel
	cd $(BUILD)/coverage && $(abspath $(python)) -m coverage combine --data-file=data && \
	  $(abspath $(python)) -m coverage report --data-file=data --rcfile=$(CURDIR)/pyproject.toml

dist: $(python) pyproject.toml
	$(install) 'build>=1.2'
	rm -rf $(BUILD)/dist
	$(python) -m build --outdir $(BUILD)/dist

docker-test:
	docker/test.sh

clean:
	rm -rf $(VENV) $(BUILD) docs/api .hypothesis .mypy_cache .pytest_cache .ruff_cache syncbn.egg-info syncbn-record-*.json

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

$(VENV)/.docs: $(python) pyproject.toml constraints.txt
	$(install) -e '.[docs]'
	touch $@

$(VENV)/.coverage: $(VENV)/.test
	$(install) -e '.[coverage]'
	touch $@
