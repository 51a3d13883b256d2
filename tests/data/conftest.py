import logging

import pytest


@pytest.fixture
def log_propagates():
    """Lets pytest's `caplog` see what is logged by transformers' loggers and this package's."""
    logger = logging.getLogger("transformers")
    before = logger.propagate
    logger.propagate = True
    yield
    logger.propagate = before
