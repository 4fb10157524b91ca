"""Further refinement of an export that is there."""

from mobie_export.methods.improve.method import Improve as Improve

METHOD = Improve
