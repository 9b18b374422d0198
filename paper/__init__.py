"""The paper's experiments, and the methods that they need beside covidgan.

METHODS: name -> covidgan.Method. export.py looks here for a name that a checkpoint gives and covidgan.py does not know.
"""

import covidgan

METHODS: dict[str, type[covidgan.Method]] = {}
