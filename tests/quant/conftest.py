import pytest


@pytest.fixture(scope="session")
def made_once(make_models):
    """Of images of 10 × 10, whose 25 tokens fill up no four."""
    return make_models(10)
