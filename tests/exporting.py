"""Plan and export in one call, for tests of what comes out."""

from pathlib import Path
from typing import Unpack

import mobie_export as mobie
from mobie_export.exporting.options import Keywords


def export(source: Path, output: Path | None = None, **keywords: Unpack[Keywords]) -> mobie.Report:
    return mobie.export(mobie.plan(source, output, **keywords))
