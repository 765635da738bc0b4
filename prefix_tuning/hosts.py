"""Several processes of one run: how they find each other, what they tell each other, and how they end together.

    python run.py train ... --hosts=auto                  # TPU pods, GKE, Slurm, Open MPI: JAX finds the others
    python run.py train ... --hosts=10.0.0.1:1234,4,0     # process 0 of 4; it listens at that address

Every process runs the same command and takes the same steps in the same order; each function below that says "all
must call it" is a meeting of all of them.  A batch is the same whatever the number of processes: each makes its rows
of it.  Evaluation shares out batches, and every process gets all answers; with weights in shards over all of them
(parallel=sharded) it shares out rows.  What is written, the first process writes; all read it, so that `--workdir` must
be a folder that all of them see.

A process that goes without a word is noticed by the others: at once where a connection breaks, else after `HEARTBEAT`
seconds by JAX's coordination service.  All then end with one line and an exit code other than 0, and whatever starts
them again (Slurm's --requeue, a Job's restarts, a person) goes on from the last checkpoint, with any number of them.

On Kubernetes JAX asks the cluster's API (`pip install "jax[k8s]"`, a service account that may read pods, services and
jobs), and finds process 0 by the name that a headless service gives it; TPU slices on GKE need neither:

    apiVersion: v1
    kind: Service
    metadata: {name: tuning}
    spec: {clusterIP: None, publishNotReadyAddresses: true, selector: {job-name: tuning}}
    ---
    apiVersion: batch/v1
    kind: Job
    metadata: {name: tuning}
    spec:
      completionMode: Indexed
      completions: 2
      parallelism: 2
      template:
        spec:
          subdomain: tuning
          serviceAccountName: reads-pods
          restartPolicy: OnFailure
          containers:
          - name: tuning
            image: IMAGE
            command: [python, run.py, train, --config=FILE, --workdir=/shared/run, --hosts=auto]
            resources: {limits: {nvidia.com/gpu: 8}}
            volumeMounts: [{name: shared, mountPath: /shared}]
          volumes: [{name: shared, persistentVolumeClaim: {claimName: shared}}]
"""

import functools
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from prefix_tuning.errors import UserError

T = TypeVar("T")
HEARTBEAT = 30  # seconds without one after which a process counts as lost
ARRIVE = 300  # seconds in which all processes must have started
AT_ONCE = 1 << 26  # bytes of an array that a device takes from the others for its host to read
LEAVE = 10  # seconds that a process which has failed waits for the others to fail as well
AUTO = "auto"
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
AGAIN = "the same command on all hosts goes on from the last checkpoint"
# What Gloo, NCCL and JAX's coordination service say about a process that is gone.
GONE = re.compile(r"gloo|nccl|coordination.?service|heartbeat|barrier", re.IGNORECASE)

last_words: subprocess.Popen | None = None


def start(hosts: str | None, environment: Mapping[str, str] = os.environ) -> None:
    """Joins the other processes of this run, before JAX touches a device; a single process starts nothing.

    `hosts` is "auto", "ADDRESS:PORT,COUNT,INDEX", or None: then the environment's `VARIABLES`, or a step of Slurm with
    several tasks, say it.  Raises `UserError` for anything else, and where JAX finds no others.
    """
    found = asked(hosts, environment)
    if found is None:
        return
    address, count, index = found
    options: dict[str, Any] = {"initialization_timeout": ARRIVE, "heartbeat_timeout_seconds": HEARTBEAT}
    if address is not None:
        options |= {"coordinator_address": address, "num_processes": count, "process_id": index}
        options |= {"cluster_detection_method": "deactivate"}
    elif alone_on_node(environment):
        options |= {"local_device_ids": []}  # all of them; JAX would take the first one of each Slurm task's node
    where = f"{address}, {count} of them" if address else "an address that it finds by itself"
    say_at_death(f"error: JAX has not seen all processes at {where}, within {ARRIVE} s; {AGAIN}")
    try:
        jax.distributed.initialize(**options)
    except Exception as error:  # the many types of what is wrong with an address, a cluster, a port
        say_at_death("")
        told = f"JAX cannot join the processes at {where}: {' '.join(str(error).split())[:300]}"
        raise UserError(
            f"{told}; expected Slurm, a TPU pod, GKE, Open MPI, or --hosts=ADDRESS:PORT,COUNT,INDEX"
        ) from error
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what Gloo prints about its connections is no result
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))  # JAX has taken it, and would only note it
    if callable(signal.getsignal(signal.SIGINT)):
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the others want to know: `leave`
    say_at_death(
        f"error: process {jax.process_index()} of {jax.process_count()} was killed, or ended by JAX because another one"
        f" is lost; {AGAIN}"
    )


