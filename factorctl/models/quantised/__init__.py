"""Routed experts in few bits: how bitsandbytes stores them, and the stock model class on top."""
