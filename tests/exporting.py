"""Plan and export in one call, for tests of what comes out: uncalibrated unless a method is named."""

from pathlib import Path
from typing import Unpack

import mobie_export as mobie
from mobie_export.exporting.options import Others
from mobie_export.methods.base import Method


def export(
    source: Path, output: Path | None = None, method: Method | str = "sign", **others: Unpack[Others]
) -> mobie.Report:
    return mobie.export(mobie.plan(source, output, method=method, **others))
