"""The readers of readers.py under a fuzzer that follows which code an input reaches. By hand, and no part of the tests.

    pip install atheris                                     # 3.0.0 was used; it is in no requirement
    python tests/faults/fuzz.py slices_map -runs=100000     # a reader, and libFuzzer's own options

It begins with the reader's right inputs, and stops at the first that is neither read right nor refused in one line.
"""

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["PIL.PngImagePlugin", "data", "covidgan", "infer_onnx", "nibabel"]):
    import readers


def main() -> None:
    """Fuzz the reader named."""
    name, *options = sys.argv[1:]
    reader, folder = readers.READERS[name], Path(tempfile.mkdtemp(prefix="fuzz_"))
    (folder / "seeds").mkdir()
    for k, content in enumerate(reader.seeds()):
        (folder / "seeds" / str(k)).write_bytes(content)
    path = folder / reader.file

    def attempt(content: bytes) -> None:
        path.write_bytes(content)
        if (fault := readers.fault_of(reader, path)) not in ("", "refused"):
            raise AssertionError(fault)

    atheris.Setup([sys.argv[0], *options, str(folder / "seeds")], attempt)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
