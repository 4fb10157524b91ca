"""Blocks of signs with one scale: constants, packing, decoding. The reference for FORMAT.md, which leads.

A row of n weights is n / 64 blocks of 9 bytes, one scale byte and 64 sign bits: the tensor type `mobie`, MOBIE. Q1_0 is
llama.cpp's own type of the same kind; what tells the two apart is a `Coding`, and every function takes one. Numpy only;
arrays are C-contiguous in the order rows are stored in, the last axis being the columns.
"""

from dataclasses import dataclass

import numpy as np

FORMAT_VERSION = 1
TYPE_ID = 200
TYPE_NAME = "mobie"

BLOCK_LEN = 64  # weights per block
BLOCK_BYTES = 9  # 1 scale byte, 8 bytes of signs
SCALE_UNIT = 2.0**-7  # of the scale byte
SCALE_MAX = 255


@dataclass(frozen=True)
class Coding:
    """How signs and magnitudes of experts are stored: the scale of a block, then its sign bits.

    Where `stock`, every llama.cpp of its time reads the tensors: a block stands for itself, and nothing lies beside.
    Otherwise block scales are relative to the float32 scale of their expert, which lies beside, and second planes and
    shared factors may; the patched runtime alone reads those.
    """

    option: str  # its name as an option, and in the names of files
    type_id: int  # of tensors
    type_name: str
    file_type: int  # general.file_type of a file whose experts are stored so
    length: int  # weights per block
    scale: np.dtype  # of a block's scale
    unit: float  # of a block's scale
    stock: bool

    @property
    def block_bytes(self) -> int:
        return self.scale.itemsize + self.length // 8


MOBIE = Coding("mobie", TYPE_ID, TYPE_NAME, TYPE_ID, BLOCK_LEN, np.dtype(np.uint8), SCALE_UNIT, stock=False)
# ggml-common.h, block_q1_0; ggml.h, GGML_TYPE_Q1_0; llama.h, LLAMA_FTYPE_MOSTLY_Q1_0
Q1_0 = Coding("q1_0", 41, "Q1_0", 40, 128, np.dtype("<f2"), 1.0, stock=True)
CODINGS = {c.option: c for c in (MOBIE, Q1_0)}
BY_TYPE = {c.type_id: c for c in CODINGS.values()}


class OutOfRange(ValueError):
    """Magnitudes that a coding cannot hold."""


# Where the largest scale of an expert is smaller, float16 has fewer than 7 bits for it: less than MOBIE's 8.
LEAST_HALF = 2.0**-17


def encode_scales(a: np.ndarray, coding: Coding = MOBIE) -> tuple[np.float32, np.ndarray]:
    """The scale of one expert and the scales of its blocks (FORMAT.md, "From floats to blocks").

    a: block magnitudes of one expert, float64 of any shape, in units of the weights, finite and >= 0
    Returns (scale, codes): float32, and coding.scale of the shape of a; block magnitude = scale * codes * coding.unit.
    The scale is 1 where the coding stores none.
    Raises ValueError where a magnitude is negative or not finite; OutOfRange where one is too large, or all too small.
    """
    a = np.asarray(a, np.float64)
    if not np.isfinite(a).all() or (a < 0).any():
        n_bad = np.sum(~(np.isfinite(a) & (a >= 0)))
        raise ValueError(f"block magnitudes must be finite and >= 0, found {n_bad} of {a.size} that are not")
    largest = a.max(initial=0.0)
    if coding.stock:
        with np.errstate(over="ignore", under="ignore"):
            codes = a.astype(coding.scale)
        if not np.isfinite(codes).all():
            raise OutOfRange(f"block magnitude {largest:g} is too large for float16, which ends at 65504")
        if 0 < largest < LEAST_HALF:
            raise OutOfRange(f"block magnitudes up to {largest:g} are too small for float16")
        return np.float32(1), codes
    with np.errstate(over="ignore"):
        scale = np.float32(largest / SCALE_UNIT / SCALE_MAX)
    if not np.isfinite(scale):
        raise OutOfRange(f"block magnitude {largest:g} is too large for a float32 expert scale")
    if scale == 0:
        return scale, np.zeros(a.shape, np.uint8)
    return scale, np.minimum(np.rint(a / SCALE_UNIT / np.float64(scale)), SCALE_MAX).astype(np.uint8)


