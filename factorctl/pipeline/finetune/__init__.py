"""`factorctl finetune`."""
