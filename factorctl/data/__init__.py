"""Text in, token blocks out."""
