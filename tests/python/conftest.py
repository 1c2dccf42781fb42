import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_torch_thread():
    """Thread counts change the bits of some matrix products, and spinning threads slow busy machines."""
    torch.set_num_threads(1)
