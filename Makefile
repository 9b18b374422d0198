# make demo        phantom data, training, export, synthesis, evaluation: ten minutes on two CPU cores, five with bfloat16
# make test        lint and tests, five minutes on two cores; make test-long: faults, browser, tables, benchmark
# make gpu         tests and times on an NVIDIA GPU: ten minutes; stopped, it goes on; docs/gpu.json
# make web         paint a map in the browser and see the CT: http://localhost:8000/web/, or make web PORT=8642
PYTHON ?= python3
PORT ?= 8000
BIN := .venv/bin
ORT_WEB = $(shell grep -om1 'onnxruntime-web@[0-9.]*' web/paint.js)

.PHONY: demo test test-long gpu web runtime clean

# glibc keeps what tensors free, and does not return it page by page to ask for it again: 14 to 17 % of a step
demo: export MALLOC_TRIM_THRESHOLD_ = 2147483647
demo: export MALLOC_MMAP_THRESHOLD_ = 2147483647
# in a folder of its own: a demo that was stopped goes on, and no other run is touched
demo: $(BIN)/ready
	$(BIN)/python covidgan.py --stage all --out out/demo $(if $(wildcard out/demo/ckpt.pt),--resume)
	$(BIN)/python export.py out/demo -o out/demo/generator.onnx
	$(BIN)/python export.py --features efficientnet-lite0 -o out/demo/features.onnx
	$(BIN)/python infer_onnx.py data/phantom --side test --complement data/phantom/images --panel \
		--model out/demo/generator.onnx --out out/demo/synthetic
	$(BIN)/python eval.py data/phantom out/demo/synthetic --features out/demo/features.onnx --train data/phantom \
		--out out/demo/eval --json out/demo/eval/results.json

test: $(BIN)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile -m "not long"

test-long: $(BIN)/ready
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile -m long

gpu: $(BIN)/ready
	@$(BIN)/python bench.py --device cuda --json docs/gpu.json

web:
	@$(MAKE) --silent runtime || echo "no npm package: the page takes ONNX Runtime Web from its public copy"
	@told=$$($(PYTHON) -c 'import socket; socket.create_server(("127.0.0.1", int("$(PORT)")))' 2>&1 | tail -n 1); \
		[ -z "$$told" ] || { echo "error: port $(PORT): $$told: give another, as in make web PORT=8642" >&2; exit 2; }
	@echo "http://localhost:$(PORT)/web/   (Ctrl-C stops it)"
	@$(PYTHON) -m http.server $(PORT) --bind 127.0.0.1

# of ONNX Runtime Web what the page needs, from npm: two files of 14 MB; the page itself holds them to their hashes
runtime: web/vendor/$(ORT_WEB)
web/vendor/$(ORT_WEB):
	rm -rf web/vendor && mkdir -p web/vendor
	npm pack --silent --pack-destination web/vendor $(ORT_WEB)
	tar -xzf web/vendor/*.tgz -C web/vendor --strip-components=2 $(addprefix package/dist/, \
		ort.wasm.bundle.min.mjs ort-wasm-simd-threaded.wasm)
	rm web/vendor/*.tgz && touch $@

$(BIN)/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -r requirements.txt
	$(BIN)/pip install --quiet --no-deps torch-fidelity==0.4.0
	touch $@

clean:
	rm -rf out/demo data/phantom data/phantom64
