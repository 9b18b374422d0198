"""The paper's experiments, and the methods that they need beside covidgan.

METHODS: name -> covidgan.Method. export.py looks here for a name that a checkpoint gives and covidgan.py does not know.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    """METHODS, brought in when it is asked for: `python -m paper.rivals` comes through here before the rivals."""
    if name != "METHODS":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from paper.rivals import METHODS
    from paper.study import Study

    return METHODS | {Study.name: Study}
