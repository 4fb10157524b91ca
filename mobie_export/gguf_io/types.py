"""Which types tensors and metadata entries have: ids, names, sizes, and how stored rows become float32.

gguf-py knows the types of tensors, their sizes and how to decode them; that knowledge is used here.
"""

import math
from functools import lru_cache

import gguf
import numpy as np

from mobie_export.spec import block

Row = tuple[str, tuple[int, ...], int]  # of a tensor table: name, shape (fastest dimension first), type

# ---- of metadata entries ---------------------------------------------------------------------------------------------

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
SCALARS = {
    U8: "<B",
    I8: "<b",
    U16: "<H",
    I16: "<h",
    U32: "<I",
    I32: "<i",
    F32: "<f",
    BOOL: "<?",
    U64: "<Q",
    I64: "<q",
    F64: "<d",
}
# Python type -> what it is called, the metadata types that hold one
VALUE_TYPES = {
    int: ("an integer", (U8, I8, U16, I16, U32, I32, U64, I64)),
    float: ("a floating-point number", (F32, F64)),
    bool: ("a bool", (BOOL,)),
    str: ("a string", (STRING,)),
}
KV_TYPE_NAMES = ("u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "string", "array", "u64", "i64", "f64")

# ---- of tensors ------------------------------------------------------------------------------------------------------

TYPE_F32 = int(gguf.GGMLQuantizationType.F32)
TYPE_F16 = int(gguf.GGMLQuantizationType.F16)
TYPE_I32 = int(gguf.GGMLQuantizationType.I32)
TYPE_BF16 = int(gguf.GGMLQuantizationType.BF16)

# What the runtime reads and gguf-py does not know: name, id, weights and bytes of a block. Q2_0 cannot be decoded here.
MORE_TYPES = (
    (block.TYPE_NAME.upper(), block.TYPE_ID, block.BLOCK_LEN, block.BLOCK_BYTES),
    ("Q2_0", 42, 64, 18),
)


def register_types() -> None:
    """Teach gguf-py in this process these types, so that its reader and writer accept our files. Idempotent."""
    types = gguf.GGMLQuantizationType
    for name, type_id, weights, n_bytes in MORE_TYPES:
        if type_id in types._value2member_map_:
            continue
        member = int.__new__(types, type_id)
        member._name_ = name
        member._value_ = type_id
        types._member_map_[name] = member
        types._value2member_map_[type_id] = member
        gguf.GGML_QUANT_SIZES[member] = (weights, n_bytes)


register_types()


def type_name(type_id: int) -> str:
    if type_id in block.BY_TYPE:
        return block.BY_TYPE[type_id].type_name
    member = gguf.GGMLQuantizationType._value2member_map_.get(type_id)
    return member.name if member is not None else f"type {type_id}"


def block_size(type_id: int) -> tuple[int, int]:
    """(weights, bytes) of one block of a type; KeyError for a type nobody here knows."""
    if type_id not in gguf.GGMLQuantizationType._value2member_map_:
        raise KeyError(type_id)
    return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(type_id)]


def tensor_bytes(shape: tuple[int, ...], type_id: int) -> int:
    weights, size = block_size(type_id)
    return math.prod(shape) // weights * size


def align(n: int, alignment: int) -> int:
    return -(-n // alignment) * alignment


@lru_cache
def can_decode(type_id: int) -> bool:
    """Whether `decode` has a way from this type to float32."""
    if type_id in (TYPE_F32, TYPE_F16, TYPE_BF16, *block.BY_TYPE):
        return True
    try:
        decode(np.zeros((1, block_size(type_id)[1]), np.uint8), type_id)
    except (NotImplementedError, KeyError):
        return False
    return True


def decode(
    raw: np.ndarray,  # uint8 [..., bytes of a row]
    type_id: int,
) -> np.ndarray:  # float32 [..., weights of a row]
    """Exact float32 values of stored rows. Non-finite values stay non-finite."""
    if type_id == TYPE_F32:
        return raw.view("<f4")
    if type_id == TYPE_F16:
        return _from_f16(raw)
    if type_id == TYPE_BF16:
        wide = raw.view("<u2").astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    with np.errstate(all="ignore"):  # non-finite block scales are found by the caller, in the result
        if type_id in block.BY_TYPE:
            return block.dequantize(raw, coding=block.BY_TYPE[type_id])
        return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(type_id))


def _from_f16(raw: np.ndarray) -> np.ndarray:
    """float16 to float32 in vector instructions: numpy's own cast is a scalar loop, three times slower.

    Sign and magnitude bits are put where float32 has them; the exponents then differ by 112, which is a product with
    a power of two and exact for normal and subnormal numbers. Infinity and NaN are not numbers: left to the cast.
    """
    bits = raw.view("<i2")
    if int((bits & 0x7FFF).max(initial=0)) >= 0x7C00:
        return raw.view("<f2").astype(np.float32)
    wide = bits.astype(np.int32)
    wide <<= 13
    wide &= np.int32(-0x70002000)  # 0x8fffe000: the sign, 5 bits of exponent, 10 of mantissa
    values = wide.view(np.float32)
    values *= np.float32(2.0**112)
    return values
