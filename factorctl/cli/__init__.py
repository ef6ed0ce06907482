"""Parse, call one pipeline function, render. Owns no logic."""
