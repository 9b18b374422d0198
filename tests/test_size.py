"""The code stays small: whoever adds takes away."""

import pytest
from conftest import ROOT

BUDGETS = {  # files, added up: lines
    "covidgan.py": 1250,
    "infer_onnx.py": 800,
    "eval.py": 850,
    "export.py features.py": 800,
    "bench.py": 400,
    "data/*.py": 1900,
    "paper/*.py": 2500,
    "web/paint.js": 850,
    "web/*.js": 920,
    "README.md": 120,
    "paper/README.md": 120,
    "tests/**/*.py": 8930,
}


@pytest.mark.parametrize("files", BUDGETS)
def test_files_keep_to_their_lines(files):
    lines = sum(path.read_text().count("\n") for pattern in files.split() for path in ROOT.glob(pattern))
    over = lines - BUDGETS[files]
    assert lines > 0 and over <= 0, f"{files}: {lines} lines, {over} over the budget: take something away"
