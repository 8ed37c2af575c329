"""One-go by the CUDA kernel is two-phase by the CUDA kernels, bit for bit; see test_cuda_on_cpu.

On a GPU the coefficients of a token may differ from the host's in their last bit: nvcc contracts
products and sums.
"""

from __future__ import annotations

import cuda_on_cpu
import pytest
from test_fused_loss import *  # noqa: F403
from test_rows_left_out import *  # noqa: F403

kernels = pytest.fixture(scope="module", autouse=True)(cuda_on_cpu.in_place_of_the_core)
