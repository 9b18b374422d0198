"""The paper's experiments, and the methods that they need besides covidgan.

METHODS: name -> covidgan.Method. export.py looks here for a name in a checkpoint that covidgan.py does not know.
"""

import functools
from typing import Any


@functools.cache  # the same dict for everyone
def _methods() -> dict[str, Any]:
    from paper import rivals, study

    return {**rivals.METHODS, study.Study.name: study.Study}


def __getattr__(name: str) -> Any:
    """METHODS, imported on first use: `python -m paper.rivals` imports this package before the rivals."""
    if name != "METHODS":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _methods()
