"""Quantisation: INT8 files for the runtime that ships."""
