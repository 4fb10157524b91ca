"""Our own method."""

from mobie_export.methods.calibrated.method import Calibrated as Calibrated

METHOD = Calibrated
