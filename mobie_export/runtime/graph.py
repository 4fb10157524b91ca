"""A model in llama.cpp, of whose graph a part is computed at a time, with some of its numbers put in place.

llama.cpp calls back before every operation of a graph and, where it is asked to, behind it (`cb_eval`). Before one the
callback decides whether it is computed; behind one it reads what came out, or puts something else there. So a layer of
any architecture can be run alone: what it needs is found by following the graph from its output to its input.

The callback looks into `ggml_tensor` as the pinned llama.cpp has it. Everything is on the CPU, one sequence at a time.
"""

import contextlib
import ctypes
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mobie_export.errors import BAD_INPUT, NO_RUNTIME, MobieError
from mobie_export.runtime import libggml

ERROR = 4  # GGML_LOG_LEVEL_ERROR
NONE = 0  # GGML_OP_NONE: nothing is computed
DTYPES = {0: np.dtype("<f4"), 26: np.dtype("<i4")}  # of GGML_TYPE_F32 and GGML_TYPE_I32
VIEWS = ("VIEW", "RESHAPE", "PERMUTE", "TRANSPOSE")  # operations that write nothing
OUTPUT = "result_output"  # the logits


class _Tensor(ctypes.Structure):
    """struct ggml_tensor."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
        ("extra", ctypes.c_void_p),
        ("padding", ctypes.c_char * 8),
    )

    def array(self) -> np.ndarray:
        """Its numbers where they are, four dimensions, slowest first."""
        dtype = DTYPES[self.type]
        shape, strides = tuple(self.ne)[::-1], tuple(self.nb)[::-1]
        extent = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + dtype.itemsize
        memory = (ctypes.c_char * extent).from_address(self.data)
        return np.ndarray(shape, dtype, memory, strides=strides)


@dataclass(frozen=True)
class Node:
    """An operation of the graph."""

    name: str
    op: int
    op_name: str
    sources: tuple["int | str", ...]  # in ggml's order: nodes by number; weights, inputs, caches by name
    root: "int | str"  # whose memory it writes to: itself, or what it is a view of


@dataclass
class Nodes:
    """A graph's operations, in the order in which they are computed."""

    every: list[Node]
    _names: dict[str, int] = field(init=False)
    _writers: dict["int | str", list[int]] = field(init=False)

    def __post_init__(self) -> None:
        self._names = {node.name: i for i, node in enumerate(self.every)}
        self._writers = {}
        for i, node in enumerate(self.every):
            if node.op_name not in VIEWS and node.root != i:  # into a cache, or in place
                self._writers.setdefault(node.root, []).append(i)

    def find(self, name: str) -> int | None:
        return self._names.get(name)

    def where(self, fits: Callable[[Node], bool]) -> list[int]:
        return [i for i, node in enumerate(self.every) if fits(node)]

    def needed(self, ends: Iterable["int | str"], starts: Iterable[int]) -> tuple[set[int], set[str]]:
        """(operations, names of all else) that the ends follow from, without what is before the starts."""
        stop, found, others = set(starts), set[int](), set[str]()
        left = [(end, len(self.every)) for end in ends]
        while left:
            tensor, before = left.pop()
            if isinstance(tensor, str):
                others.add(tensor)
                root: int | str = tensor
            else:
                root = self.every[tensor].root
                if tensor not in stop and tensor not in found:
                    found.add(tensor)
                    left += [(source, tensor) for source in self.every[tensor].sources]
            # what was written into the same memory earlier is read, too
            for writer in self._writers.get(root, ()):
                if writer < before and writer not in found and writer not in stop and writer != tensor:
                    left.append((writer, writer + 1))
        return found, others


@dataclass(frozen=True)
class Part:
    """What is computed of a graph."""

    compute: frozenset[int]
    put: Mapping[int, str] = field(default_factory=dict)  # node -> name of what takes the place of its output
    # name -> (node, number of its source, or None for its output), as it is when the node has its turn
    take: Mapping[str, tuple[int, int | None]] = field(default_factory=dict)


