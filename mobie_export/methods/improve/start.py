"""An export as the beginning of a refinement: its planes and tuned tensors in the store."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mobie_export import gguf_io
from mobie_export.calibration.planes import Planes, decoded
from mobie_export.errors import BAD_INPUT, MobieError
from mobie_export.gguf_io import Gguf
from mobie_export.methods.base import Run
from mobie_export.methods.calibrated.steps import Workspace
from mobie_export.models.twin import PROJECTIONS, Twin
from mobie_export.spec import block, layout
from mobie_export.spec.block import Coding

LEAST_COSINE = 0.1  # between an expert and what was made of it; one bit of normal weights has 0.8, strangers 0.01


def take(file: Gguf, run: Run, work: Workspace) -> None:
    """MobieError where the file was not made from the source."""
    twin, store = work.files.twin, work.store
    layers = [i for i in range(twin.n_layers) if twin.has_experts(i)]
    with run.phase("earlier export", len(layers), "layer") as progress:
        for i in layers:
            if not store.has(i):
                found = planes(file, twin, i, run.coding)
                store.put(i, found, _order(found, twin.experts(i), f"{file.paths[0]}: layer {i}"))
            progress.update(1, f"layer {i}")
    for name in run.needs.tuned:
        tensor = file.tensors[name]
        raw = file.read(tensor).reshape(int(np.prod(tensor.shape[1:], dtype=np.int64)), -1)
        values = gguf_io.decode(raw, tensor.type_id).astype(np.float32, copy=False)
        store.tuned[name] = values.reshape(tensor.shape[::-1])
    work.settings["second"] = _second(file, twin, layers)


def planes(file: Gguf, twin: Twin, layer: int, coding: Coding) -> dict[str, Planes]:
    """Projection -> planes, of a layer of a file whose experts are of that type."""
    items, found = layout.experts(file), {}
    for projection, (name, rows) in twin.expert_names(layer).items():
        item = items[name]
        scales = np.ones(item.n_expert, "<f4") if item.factor is None else file.read(item.factor).view("<f4")

        def plane(tensor: gguf_io.Tensor, rows: slice = rows, scales: np.ndarray = scales) -> list[Tensor]:
            raw = file.read(tensor).reshape(tensor.shape[2], tensor.shape[1], -1)[:, rows]
            signs, codes = block.unpack(raw, coding)
            magnitudes = codes.astype(np.float32) * np.float32(coding.unit) * scales[:, None, None]
            return [torch.from_numpy(np.ascontiguousarray(t)) for t in (signs, magnitudes)]

        parts = plane(item.tensor)
        if item.residual is not None:
            parts += plane(item.residual)
            if projection != "down":
                parts.append(torch.from_numpy(item.second_columns(file)))
        found[projection] = Planes(*parts)
    return found


def _order(found: dict[str, Planes], weights: dict[str, Tensor], where: str) -> Tensor | None:
    """Where the neurons of the planes were in the source, int64 [E, ff], which the file does not say; None where they
    are in their places. Those of an expert are told by what they resemble most."""
    orders, moved = [], found["down"].signs2 is not None
    n_expert, ff, _ = weights["gate"].shape
    places = torch.arange(ff)
    for e in range(n_expert):
        alike = torch.zeros(ff, ff)  # mean cosine of the three projections; [of the planes, of the source]
        for p in PROJECTIONS:
            ours, theirs = _expert(found[p], e), weights[p][e]
            if p == "down":
                ours, theirs = ours.T, theirs.T
            alike.addmm_(F.normalize(ours), F.normalize(theirs).T, alpha=1 / len(PROJECTIONS))
        order = alike.argmax(1) if moved else places
        known = torch.equal(order.sort().values, places)
        cosine = float(alike[places, order].mean())
        if not known or not cosine > LEAST_COSINE:
            raise MobieError(
                BAD_INPUT,
                "the export was not made from this source",
                f"{where}, expert {e}: " + (f"cosine {cosine:.3f} to the source's" if known else "other neurons"),
                todo="name the model that it was made from",
            )
        orders.append(order)
    return torch.stack(orders) if moved else None


def _expert(planes: Planes, e: int) -> Tensor:  # float32 [rows, cols]
    signs2, magnitudes2 = (None if t is None else t[e] for t in (planes.signs2, planes.magnitudes2))
    return decoded(planes.signs[e], planes.magnitudes[e], signs2, magnitudes2, planes.columns)


def _second(file: Gguf, twin: Twin, layers: list[int]) -> dict[str, dict[str, int]]:
    """Layer -> projection -> columns with a second sign."""
    items, found = layout.experts(file), {}
    for i in layers:
        names = {p: items[name].residual for p, (name, _) in twin.expert_names(i).items()}
        wide = {p: t.shape[0] for p, t in names.items() if t is not None}
        if wide:
            found[str(i)] = wide
    return found
