# Everything the README promises. PYTHON is the interpreter the virtual environment is made with;
# set VENV to an existing environment to use the torch that is already there.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.tca_fast

.PHONY: demo docs test test-transformers test-long drill soak sanitize bench gpu lint clean

demo: $(INSTALLED)
	$(BIN)/tca-fast demo

test: $(INSTALLED) lint
	$(BIN)/python -m pytest -n auto --dist loadfile
	$(MAKE) test-transformers

# The parity suite once more, with the lowest transformers that is supported. The environment borrows
# everything else from the first one.
LOWEST := build/lowest
test-transformers: $(LOWEST)/.installed
	$(LOWEST)/bin/python -m pytest tests/test_architectures.py -n auto -p no:cacheprovider

$(LOWEST)/.installed: constraints-lowest.txt $(INSTALLED)
	$(BIN)/python -m venv --clear --without-pip $(LOWEST)
	$(BIN)/python -m pip --python $(LOWEST) install --quiet -r constraints-lowest.txt
	$(BIN)/python -c "import site; print('import site; site.addsitedir(%r)' % site.getsitepackages()[0])" \
		> $$(echo $(LOWEST)/lib/python3*/site-packages)/borrowed.pth
	touch $@

# Ten thousand random cases of every random test for the C++ backend and 500 for the others, with
# their count, 200 random pairs through both steps, ten thousand damaged checkpoints,
# configurations and data files, and the cases marked slow, which need 9 GB and run one after another.
test-long: $(INSTALLED)
	$(BIN)/python -m pytest tests/test_ops*.py tests/test_kernels.py tests/test_cuda_operators.py \
		tests/test_bridging_shared.py tests/test_bridging_packing.py tests/test_planning_memory.py \
		tests/test_training_fuzz.py tests/test_data_fuzz.py tests/test_rank_counts.py \
		-n auto --dist loadgroup --hypothesis-profile=long --hypothesis-show-statistics

# Training on two ranks is killed, its disk filled and its checkpoints damaged N times; every resume is
# compared bit for bit. Goes on where it was stopped; the results are in build/drill/summary.json.
N ?= 200
drill: $(INSTALLED)
	$(BIN)/python tests/drill.py --faults $(N) --out build/drill

# Two ranks train for MINUTES; memory and open files must not grow.
MINUTES ?= 30
soak: $(INSTALLED)
	$(BIN)/python tests/soak.py --minutes $(MINUTES) --out build/soak

# The extension compiled with AddressSanitizer and UndefinedBehaviorSanitizer, in a copy of the package;
# then with ThreadSanitizer and threads that it knows (it wants the layout of memory left unshuffled);
# then the CUDA kernels in the emulator, every access watched, threads and blocks in three orders.
SANITIZED := build/sanitized
SANITIZED_TESTS := tests/test_ops.py tests/test_ops_random.py tests/test_csrc_arguments.py -k "not reference"
ADDRESS := -fsanitize=address,undefined -fno-sanitize-recover=undefined -D_GLIBCXX_ASSERTIONS
sanitized = rm -rf $(SANITIZED) && mkdir -p $(SANITIZED) && cp -r tca_fast $(SANITIZED) && \
	rm -f $(SANITIZED)/tca_fast/*.so && cp -r kernels/src $(SANITIZED)/tca_fast/kernels && \
	CFLAGS="$(1) -g" LDFLAGS="$(1) $(2)" \
		$(BIN)/python setup.py -q build_ext --build-temp $(SANITIZED)/objects --build-lib $(SANITIZED)
sanitize: $(INSTALLED)
	$(call sanitized,$(ADDRESS),)
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$(SANITIZED) $(BIN)/pytest $(SANITIZED_TESTS)
	c++ -std=c++20 -O1 -g -fPIC -fsanitize=thread -c tests/sanitizers/parallel_for.cpp -o build/parallel_for.o
	$(call sanitized,-fsanitize=thread,$(CURDIR)/build/parallel_for.o)
	LD_PRELOAD="$$(c++ -print-file-name=libtsan.so)" TSAN_OPTIONS=ignore_noninstrumented_modules=1 \
		PYTHONPATH=$(SANITIZED) setarch -R $(BIN)/pytest -s $(SANITIZED_TESTS)
	for order in random ascending descending; do \
		CUDA_EMULATION_ACCESSES=1 CUDA_EMULATION_ORDER=$$order $(BIN)/pytest tests/test_cuda_generation.py \
			tests/test_cuda_inference.py tests/test_cuda_operators.py tests/test_cuda_screening.py \
			tests/test_cuda_slab.py tests/test_cuda_topk.py -k "not equals_sorting" || exit 1; done

# Every operator and the layer, timed on this machine alone. BENCH takes options of the suites, such
# as BENCH="--only 7B"; benchmarks/README.md has them.
RESULTS ?= benchmarks/results/$(shell git describe --always --dirty).json
bench: $(INSTALLED)
	$(BIN)/python -m pytest benchmarks/bench_layer.py benchmarks/bench_ops.py -q --benchmark-quiet \
		--out $(RESULTS) $(BENCH)

# Everything a GPU has to show, with the Python of that machine and nothing installed but the package
# itself; benchmarks/gpu/__main__.py names the stages. DEVICE=cpu rehearses them without a GPU.
STAGE ?= all
OUT ?= gpu-results
DEVICE ?= cuda
STAGE_SECONDS ?= 480
gpu:
	$(PYTHON) -c "import tca_fast.kernels" 2>/dev/null || \
		$(PYTHON) -m pip install --quiet --no-build-isolation --no-deps -e .
	$(PYTHON) -m benchmarks.gpu --stage $(STAGE) --out $(OUT) --device $(DEVICE) \
		--seconds $(STAGE_SECONDS)

# The documentation site, in build/site; a link that leads nowhere is an error.
docs: $(INSTALLED)
	$(BIN)/python -m mkdocs build --strict

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch comes first: setup.py and deepspeed look for it when they are installed, and a torch
# that is already there is kept if it fits.
$(INSTALLED): pyproject.toml setup.py constraints.txt $(wildcard csrc/*.* csrc/*/*.*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt pip setuptools wheel
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e ".[deepspeed,triton,kernels,docs,test]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info tca_fast/*.so
