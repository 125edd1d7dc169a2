# One command for each thing one does here. On a machine with only python3 (3.11 to 3.13), make and git, each target sets
# up what it needs by itself: .venv for running and checking, .tools/gen for generating code.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

# A test run starts hundreds of Python processes: without their bytecode each would compile every module anew.
export PYTHONDONTWRITEBYTECODE :=

BIN := .venv/bin
INSTALLED := .venv/.installed
# The native front, or the note that there can be none on this machine.
FRONT := .venv/.front
# Installs Valkey, promtool and chromium where they are missing, or says what to install; tests that need them fail without.
PROGRAMS := scripts/install_programs.py || true
# What the demo leaves behind.
MODEL := out/temperature.keras

# The first Python of a version that pyproject.toml allows; `make PYTHON=...` names another.
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	"$$p" -c '$(SUPPORTED)' 2>/dev/null && { echo "$$p"; break; }; done)

.PHONY: help
help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/\1\t\2/' | expand -t 14

$(INSTALLED): pyproject.toml constraints.txt
	@"$(PYTHON)" -c '$(SUPPORTED)' 2>/dev/null || { echo "No Python 3.11, 3.12 or 3.13 found. Name one: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@[ -x $(BIN)/python ] || "$(PYTHON)" -m venv .venv || { echo "$(PYTHON) cannot make virtual environments; on Debian: apt-get install python3-venv" >&2; rm -rf .venv; exit 1; }
	@echo "Installing into .venv (TensorFlow is large: the first time takes one to five minutes)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt pip
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt --editable '.[server,demo,onnx,otel,valkey]' --group dev --group docs
	@echo "Compiling what all targets import"
	@$(BIN)/python -c "import keras, tensorflow" 2>/dev/null
	@touch $@

$(FRONT): $(INSTALLED) scripts/front.py $(wildcard server/front/*.toml server/front/*.pyi server/front/src/*.rs server/front/src/*/*.rs)
	@$(BIN)/python scripts/front.py || [ $$? -eq 3 ]
	@touch $@

.PHONY: front
front: $(FRONT) ## Build the native front, where cargo is there (one to six minutes; may install Debian's crates, which STEPWELL_NO_APT=1 forbids)
	@$(BIN)/python -c "import stepwell_front" 2>/dev/null && echo "The native front is installed" || $(BIN)/python scripts/front.py

.PHONY: crates
crates: ## Compile the crates that the native front uses, where cargo is there; needs no .venv, so CI runs it beside `make install`
	@"$(PYTHON)" scripts/front.py --crates || [ $$? -eq 3 ]

.PHONY: install
install: $(INSTALLED) ## Make .venv with everything for running, testing and checking

.PHONY: demo
demo: $(INSTALLED) $(FRONT) ## Train a small model on real data, serve it to three users, show what they got (one to four minutes)
	@echo "Importing TensorFlow (ten seconds, a minute on a busy machine)"
	$(BIN)/python examples/demo.py

.PHONY: cluster-demo
cluster-demo: $(INSTALLED) $(FRONT) ## Run three replicas with Valkey and Envoy, kill some, show what their users saw (one to five minutes)
	@$(BIN)/python $(PROGRAMS)
	$(BIN)/python examples/cluster_demo.py

$(MODEL): | $(INSTALLED)
	$(BIN)/python examples/demo.py

.PHONY: serve
serve: $(INSTALLED) $(FRONT) $(MODEL) ## Serve the demo's model (trained first if need be) until Ctrl-C
	$(BIN)/stepwell serve temperature=$(MODEL) $$($(BIN)/python -c 'import stepwell_front' 2>/dev/null && echo --http-listen 127.0.0.1:8080)

# Whole runs are divided among so many processes, one more than two cores have: many tests wait for servers, disks and
# limits of time. A few tests, named by ARGS, are faster in one.
WORKERS ?= 3
ALL := $(if $(ARGS),,--numprocesses $(WORKERS) --dist worksteal)

.PHONY: test
test: $(INSTALLED) $(FRONT) ## Run all tests but those marked slow (four minutes on two idle cores); ARGS="tests/unit -k slots" runs some, WORKERS=4 uses more cores; installs Valkey, promtool and chromium on a Debian as root, unless STEPWELL_NO_APT=1
	@$(BIN)/python $(PROGRAMS)
	TEST_KEEP_PROGRAMS=1 $(BIN)/pytest $(ALL) $(if $(ARGS),,-m "not slow") $(ARGS)

.PHONY: test-unit
test-unit: $(INSTALLED) ## Run the unit tests (half a minute to three; ARGS="-k slots" runs some)
	$(BIN)/pytest tests/unit $(ALL) $(ARGS)

.PHONY: test-slow
test-slow: $(INSTALLED) $(FRONT) ## Run the tests that are marked slow (about thirteen minutes on two cores)
	@$(BIN)/python $(PROGRAMS)
	TEST_KEEP_PROGRAMS=1 $(BIN)/pytest $(ALL) -m "slow and not soak" $(ARGS)

.PHONY: coverage
coverage: $(INSTALLED) $(FRONT) ## Run what CI runs: the tests of `make test`, half of `make test-slow` by turns from commit to commit, and fail if they cover less than the floor in pyproject.toml (ARGS="tests/unit -k slots" measures some)
	@$(BIN)/python $(PROGRAMS)
	$(BIN)/coverage erase
	failed=0; TEST_COVERAGE=1 $(if $(ARGS),,TEST_CASES=$$(git rev-list --count HEAD 2>/dev/null || echo 0)) $(BIN)/pytest $(ALL) $(ARGS) || failed=$$?; \
	$(BIN)/coverage combine --quiet && $(BIN)/coverage report && exit $$failed

.PHONY: mutants
mutants: $(INSTALLED) ## Change one thing at a time in core and intake, a hundred times each, and show what no unit test notices (half an hour; ARGS="server/stepwell_server/core --count 20 --seed 7" tries others)
	@$(BIN)/python $(PROGRAMS)
	$(if $(ARGS),$(BIN)/python scripts/mutants.py $(ARGS),for package in core engine/intake; do $(BIN)/python scripts/mutants.py server/stepwell_server/$$package; done)

# What runs once more with TLS and tokens, which is said to the harness by STEPWELL_TEST_SECURED=1.
SECURED := tests/fault $(addprefix tests/integration/test_,$(addsuffix .py,wire_* fronts* sdk_* native_* groups server_stops triton_clients))

# What finds the files that try samples, besides unit and congruence tests.
SAMPLED := "^from (hypothesis|support.samples) import|^from support import (.*, )?samples"

.PHONY: soak
soak: $(INSTALLED) $(FRONT) ## Try all of what `make test` samples, the front in Python, and TLS with tokens on both, then kill servers a thousand times under load (forty minutes; ARGS="--kills 50 --seed 7" only kills)
	@$(BIN)/python $(PROGRAMS)
	$(if $(ARGS),,TEST_ALL=1 $(BIN)/pytest $(ALL) tests/unit tests/congruence $$(grep -rlE $(SAMPLED) --include="test_*.py" tests/fault tests/integration))
	$(if $(ARGS),,$(BIN)/pytest $(ALL) -m soak tests/packaging tests/fault tests/integration tests/against)
	$(if $(ARGS),,STEPWELL_FRONT=python $(BIN)/pytest $(ALL) tests/integration)
	$(if $(ARGS),,for front in auto python; do STEPWELL_TEST_SECURED=1 STEPWELL_FRONT=$$front $(BIN)/pytest $(ALL) $(SECURED) || exit 1; done)
	$(if $(ARGS),,STEPWELL_TEST_SECURED=1 $(BIN)/python tests/fault/soak.py --kills 100)
	$(if $(ARGS),,$(BIN)/python tests/fault/soak_models.py)
	$(if $(ARGS),,for options in "" "--resident-rows 100 --max-batch-rows 8" "--tenants 3" "--front python"; do $(BIN)/python tests/fault/soak_mixture.py --seconds 30 $$options || exit 1; done)
	$(if $(ARGS),,STEPWELL_TEST_SECURED=1 $(BIN)/python tests/fault/soak_mixture.py --seconds 30)
	$(BIN)/python tests/fault/soak.py $(ARGS)

.PHONY: soak-cluster
soak-cluster: $(INSTALLED) $(FRONT) ## Simulate replicas on one store, ten thousand schedules, then kill, pause, restart, cut off and fail over real ones under load (two hours; ARGS="--kills 50 --seed 7" only kills)
	@$(BIN)/python $(PROGRAMS)
	$(if $(ARGS),,$(BIN)/python tests/fault/simulate.py --runs 10000)
	$(BIN)/python tests/fault/soak_cluster.py $(ARGS)

.PHONY: simulate
simulate: $(INSTALLED) ## Simulate replicas on one store, schedules with fresh seeds (half an hour; ARGS="--runs 500 --seed 7", or ARGS="--trace --seed 7" shows one)
	$(BIN)/python tests/fault/simulate.py $(if $(ARGS),$(ARGS),--runs 10000)

.PHONY: fuzz-models
fuzz-models: $(INSTALLED) ## Compile random models and compare what is served with Keras (four seconds each; ARGS="--models 500 --seed 7")
	$(BIN)/python tests/congruence/fuzz_models.py $(ARGS)

.PHONY: fuzz
fuzz: $(INSTALLED) $(FRONT) ## Send a million malformed messages and 100,000 malformed connections to both fronts (half an hour; ARGS="--messages 20000 --connections 2000 --seed 7 --front native")
	$(BIN)/python tests/fault/fuzz.py $(ARGS)

# The build that the tree is compared with. What differs from it on purpose stands in tests/against/wanted.toml.
BASE ?= 9ff66142209876891bf120efee1fa689c51b22ce
.PHONY: against
against: $(INSTALLED) $(FRONT) ## Send the same programs and malformed messages to a build of the commit BASE and to this tree, and compare each answer (ten minutes, and up to six to build BASE once; ARGS="--programs 200 --malformed 20000 --seed 7 --front native --store disk")
	TEST_KEEP_PROGRAMS=1 $(BIN)/python tests/against/run.py --base $(BASE) $(ARGS)

# What speed and protocol are compared with: the last release, or main before the first one.
AGAINST ?= $(shell git describe --tags --abbrev=0 --match 'v*' 2>/dev/null || echo main)

.PHONY: bench
bench: $(INSTALLED) $(FRONT) ## Measure rates, latencies, memory and start (at most fourteen minutes on two idle cores; ARGS="sessions tls" runs some cases)
	$(BIN)/python bench/measure.py $(ARGS)

.PHONY: bench-scale
bench-scale: $(INSTALLED) $(FRONT) ## Measure a server with a million sessions (a few minutes, 2 GB of disk; ARGS="--sessions 50000")
	$(BIN)/python bench/million.py $(ARGS)

.PHONY: bench-gate
bench-gate: $(INSTALLED) $(FRONT) ## Is this tree more than 5 % slower than the last release (or AGAINST=COMMIT), or short of its goals (AGAINST=bare)? Ten minutes, and up to six to build the commit once; ARGS='--pairs 40 --loads "stream 32"'
	$(BIN)/python bench/gate.py --against $(AGAINST) $(ARGS)

.PHONY: bench-plots
bench-plots: $(INSTALLED) ## Draw the plots and fill in the tables of docs/explanation/performance.md from the last `make bench` and `bench-scale`
	$(BIN)/python bench/plots.py
	$(BIN)/python scripts/wrap_documents.py

.PHONY: check
check: check-format check-lint check-types check-arrows check-proto check-front check-console check-repo check-surface check-layers check-size docs-site ## Run every check that is not a test: all those below, and docs-site

.PHONY: check-format
check-format: $(INSTALLED) ## Is everything formatted?
	$(BIN)/ruff format --check .

.PHONY: check-lint
check-lint: $(INSTALLED) ## Does ruff find anything?
	$(BIN)/ruff check .

.PHONY: check-types
check-types: $(INSTALLED) ## Does mypy find anything?
	$(BIN)/mypy

.PHONY: check-arrows
check-arrows: $(INSTALLED) ## Does any import go against the architecture?
	$(BIN)/lint-imports --no-logo

.PHONY: check-proto
check-proto: $(INSTALLED) ## Is the protocol in order and its generated code fresh?
	$(BIN)/buf lint
	$(BIN)/buf format --diff --exit-code --exclude-path proto/google
	$(BIN)/python scripts/proto.py --check

.PHONY: check-front
check-front: $(INSTALLED) ## Is the native front formatted, and do clippy and its own tests find nothing? (Where cargo is there)
	$(BIN)/python scripts/front.py --check || [ $$? -eq 3 ]

.PHONY: check-console
check-console: $(INSTALLED) ## Is the console's bundle what its sources make, and small? With npm: are its types right, and do its unit tests pass?
	$(BIN)/python scripts/console.py --check

.PHONY: check-repo
check-repo: $(INSTALLED) ## Do documents and code agree, and does every file keep the rules?
	$(BIN)/python scripts/check_repo.py

.PHONY: check-surface
check-surface: $(INSTALLED) ## Is docs/surface/ what the code says: signatures, commands, protocols, reasons of errors, metrics?
	$(BIN)/python scripts/surface.py --check

.PHONY: check-layers
check-layers: $(INSTALLED) ## Is the table of layers in docs/explanation/models.md what compiled models have? Compiles one row in four
	$(BIN)/python scripts/layer_table.py --check

.PHONY: check-size
check-size: $(INSTALLED) ## Is no room larger than its bound in scripts/size.toml?
	$(BIN)/python scripts/size.py --check

.PHONY: console
console: $(INSTALLED) ## Build the console into server/stepwell_server/console/dist/, with npm (ten seconds)
	$(BIN)/python scripts/console.py

.PHONY: console-pictures
console-pictures: $(INSTALLED) $(FRONT) ## Take the pictures of the console for README and docs, with Chromium; installs it as `make test` does
	@$(BIN)/python $(PROGRAMS)
	CONSOLE_PICTURES=1 $(BIN)/pytest tests/integration/test_console_demo.py

.PHONY: breaking
breaking: $(INSTALLED) ## Does the protocol break clients of the last release (or of AGAINST=...)?
	$(BIN)/buf breaking --against '.git#ref=$(AGAINST)'

.PHONY: proto
proto: $(INSTALLED) ## Generate the protocols' code from proto/
	$(BIN)/buf format --write --exclude-path proto/google
	$(BIN)/python scripts/proto.py

.PHONY: docs-site
docs-site: $(INSTALLED) ## Build the documents as a site into out/site; every warning and broken link is an error
	@$(BIN)/python -m sphinx --quiet --jobs auto --fresh-env --fail-on-warning --keep-going --nitpicky --conf-dir docs --doctree-dir out/site-cache . out/site
	@$(BIN)/python scripts/check_site.py out/site
	@echo "Open out/site/index.html"

.PHONY: surface
surface: $(INSTALLED) ## Write docs/surface/ from the code: signatures, commands, protocols, reasons of errors, metrics
	$(BIN)/python scripts/surface.py

.PHONY: layer-table
layer-table: $(INSTALLED) ## Write the table of layers in docs/explanation/models.md from compiled models (20 seconds)
	$(BIN)/python scripts/layer_table.py

.PHONY: format
format: $(INSTALLED) ## Format everything, wrap the documents, and mend what ruff can mend safely
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .
	$(BIN)/python scripts/wrap_documents.py

# After the front: both are built in one folder of maturin's.
.PHONY: wheels
wheels: $(INSTALLED) $(FRONT) ## Build the wheels of stepwell and of its native front into dist/, and try them in a bare environment
	rm -rf dist
	$(BIN)/python -m hatchling build --target wheel --directory dist
	$(BIN)/python scripts/front.py --wheel dist
	$(BIN)/pytest tests/packaging/wheels.py

.PHONY: release
release: wheels ## Complete dist/ for a release: both wheels, sources, bills of materials, notes, checksums; tried in a bare environment (two to six minutes)
	$(BIN)/python scripts/release.py

.PHONY: image
image: $(INSTALLED) ## Build the container image with podman, docker or buildah (ARGS="--base debian --check model.stepwell": without a registry of images; run it)
	$(BIN)/python scripts/image.py $(ARGS)

.PHONY: clean
clean: ## Remove everything that the targets above have made
	rm -rf .venv .tools out dist server/front/target server/front/.cargo server/front/Cargo.lock console/node_modules build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache .coverage
	find client server tests bench scripts examples -name __pycache__ -type d -prune -exec rm -rf {} +
