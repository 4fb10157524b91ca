"""Whether a MoBiE file keeps the promises of FORMAT.md."""

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mobie_export import gguf_io
from mobie_export.errors import VERIFY_FAILED, MobieError
from mobie_export.gguf_io import Gguf, Tensor
from mobie_export.progress import Callback, Progress
from mobie_export.spec import block, layout, metadata
from mobie_export.spec.block import Coding
from mobie_export.spec.layout import Experts

MAX_PROBLEMS = 10  # named in an error; the rest are counted

Digests = tuple["hashlib._Hash", ...]
Largest = dict[str, np.ndarray]  # expert tensor -> its largest block scale by expert, of both planes


@dataclass(frozen=True)
class Verified:
    """What was checked and found sound.

    expert_tensors, blocks: how many, blocks of both planes together; expert_bpw: stored bits per expert weight, with
    all that is stored for the experts. requantized: where another program gave the tensors that are no experts other
    types, these types, name -> tensors: their data are checked against nothing. None where the whole file is as it was
    written.
    """

    expert_tensors: int
    blocks: int
    expert_bpw: float
    requantized: dict[str, int] | None


def verify(path: str | Path, *, progress: Callback | None = None) -> Verified:
    """Check a MoBiE file (given its first shard, all of them): metadata, shapes, every block and scale, and all data
    against their SHA-256. MobieError says what is wrong with it."""
    with gguf_io.open_model(Path(path)) as gguf:
        return check(gguf, progress=progress)


def check(
    gguf: Gguf,
    digests: Mapping[str, bytes] | None = None,
    progress: Callback | None = None,
    max_ram: int | None = None,
) -> Verified:
    """As `verify`, of an open file.

    With `digests` (of gguf_io.new_digest, by tensor name) the damaged tensor is named. max_ram: bytes that may be
    resident at most.
    """
    metadata.check_version(gguf)
    coding = metadata.coding(gguf) or block.MOBIE  # another one is named among the problems
    problems = _metadata_problems(gguf, coding)
    experts = layout.experts(gguf)
    if not metadata.is_mobie(gguf) or not experts:
        raise MobieError(
            VERIFY_FAILED,
            f"{gguf.paths[0]} is not a MoBiE file",
            f"architecture {gguf.architecture}, {len(experts)} expert tensors",
            f"{metadata.FORMAT_VERSION.name} and expert tensors",
            "export it: mobie-export MODEL.gguf",
        )
    blocks, seal, found = 0, hashlib.sha256(), {}
    second = {x.residual.name: x for x in experts.values() if x.residual is not None}
    largest: Largest = {}
    total = sum(t.n_bytes for t in gguf.tensors.values())
    with Progress("verify", total, progress, max_ram=max_ram) as shown:
        for name, tensor in gguf.tensors.items():
            digest = gguf_io.new_digest()
            if name in experts:
                problems += _expert_problems(gguf, experts[name], coding, (digest, seal), shown, largest)
                blocks += tensor.n_bytes // coding.block_bytes
            elif name in second:
                problems += _block_problems(gguf, second[name], tensor, coding, (digest, seal), shown, largest)
                blocks += tensor.n_bytes // coding.block_bytes
            else:
                if layout.kind(name) == "expert factor":
                    problems += _factor_problems(gguf, tensor, experts)
                for chunk in gguf.chunks(tensor):
                    digest.update(chunk.data)
                    seal.update(chunk.data)
                    shown.update(chunk.size, name)
            found[name] = digest.digest()
            if digests is not None and found[name] != digests[name]:
                problems.append(f"{name}: the bytes on the disk are not those that were written")
    if not coding.stock:
        problems += _largest_problems(gguf, experts, largest)
    requantized = None
    stated = gguf.value(metadata.SEAL.name)
    same = gguf.value(metadata.TENSOR_SEAL.name) == metadata.tensor_seal(found)  # in whatever order
    if not same and stated not in (None, seal.hexdigest()):
        same_experts = gguf.value(metadata.EXPERT_SEAL.name) == metadata.expert_seal(found)
        if same_experts and gguf.value(metadata.FILE_TYPE.name) != coding.file_type:
            rest = [t for n, t in gguf.tensors.items() if layout.kind(n) not in metadata.SEALED_KINDS]
            requantized = dict(Counter(gguf_io.type_name(t.type_id) for t in rest))
        else:
            problems.append(
                f"{metadata.SEAL.name} is {stated}, the data have {seal.hexdigest()}: the file was changed or damaged"
            )
    if requantized is None:
        problems += _type_problems(gguf, coding)
    if problems:
        more = f"\n          and {len(problems) - MAX_PROBLEMS} more" if len(problems) > MAX_PROBLEMS else ""
        raise MobieError(
            VERIFY_FAILED,
            f"{gguf.paths[0]} is not a sound MoBiE file",
            "\n          ".join(problems[:MAX_PROBLEMS]) + more,
            "what FORMAT.md says",
            "export again from the original model",
        )
    bpw = layout.bits_per_weight(gguf)[1] or 0.0
    return Verified(len(experts), blocks, bpw, requantized)


