# Two commands, on a bare machine with Python 3.11 or 3.12:   make train   make test
# They run what you would type yourself, and print it. make test-all has the long proofs as well, make faults all 33 faults.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test test-all faults

train: .venv/installed
	$(BIN)/python prepare_data.py shakespeare_bpe
	$(BIN)/python train.py config/shakespeare.py
	$(BIN)/python sample.py out/shakespeare --prompt "JULIET:" --temperature=0.7
	@echo
	@echo "next:  $(BIN)/python sample.py out/shakespeare --prompt 'KING RICHARD:' --num_samples=3"
	@echo "       $(BIN)/python prepare_data.py my.txt --tokenizer=bpe       your own text; it prints how to train on it"
	@echo "       $(BIN)/python prepare_data.py shakespeare && $(BIN)/python bench.py ladder --quick      how fast, and why"

test: .venv/installed
	$(BIN)/python -m pytest -m "not slow"

test-all: .venv/installed
	$(BIN)/python -m pytest

faults: .venv/installed
	$(BIN)/python tests/faults.py

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -r requirements.txt
	touch $@