def pack(signs: np.ndarray, codes: np.ndarray, coding: Coding = MOBIE) -> np.ndarray:
    """Blocks from signs and block scales.

    signs: bool [..., n], True is plus; codes: coding.scale [..., n / coding.length]
    Returns uint8 [..., bytes of a row]. Blocks with scale 0 are zero bytes whatever their signs.
    Raises ValueError where the shapes do not fit or n is no multiple of the block length.
    """
    signs, codes = np.asarray(signs, np.bool_), np.asarray(codes)
    lead, n_blocks = signs.shape[:-1], signs.shape[-1] // coding.length
    if signs.shape[-1] % coding.length:
        raise ValueError(f"rows of {signs.shape[-1]} weights cannot be packed: need a multiple of {coding.length}")
    if codes.dtype != coding.scale or codes.shape != (*lead, n_blocks):
        raise ValueError(f"codes are {codes.dtype} {codes.shape}, wanted {coding.scale} {(*lead, n_blocks)}")
    blocks, head = np.empty((*lead, n_blocks, coding.block_bytes), np.uint8), coding.scale.itemsize
    blocks[..., :head] = np.ascontiguousarray(codes)[..., None].view(np.uint8)
    blocks[..., head:] = np.packbits(signs, axis=-1, bitorder="little").reshape(*lead, n_blocks, coding.length // 8)
    blocks[codes == 0] = 0
    return blocks.reshape(*lead, n_blocks * coding.block_bytes)


def unpack(blocks: np.ndarray, coding: Coding = MOBIE) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of pack: uint8 [..., bytes of a row] -> (signs bool [..., n], codes [..., n / coding.length]).

    Raises ValueError where the bytes of a row are no multiple of those of a block.
    """
    blocks = _as_blocks(blocks, coding)
    signs = np.unpackbits(blocks[..., coding.scale.itemsize :], axis=-1, bitorder="little").view(np.bool_)
    return signs.reshape(*signs.shape[:-2], -1), _scales(blocks, coding)


def scales(blocks: np.ndarray, coding: Coding = MOBIE) -> np.ndarray:
    """Of blocks, uint8 [..., bytes of a row]: coding.scale [..., n / coding.length]. ValueError as of unpack."""
    return _scales(_as_blocks(blocks, coding), coding)


def dequantize(blocks: np.ndarray, scale: float | np.ndarray = 1.0, coding: Coding = MOBIE) -> np.ndarray:
    """Weights, float32 [..., n], of blocks, uint8 [..., bytes of a row].

    scale: float32 of the expert, or an array that broadcasts against [..., n]. With scale 1 the result is exact.
    Raises ValueError where the bytes of a row are no multiple of those of a block.
    """
    blocks = _as_blocks(blocks, coding)
    codes, signs = _scales(blocks, coding)[..., None], blocks[..., coding.scale.itemsize :]
    signs = np.where(codes == 0, np.uint8(0xFF), signs)  # a zero is never a negative zero
    weights = _PLUS_MINUS.take(signs, axis=0).reshape(*codes.shape[:-1], coding.length)
    weights *= codes.astype(np.float32) * np.float32(coding.unit)
    weights = weights.reshape(*codes.shape[:-2], -1)
    return weights if np.isscalar(scale) and scale == 1 else weights * np.asarray(scale, np.float32)


# The eight signs of every byte, as floats.
_PLUS_MINUS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little") * np.float32(2) - 1


def _scales(blocks: np.ndarray, coding: Coding) -> np.ndarray:  # uint8 [..., n_blocks, bytes] -> [..., n_blocks]
    return np.ascontiguousarray(blocks[..., : coding.scale.itemsize]).view(coding.scale)[..., 0]


def _as_blocks(blocks: np.ndarray, coding: Coding) -> np.ndarray:
    """uint8 [..., bytes of a row] as [..., n_blocks, bytes of a block]."""
    blocks, size = np.asarray(blocks), coding.block_bytes
    if blocks.dtype != np.uint8 or blocks.shape[-1] % size:
        raise ValueError(
            f"blocks are {blocks.dtype}, {blocks.shape[-1]} bytes per row; wanted uint8 and a multiple of {size}"
        )
    return blocks.reshape(*blocks.shape[:-1], -1, size)
