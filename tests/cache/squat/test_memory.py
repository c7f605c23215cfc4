"""What a process holds while it decodes, measured where the system counts it."""

import sys

import pytest

from benchmarks.kv_cache.memory import measure


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_decoding_takes_little_more_than_the_cache():
    measured = measure("SQuatCache, 2 bits", 8192)
    assert 0.9 * measured["cache"] < measured["decode"] < 1.1 * measured["cache"], measured
