"""Export Mixture-of-Experts GGUF models with binary expert weights. docs/api.md shows how.

Names are imported when they are used: neither `import mobie_export` nor `mobie-export --help` loads torch.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mobie_export.api import bench, dequantize, edit, export, inspect, plan, report, verify
    from mobie_export.errors import MobieError
    from mobie_export.exporting.effort import Effort
    from mobie_export.exporting.flow import Report
    from mobie_export.exporting.options import ExportOptions
    from mobie_export.exporting.plan import Plan
    from mobie_export.methods import register
    from mobie_export.methods.base import MatrixMethod, Method, option
    from mobie_export.methods.calibrated import Calibrated
    from mobie_export.methods.imatrix import Importance
    from mobie_export.methods.ordered import Ordered
    from mobie_export.methods.paper import Paper
    from mobie_export.methods.sign import Sign
    from mobie_export.progress import Step
    from mobie_export.reporting.bench import Benchmark
    from mobie_export.reporting.gather import Compared

_PLACES = {
    **dict.fromkeys(("bench", "dequantize", "edit", "export", "inspect", "plan", "report", "verify"), "api"),
    "MobieError": "errors",
    "Report": "exporting.flow",
    "Effort": "exporting.effort",
    "ExportOptions": "exporting.options",
    "Plan": "exporting.plan",
    "register": "methods",
    **dict.fromkeys(("MatrixMethod", "Method", "option"), "methods.base"),
    "Calibrated": "methods.calibrated",
    "Importance": "methods.imatrix",
    "Ordered": "methods.ordered",
    "Paper": "methods.paper",
    "Sign": "methods.sign",
    "Benchmark": "reporting.bench",
    "Compared": "reporting.gather",
    "Step": "progress",
}
__all__ = [
    "Benchmark",
    "Calibrated",
    "Compared",
    "Effort",
    "ExportOptions",
    "Importance",
    "MatrixMethod",
    "Method",
    "MobieError",
    "Ordered",
    "Paper",
    "Plan",
    "Report",
    "Sign",
    "Step",
    "bench",
    "dequantize",
    "edit",
    "export",
    "inspect",
    "option",
    "plan",
    "register",
    "report",
    "verify",
]


def __getattr__(name: str) -> object:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
