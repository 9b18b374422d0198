"""Volumes to slices, the built-in data, and the formats. The data sets themselves lie in folders below."""
