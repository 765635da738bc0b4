"""Starts runs of several processes for tests/test_hosts.py: imports all that is slow once, and forks.

    python tests/hosts_processes.py '[{"name": "a", "count": 2, "devices": 4, "arguments": ["train", ...], "lose": 1}]'

Each job in turn: `count` processes with `devices` CPU devices each run the command line with these arguments, or `meet`
without any; the one numbered `lose` dies by SIGKILL in its sixth step.  What they print goes to NAME.INDEX.out and .err
in this folder; the exit codes and seconds of all jobs go to standard output as JSON.
"""

import gc
import json
import os
import pathlib
import signal
import socket
import sys
import time

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import run
from prefix_tuning import api, hosts, population, progress, train  # noqa: F401 (imported before forking)
from prefix_tuning.errors import UserError

gc.disable()  # these processes are short, and each would copy what it goes through


def dies(number):
    """Lets this process die when it is to take the step of this number, the third being saved."""
    advance, taken = population.Single.advance, []

    def counted(self, batch):
        taken.append(1)
        while len(taken) == number:
            if pathlib.Path(os.environ["WAIT_FOR"]).exists():
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.02)
        return advance(self, batch)

    population.Single.advance = counted


def refused(function, *arguments, **options):
    """What it raises."""
    try:
        function(*arguments, **options)
    except UserError as error:
        return str(error)


def wrong():
    raise UserError("it is wrong")


def meet(address):
    """Prints what every meeting gave as JSON; then the first process dies, and the others find out; never returns."""
    hosts.start(address)
    own, rounds = hosts.index(), []
    found = {
        "gathered": hosts.gather({"own": own, "long": "x" * own * 1000}),
        "agreed": hosts.agreed(lambda: {"own": own}),
        "refused": refused(hosts.agreed, wrong),
        "same": refused(hosts.same, one=1, other=own),
        "collected": {n: x.tolist() for n, x in sorted(hosts.collected({own: np.full(own, -np.inf)}).items())},
        "shared": list(hosts.shared_out("abcdefghij", lambda: rounds.append(1))),
        "rounds": len(rounds),
    }
    with progress.Stop() as stop:
        for number in range(20):
            if number == 7 and own == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            try:
                stop.check()
            except progress.Interrupted as error:
                found["stopped"] = [number, error.args[0]]
                break
    print(json.dumps(found), flush=True)
    hosts.gather(None)  # all have printed it
    if own == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        while True:
            hosts.gather(None)
    except Exception as error:
        hosts.leave(1, hosts.lost(error))


def one(job, index, port):
    """A process of a job; never returns."""
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{job['name']}.{index}.{name}", os.O_WRONLY | os.O_CREAT), number)
    os.environ["XLA_FLAGS"] = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={job['devices']}"
    if job.get("lose") == index:
        dies(6)
    address = f"localhost:{port},{job['count']},{index}"
    if "arguments" not in job:
        meet(address)
    code = run.main([*job["arguments"], f"--hosts={address}"])
    sys.stdout.flush()
    os._exit(code)


def finish(job):
    """Runs a job to its end: (exit codes, seconds from the loss of a process, or the start, to the end of the last)."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    pids = []
    for index in range(job["count"]):
        pids.append(os.fork())
        if not pids[-1]:
            one(job, index, port)
    codes, began = {}, time.monotonic()
    while len(codes) < len(pids):
        pid, status = os.wait()
        index = pids.index(pid)
        codes[index] = os.waitstatus_to_exitcode(status)
        if job.get("lose") == index:
            began = time.monotonic()
    return [codes[index] for index in range(job["count"])], time.monotonic() - began


print(json.dumps({job["name"]: finish(job) for job in json.loads(sys.argv[1])}))
