"""One frozen dataclass per verb: everything that decides its result, so that a manifest can record it whole."""
