"""Signs and magnitudes from the weights alone."""

from mobie_export.methods.sign.method import Sign as Sign

METHOD = Sign
