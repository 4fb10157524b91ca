"""Signs from the weights, magnitudes under an importance matrix of llama-imatrix."""

from mobie_export.methods.imatrix.method import Importance as Importance

METHOD = Importance
