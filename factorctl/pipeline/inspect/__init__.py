"""`factorctl inspect`, `verify`, `plugins` and `doctor`."""
