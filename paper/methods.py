"""The methods besides covidgan, by name: where export.py looks for one that covidgan.py does not know."""

import covidgan
from paper import rivals

METHODS: dict[str, type[covidgan.Method]] = rivals.METHODS