def _type_problems(gguf: Gguf, coding: Coding) -> list[str]:
    """Of the metadata that another program changes together with the types of tensors."""
    problems = []
    found = gguf.value(metadata.FILE_TYPE.name)
    if found not in (None, coding.file_type):
        problems.append(f"{metadata.FILE_TYPE.name} is {found}, wanted {coding.file_type}")
    bpw, stated = layout.bits_per_weight(gguf)[1], gguf.value(metadata.EXPERT_BPW.name)
    if isinstance(stated, float) and bpw is not None and np.float32(bpw) != np.float32(stated):
        problems.append(f"{metadata.EXPERT_BPW.name} is {stated}, the tensors have {bpw}")
    return problems


def _metadata_problems(gguf: Gguf, coding: Coding) -> list[str]:
    problems = []
    for key in metadata.KEYS:
        entry = gguf.entries.get(key.name)
        if entry is None:
            problems += [] if key.optional else [f"{key.name} is missing"]
        elif entry.type != key.type:
            wanted, found = gguf_io.KV_TYPE_NAMES[key.type], gguf_io.KV_TYPE_NAMES[entry.type]
            problems.append(f"{key.name} is of type {found}, wanted {wanted}")
        elif key.value not in (None, entry.value):
            problems.append(f"{key.name} is {entry.value}, wanted {key.value}")
    stated = gguf.value(metadata.TYPE_ID.name)
    if stated not in (None, coding.type_id):
        problems.append(f"{metadata.TYPE_ID.name} is {stated}, wanted {' or '.join(map(str, block.BY_TYPE))}")
    settings = gguf.value(metadata.SETTINGS.name)
    if settings is not None and (not isinstance(settings, str) or metadata.parsed_settings(settings) is None):
        problems.append(f"{metadata.SETTINGS.name} is no JSON object")
    problems += [
        f"{t.name} is of type mobie and no expert tensor"
        for t in gguf.tensors.values()
        if t.type_id == block.TYPE_ID and layout.kind(t.name) not in ("expert", "expert residual")
    ]
    if coding.stock:
        only = [n for n in gguf.tensors if layout.kind(n) in layout.PATCHED]
        problems += [f"{n} lies beside experts of type {coding.type_name}, which stock llama.cpp refuses" for n in only]
    whole = {x.residual.name for x in layout.experts(gguf).values() if x.residual is not None}
    problems += [
        f"{n} belongs to no expert tensor"
        for n in gguf.tensors
        if layout.kind(n) == "expert residual" and n not in whole
    ]
    return problems


