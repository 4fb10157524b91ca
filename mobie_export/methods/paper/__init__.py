"""MoBiE as it was published."""

from mobie_export.methods.paper.method import Paper as Paper

METHOD = Paper
