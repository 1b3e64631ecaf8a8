import threading

import deepseek as ds
from deepseek.distributed.overlap import is_overlapping, note_communication, note_exposed


def test_a_block_counts_what_happens_inside_it_from_any_thread():
    note_communication(5.0)
    with ds.comm_overlap() as outer:
        note_communication(3.0)
        with ds.comm_overlap() as inner:
            thread = threading.Thread(target=note_communication, args=(1.0,))
            thread.start()
            thread.join()
            note_exposed(0.25)
    note_exposed(9.0)
    assert (outer.communication_s, outer.exposed_s, outer.hidden_s) == (4.0, 0.25, 3.75)
    assert (inner.communication_s, inner.num_collectives, inner.hidden_share) == (1.0, 1, 0.75)


def test_only_a_block_that_says_so_lets_gradients_wait():
    assert is_overlapping()
    with ds.comm_overlap(enabled=False), ds.comm_overlap():
        assert not is_overlapping()
    assert is_overlapping()
