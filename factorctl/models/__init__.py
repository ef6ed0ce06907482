"""The factored FFN, its execution paths, and the families that it fits into."""
