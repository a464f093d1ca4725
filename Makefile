# `make test` and `make demo` set up .venv themselves, from pinned constraints.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
OUT ?= out/demo
# TensorRT-RTX has wheels for x86-64 only.
ifeq ($(shell uname -m),x86_64)
EXTRAS := dev,trt-rtx
else
EXTRAS := dev
endif

.PHONY: setup demo fuzz test test-container lint bench soak clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	# Its requirements name old versions and all of Jupyter; the tests compare our importer with its reader alone.
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps nuscenes-devkit
	touch $@

demo: setup
	$(BIN)/fmdeploy demo --out $(OUT)

# Two test processes of one thread each: two thread pools on two cores are many times slower than either. Files in their
# own order: xdist would leave those with few tests to the end, which are the long ones, and one process would idle.
test: setup
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations 15

# The runtime image on a real engine, installed and started where there is none; ARCH=arm64 runs it under qemu.
test-container: setup
	tests/container/engine.sh $(ARCH)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Ratios on this machine, where a benchmark needs them from the artifacts of the demo.
bench: demo
	$(BIN)/python benchmarks/demo_numbers.py --demo $(OUT)
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/record.py
	$(BIN)/python benchmarks/cached_step.py
	$(BIN)/python benchmarks/int8_cpu.py --bundle $(OUT)/bundle
	$(BIN)/python benchmarks/int8_networks.py
	$(BIN)/python benchmarks/qat_step.py --threads 1
	$(BIN)/python benchmarks/ptq_peers.py --demo $(OUT) --work $(OUT)/peers
	$(BIN)/python benchmarks/qad_recovery.py --demo $(OUT)
	$(BIN)/python benchmarks/estimate_orin.py
	$(BIN)/python benchmarks/estimate_cpu.py
	$(BIN)/python benchmarks/runtime_overhead.py --bundle $(OUT)/bundle
	$(BIN)/python benchmarks/supervised_overhead.py --bundle $(OUT)/bundle
	$(BIN)/python benchmarks/serve_throughput.py --bundle $(OUT)/bundle
	$(BIN)/python benchmarks/serve_throughput.py --bundle $(OUT)/bundle --supervisor
	$(BIN)/python benchmarks/cold_start.py $(OUT)/bundle
	$(BIN)/python benchmarks/false_alarms.py --demo $(OUT)
	$(BIN)/python benchmarks/label_draws.py --demo $(OUT)

# 30 minutes at 20 % faults through the real server, and 10,000 frames on the model of the demo.
soak: demo
	$(BIN)/python benchmarks/soak.py --seconds 1800
	$(BIN)/python benchmarks/soak.py --frames 10000 --bundle $(OUT)/bundle

# Mutated manifests and ONNX files through the validator, and writers that are killed; `make test` runs a short version.
fuzz: setup
	$(BIN)/python benchmarks/fuzz.py

clean:
	rm -rf $(VENV) out build dist
