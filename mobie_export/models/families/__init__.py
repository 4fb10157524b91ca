"""The architectures that have a twin, one file per family with a function `of`: file -> its `Architecture`."""
