"""`DeepSeekComm`: one communicator over torch.distributed, for one process as for thousands.

    from deepseek.distributed import DeepSeekComm

    with DeepSeekComm.init(mesh={"dp": 2, "tp": 4}) as comm:
        comm.all_reduce(gradient, algorithm="auto")
        comm.group("tp").all_gather(activations)

`init` finds out who it is from torchrun, Slurm or Kubernetes (`launch_environment.py`), joins a program that already
initialized torch.distributed, or is a world of one. Every collective goes through `_call`: a line in the ledger, the
doctor's check where the call is new, the work, and the doctor's report where it fails. `reduction_algorithms.py` and
`differentiable_all_to_all.py` do the work by the message lists of `collectives/`.

Collectives are run in the order in which they are called, also where some are asynchronous: those run in one thread,
and a blocking one waits for its turn behind them.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

from deepseek.core.errors import CollectiveMismatchError, ConfigError, PermanentError
from deepseek.core.names import explain_unknown
from deepseek.distributed.algorithm_choice import HOPELESS, LONG_ROUND_S, NUM_ROUNDS, AlgorithmTable
from deepseek.distributed.collective_ledger import CollectiveCall, CollectiveLedger
from deepseek.distributed.communication_metrics import render_metrics
from deepseek.distributed.differentiable_all_to_all import ALL_TO_ALLS, exchange_rows, swap_lengths
from deepseek.distributed.hang_doctor import HangDoctor, first_sentence
from deepseek.distributed.launch_environment import LaunchEnvironment, read_launch_environment
from deepseek.distributed.overlap import note_communication, note_exposed
from deepseek.distributed.reduction_algorithms import (
    ALL_REDUCES,
    RankGroup,
    all_gather,
    all_reduce_,
    find_slices,
    list_candidates,
    name_operator,
    reduce_scatter,
)
from deepseek.distributed.topology import RankTopology

BACKENDS = ("auto", "nccl", "gloo", "mpi")
DEFAULT_TIMEOUT_S = 600.0
_PING_BYTES, _NUM_PINGS = 1024, 5

Mesh = Mapping[str, int] | DeviceMesh
Result = TypeVar("Result")


@dataclass
class _Session:
    """What all groups of one communicator share."""

    ledger: CollectiveLedger
    doctor: HangDoctor | None
    topology: RankTopology
    algorithms: AlgorithmTable
    mesh: DeviceMesh | None
    backend: str
    is_owner: bool
    thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "deepseek-collectives"))
    last_submitted: Future[Any] | None = None
    waited_s: float = 0.0
    is_closed: bool = False

    def note_waited(self, seconds: float) -> None:
        """Count seconds in which the program waited for a collective."""
        self.waited_s += seconds
        note_exposed(seconds)


class PendingCollective:
    """A collective that runs while the program goes on; `wait()` returns its result."""

    def __init__(self, future: Future[Any], session: _Session) -> None:
        self._future = future
        self._session = session

    def wait(self) -> Any:
        """Wait for the result; the seconds count as exposed communication."""
        began_s = time.perf_counter()
        try:
            return self._future.result()
        finally:
            self._session.note_waited(time.perf_counter() - began_s)

    def pass_on(self, future: torch.futures.Future[torch.Tensor], *, is_waited_for: bool) -> None:
        """Hand the result to a future of torch; seconds from now on are exposed where nothing is left to compute."""
        began_s = time.perf_counter()

        def tell(done: Future[Any]) -> None:
            if is_waited_for:
                self._session.note_waited(time.perf_counter() - began_s)
            error = done.exception()
            if error is None:
                future.set_result(done.result())
            else:
                future.set_exception(error)  # type: ignore[arg-type]

        self._future.add_done_callback(tell)

    def is_done(self) -> bool:
        """Whether it ended."""
        return self._future.done()


class DeepSeekComm:
    """A group of ranks that exchange tensors; made by `init`, and for the axes of a mesh by `group`.

    >>> with DeepSeekComm.init(backend="gloo") as comm:  # a single process is a world of one
    ...     comm.get_rank(), comm.get_world_size(), comm.all_reduce(torch.ones(2)).tolist()
    (0, 1, [1.0, 1.0])
    """

    def __init__(self, session: _Session, process_group: dist.ProcessGroup, name: str) -> None:
        self.name = name
        self.ranks = dist.get_process_group_ranks(process_group)
        self._session = session
        topology = session.topology.select(self.ranks)
        self._group = RankGroup(process_group, dist.get_rank(process_group), topology)

    @classmethod
    def init(
        cls,
        backend: str = "auto",
        mesh: Mesh | None = None,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        init_method: str | None = None,
        hosts: Sequence[str | int] | None = None,
        algorithms: AlgorithmTable | None = None,
    ) -> DeepSeekComm:
        """Join the other ranks of this job, and return the communicator of all of them.

        `backend` is "auto" (NCCL with GPUs, else Gloo), "nccl", "gloo" or "mpi", in any case of letters. `mesh` names
        the axes for `group`, outermost first, e.g. `{"dp": 2, "tp": 4}`, or is a `DeviceMesh`. After `timeout_s` a
        collective that some rank never entered fails with a report. `init_method` ("file:///...", "tcp://...") is
        where ranks meet, if not where the launcher says. `hosts` names the host of each rank (default: as each rank
        says itself). `algorithms` is a table measured before. Raises `ConfigError` for what does not exist here.
        """
        if not timeout_s > 0:
            raise ConfigError(f"timeout_s={timeout_s} gives no rank a chance to come; give seconds above 0")
        is_owner = not dist.is_initialized()
        store = _join(choose_backend(backend), timeout_s, init_method) if is_owner else _join_nested(backend, timeout_s)
        try:
            session, world = _build_session(store, is_owner, mesh, timeout_s, hosts, algorithms or AlgorithmTable())
        except BaseException:
            if is_owner:
                dist.destroy_process_group()
            raise
        return cls(session, world, "world")

    def __enter__(self) -> DeepSeekComm:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(error)

    def close(self, error: BaseException | None = None) -> None:
        """Leave the other ranks, telling them of the `error` that made this one leave; closing twice is once."""
        session = self._session
        if session.is_closed:
            return
        session.is_closed = True
        session.thread.shutdown(wait=error is None)
        if session.doctor is not None:
            session.doctor.close(
                "left" if error is None else f"failed: {type(error).__name__}: {first_sentence(error)}"
            )
        if session.is_owner:
            dist.destroy_process_group()
        else:
            dist.destroy_process_group(self._group.process_group)

    def get_rank(self) -> int:
        """Return the number of this process in the group."""
        return self._group.rank

    def get_world_size(self) -> int:
        """Return how many ranks the group has."""
        return self._group.size

    @property
    def process_group(self) -> dist.ProcessGroup:
        """The group of torch.distributed, for libraries that take one."""
        return self._group.process_group

    @property
    def backend(self) -> str:
        """The backend that carries the messages."""
        return self._session.backend

    @property
    def topology(self) -> RankTopology:
        """The hosts of the ranks of this group."""
        return self._group.topology

    @property
    def ledger(self) -> CollectiveLedger:
        """What this rank called."""
        return self._session.ledger

    @property
    def algorithms(self) -> AlgorithmTable:
        """What `algorithm="auto"` measured so far."""
        return self._session.algorithms

    @property
    def waited_s(self) -> float:
        """Seconds that callers of collectives waited for them."""
        return self._session.waited_s

    def render_metrics(self) -> str:
        """Return latencies and bytes of this rank in the Prometheus text format."""
        return render_metrics(self._session.ledger, dist.get_rank())

    def group(self, axis: str) -> DeepSeekComm:
        """Return the communicator of the ranks along one axis of the mesh, this one among them."""
        mesh = self._session.mesh
        names = (mesh.mesh_dim_names or ()) if mesh is not None else ()
        if axis not in names or mesh is None:
            hint = "" if names else "; give init(mesh={...}) to name axes"
            raise ConfigError(explain_unknown("axis of the mesh", axis, names) + hint)
        return DeepSeekComm(self._session, mesh.get_group(axis), axis)

    def over(self, process_group: dist.ProcessGroup, name: str) -> DeepSeekComm:
        """Return the communicator of a group that torch made of some of the ranks, this one among them."""
        return DeepSeekComm(self._session, process_group, name)

    def all_reduce(
        self,
        tensor: torch.Tensor,
        op: Any = dist.ReduceOp.SUM,
        *,
        algorithm: str = "auto",
        payload: torch.dtype | None = None,
        async_op: bool = False,
    ) -> Any:
        """Reduce `tensor` in place over the ranks and return it, or a `PendingCollective` with `async_op`.

        `algorithm` is "flat" (torch's own), "ring", "hierarchical" (inside hosts, across, inside), "tree", or "auto",
        which measures them the first time that a size is seen. With `payload=torch.bfloat16` numbers travel in 16 bits
        and are added in the tensor's type; partial sums are rounded on their way, and all ranks get the same bits.
        """
        _check_name("algorithm of all_reduce", algorithm, ("auto", *ALL_REDUCES))
        if payload is not None and algorithm == "flat":
            raise ConfigError(
                f"algorithm='flat' knows no payload={payload}; use 'ring', 'hierarchical', 'tree' or 'auto'"
            )
        operator = _name_reduction(op)
        if operator == "AVG" and not tensor.dtype.is_floating_point:
            raise ConfigError(f"an average of {tensor.dtype} is no {tensor.dtype}; reduce with SUM and divide")
        chosen = self._choose(tensor, algorithm, payload)
        reduce_ = self._prepare_all_reduce(tensor, op, chosen, payload)
        return self._call(
            f"all_reduce({operator})", tensor, reduce_, self._count_all_reduce(tensor, chosen, payload), async_op
        )

    def reduce_scatter(
        self, tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, *, algorithm: str = "auto", async_op: bool = False
    ) -> Any:
        """Return this rank's part, of equally many rows, of the reduction of `tensor` over the ranks.

        `algorithm` is "flat" (torch's own, which over gloo sends the whole tensor around), "ring", or "auto": the ring
        over gloo, torch's own elsewhere.
        """
        chosen = self._choose_ring(algorithm)
        if tensor.dim() == 0 or tensor.shape[0] % self._group.size:
            raise ConfigError(
                f"{list(tensor.shape)} cannot be cut into {self._group.size} parts of equally many rows; pad it"
            )

        def run() -> torch.Tensor:
            if chosen == "ring":
                return reduce_scatter(tensor, self._group, name_operator(op))
            part = tensor.new_empty(tensor.shape[0] // self._group.size, *tensor.shape[1:])
            parts = list(tensor.contiguous().chunk(self._group.size))
            dist.reduce_scatter(part, parts, op, group=self.process_group)
            return part

        return self._call("reduce_scatter", tensor, run, self._count_ring(tensor.nbytes), async_op)

    def all_gather(self, tensor: torch.Tensor, *, algorithm: str = "auto", async_op: bool = False) -> Any:
        """Return the tensors of all ranks, of one shape, one after the other along the first dimension."""
        chosen = self._choose_ring(algorithm, standard="flat")
        source = tensor if tensor.dim() else tensor.view(1)

        def run() -> torch.Tensor:
            if chosen == "ring":
                return all_gather(source, self._group)
            whole = source.new_empty(source.shape[0] * self._group.size, *source.shape[1:])
            dist.all_gather(list(whole.chunk(self._group.size)), source.contiguous(), group=self.process_group)
            return whole

        return self._call("all_gather", tensor, run, self._count_ring(tensor.nbytes * self._group.size), async_op)

    def all_to_all(
        self,
        rows: torch.Tensor,
        sent: Sequence[int] | None = None,
        received: Sequence[int] | None = None,
        *,
        algorithm: str = "native",
    ) -> torch.Tensor:
        """Send `sent[j]` of the rows to rank j, in order, and return those that arrive, in order; it has a backward.

        Without `sent`, equal parts. Without `received`, ranks first say how many rows they send. `algorithm` is
        "native", "ring", "pairwise" or "hierarchical"; parts may be empty, and none is padded.
        """
        _check_name("algorithm of all_to_all", algorithm, ALL_TO_ALLS)
        size = self._group.size
        if sent is None:
            if rows.shape[0] % size:
                raise ConfigError(
                    f"{rows.shape[0]} rows are no equal parts for {size} ranks; give the rows of each part"
                )
            sent = received = [rows.shape[0] // size] * size
        if len(sent) != size or min(sent) < 0 or sum(sent) != rows.shape[0]:
            raise ConfigError(
                f"sent={list(sent)} does not part {rows.shape[0]} rows among {size} ranks; give one count for each rank"
            )
        parts = list(sent)
        if received is None:
            received = self._call("all_to_all(lengths)", rows[:0], lambda: swap_lengths(parts, self._group), {}, False)
        arriving = list(received)
        width = rows.element_size() * rows[:1].numel() if rows.shape[0] else 0
        sent_bytes = self._count_by_link({rank: count * width for rank, count in enumerate(parts)})
        like = rows[:0]  # lengths differ between ranks and are no part of what they agree on
        arrived: torch.Tensor = self._call(
            "all_to_all", like, lambda: exchange_rows(rows, parts, arriving, self._group, algorithm), sent_bytes, False
        )
        return arrived

    def broadcast(self, tensor: torch.Tensor, source: int = 0, *, async_op: bool = False) -> Any:
        """Overwrite `tensor` with that of rank `source` of the group, and return it."""
        if not 0 <= source < self._group.size:
            raise ConfigError(
                f"source={source} is not one of {self._group.size} ranks; give 0 to {self._group.size - 1}"
            )

        def run() -> torch.Tensor:
            dist.broadcast(tensor, group=self.process_group, group_src=source)
            return tensor

        return self._call(f"broadcast({source})", tensor, run, self._count_ring(tensor.nbytes), async_op)

    def barrier(self) -> None:
        """Wait until all ranks of the group are here."""
        nothing = torch.empty(0)
        self._call("barrier", nothing, lambda: dist.barrier(self.process_group), {}, False)

    def send(self, tensor: torch.Tensor, target: int) -> None:
        """Send `tensor` to one rank of the group, and return when it may be written to again."""
        self._exchange_with(
            tensor, self._group.rank, target, lambda: dist.send(tensor, group=self.process_group, group_dst=target)
        )

    def recv(self, tensor: torch.Tensor, source: int) -> torch.Tensor:
        """Overwrite `tensor` with what rank `source` of the group sends, and return it."""
        self._exchange_with(
            tensor, source, self._group.rank, lambda: dist.recv(tensor, group=self.process_group, group_src=source)
        )
        return tensor

    def require_equal(self, name: str, value: str) -> None:
        """Refuse to go on where ranks have different values, e.g. of a digest of the configuration.

        Raises `CollectiveMismatchError` that names the values and their ranks.
        """
        values: list[str] = [""] * self._group.size
        self._call(
            "require_equal",
            torch.empty(0),
            lambda: dist.all_gather_object(values, value, self.process_group),
            {},
            False,
        )
        holders: dict[str, list[int]] = {}
        for rank, other in enumerate(values):
            holders.setdefault(other, []).append(rank)
        if len(holders) > 1:
            shown = "; ".join(f"{other[:200]!r} on ranks {ranks}" for other, ranks in holders.items())
            raise CollectiveMismatchError(f"ranks do not have the same {name}: {shown}; start all with the same one")

    def measure_topology(self) -> RankTopology:
        """Time small messages between all pairs of ranks, and return which of them share a host by that.

        It takes a few round trips per pair, pair after pair, and changes nothing: give the result to `init(hosts=...)`.
        """
        size, rank = self._group.size, self._group.rank
        latencies_s = torch.zeros(size, size, dtype=torch.float64)
        buffer = torch.zeros(_PING_BYTES, dtype=torch.uint8)
        for one in range(size):
            for two in range(one):
                self.barrier()
                if rank in (one, two):
                    latencies_s[one, two] = self._time_round_trips(buffer, two if rank == one else one, rank == one)
        self.all_reduce(latencies_s, dist.ReduceOp.MAX, algorithm="flat")
        return RankTopology.from_latencies((latencies_s + latencies_s.T).tolist())

    def _time_round_trips(self, buffer: torch.Tensor, other: int, is_first: bool) -> float:
        times_s = []
        for _ in range(_NUM_PINGS + 1):
            began_s = time.perf_counter()
            if is_first:
                self.send(buffer, other)
                self.recv(buffer, other)
            else:
                self.recv(buffer, other)
                self.send(buffer, other)
            times_s.append(time.perf_counter() - began_s)
        return min(times_s[1:])

    def _choose(self, tensor: torch.Tensor, algorithm: str, payload: torch.dtype | None) -> str:
        if algorithm != "auto":
            return algorithm
        if self._group.size == 1:
            return "flat" if payload is None else "ring"
        wire_bytes = tensor.numel() * (payload or tensor.dtype).itemsize
        operation = f"{self.name}:all_reduce" if payload is None else f"{self.name}:all_reduce({payload})"
        return self._session.algorithms.find(operation, wire_bytes) or self._measure(
            operation, tensor, wire_bytes, payload
        )

    def _measure(self, operation: str, tensor: torch.Tensor, wire_bytes: int, payload: torch.dtype | None) -> str:
        """Run every candidate in turns on a scratch buffer of the size, on all ranks."""
        names = [name for name in list_candidates(self.topology) if payload is None or name != "flat"]
        scratch = torch.zeros_like(tensor)
        first_s = {name: self._time_slowest(scratch, name, payload) for name in names}  # connects, and warms up
        fastest_s = min(first_s.values())
        worthy = [name for name in names if first_s[name] <= HOPELESS * fastest_s]
        times_s: dict[str, list[float]] = {name: [] for name in worthy}
        for _ in range(NUM_ROUNDS if fastest_s < LONG_ROUND_S else 1):
            for name in worthy:
                times_s[name].append(self._time_slowest(scratch, name, payload))
        return self._session.algorithms.learn(operation, wire_bytes, "flat", times_s)

    def _time_slowest(self, scratch: torch.Tensor, name: str, payload: torch.dtype | None) -> float:
        """Seconds that one run takes the slowest rank, which all ranks agree on."""
        run = self._prepare_all_reduce(scratch, dist.ReduceOp.SUM, name, payload)
        self.barrier()
        began_s = time.perf_counter()
        self._call(f"measure({name})", scratch, run, self._count_all_reduce(scratch, name, payload), False)
        if scratch.is_cuda:
            torch.cuda.synchronize(scratch.device)
        slowest_s = torch.tensor([time.perf_counter() - began_s], device=scratch.device)
        return float(self.all_reduce(slowest_s, dist.ReduceOp.MAX, algorithm="flat"))

    def _choose_ring(self, algorithm: str, standard: str | None = None) -> str:
        _check_name("algorithm", algorithm, ("auto", "flat", "ring"))
        if algorithm != "auto":
            return algorithm
        return standard or ("ring" if self.backend == "gloo" else "flat")

    def _prepare_all_reduce(
        self, tensor: torch.Tensor, op: Any, algorithm: str, payload: torch.dtype | None
    ) -> Callable[[], torch.Tensor]:
        operator = "" if algorithm == "flat" else name_operator(op)

        def run() -> torch.Tensor:
            if algorithm == "flat":
                dist.all_reduce(tensor, op, group=self.process_group)
            else:
                all_reduce_(tensor, self._group, algorithm, operator, payload)
            return tensor

        return run

    def _count_all_reduce(self, tensor: torch.Tensor, algorithm: str, payload: torch.dtype | None) -> Mapping[str, int]:
        if algorithm == "flat":
            return self._count_ring(2 * tensor.nbytes)
        element_bytes = (payload or tensor.dtype).itemsize
        placement, sent = self.topology.placement, dict[int, int]()
        for _, _, steps in find_slices(algorithm, self._group, tensor, payload):
            for message in (message for messages, _ in steps for message in messages):
                target = placement[message.target]
                sent[target] = sent.get(target, 0) + message.num_elements * element_bytes
        return self._count_by_link(sent)

    def _count_ring(self, num_bytes: int) -> Mapping[str, int]:
        """What a ring in rank order sends of a whole buffer: torch does not say how its own collectives send."""
        size = self._group.size
        return self._count_by_link({(self._group.rank + 1) % size: num_bytes * (size - 1) // size})

    def _count_by_link(self, sent_bytes: Mapping[int, int]) -> dict[str, int]:
        hosts, counts = self.topology.hosts, {"inside": 0, "across": 0}
        for target, num_bytes in sent_bytes.items():
            if target != self._group.rank:
                counts["inside" if hosts[target] == hosts[self._group.rank] else "across"] += num_bytes
        return counts

    def _call(
        self,
        operation: str,
        tensor: torch.Tensor,
        run: Callable[[], Result],
        sent_bytes: Mapping[str, int],
        async_op: bool,
    ) -> Any:
        """Run a collective with a line in the ledger, in its turn."""
        session = self._session
        if session.is_closed:
            raise PermanentError(f"{operation} came after the communicator was closed; make a new one with init")
        call = session.ledger.begin(self.name, operation, tuple(tensor.shape), _name_dtype(tensor.dtype), tensor.nbytes)
        if async_op:
            session.last_submitted = session.thread.submit(self._work, call, run, sent_bytes, self.ranks, True)
            return PendingCollective(session.last_submitted, session)
        if session.last_submitted is not None and not session.last_submitted.done():
            return PendingCollective(
                session.thread.submit(self._work, call, run, sent_bytes, self.ranks, True), session
            ).wait()
        result = self._work(call, run, sent_bytes, self.ranks, True)
        session.note_waited((call.ended_s or call.began_s) - call.began_s)
        return result

    def _work(
        self,
        call: CollectiveCall,
        run: Callable[[], Result],
        sent_bytes: Mapping[str, int],
        ranks: Sequence[int],
        is_checked: bool,
    ) -> Result:
        doctor, began_s = self._session.doctor, time.perf_counter()
        try:
            if doctor is not None and is_checked and len(ranks) > 1:
                doctor.check(call, ranks)
                began_s = time.perf_counter()
            result = run()
        except RuntimeError as error:
            if doctor is None or not is_from_the_wire(error):
                raise
            raise doctor.explain(call, ranks, error) from error
        self._session.ledger.end(call, sent_bytes)
        note_communication(time.perf_counter() - began_s)
        return result

    def _exchange_with(self, tensor: torch.Tensor, source: int, target: int, run: Callable[[], object]) -> None:
        """One message, numbered along its own way; a sender must not wait for its receiver, so nothing is compared."""
        other = target if source == self._group.rank else source
        if not 0 <= other < self._group.size or other == self._group.rank:
            raise ConfigError(
                f"rank {self._group.rank} cannot exchange a message with rank {other} of {self._group.size}; "
                "name another rank of the group"
            )
        call = self._session.ledger.begin(
            f"{self.name} {source}->{target}",
            "message",
            tuple(tensor.shape),
            _name_dtype(tensor.dtype),
            tensor.nbytes,
        )
        sent_bytes = self._count_by_link({target: tensor.nbytes}) if source == self._group.rank else {}
        self._work(call, run, sent_bytes, [self.ranks[source], self.ranks[target]], False)
        self._session.note_waited((call.ended_s or call.began_s) - call.began_s)


def choose_backend(name: str) -> str:
    """Return the backend that torch knows by `name`, in any case of letters; "auto" is NCCL with GPUs, else Gloo.

    >>> choose_backend("Gloo")
    'gloo'
    """
    backend = name.lower()
    _check_name("backend", backend, BACKENDS)
    if backend == "auto":
        return "nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    if backend == "nccl" and not torch.cuda.is_available():
        raise ConfigError(f"backend={name!r} needs a GPU, and torch sees none here; use backend='gloo'")
    if backend == "nccl" and not dist.is_nccl_available():
        raise ConfigError(f"backend={name!r} is not in this build of torch; install one with CUDA, or use 'gloo'")
    if backend == "mpi" and not dist.is_mpi_available():
        raise ConfigError(f"backend={name!r} needs a torch that was built with MPI, which this one was not; use 'gloo'")
    return backend


def _join(backend: str, timeout_s: float, init_method: str | None) -> Store:
    """Meet the other ranks; returns the store for the doctor."""
    known = {"MASTER_ADDR": "127.0.0.1"} if init_method else {}  # the launcher need not say where ranks meet
    launch = read_launch_environment({**known, **os.environ})
    if backend == "nccl":
        torch.cuda.set_device(launch.local_rank)
    store = _open_store(launch, timeout_s, init_method)
    dist.init_process_group(
        backend,
        store=PrefixStore("deepseek/groups", store),
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=timedelta(seconds=timeout_s),
    )
    return PrefixStore("deepseek/doctor", store)


def _open_store(launch: LaunchEnvironment, timeout_s: float, init_method: str | None) -> Store:
    if init_method is None and launch.world_size == 1:
        return HashStore()
    if init_method is None and launch.launcher == "torchrun":
        init_method = "env://"
    place = init_method or f"tcp://{launch.master_address}:{launch.master_port}"
    timeout = timedelta(seconds=timeout_s)
    found: Store
    found, _, _ = next(rendezvous(place, rank=launch.rank, world_size=launch.world_size, timeout=timeout))
    return found


def _join_nested(backend: str, timeout_s: float) -> Store:
    """Use the ranks of a program that initialized torch.distributed itself; the doctor gets a store of its own."""
    present = dist.get_backend()
    if backend.lower() not in ("auto", present):
        raise ConfigError(
            f"backend={backend!r} was asked for, and this program initialized torch.distributed with {present!r} "
            "before; use backend='auto', or let init do it"
        )
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if world_size == 1:
        return HashStore()
    timeout = timedelta(seconds=timeout_s)
    server = None
    address: list[Any] = [None]
    if rank == 0:
        server = TCPStore("0.0.0.0", 0, None, True, timeout, wait_for_workers=False)  # noqa: S104 - other hosts come
        address = [(os.environ.get("MASTER_ADDR") or socket.gethostname(), server.port)]
    dist.broadcast_object_list(address, 0)
    host, port = address[0]
    return server or TCPStore(host, port, None, False, timeout)


def _build_session(
    store: Store,
    is_owner: bool,
    mesh: Mesh | None,
    timeout_s: float,
    hosts: Sequence[str | int] | None,
    algorithms: AlgorithmTable,
) -> tuple[_Session, dist.ProcessGroup]:
    """Assemble what the groups of a communicator share, and the group of all ranks."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    world = dist.group.WORLD if is_owner else dist.new_group(timeout=timedelta(seconds=timeout_s))
    assert world is not None
    backend = dist.get_backend(world)
    built_mesh = _build_mesh(mesh, world_size, backend)
    names = list(hosts) if hosts is not None else _ask_hosts(world, world_size)
    if len(names) != world_size:
        raise ConfigError(f"hosts names {len(names)} ranks of {world_size}; name the host of each rank in order")
    ledger = CollectiveLedger()
    doctor = HangDoctor(store, rank, ledger, timeout_s) if world_size > 1 else None
    topology = RankTopology.of(names)
    return _Session(ledger, doctor, topology, algorithms, built_mesh, backend, is_owner), world


def _ask_hosts(world: dist.ProcessGroup, world_size: int) -> list[str]:
    names = [""] * world_size
    dist.all_gather_object(names, socket.gethostname(), world)
    return names


def _build_mesh(mesh: Mesh | None, world_size: int, backend: str) -> DeviceMesh | None:
    if mesh is None or isinstance(mesh, DeviceMesh):
        return mesh
    sizes, num_ranks = dict(mesh), 1
    for axis, size in sizes.items():
        if size < 1:
            raise ConfigError(f"axis {axis!r} of the mesh has {size} ranks; give at least 1")
        num_ranks *= size
    if num_ranks != world_size:
        raise ConfigError(
            f"mesh={sizes} has {num_ranks} ranks, and {world_size} were started; the two have to be equal"
        )
    kind = "cuda" if backend == "nccl" else "cpu"
    return init_device_mesh(kind, tuple(sizes.values()), mesh_dim_names=tuple(sizes))


@cache
def _name_reduction(op: Any) -> str:
    return str(op).rpartition(".")[2]


@cache
def _name_dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_name(noun: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        raise ConfigError(explain_unknown(noun, name, known))


def is_from_the_wire(error: RuntimeError) -> bool:
    """Return whether an error is about a connection to other ranks, and not torch's about an argument."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(
        word in text for word in ("gloo", "timed out", "timeout", "connection", "socket", "nccl", "peer")
    )
