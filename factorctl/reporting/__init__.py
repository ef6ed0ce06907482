"""What reports of evaluation, profile and finetuning share."""
