"""What a rank does in test_launching.py: `python -m tests.distributed.launched WHAT FOLDER`; torch is not imported."""

import json
import os
import signal
import sys
import time
from pathlib import Path


def main() -> None:
    what, folder = sys.argv[1], Path(sys.argv[2])
    rank = int(os.environ["RANK"])
    names = ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS", "MASTER_ADDR", "MASTER_PORT")
    seen = {name: os.environ.get(name) for name in names} | {"pid": os.getpid()}
    (folder / f"{rank}.json").write_text(json.dumps(seen))
    print(f"rank {rank} speaks")
    if what == "end":
        return
    if rank == 1:
        while not (folder / "0.json").exists():
            time.sleep(0.01)
        if what == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "exit":
            print("no such thing", file=sys.stderr)
            sys.exit(3)
        error = {"message": f"{what}: the reason", "extraInfo": {"py_callstack": "lines\n", "timestamp": time.time()}}
        Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps({"message": error}))
        sys.exit(2)
    time.sleep(60)


if __name__ == "__main__":
    main()
