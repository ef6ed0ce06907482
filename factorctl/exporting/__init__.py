"""From a native checkpoint to what stock engines run."""