def asked(hosts: str | None, environment: Mapping[str, str]) -> tuple[str | None, int, int] | None:
    """(address, count, index) of this process, (None, 0, 0) where JAX is to find them, None for a run of one process.

    Raises `UserError` for what is none of these.
    """
    text = hosts
    if hosts is None and environment.get(VARIABLES[0]):
        missing = [name for name in VARIABLES if not environment.get(name)]
        if missing:
            raise UserError(f"the environment has {VARIABLES[0]} and not {' and '.join(missing)}; set all or none")
        text = ",".join(environment[name] for name in VARIABLES)
    if text is None and environment.get("SLURM_PROCID") and int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        text = AUTO  # otherwise each task would train a run of its own in the same folder
    if text is None:
        return None
    if text == AUTO:
        return None, 0, 0
    parsed = re.fullmatch(r"([^,]+:\d+),(\d+),(\d+)", text)
    if parsed is None or not int(parsed[3]) < int(parsed[2]):
        raise UserError(f"--hosts={text!r}; expected auto, or ADDRESS:PORT,COUNT,INDEX with an INDEX from 0 to COUNT-1")
    return (parsed[1], int(parsed[2]), int(parsed[3])) if int(parsed[2]) > 1 else None


def alone_on_node(environment: Mapping[str, str]) -> bool:
    """Whether each node of a step of Slurm has one task, and nobody has said which devices are its own."""
    tasks = re.sub(r"\(x\d+\)", "", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    return set(tasks.split(",")) == {"1"} and not environment.get("JAX_LOCAL_DEVICE_IDS")


def count() -> int:
    """How many processes this run has."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def index() -> int:
    """Which of them this is."""
    return jax.process_index() if jax.distributed.is_initialized() else 0


def primary() -> bool:
    """Whether this is the first process, which writes and speaks for all."""
    return index() == 0


def gather(value: Any) -> list[Any]:
    """The JSON value of every process, in their order; all must call it."""
    if count() == 1:
        return [value]
    return [json.loads(one) for one in gather_bytes(json.dumps(value).encode())]


def gather_bytes(own: bytes) -> list[bytes]:
    """The bytes of every process, in their order; all must call it."""
    array = np.frombuffer(own, np.uint8)
    sizes = multihost_utils.process_allgather(np.array([len(array)], np.int32))[:, 0]
    room = 1 << int(sizes.max()).bit_length()  # a power of 2, so that few sizes are compiled
    found = multihost_utils.process_allgather(np.pad(array, (0, room - len(array))))
    return [row[:size].tobytes() for row, size in zip(found, sizes, strict=True)]


def agreed(make: Callable[[], T]) -> T:
    """What the first process makes, a JSON value, on all of them, and its `UserError` too; all must call it."""
    if count() == 1:
        return make()
    told: dict[str, Any] = {}
    if primary():
        try:
            told["value"] = make()
        except UserError as error:
            told["error"] = str(error)
    told = gather(told)[0]
    if "error" in told:
        raise UserError(told["error"])
    return told["value"]


def same(**values: Any) -> None:
    """Raises `UserError` unless all processes have the same JSON values, naming those that differ; all must call it."""
    found = gather(values)
    differing = [name for name in values if any(one[name] != found[0][name] for one in found)]
    if differing:
        told = "; ".join(f"{name}: {', '.join(str(one[name]) for one in found)}" for name in differing)
        raise UserError(f"the {len(found)} hosts differ in {told}; expected the same files and workdir on all of them")


def has(array: Any) -> bool:
    """Whether this process has all of an array, which may lie on several of them."""
    return not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated


def fetch(tree: Any) -> Any:
    """`jax.device_get`, also of arrays that no process has all of; all must call it, and all get all."""

    def read(x: Any) -> Any:
        if has(x):
            return jax.device_get(x)
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(collect(jax.random.key_data(x)))
        return collect(x)

    return jax.tree.map(read, tree)


def collect(array: jax.Array) -> np.ndarray:
    """An array [N ...] that lies on several processes, some rows at a time, since no device may have room for it."""
    whole = NamedSharding(array.sharding.mesh, PartitionSpec())
    found = np.empty(array.shape, array.dtype)
    rows = min(len(array), max(1, AT_ONCE * len(array) // array.nbytes))
    for start in (*range(0, len(array) - rows, rows), len(array) - rows):
        found[start : start + rows] = take(array, start, rows, whole)
    return found


@functools.partial(jax.jit, static_argnums=(2, 3))
def take(array: jax.Array, start: int, rows: int, where: NamedSharding) -> jax.Array:
    """So many rows of an array, placed elsewhere."""
    return jax.lax.with_sharding_constraint(jax.lax.dynamic_slice_in_dim(array, start, rows), where)


def spread(tree: Any, where: Any) -> Any:
    """`jax.device_put` of what every process has, onto devices of several: each puts there what is its own's.

    `where` is one sharding for all, or a tree of them.
    """

    def put(x: Any, sharding: NamedSharding) -> jax.Array:
        if sharding.is_fully_addressable or not has(x):
            return jax.device_put(x, sharding)
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(put(jax.random.key_data(x), sharding))
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(put, tree, jax.tree.map(lambda _: where, tree) if isinstance(where, NamedSharding) else where)


def largest(number: int) -> int | jax.Array:
    """The largest of all processes' numbers, perhaps still on its way; all must call it."""
    if count() == 1:
        return number
    devices = Mesh(np.asarray(jax.devices()), ("all",))
    own = np.full(jax.local_device_count(), number, np.int32)
    return maximum(jax.make_array_from_process_local_data(NamedSharding(devices, PartitionSpec("all")), own))


@jax.jit
def maximum(numbers: jax.Array) -> jax.Array:
    """The largest of numbers that lie on several devices."""
    return numbers.max()


def shared_out(batches: Iterable[T], check: Callable[[], None], *, apart: bool = True) -> Iterator[tuple[int, T]]:
    """(number, batch) of this process, which takes its turn; `check` runs on all before each round.

    Where they do not compute `apart`, all take every batch.
    """
    own, all_of_them = (index(), count()) if apart else (0, 1)
    for number, batch in enumerate(batches):
        if number % all_of_them == 0:
            check()
        if number % all_of_them == own:
            yield number, batch


def collected(found: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
    """The arrays that each process has found, by their numbers, those of all; all must call it."""
    if count() == 1:
        return found
    file = io.BytesIO()
    np.savez(file, **{str(number): array for number, array in found.items()})
    files = [np.load(io.BytesIO(one), allow_pickle=False) for one in gather_bytes(file.getvalue())]
    return {int(name): one[name] for one in files for name in one.files}


def lost(error: BaseException | None) -> str | None:
    """What to tell the user of an error that another process's end has caused; None for any other, and for none."""
    if count() == 1 or error is None:
        return None
    for one in (error, error.__cause__):  # what could not be saved is a `UserError` because of it
        if isinstance(one, (RuntimeError, ValueError)) and not isinstance(one, UserError) and GONE.search(str(one)):
            reason = str(one).strip().splitlines()[0][:200]
            return f"process {index()} of {count()} has lost another one ({reason}); {AGAIN}"
    return None


def leave(code: int, lost: str | None = None) -> None:
    """Ends this process's part in the run: when all have come to their ends, or at once, saying it, if one is `lost`.

    With an exit code other than 0 the others may not know yet; after `LEAVE` seconds this process ends and they will.
    """
    if count() == 1:
        return
    sys.stdout.flush()
    if lost:
        say_at_death(f"error: {lost}")  # behind all that JAX's own threads still print
        os._exit(code)
    if code:
        say_at_death("")
        meeting = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        meeting.start()
        meeting.join(LEAVE)
        os._exit(code)  # not by the interpreter's end, where JAX would wait for a process that does not come
    jax.distributed.shutdown()
    say_at_death("")


def say_at_death(line: str) -> None:
    """What a helper prints should this process end without taking it back, by saying "".

    JAX ends a process by SIGABRT from a thread of its own, which Python never learns of.
    """
    global last_words
    if last_words is None and not line:
        return
    if last_words is None:
        script = 'trap "" INT TERM; while read -r line; do [ "$line" ] || exit; last=$line; done; echo "$last" >&2'
        last_words = subprocess.Popen(
            ["sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
        )
    last_words.stdin.write(f"{line}\n".encode())
    last_words.stdin.flush()
    if not line:
        last_words.stdin.close()
        last_words.wait()
        last_words = None
