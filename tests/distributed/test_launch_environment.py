import pytest

from deepseek.core.errors import ConfigError
from deepseek.distributed.launch_environment import (
    LaunchEnvironment,
    expand_counts,
    expand_hosts,
    read_launch_environment,
)

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "a",
    "MASTER_PORT": "29400",
}
SLURM = {
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "6",
    "SLURM_NTASKS": "7",
    "SLURM_LOCALID": "2",
    "SLURM_NODEID": "1",
    "SLURM_JOB_ID": "20077",
    "SLURM_STEP_TASKS_PER_NODE": "4,3",
    "SLURM_STEP_NODELIST": "gpu-[1,3]",
}
KUBERNETES = {"JOB_COMPLETION_INDEX": "2", "WORLD_SIZE": "3", "MASTER_ADDR": "job-0.job"}


def test_no_variables_are_a_single_process():
    assert read_launch_environment({"PATH": "/bin"}) == LaunchEnvironment()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        (TORCHRUN, LaunchEnvironment("torchrun", 5, 8, 1, 4, "a", 29400)),
        (SLURM, LaunchEnvironment("slurm", 6, 7, 2, 3, "gpu-1", 15077)),
        (KUBERNETES, LaunchEnvironment("kubernetes", 2, 3, 0, 1, "job-0.job", 29500)),
        ({**SLURM, **TORCHRUN}, LaunchEnvironment("torchrun", 5, 8, 1, 4, "a", 29400)),  # torchrun started by srun
    ],
)
def test_each_launcher_is_recognized(variables, expected):
    assert read_launch_environment(variables) == expected


def test_a_batch_script_that_srun_did_not_start_is_a_single_process():
    batch = {name: value for name, value in SLURM.items() if not name.startswith("SLURM_STEP")}
    assert read_launch_environment(batch).launcher == "single"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "1"}, "WORLD_SIZE is not set"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "MASTER_ADDR is not set"),
        ({**TORCHRUN, "RANK": "8"}, "rank=8 is not one of 8 ranks"),
        ({**TORCHRUN, "RANK": "one"}, "RANK='one' .* not a whole number"),
        ({"JOB_COMPLETION_INDEX": "0"}, "set it in the manifest"),
        ({"JOB_COMPLETION_INDEX": "0", "WORLD_SIZE": "2"}, "JOB-0.SERVICE"),
    ],
)
def test_what_is_missing_or_wrong_is_named(variables, message):
    with pytest.raises(ConfigError, match=message):
        read_launch_environment(variables)


def test_short_forms_of_slurm_are_written_out():
    assert expand_hosts("a[1-2,10]-ib,b") == ["a1-ib", "a2-ib", "a10-ib", "b"]
    assert expand_hosts("") == []
    assert expand_counts("2(x3),1") == [2, 2, 2, 1]
