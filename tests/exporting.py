"""What tests of exports share: plan and export in one call, uncalibrated unless a method is named; looks at both."""

from pathlib import Path
from typing import Unpack

import pytest

import mobie_export as mobie
from mobie_export.exporting.options import Others
from mobie_export.methods.base import Method


def export(
    source: Path, output: Path | None = None, method: Method | str = "sign", **others: Unpack[Others]
) -> mobie.Report:
    return mobie.export(mobie.plan(source, output, method=method, **others))


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def phases(steps: list[mobie.Step]) -> list[str]:
    """Phases in the order in which they began. Every one counts up to its total, and says once that it is over."""
    found = list(dict.fromkeys(s.phase for s in steps))
    for phase in found:
        of_one = [s for s in steps if s.phase == phase]
        assert [s.ended for s in of_one] == [False] * (len(of_one) - 1) + [True], phase
        done = [s.done for s in of_one]
        assert done == sorted(done) and done[-1] == pytest.approx(of_one[-1].total), phase
    return found


def refused(call, *arguments, **keywords) -> mobie.MobieError:
    with pytest.raises(mobie.MobieError) as e:
        call(*arguments, **keywords)
    said = (e.value.what, e.value.found, e.value.wanted, e.value.todo)
    assert str(e.value).startswith(said[0]) and all(text in str(e.value) for text in said)
    return e.value
