# make run: everything set up, then the whole pipeline on Fashion-MNIST.   make test: everything set up, then the tests.

PYTHON ?= python3
# pip compiles on one core, compileall on all of them. Each step of a run is a process that imports much: without
# bytecode, and where the environment forbids to write it, a run takes twice as long. (Some packages ship templates
# that are no Python: compileall says so by its status.)
PIP = -m pip install --quiet --disable-pip-version-check --no-compile --no-deps --require-hashes
COMPILE = -m compileall -qq -j 0 -x '/tests?/'
MAKEFLAGS += --jobs=2

.PHONY: run test test-fast bench lint lock setup image clean

run: .venv/ready .venv-triton/ready
	.venv/bin/unlabeled run --profile cpu

# One process per core, one thread each; a file stays in one process. The long files start first (tests/conftest.py).
PYTEST = OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

test: .venv/test-ready .venv-triton/ready
	$(PYTEST)

test-fast: .venv/test-ready .venv-triton/ready
	$(PYTEST) -m "not slow"

bench: .venv/test-ready .venv-triton/ready
	.venv/bin/unlabeled bench all

lint: .venv/test-ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

setup: .venv/ready .venv-triton/ready

.venv/ready: requirements.lock pyproject.toml
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python $(PIP) -r requirements.lock
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	.venv/bin/python $(COMPILE) .venv/lib || true
	touch $@

.venv/test-ready: .venv/ready requirements-test.lock
	.venv/bin/python $(PIP) -r requirements-test.lock
	.venv/bin/python $(COMPILE) .venv/lib || true
	touch $@

# The Triton server lives apart: what carries it asks for another NumPy than the rest.
.venv-triton/ready: requirements-triton.lock
	test -x .venv-triton/bin/python || $(PYTHON) -m venv .venv-triton
	.venv-triton/bin/python $(PIP) -r requirements-triton.lock
	.venv-triton/bin/python $(COMPILE) .venv-triton/lib || true
	.venv-triton/bin/python -c "import ctypes; ctypes.CDLL('libpython3.11.so.1.0')" 2>/dev/null || $(LIBPYTHON)
	touch $@

# Debian packs the shared library of Python by itself; the server's Python backend needs it. No root.
LIBPYTHON = (cd .venv-triton && apt-get download -q libpython3.11 && dpkg-deb -x libpython3.11_*.deb libpython \
	&& cp libpython/usr/lib/*/libpython3.11.so.1.0 lib/ && rm -r libpython libpython3.11_*.deb)

# The container image and, beside it, its bill of materials (docs/image.md). BASE=…@sha256:… pins the base to the byte.
# A tree that differs from its commit is built without the commit's name.
ENGINE ?= $(notdir $(shell command -v podman || command -v docker))
IMAGE ?= localhost/unlabeled-python:0.1.0

image:
	$(ENGINE) build --file Containerfile --tag $(IMAGE) --build-arg IMAGE=$(IMAGE) $(if $(BASE),--build-arg BASE=$(BASE)) \
		--build-arg CODE_DIGEST=$$($(PYTHON) -c "from unlabeled.digest import code_digest; print(code_digest())") \
		--build-arg COMMIT=$$(test -n "$$(git status --porcelain)" || git rev-parse HEAD) $(BUILD_ARGUMENTS) .
	$(ENGINE) run --rm $(IMAGE) python -m pipelines.sbom > sbom.cdx.json

# Exact versions with hashes, from the ranges in pyproject.toml (needs uv).
lock:
	uv pip compile pyproject.toml --generate-hashes --python-version 3.11 --no-header --no-annotate -o requirements.lock
	uv pip compile pyproject.toml --extra test -c requirements.lock --generate-hashes --python-version 3.11 --no-header --no-annotate -o requirements-test.lock

clean:
	rm -rf .venv .venv-triton workspace .pytest_cache .mypy_cache .ruff_cache *.egg-info
