# make test, make demo: the two commands of the README. Each makes .venv itself.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
WHEEL := build/wheel
PIP := .venv/bin/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
SOURCES := pyproject.toml CMakeLists.txt build_backend/dualbin_build.py $(wildcard cmake/*.cmake) $(shell find src cuda -type f \
	-not -name '*.so' -not -path '*/__pycache__/*')

# Processes of the suites run side by side; more threads than processors make all of them slow.
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
TEST := OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n $(JOBS) --dist worksteal

CPP_SOURCES := find cuda tests -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h'

.PHONY: test demo wheel versions docs fuzz soak parity lint format dev clean sanitize test-native test-python

test: lint test-native test-python

demo: .venv/installed
	.venv/bin/python examples/demo.py --out demo-out $(DEMO)

# The full product of the parity suite; `make test` runs a selection that covers every pair.
parity: .venv/tools
	$(TEST) -m parity tests/parity

# Every wrong argument, and mutated files for dualbin.io.load; `make test` runs a part of both.
FUZZ ?= 100000
fuzz: .venv/tools .venv/installed
	DUALBIN_FUZZ=$(FUZZ) DUALBIN_ALL_ARGUMENTS=1 $(TEST) tests/test_io_fuzz.py tests/arguments

# Random operations against the reference, and processes that are killed while they train, save or exchange rows, for longer than
# `make test` does. Without make: `scripts/gpu_check.sh OUT faults`, on the CPUs of its machine.
SOAK ?= 100000
soak: .venv/tools .venv/installed
	DUALBIN_SOAK=$(SOAK) DUALBIN_KILLS=200 DUALBIN_PARTS=$(JOBS) $(TEST) tests/torch/test_soak.py tests/test_io_faults.py \
		tests/torch/test_faults.py tests/torch/test_dying_ranks.py

lint: .venv/tools
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	$(CPP_SOURCES) | xargs .venv/bin/clang-format --dry-run --Werror
	.venv/bin/python scripts/typed_examples.py build/typed
	.venv/bin/mypy src/dualbin build/typed

format: .venv/tools
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .
	$(CPP_SOURCES) | xargs .venv/bin/clang-format -i

# The C++ tests of the CPU back end, linked without CUDA, in the build folder of the wheel, which has compiled that back end.
test-native: .venv/installed
	.venv/bin/cmake --build $(WHEEL) --target cpu_tests
	.venv/bin/ctest --test-dir $(WHEEL) --label-regex '^cpu$$' --no-tests=error --output-on-failure

test-python: .venv/tools .venv/installed
	$(TEST) -m "not parity"

# The C++ tests under AddressSanitizer with UBSan, and under ThreadSanitizer; then Python with each of these libraries: wrong operands and
# arguments, mutated files and the soak under the first, tables in threads under the second, which knows nothing of OpenMP's threads.
SANITIZED := build/sanitize/site
SANITIZE_PYTHON := OMP_NUM_THREADS=1 PYTHONPATH=$(SANITIZED) .venv/bin/python -m pytest -q -p no:cacheprovider
sanitize: .venv/tools
	set -e; for sanitizer in address,undefined thread; do \
		.venv/bin/cmake -S . -B build/sanitize/$$sanitizer -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/.venv/bin/ninja \
			-DDUALBIN_SANITIZE=$$sanitizer -DDUALBIN_CUDA=OFF -DDUALBIN_PYTHON=ON -DPython_EXECUTABLE=$(CURDIR)/.venv/bin/python; \
		.venv/bin/cmake --build build/sanitize/$$sanitizer; \
		.venv/bin/ctest --test-dir build/sanitize/$$sanitizer --output-on-failure; \
	done
	rm -rf $(SANITIZED)
	mkdir -p $(SANITIZED)
	cp -r src/dualbin $(SANITIZED)
	find $(SANITIZED) -name '*.so' -delete
	.venv/bin/cmake --install build/sanitize/address,undefined --prefix $(SANITIZED)
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:quarantine_size_mb=16 UBSAN_OPTIONS=print_stacktrace=1 \
		$(SANITIZE_PYTHON) -s tests/test_native_arguments.py tests/torch/test_operator_arguments.py tests/jax/test_handler_arguments.py \
		tests/torch/test_soak.py tests/test_io_fuzz.py tests/test_float_environment.py tests/arguments -k "not (test_wrong_arguments and jax)"
	.venv/bin/cmake --install build/sanitize/thread --prefix $(SANITIZED)
	LD_PRELOAD="$$($(CXX) -print-file-name=libtsan.so)" TSAN_OPTIONS=halt_on_error=1 $(SANITIZE_PYTHON) -s tests/test_threads.py

# Work on the sources without installing: the module goes to src/dualbin, and .venv imports from src.
dev: .venv/packages .venv/tools
	.venv/bin/cmake -S . -B build/dev -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/.venv/bin/ninja -DDUALBIN_INPLACE=ON -DDUALBIN_PYTHON=ON \
		-DPython_EXECUTABLE=$(CURDIR)/.venv/bin/python $(CMAKE_ARGS)
	.venv/bin/cmake --build build/dev
	.venv/bin/python -m pip --quiet uninstall --yes dualbin
	echo $(CURDIR)/src > $$(.venv/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/dualbin-dev.pth
	touch .venv/installed

# One wheel for this machine, tested as a user meets it; DUALBIN_CPU_WHEEL=1 leaves CUDA out.
wheel:
	PYTHON=$(PYTHON) scripts/wheel_check.sh dist

# The wheel of `make wheel` with the lowest and the newest releases of PyTorch and JAX. Downloads them.
versions:
	PYTHON=$(PYTHON) scripts/versions.sh

# The pages as a site, in build/site. Needs no network once its tools are there.
docs: .venv/docs-tools
	NO_MKDOCS_2_WARNING=1 .venv/docs/bin/mkdocs build

clean:
	rm -rf build dist .venv .pytest_cache .ruff_cache .mypy_cache .hypothesis demo-out
	find src -name '*.so' -delete

.venv/created:
	$(PYTHON) -m venv .venv
	touch $@

.venv/build-tools: .venv/created constraints.txt
	$(PIP) "scikit-build-core>=0.10" "pybind11>=2.13" cmake ninja
	touch $@

.venv/packages: .venv/build-tools constraints.txt
	$(PIP) torch jax optax numpy safetensors matplotlib tqdm
	touch $@

.venv/tools: .venv/installed constraints.txt
	$(PIP) accelerate basedpyright clang-format ema-pytorch flatbuffers flax gguf hypothesis ml_dtypes mypy orbax-checkpoint peft pytest pytest-timeout \
		pytest-xdist ruff transformers
	touch $@

.venv/docs-tools: .venv/created constraints.txt
	$(PYTHON) -m venv .venv/docs
	.venv/docs/bin/python -m pip --disable-pip-version-check install --quiet -c constraints.txt mkdocs-material "mkdocstrings[python]"
	touch $@

# The build tools and the headers of jaxlib are there by now, so nothing is downloaded a second time.
.venv/installed: .venv/packages $(SOURCES)
	rm -f .venv/lib/python3*/site-packages/dualbin-dev.pth
	$(PIP) --no-build-isolation --no-deps --force-reinstall -C build-dir=$(WHEEL) -C cmake.define.DUALBIN_NATIVE_TESTS=ON .
	touch $@
