"""Keeping lm-eval, datasets and transformers from drawing bars and logging over our own progress."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import datasets
import lm_eval.api.task
from transformers.utils import logging as transformers_logging


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Errors only, no bars, while the block runs; everything is as before afterwards."""
    logger = logging.getLogger("lm_eval")
    level, verbosity = logger.level, transformers_logging.get_verbosity()
    bars, bar = datasets.are_progress_bars_disabled(), lm_eval.api.task.tqdm
    logger.setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    datasets.disable_progress_bars()
    lm_eval.api.task.tqdm = functools.partial(bar, disable=True)  # it has no switch: "Building contexts" always draws
    try:
        yield
    finally:
        lm_eval.api.task.tqdm = bar
        if not bars:
            datasets.enable_progress_bars()
        transformers_logging.set_verbosity(verbosity)
        logger.setLevel(level)
