"""The factored FFN: its layer, its routing, its execution paths, and the teacher's labels for it."""
