# make demo   phantom data, training, export, synthesis, evaluation: about ten minutes on two CPU cores
# make test   lint and tests
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test clean

demo: $(BIN)/ready
	$(BIN)/python covidgan.py --stage all $(if $(wildcard out/ckpt.pt),--resume)
	$(BIN)/python export.py ckpt.pt
	$(BIN)/python export.py --features efficientnet-lite0
	$(BIN)/python infer_onnx.py data/phantom --side test --complement data/phantom/images --panel --out out/synthetic
	$(BIN)/python eval.py data/phantom out/synthetic --features features.onnx --train data/phantom --out out/eval --json out/eval/results.json

test: $(BIN)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -q

$(BIN)/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -r requirements.txt
	$(BIN)/pip install --quiet --no-deps torch-fidelity==0.4.0
	touch $@

clean:
	rm -rf out data/phantom data/phantom64 generator.onnx features.onnx
