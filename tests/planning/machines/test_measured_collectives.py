import pytest

from deepseek.core.errors import ConfigError
from deepseek.distributed.collectives import COLLECTIVES
from deepseek.distributed.topology import LinkClass
from deepseek.planning.machines import measured_collectives
from deepseek.planning.machines.measured_collectives import count_elements, measure_collectives

LINK = LinkClass(1e-4, 1e9)


def test_every_collective_runs_between_processes_beside_what_its_messages_should_take(monkeypatch):
    rows = measure_collectives(2, LINK)
    assert {row.name for row in rows} == set(COLLECTIVES)
    assert len(rows) == 2 * len(COLLECTIVES)
    assert all(row.measured_s > 0 for row in rows)
    ring = next(row for row in rows if row.name == "ring_all_reduce" and row.buffer_bytes > 1 << 20)
    # Two ranks: in two steps each sends half of the buffer.
    assert ring.sent_bytes == ring.buffer_bytes
    assert ring.estimated_s == pytest.approx(2 * LINK.alpha_s + ring.buffer_bytes / LINK.bandwidth_bytes_per_s)


@pytest.mark.parametrize("world_size", [-1, 0, 1, 65])
def test_a_number_of_processes_that_says_nothing_is_refused(world_size):
    with pytest.raises(ConfigError, match="give 2 to 64"):
        measure_collectives(world_size, LINK)


@pytest.mark.parametrize("world_size", [2, 3, 7, 64])
def test_buffers_are_shared_evenly_and_about_as_large_as_asked(world_size):
    for size in measured_collectives.BUFFER_BYTES:
        elements = count_elements(world_size, size)
        assert elements % world_size == 0
        assert size <= 4 * elements < size + 4 * world_size
