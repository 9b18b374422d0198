"""The paper's experiments, and the methods that they need beside covidgan.

METHODS: name -> covidgan.Method. export.py looks here for a name that a checkpoint gives and covidgan.py does not know.
"""

import functools
from typing import Any


@functools.cache  # one dict, whoever asks
def _methods() -> dict[str, Any]:
    from paper import rivals, study

    return {**rivals.METHODS, study.Study.name: study.Study}


def __getattr__(name: str) -> Any:
    """METHODS, brought in when it is asked for: `python -m paper.rivals` comes through here before the rivals."""
    if name != "METHODS":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _methods()
