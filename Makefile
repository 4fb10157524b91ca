# Everything happens in a virtual environment, .venv; a second run reuses what is there.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
MODEL  := examples/tiny-moe/tiny-moe-f16.gguf
EXTRAS := .[calibrate,convert,dev]
JOBS   ?= $(shell nproc 2>/dev/null || echo 2)

# pip takes the tested versions wherever it is called from
export PIP_CONSTRAINT := $(abspath constraints.txt)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# $(call timed,NAME,COMMAND) runs COMMAND and keeps its seconds for the list at the end of `make test` (tests/conftest.py).
timed = @mkdir -p build; echo '$(2)'; start=$$(date +%s); $(2) && echo "$(1) $$(($$(date +%s) - start))" >> build/seconds.txt

KERNEL_FILES := $(shell find kernels_cpp -type f)
PATCH_FILES  := $(wildcard patches/*)

.PHONY: help demo test test-quick forget-seconds test-kernels test-neon test-cuda test-vulkan test-python bench bench-speed bench-cuda
.PHONY: check-upstream bench-quality plots fmt lint clean wheels check-wheels bump test-more test-sanitizers test-hostile fuzz
.PHONY: test-interrupted test-stock

# what `make test-more` runs: each needs a build of its own, or long
MORE := test-sanitizers test-hostile fuzz test-interrupted test-stock test-vulkan check-upstream

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

# Prerequisites are named with the package that has them, before anything starts.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "need Python 3.11 or newer as $(PYTHON) (Debian, Ubuntu: apt install python3); or make PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "need Python's venv module (Debian, Ubuntu: apt install python3-venv)"; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || command -v g++ >/dev/null || \
	  { echo "need a C++17 compiler (Debian, Ubuntu: apt install g++)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(call timed,packages,$(BIN)/python -m pip install --quiet -e "$(EXTRAS)")
	@touch $@

$(VENV)/.runtime: $(VENV)/.installed $(PATCH_FILES) $(KERNEL_FILES)
	$(call timed,runtime,$(BIN)/mobie-export runtime build --jobs $(JOBS))
	@touch $@

demo: $(VENV)/.runtime  ## export the bundled model to one bit per expert weight and let it write
	@$(BIN)/python tools/demo.py $(MODEL)

test: forget-seconds test-kernels test-python  ## all tests: kernels, then Python (builds the runtime once)

forget-seconds:
	@rm -f build/seconds.txt

build/kernels/build.ninja: $(VENV)/.installed CMakeLists.txt $(wildcard kernels_cpp/CMakeLists.txt kernels_cpp/*.cmake)
	$(BIN)/cmake -S . -B build/kernels -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DCMAKE_BUILD_TYPE=Release

test-quick: $(VENV)/.installed  ## what needs neither PyTorch nor the runtime: two minutes at most
	$(BIN)/python -m pytest tests/unit

test-kernels: build/kernels/build.ninja  ## every kernel against the reference and the golden vectors
	$(call timed,kernels,$(BIN)/cmake --build build/kernels)
	$(call timed,kernel-tests,$(BIN)/ctest --test-dir build/kernels --output-on-failure --no-tests=error)

test-sanitizers: $(VENV)/.installed  ## the kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer
	$(BIN)/cmake -S . -B build/kernels-sanitized -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
	  -DCMAKE_BUILD_TYPE=None \
	  -DCMAKE_CXX_FLAGS="-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"
	$(BIN)/cmake --build build/kernels-sanitized
	$(BIN)/ctest --test-dir build/kernels-sanitized --output-on-failure --no-tests=error

test-hostile: $(VENV)/.installed  ## whatever reads files, on many odd ones (hypothesis)
	$(BIN)/python -m pytest --hypothesis-profile=more tests/unit/test_hostile.py

fuzz: $(VENV)/.installed  ## docs/reliability.md: codec, products and loading under libFuzzer (hours; ARGS='load --runs 1000')
	@command -v clang++ >/dev/null || { echo "need clang with libFuzzer (Debian, Ubuntu: apt install clang)"; exit 1; }
	$(BIN)/python tools/fuzz.py --jobs $(JOBS) $(ARGS)

test-interrupted: $(VENV)/.runtime  ## exports killed at every stage, on full disks, without their folder (an hour)
	$(BIN)/python -m tests.kill_matrix $(ARGS)

test-stock: $(VENV)/.runtime  ## files of --type q1_0, and an RPC server, of an unpatched build of the pinned release (long)
	$(BIN)/python -m tests.stock --jobs $(JOBS) $(ARGS)

test-more: $(MORE)  ## what `make test` leaves out: sanitizers, fuzzing, killed exports, an unpatched build, upstream's own tests (hours)

test-neon: $(VENV)/.installed  ## the NEON kernels, cross compiled, in an emulator with and without dot products
	@command -v aarch64-linux-gnu-g++ >/dev/null || \
	  { echo "need a cross compiler (Debian, Ubuntu: apt install g++-aarch64-linux-gnu)"; exit 1; }
	@command -v qemu-aarch64 >/dev/null || { echo "need qemu-aarch64 (Debian, Ubuntu: apt install qemu-user)"; exit 1; }
	$(BIN)/cmake -S . -B build/kernels-neon -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
	  -DCMAKE_BUILD_TYPE=Release -DCMAKE_TOOLCHAIN_FILE=$(abspath kernels_cpp/tests/aarch64-linux-gnu.cmake)
	$(BIN)/cmake --build build/kernels-neon
	$(BIN)/ctest --test-dir build/kernels-neon --output-on-failure --no-tests=error

test-cuda: $(VENV)/.installed  ## the CUDA kernels: compiled for all architectures, checked where there is a card
	@command -v nvcc >/dev/null || { echo "need nvcc of CUDA 12.8 or newer on the PATH (NVIDIA's CUDA toolkit)"; exit 1; }
	$(BIN)/cmake -S . -B build/kernels-cuda -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
	  -DCMAKE_BUILD_TYPE=Release -DMOBIE_CUDA=ON
	$(BIN)/cmake --build build/kernels-cuda
	$(BIN)/ctest --test-dir build/kernels-cuda --output-on-failure --no-tests=error -R check_cuda

test-vulkan: $(VENV)/.runtime  ## the Vulkan backend against the CPU, on a GPU or Mesa's software device (long to compile)
	$(BIN)/python -m tests.vulkan --jobs $(JOBS) $(ARGS)

test-python: $(VENV)/.runtime  ## format, exporter, runtime, parity
	$(BIN)/python -m pytest

bench: build/kernels/build.ninja  ## speed of every kernel on 256 MB of weights, one core
	$(BIN)/cmake --build build/kernels
	build/kernels/kernels_cpp/check_kernels --bench

bench-speed: $(VENV)/.runtime  ## docs/measured/speed.md: our type beside llama.cpp's others, hours (ARGS='--quick': minutes)
	$(BIN)/python -m tools.bench.speed $(ARGS)

bench-cuda:  ## docs/measured/cuda.md: the type on a GPU beside others (after: mobie-export runtime build --cuda)
	$(BIN)/python -m tools.bench.cuda $(ARGS)

bench-quality: $(VENV)/.runtime  ## docs/measured/quality.md: perplexity and divergence beside llama.cpp's other types (hours; ARGS=...)
	$(BIN)/python -m tools.bench.quality $(ARGS)

$(VENV)/.plot: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -e '.[plot]'
	@touch $@

plots: $(VENV)/.plot  ## the figures of README and docs/measured, from the tables there
	$(BIN)/python -m tools.bench.plots

check-upstream: $(VENV)/.runtime  ## upstream's own tests on the patched tree, and on the unpatched one (long)
	$(BIN)/python -m tools.release.check_upstream

$(VENV)/.wheels: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -e '.[wheels]'
	@touch $@

wheels: $(VENV)/.wheels  ## dist/: the package and the runtime as wheels (long; ARGS='--arch aarch64': cross compiled)
	$(BIN)/python -m tools.release.build_wheels --jobs $(JOBS) $(ARGS)

check-wheels: $(VENV)/.wheels  ## install both into an empty environment without a compiler; run on old CPUs in qemu
	$(BIN)/python -m tools.release.check_wheels $(ARGS)

bump: $(VENV)/.installed  ## PIN=x.y.z: rebase the series onto another llama-cpp-python, build it, test it (long)
	@[ -n "$(PIN)" ] || { echo "which release? make bump PIN=x.y.z"; exit 1; }
	$(BIN)/python -m tools.release.series bump $(PIN)
	$(BIN)/python -m tools.release.series check $(PIN) --jobs $(JOBS) $(ARGS)

fmt:  ## format Python and C++
	$(BIN)/ruff format . && $(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $$(find kernels_cpp -name '*.cpp' -o -name '*.h')

lint:  ## what fmt would change, ruff's findings and mypy's
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy

clean:  ## remove what make made, but not the runtime's cache
	rm -rf $(VENV) build demo
