"""The compiled CPU kernel: an FFN, or a linear layer, in one call."""
