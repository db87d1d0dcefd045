"""Loading keeps the garbage collector away, and always gives it back."""

import gc

import pytest

from glm_batch.glm_actors.faults.startup import loading


@pytest.fixture(autouse=True)
def _thawed():
    yield
    gc.unfreeze()


def test_what_is_loaded_is_left_out_of_later_collections():
    before = gc.get_freeze_count()
    with loading():
        assert not gc.isenabled()
        kept = [[] for _ in range(1000)]
    assert gc.isenabled()
    assert gc.get_freeze_count() >= before + len(kept)


def test_the_collector_comes_back_only_at_the_outer_end():
    with loading():
        with loading():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()


def test_the_collector_comes_back_after_an_error():
    with pytest.raises(RuntimeError), loading():
        raise RuntimeError
    assert gc.isenabled()
