"""Bytes on disk: sources, readers, writers, the manifest. Knows no model maths."""
