# Every command makes what it needs first: a virtual environment in .venv, the package and its tools, the model files.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
FOLDERS := ramet/*.py ramet/*.pyi ramet/cli ramet/compat ramet/integrations lang grammar kernels runtime tests examples benchmarks tools

NPM_STAMPS := tests/clients/tours/node_modules/.package-lock.json

.PHONY: demo test test-all soak check house docs release lock tag format bench clean

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install -qq -e '.[dev]'
	touch $@

%/node_modules/.package-lock.json: %/package-lock.json
	if command -v npm >/dev/null; then npm ci --silent --prefix $* && touch $@; \
	else echo "npm is not installed: the tours of npm clients will be skipped"; fi

demo: $(STAMP)  ## run examples/quickstart.py on SmolLM2-135M-Instruct
	$(BIN)/ramet pull smollm2-135m
	$(BIN)/python examples/quickstart.py

test: $(STAMP) $(NPM_STAMPS)  ## the suite that CI runs
	$(BIN)/ramet pull smollm2-135m
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not gpu" -n logical --maxprocesses 4 --dist loadfile \
		--max-worker-restart 0

test-all: $(STAMP) $(NPM_STAMPS)  ## also the long and large ones, and the GPU's where there is one
	$(BIN)/ramet pull smollm2-135m
	MALLOC_PERTURB_=85 $(BIN)/python -m pytest --timeout 3600

soak: $(STAMP)  ## 30 minutes of nice and nasty clients against a server whose engine is killed; nothing may be left
	$(BIN)/python tests/adversary/soak.py --seconds 1800

house: $(STAMP)  ## what a reader must hold in mind, measured
	$(BIN)/python tools/house.py

check: $(STAMP)  ## format, lint, types, tests
	$(BIN)/ruff format --check $(FOLDERS)
	$(BIN)/ruff check $(FOLDERS)
	$(BIN)/mypy
	$(MAKE) test

docs: $(STAMP)  ## the pages, in build/site; needs no network, fails for a link that leads nowhere
	$(BIN)/zensical build --clean --strict

release: $(STAMP)  ## the wheel and the source, checked, and the list of all packages (CycloneDX) of this environment, in dist
	rm -rf dist
	$(BIN)/uv tool run --from build pyproject-build
	$(BIN)/uv tool run twine check --strict dist/*.whl dist/*.tar.gz
	$(BIN)/uv tool run --from cyclonedx-bom cyclonedx-py environment $(BIN)/python -o dist/sbom.json

lock: $(STAMP)  ## the versions of all packages in the images: those of this environment, which the suite ran with
	mkdir -p build
	$(BIN)/uv pip freeze -q --python $(BIN)/python | grep == | sed 's/+cpu$$//' | grep -v ^triton= > build/installed.txt
	$(BIN)/uv pip compile -q pyproject.toml --extra gpu --extra server -c build/installed.txt --python-version 3.12 \
		--python-platform linux --no-annotate --custom-compile-command "make lock" -o deploy/constraints.txt

tag:  ## make tag VERSION=0.2.0: the version, its section of the changelog, a commit and a tag; pushes nothing
	echo "$(VERSION)" | grep -Eqx '[0-9]+\.[0-9]+\.[0-9]+' || { echo "VERSION is '$(VERSION)', but must be like 0.2.0"; exit 1; }
	test -z "$$(git status --porcelain)" || { echo "there are changes that are not committed"; exit 1; }
	sed -i 's/^version = .*/version = "$(VERSION)"/' pyproject.toml
	sed -i 's/^## \[Unreleased\]$$/&\n\n## [$(VERSION)] - '"$$(date +%F)"'/' CHANGELOG.md
	git commit -qam "release $(VERSION)" && git tag -a v$(VERSION) -m "Ramet $(VERSION)"

format: $(STAMP)
	$(BIN)/ruff format $(FOLDERS)
	$(BIN)/ruff check --fix $(FOLDERS)

bench: $(STAMP)  ## the CPU benchmarks; each prints a table and one JSON line
	$(BIN)/ramet pull smollm2-135m
	$(BIN)/python benchmarks/bench_prefix.py
	$(BIN)/python benchmarks/bench_cpu.py

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
