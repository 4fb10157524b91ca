"""Layers in order, each paying back what those before it have lost."""

from mobie_export.methods.ordered.method import Ordered as Ordered

METHOD = Ordered
