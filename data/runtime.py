"""ONNX Runtime without telemetry, for all that import it: `from data.runtime import ort`.

Its official builds from 1.29 on keep records in the user's home and send them: of the machine, and of each model its
file's name, its graph's name and hashes.
"""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read as it is imported; then nothing is kept, nor sent

import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_state

ort.disable_telemetry_events()  # on Windows, where the variable does not count

__all__ = ["ort", "ort_state"]
