"""The MoBiE block: constants, packing, decoding. The reference for FORMAT.md, which leads.

A row of n weights is n / 64 blocks of 9 bytes, one scale byte and 64 sign bits. Numpy only; arrays are C-contiguous in
the order rows are stored in, the last axis being the columns.
"""

import numpy as np

FORMAT_VERSION = 1
TYPE_ID = 200
TYPE_NAME = "mobie"

BLOCK_LEN = 64  # weights per block
BLOCK_BYTES = 9  # 1 scale byte, 8 bytes of signs
SCALE_UNIT = 2.0**-7  # of the scale byte
SCALE_MAX = 255


def encode_scales(a: np.ndarray) -> tuple[np.float32, np.ndarray]:
    """The scale of one expert and the scale bytes of its blocks (FORMAT.md, "From floats to blocks").

    a: block magnitudes of one expert, float64 of any shape, in units of the weights, finite and >= 0
    Returns (scale, codes): float32, and uint8 of the shape of a; block magnitude = scale * codes * 2^-7.
    Raises ValueError where a magnitude is negative, not finite or too large for a float32 scale.
    """
    a = np.asarray(a, np.float64)
    if not np.isfinite(a).all() or (a < 0).any():
        n_bad = np.sum(~(np.isfinite(a) & (a >= 0)))
        raise ValueError(f"block magnitudes must be finite and >= 0, found {n_bad} of {a.size} that are not")
    largest = a.max(initial=0.0)
    with np.errstate(over="ignore"):
        scale = np.float32(largest / SCALE_UNIT / SCALE_MAX)
    if not np.isfinite(scale):
        raise ValueError(f"block magnitude {largest:g} is too large for a float32 expert scale")
    if scale == 0:
        return scale, np.zeros(a.shape, np.uint8)
    return scale, np.minimum(np.rint(a / SCALE_UNIT / np.float64(scale)), SCALE_MAX).astype(np.uint8)


def pack(signs: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Blocks from signs and scale bytes.

    signs: bool [..., n], True is plus; codes: uint8 [..., n / 64]
    Returns uint8 [..., n / 64 * 9]. Blocks with scale 0 are nine zero bytes whatever their signs.
    Raises ValueError where the shapes do not fit or n is no multiple of 64.
    """
    signs, codes = np.asarray(signs, np.bool_), np.asarray(codes)
    lead, n_blocks = signs.shape[:-1], signs.shape[-1] // BLOCK_LEN
    if signs.shape[-1] % BLOCK_LEN:
        raise ValueError(f"rows of {signs.shape[-1]} weights cannot be packed: need a multiple of {BLOCK_LEN}")
    if codes.dtype != np.uint8 or codes.shape != (*lead, n_blocks):
        raise ValueError(f"codes are {codes.dtype} {codes.shape}, wanted uint8 {(*lead, n_blocks)}")
    blocks = np.empty((*lead, n_blocks, BLOCK_BYTES), np.uint8)
    blocks[..., 0] = codes
    blocks[..., 1:] = np.packbits(signs, axis=-1, bitorder="little").reshape(*lead, n_blocks, BLOCK_BYTES - 1)
    blocks[codes == 0] = 0
    return blocks.reshape(*lead, n_blocks * BLOCK_BYTES)


def unpack(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of pack: uint8 [..., n / 64 * 9] -> (signs bool [..., n], codes uint8 [..., n / 64]).

    Raises ValueError where the bytes of a row are no multiple of 9.
    """
    blocks = _as_blocks(blocks)
    signs = np.unpackbits(blocks[..., 1:], axis=-1, bitorder="little").view(np.bool_)
    return signs.reshape(*signs.shape[:-2], -1), blocks[..., 0].copy()


def dequantize(blocks: np.ndarray, scale: float | np.ndarray = 1.0) -> np.ndarray:
    """Weights, float32 [..., n], of blocks, uint8 [..., n / 64 * 9].

    scale: float32 of the expert, or an array that broadcasts against [..., n]. With scale 1 the result is exact.
    Raises ValueError where the bytes of a row are no multiple of 9.
    """
    blocks = _as_blocks(blocks)
    codes, signs = blocks[..., :1], blocks[..., 1:]
    signs = np.where(codes == 0, np.uint8(0xFF), signs)  # a zero is never a negative zero
    weights = _PLUS_MINUS.take(signs, axis=0).reshape(*codes.shape[:-1], BLOCK_LEN)
    weights *= codes * np.float32(SCALE_UNIT)
    weights = weights.reshape(*codes.shape[:-2], -1)
    return weights if np.isscalar(scale) and scale == 1 else weights * np.asarray(scale, np.float32)


# The eight signs of every byte, as floats.
_PLUS_MINUS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little") * np.float32(2) - 1


def _as_blocks(blocks: np.ndarray) -> np.ndarray:
    """uint8 [..., bytes] as [..., n_blocks, 9]."""
    blocks = np.asarray(blocks)
    if blocks.dtype != np.uint8 or blocks.shape[-1] % BLOCK_BYTES:
        raise ValueError(
            f"blocks are {blocks.dtype}, {blocks.shape[-1]} bytes per row; wanted uint8 and a multiple of {BLOCK_BYTES}"
        )
    return blocks.reshape(*blocks.shape[:-1], -1, BLOCK_BYTES)
