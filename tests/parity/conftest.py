"""Nothing of this folder is collected where torch and CEBRA are not installed."""

import warnings
from unittest import mock

import pytest

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pytest makes errors of what they warn of on import
        import cebra
        import torch
except ImportError:
    collect_ignore_glob = ["*.py"]
else:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _seeded_generators():
    """CEBRA's samplers seed themselves from the system: let them seed from torch instead."""
    has_generator = cebra.distributions.base.HasGenerator
    original = has_generator.__init__

    def seeded(self, device, seed):
        original(self, device=device, seed=seed)
        self.generator.manual_seed(int(torch.randint(2**31, ())))

    with mock.patch.object(has_generator, "__init__", seeded):
        yield


@pytest.fixture
def exact_index(monkeypatch):
    """CEBRA's label index in float64 with direct differences: in float32 it misses neighbours."""
    index = cebra.distributions.index

    class ExactDistances(index.DistanceMatrix):
        def __call__(self, query, mask=None):
            samples = self.index if mask is None else self.index[mask]
            pairs = zip(samples.double().T, query.double().T, strict=True)  # one of each feature
            return sum((label[:, None] - asked[None, :]).square() for label, asked in pairs)

    monkeypatch.setattr(index, "DistanceMatrix", ExactDistances)
