"""A model without its weights: metadata and tensor table of a GGUF, or of what a checkpoint is converted to.

Of a model of the hub nothing else is fetched. The converter of a checkpoint gets a folder whose weights are holes
behind true headers, so that what it says of the model is what it will say when the weights are there.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mobie_export import gguf_io
from mobie_export.gguf_io import Gguf
from mobie_export.sources import convert, find, hub


@contextlib.contextmanager
def opened(
    text: str, revision: str | None = None, pre_tokenizer: str | None = None, trust_remote_code: bool = False
) -> Iterator[Gguf]:
    """What `find.find` finds, for a look at its header; the data of tensors are zeros, or cannot be read. Raises
    MobieError."""
    asked = find.hub_word(text)
    listing = hub.listing(asked["name"], revision) if asked else None
    with tempfile.TemporaryDirectory(prefix="mobie-hub-") as temporary:
        if asked is None or listing is None or listing.cached:
            source = find.find(text, revision, pre_tokenizer, trust_remote_code)
        else:
            name, sizes = asked["name"], listing.sizes
            chosen = hub.choose(name, list(sizes), asked["which"])
            if chosen is not None:
                with hub.gguf(name, revision, chosen, sizes) as header:
                    yield header
                return
            folder = Path(temporary) / name
            folder.mkdir(parents=True)
            hub.skeleton(name, revision, sizes, folder, trust_remote_code)
            source = find.of_checkpoint(folder, text, name, pre_tokenizer, trust_remote_code)
        with (
            convert.opened(source, Path(temporary), header_only=True) as path,
            gguf_io.open_model(path) as header,
        ):
            yield header