def _expert_problems(
    gguf: Gguf, item: Experts, coding: Coding, digests: Digests, progress: Progress, largest: Largest
) -> list[str]:
    """Problems of one expert tensor; all its bytes go into every one of `digests`, its block scales into `largest`."""
    name, scale, problems = item.tensor.name, item.factor, item.problems(gguf)
    if item.tensor.type_id != coding.type_id:
        problems.append(f"{name} is of type {gguf_io.type_name(item.tensor.type_id)}, wanted {coding.type_name}")
    if scale is None:
        problems += [] if coding.stock else [f"{layout.scale_name(name)} is missing"]
    elif (scales := _scales(gguf, item)) is not None:
        bad = np.flatnonzero(~(np.isfinite(scales) & (scales >= 0)))
        if bad.size:
            problems.append(f"{scale.name}: expert {bad[0]} has scale {scales[bad[0]]}, {bad.size} such experts")
    return problems + _block_problems(gguf, item, item.tensor, coding, digests, progress, largest)


def _scales(gguf: Gguf, item: Experts) -> np.ndarray | None:
    """The scales of an expert tensor, float32 [n_expert]; None where they are not laid out so."""
    scale = item.factor
    if scale is None or scale.type_id != gguf_io.TYPE_F32 or scale.shape != (item.n_expert,):
        return None
    return gguf.read(scale).view("<f4")


def _factor_problems(gguf: Gguf, tensor: Tensor, experts: dict[str, Experts]) -> list[str]:
    """Of what its experts do not say (Experts.problems): a factor without experts, and values that are not finite."""
    name = tensor.name
    users = [x for n, x in experts.items() if layout.shared_name(n) == name]
    if not users:
        return [f"{name} has no experts in its layer"]
    if any(x.problems(gguf) for x in users):
        return []  # named already
    values = gguf_io.decode(gguf.read(tensor).reshape(tensor.shape[1], -1), tensor.type_id)
    bad = int(np.count_nonzero(~np.isfinite(values)))
    return [f"{name} has {bad} NaN or infinite values"] if bad else []


def _block_problems(
    gguf: Gguf, item: Experts, tensor: Tensor, coding: Coding, digests: Digests, progress: Progress, largest: Largest
) -> list[str]:
    problems, size = [], tensor.n_bytes // item.n_expert
    found = largest.setdefault(item.tensor.name, np.zeros(item.n_expert, coding.scale))
    blocks_of_experts = tensor.type_id == coding.type_id and tensor.shape[1:] == item.tensor.shape[1:]
    pieces = (gguf.read(tensor, e * size, size) for e in range(item.n_expert))
    for e, raw in enumerate(pieces if blocks_of_experts else gguf.chunks(tensor)):
        progress.update(raw.size, tensor.name)
        for digest in digests:
            digest.update(raw.data)
        if not blocks_of_experts:
            continue
        blocks = raw.reshape(-1, coding.block_bytes)
        codes = block.scales(blocks, coding)[:, 0]
        if blocks[codes == 0].any():
            problems.append(f"{tensor.name}: expert {e} has signs in blocks of scale 0")
        if coding.stock and (bad := int(np.count_nonzero(~(np.isfinite(codes) & (codes >= 0))))):
            problems.append(f"{tensor.name}: expert {e} has {bad} block scales that are NaN, infinite or negative")
        found[e] = max(found[e], codes.max(initial=0))
    return problems


def _largest_problems(gguf: Gguf, experts: dict[str, Experts], largest: Largest) -> list[str]:
    """The scale of an expert is such that the largest block scale of its planes is 255."""
    problems = []
    for name, item in experts.items():
        scales = _scales(gguf, item)
        if scales is None or item.tensor.type_id != block.TYPE_ID:
            continue  # named already
        wanted = np.where(scales > 0, block.SCALE_MAX, 0)
        problems += [
            f"{name}: expert {e}'s largest block scale is {largest[name][e]}, wanted {wanted[e]}"
            for e in np.flatnonzero(largest[name] != wanted)
        ]
    return problems
