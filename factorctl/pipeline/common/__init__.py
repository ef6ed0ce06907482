"""What several verbs need: devices, places, tokenizers, sources and calibration text."""
