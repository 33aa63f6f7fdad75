"""One undisturbed run for all the disturbed ones: setting it up costs more than most of them."""

import pytest

from tests.chaos.harness import Chaos


@pytest.fixture(scope="session")
def chaos(tmp_path_factory: pytest.TempPathFactory) -> Chaos:
    return Chaos(tmp_path_factory.mktemp("chaos"))
