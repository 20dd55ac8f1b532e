"""Methods to compare with, one a file: model, pipeline and recipe side by side.

A new one is a file here, and one line in `_MODULES` of the package, which names its model and its pipeline.
"""
