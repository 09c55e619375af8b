from __future__ import annotations

from collections.abc import Iterator

import pytest

from nano_pretrain.platform import Platform
from tests.kernels.implementations import using


# Of the module, since hypothesis enters a fixture once for all examples; after `one_rank`, which chooses kernels too.
@pytest.fixture(scope="module", params=["plain", "native"])
def implementation(one_rank: Platform, request: pytest.FixtureRequest) -> Iterator[str]:
    """The kernels that our model runs on."""
    with using(request.param):
        yield request.param
