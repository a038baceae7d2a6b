"""Skips for tests that need the C++ core."""

from __future__ import annotations

import pytest

from vispruner_kernels import _native

needs_native = pytest.mark.skipif(not _native.INSTALLED, reason="vispruner_kernels._C is not built")
