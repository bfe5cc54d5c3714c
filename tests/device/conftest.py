"""The device that laws over devices run on: a card where there is one, and a simulated one elsewhere."""

import pytest
import torch

from tests.device.simulated import simulation


@pytest.fixture
def device():
    """Yield a card, or the simulated device."""
    if torch.cuda.is_available():
        yield torch.device("cuda", 0)
    else:
        with simulation() as place:
            yield place