class Model:
    """A GGUF in the installed llama.cpp, mapped. MobieError where it does not load."""

    def __init__(self, path: Path, length: int, threads: int):
        """length: tokens of a sequence at most."""
        import llama_cpp

        self._llama: Any = llama_cpp
        self._nodes: dict[int, Nodes] = {}  # by the number of tokens
        self._context = self._model = None
        self._path, self.length = path, length
        self._part: Part | None = None  # None: the graph is looked at
        self._learnt: list[tuple[int, int, list[int], int]] = []  # pointer, operation, sources, what it is a view of
        self._names: dict[int, str] = {}  # by pointer
        self._taken: dict[str, np.ndarray] = {}
        base = ctypes.CDLL(str(libggml.base_library()))
        base.ggml_op_name.restype, base.ggml_op_name.argtypes = ctypes.c_char_p, [ctypes.c_int]
        base.ggml_get_name.restype, base.ggml_get_name.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
        self._base = base
        self._called = llama_cpp.ggml_backend_sched_eval_callback(self._call)  # as long as llama.cpp may call it
        llama_cpp.llama_log_set(_listener(), ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers, params.use_extra_bufts = 0, False  # nothing is copied
        params.load_mode = llama_cpp.LLAMA_LOAD_MODE_MMAP
        _SAID.clear()
        with _not_prefetched():
            self._model = llama_cpp.llama_model_load_from_file(os.fsencode(path), params)
        if not self._model:
            raise self._failed("does not load")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = length
        params.n_seq_max, params.n_threads, params.n_threads_batch = 1, threads, threads
        params.type_k = params.type_v = 0  # float32
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.offload_kqv, params.op_offload, params.swa_full = False, False, True
        params.cb_eval = self._called
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise self._failed("makes no context")

    def close(self) -> None:
        for name, free in (("_context", self._llama.llama_free), ("_model", self._llama.llama_model_free)):
            if getattr(self, name):
                free(getattr(self, name))
            setattr(self, name, None)

    def nodes(self, n_tokens: int) -> Nodes:
        """The graph of a sequence of so many tokens."""
        if n_tokens not in self._nodes:
            self._part, self._at, self._learnt, self._names = None, 0, [], {}
            self._decode([0] * n_tokens)
            self._nodes[n_tokens] = self._known()
        return self._nodes[n_tokens]

    def run(self, tokens: list[int], part: Part, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What `part` takes, arrays of four dimensions, slowest first. given: name -> float32, of `part.put`."""
        self._expected = self.nodes(len(tokens)).every
        self._part, self._given, self._taken, self._at = part, given, {}, 0
        self._stops = {*part.put, *(i for i, _ in part.take.values())}
        self._last = max(self._stops)
        self._decode(tokens)
        if missing := set(part.take) - set(self._taken):
            raise self._failed(f"computes no {', '.join(sorted(missing))}")
        return self._taken

    def _decode(self, tokens: list[int]) -> None:
        llama = self._llama
        self._error: BaseException | None = None
        batch = llama.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for i, token in enumerate(tokens):
                batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, i, 1
                batch.seq_id[i][0], batch.logits[i] = 0, 1
            llama.llama_memory_clear(llama.llama_get_memory(self._context), True)
            code = llama.llama_decode(self._context, batch)
        finally:
            llama.llama_batch_free(batch)
        if self._error is not None:
            raise self._error
        if code:
            raise self._failed(f"fails with code {code}")

    # ---- called by llama.cpp

    def _call(self, pointer: int, ask: bool, _: object) -> bool:
        try:
            return self._before(pointer) if ask else self._behind(pointer)
        except BaseException as e:  # ctypes would print and forget it
            self._error = self._error or e
            return bool(ask)  # the next call is the one behind, which ends it

    def _before(self, pointer: int) -> bool:
        """Whether a call behind the operation is wanted."""
        at, self._at = self._at, self._at + 1
        tensor = _Tensor.from_address(pointer)
        if self._part is None:
            self._look(pointer)
            tensor.op = NONE
            return False
        node = self._expected[at]
        assert tensor.name == node.name.encode(), f"another graph: {tensor.name!r} in place of {node.name}"
        tensor.op = node.op if at in self._part.compute else NONE  # the graph may be one of before
        return at in self._stops

    def _behind(self, pointer: int) -> bool:
        """Whether to go on."""
        assert self._part is not None
        at, tensor = self._at - 1, _Tensor.from_address(pointer)
        if self._error is not None:
            return False
        if at in self._part.put:
            tensor.array()[...] = self._given[self._part.put[at]].reshape(tuple(tensor.ne)[::-1])
        for name, (i, source) in self._part.take.items():
            if i == at:
                read = tensor if source is None else _Tensor.from_address(tensor.src[source])
                self._taken[name] = read.array().copy()
        return at < self._last

    def _look(self, pointer: int) -> None:
        """Keeps in mind what an operation is and what it reads."""
        tensor = _Tensor.from_address(pointer)
        if self._base.ggml_get_name(pointer) != tensor.name:
            raise MobieError(
                NO_RUNTIME,
                "the installed llama.cpp is not the pinned one: its tensors are laid out otherwise",
                todo="mobie-export runtime build",
            )
        sources = [p for p in tensor.src if p]
        for p in (pointer, *sources, tensor.view_src):
            if p:
                self._names[p] = _Tensor.from_address(p).name.decode()
        self._learnt.append((pointer, tensor.op, sources, tensor.view_src))

    def _known(self) -> Nodes:
        numbers = {pointer: i for i, (pointer, *_) in enumerate(self._learnt)}
        views = {pointer: view for pointer, _, _, view in self._learnt if view}

        def called(pointer: int) -> int | str:
            return numbers.get(pointer, self._names[pointer])

        every = []
        for pointer, op, sources, _ in self._learnt:
            root = pointer
            while root in views:
                root = views[root]
            op_name = self._base.ggml_op_name(op).decode()
            every.append(Node(self._names[pointer], op, op_name, tuple(map(called, sources)), called(root)))
        return Nodes(every)

    def _failed(self, what: str) -> MobieError:
        found = _SAID[-1] if _SAID else ""
        return MobieError(BAD_INPUT, f"llama.cpp: {self._path} {what}", found, "a model that it runs")


_SAID: list[str] = []  # llama.cpp's errors, which it has one place for


@functools.cache
def _listener() -> Any:
    import llama_cpp

    def hear(level: int, text: bytes, _: object) -> None:
        if level == ERROR:
            _SAID.append(text.decode("utf-8", "replace").strip())

    return llama_cpp.llama_log_callback(hear)


@contextlib.contextmanager
def _not_prefetched() -> Iterator[None]:
    """What is not computed is not read from a mapped model (patches/0018). Other programs that are started are not
    meant."""
    os.environ["LLAMA_MMAP_NO_PREFETCH"] = "1"
    try:
        yield
    finally:
        del os.environ["LLAMA_MMAP_NO_PREFETCH"]
