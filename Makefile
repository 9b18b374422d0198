# make demo   phantom data, training, export, synthesis, evaluation: about ten minutes on two CPU cores
# make test   lint and tests
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test clean

demo: $(BIN)/ready
	$(BIN)/python covidgan.py --stage all --resume

test: $(BIN)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -q

$(BIN)/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -r requirements.txt
	touch $@

clean:
	rm -rf out synthetic eval data/phantom data/phantom64 generator.onnx
