"""What do the ggml libraries of the installed llama_cpp have? They are loaded by ctypes, without llama_cpp."""

import ctypes
import sys
from pathlib import Path

import numpy as np

from mobie_export.runtime import installed

PLAINEST_CPUS = ("sse42", "armv8.0_1")  # of the wheels' variants, see tools/release/build_wheels.py


def kernel_names() -> list[str]:
    """Instruction sets the installed ggml-cpu has MoBiE kernels for on this CPU, the chosen one last.

    Empty when the library does not know the type. Asking for a symbol is safe on any llama.cpp; asking ggml for the
    name of an unknown type id is not, it would read past a table.
    """
    library = cpu_library()
    if library is None or not hasattr(library, "mobie_kernels_best"):
        return []
    pointer = ctypes.POINTER(ctypes.c_char_p)  # the first member of mobie_kernels is its name
    library.mobie_kernels_all.restype = ctypes.POINTER(pointer)
    library.mobie_kernels_all.argtypes = [ctypes.POINTER(ctypes.c_int)]
    library.mobie_kernels_best.restype = pointer
    n = ctypes.c_int()
    every = library.mobie_kernels_all(ctypes.byref(n))
    known = [every[i][0].decode() for i in range(n.value)]
    best = library.mobie_kernels_best()[0].decode()
    return [*(name for name in known if name != best), best]


def cpu_library() -> ctypes.CDLL | None:
    """ggml-cpu, with our kernels in a patched runtime; None where no runtime is installed."""
    # One library, or (in the wheel) one for each kind of CPU: each has all our kernels, the plainest loads everywhere.
    lib = installed.site() / "llama_cpp" / "lib"
    names = ("libggml-cpu.so", "libggml-cpu.dylib", "ggml-cpu.dll", *(f"libggml-cpu-{v}.so" for v in PLAINEST_CPUS))
    path = next((lib / name for name in names if (lib / name).exists()), None)
    return None if path is None else ctypes.CDLL(str(path))


def base_library() -> Path:
    """Where the ggml library with the quantizers would be; any llama_cpp has it, patched or not."""
    names = {"win32": "ggml-base.dll", "darwin": "libggml-base.dylib"}
    return installed.site() / "llama_cpp" / "lib" / names.get(sys.platform, "libggml-base.so")


class Quantizers:
    """ggml's quantizers, from the library given; OSError where it cannot be loaded. May be used in threads."""

    def __init__(self, path: Path):
        self._library = ctypes.CDLL(str(path))
        i64, pointer = ctypes.c_int64, ctypes.c_void_p
        self._library.ggml_row_size.restype = ctypes.c_size_t
        self._library.ggml_row_size.argtypes = [ctypes.c_int, i64]
        self._library.ggml_quantize_chunk.restype = ctypes.c_size_t
        # The last argument exists in ik_llama.cpp; where it does not, nobody looks at it.
        self._library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, i64, i64, i64, pointer, pointer]

    def row_bytes(self, type_id: int, columns: int) -> int:
        return self._library.ggml_row_size(type_id, columns)

    def quantize(
        self,
        type_id: int,
        weights: np.ndarray,  # float32 [rows, columns]
        importance: np.ndarray | None = None,  # float32 [columns]
    ) -> np.ndarray:  # uint8 [rows, bytes of a row]
        rows, columns = weights.shape
        weights = np.ascontiguousarray(weights, np.float32)
        quantized = np.empty((rows, self.row_bytes(type_id, columns)), np.uint8)
        given = None if importance is None else importance.ctypes.data
        pointers = weights.ctypes.data, quantized.ctypes.data
        done = self._library.ggml_quantize_chunk(type_id, *pointers, 0, rows, columns, given, None)
        assert done == quantized.nbytes, f"type {type_id}: {done} bytes quantized, {quantized.nbytes} expected"
        return quantized
