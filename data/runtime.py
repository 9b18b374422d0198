"""ONNX Runtime without telemetry, which from 1.29 on tells of machine and models: `from data.runtime import ort`."""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read as it is imported; then nothing is kept, nor sent

import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_state

ort.disable_telemetry_events()  # on Windows, where the variable does not count

__all__ = ["ort", "ort_state"]
