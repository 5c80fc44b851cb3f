"""Shared by all tests."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _same_draws_every_time():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _skip_gpu_tests_without_a_gpu(request):
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU; there is none here")
