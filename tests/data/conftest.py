import pytest

from tests.data.inputs import make_pairs, make_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """Manifest of 60 pairs in 9 shards, every fifth held out."""
    return make_pairs(tmp_path_factory.mktemp("pairs"), 60, heldout_every=5)
