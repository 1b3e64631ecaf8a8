import json
import platform
from pathlib import Path

import numpy
import psutil
import pydantic

from deepseek.core.machine import describe_machine, describe_versions, list_processor_flags, measure_free_bytes


def test_it_is_the_machine_that_psutil_sees():
    machine = describe_machine()
    assert machine["memory_bytes"] == psutil.virtual_memory().total
    assert machine["num_cores"] == len(psutil.Process().cpu_affinity())
    assert machine["architecture"] == platform.uname().machine
    assert machine["processor"] and machine["system"] == platform.uname().system


def test_the_flags_of_the_processor_are_those_of_the_system():
    words = Path("/proc/cpuinfo").read_text().split()
    flags = list_processor_flags()
    assert flags == tuple(sorted(flags)) and len(flags) > 10 and set(flags) <= set(words)


def test_what_is_free_is_what_psutil_calls_available():
    free, available = measure_free_bytes(), psutil.virtual_memory().available
    limit = Path("/sys/fs/cgroup/memory.max")
    is_bounded = limit.exists() and limit.read_text().strip() != "max"
    assert free <= 1.05 * available if is_bounded else abs(free / available - 1) < 0.05


def test_processors_of_one_name_are_told_apart_by_their_generation():
    lines = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines())
    values = [value.strip() for value in lines.values()]
    generation = describe_machine()["processor_generation"]
    assert generation and all(part.rsplit(" ", 1)[1] in values for part in generation.split(", "))


def test_it_can_be_written_into_a_report():
    described = {"machine": describe_machine(), "versions": describe_versions()}
    assert json.loads(json.dumps(described)) == described


def test_versions_are_those_the_libraries_say_themselves():
    versions = describe_versions(("numpy", "pydantic", "no-such-library"))
    assert versions["numpy"] == numpy.__version__ and versions["pydantic"] == pydantic.VERSION
    assert versions["no-such-library"] is None
    assert versions["python"] == platform.python_version() and versions["deepseek"]
