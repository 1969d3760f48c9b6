"""Runs of train.py and merge.py in forked processes, and their deaths. For test_kills.py.

    python tests/runs/forked_runs.py spread|chain ARGUMENTS         arguments and result are JSON

It imports train and merge once and forks the processes of every run, so that a run costs no more
than itself. In a process of its own, because a fork of pytest's would copy pytest's threads.
"""

import itertools
import json
import os
import random
import shutil
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import bases  # noqa: E402
import merge  # noqa: E402
import train  # noqa: E402
from bases import generator, tensors  # noqa: E402
from support import files  # noqa: E402

# --------------------------------------------------------------------------------------------------
# The end of a process at one of its operations on files.


def do(function, *args, **kwargs):
    """Half of a rename is the rename."""
    function(*args, **kwargs)


def cut_short(function, content, path, *args, **kwargs):
    """Half of writing a file is half the file."""
    function(content, path, *args, **kwargs)
    os.truncate(path, os.path.getsize(path) // 2)


def remove_one(function, folder, **kwargs):
    """Half of removing a folder is one file less."""
    paths = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
    paths[0].unlink()


def plant_fault(number):
    """Operation `number` on files of this process is its last -> the counter of operations.

    Operations are counted in halves: an even number does not happen, an odd one happens by half.
    None: it lives.
    """
    count = itertools.count()

    def mortal(function, half):
        def run(*args, **kwargs):
            before = 2 * next(count)
            if number == before + 1:
                half(function, *args, **kwargs)
            if number in (before, before + 1):
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return run

    os.replace = mortal(os.replace, do)
    torch.save = mortal(torch.save, cut_short)
    for module in (files, tensors, generator):
        module.save_file = mortal(module.save_file, cut_short)
    rmtree = shutil.rmtree
    mortal_rmtree = mortal(rmtree, remove_one)

    def remove(path, *args, **kwargs):
        function = mortal_rmtree if os.path.isdir(path) else rmtree
        function(path, *args, **kwargs)

    shutil.rmtree = remove
    return count


# --------------------------------------------------------------------------------------------------
# The processes of one run.


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_command(script, argv, rank, operation, log):
    """train.py or merge.py in this process; keeps what `credit` returned, and counts operations."""
    count = plant_fault(operation) if rank == 0 else None
    credit = train.credit
    credits = []

    def credit_and_note(*args):
        credits.append(credit(*args))
        return credits[-1]

    train.credit = credit_and_note
    {"train": train, "merge": merge}[script].main(argv)
    if rank == 0:
        operations = 2 * next(count)
        torch.save(credits, f"{log}-credits.pt")
        Path(f"{log}-operations.txt").write_text(str(operations))


def become_worker(script, argv, rank, processes, port, operation, log):
    """Is one process of a run, as torchrun would start it. Never returns."""
    code = 1
    with open(f"{log}-{rank}.txt", "a", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if processes > 1:
        os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
        os.environ["WORLD_SIZE"] = str(processes)
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        os.environ["MASTER_PORT"] = str(port)
    try:
        run_command(script, argv, rank, operation, log)
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def start(script, argv, processes, operation, log):
    """Forks the processes of a run -> their ids."""
    port = free_port()
    pids = []
    for rank in range(processes):
        pid = os.fork()
        if pid == 0:
            become_worker(script, argv, rank, processes, port, operation, log)
        pids.append(pid)
    return pids


def wait(pids, seconds, kill_after=None):
    """Waits for all; kills them `kill_after` seconds after now -> exit codes, how long it took.

    The code of a killed one is negative. Raises RuntimeError if one outlives another by `seconds`.
    """
    began = time.time()
    first_end = None
    codes = {}
    while len(codes) < len(pids):
        alive = [pid for pid in pids if pid not in codes]
        for pid in alive:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                codes[pid] = os.waitstatus_to_exitcode(status)
                first_end = first_end or time.time()
            elif kill_after is not None and time.time() - began > kill_after:
                os.kill(pid, signal.SIGKILL)
        if first_end and time.time() - first_end > seconds:
            for pid in pids:
                if pid not in codes:
                    os.kill(pid, signal.SIGKILL)
            raise RuntimeError(f"{len(codes)} of {len(pids)} ended, the others wait for them")
        time.sleep(0.005)
    return [codes[pid] for pid in pids], time.time() - began


# --------------------------------------------------------------------------------------------------
# What the tests run.


def spread(script, argv, counts, folder):
    """The same command with each number of processes -> the exit codes of each."""
    codes = []
    for count in counts:
        command_line = [*argv, "--out", f"{folder}/{count}"]
        pids = start(script, command_line, count, None, f"{folder}/log{count}")
        codes.append(wait(pids, 300)[0])
    return codes


def chain(script, argv, processes, kills, seed, folder):
    """A whole run, in folder/whole; then the same command killed and started again, many times.

    Half of the kills come at random moments, half at operations on files. A run that ends is left,
    and the next one begins in a new folder. -> the folders of ended runs, the kills of each kind.
    """
    draw = random.Random(seed)
    pids = start(script, [*argv, "--out", f"{folder}/whole"], processes, None, f"{folder}/whole")
    codes, seconds = wait(pids, 60)
    if any(codes):
        raise RuntimeError(Path(f"{folder}/whole-0.txt").read_text())
    operations = int(Path(f"{folder}/whole-operations.txt").read_text())

    ended = []
    killed = {"moment": 0, "operation": 0}
    is_cut = False  # does the run of now go on?
    while sum(killed.values()) < kills or is_cut:
        kind, operation, kill_after = None, None, None
        if sum(killed.values()) < kills:
            kind = "moment" if sum(killed.values()) % 2 else "operation"
        if kind == "operation":
            operation = draw.randrange(operations)
        if kind == "moment":
            kill_after = draw.uniform(0.05, 1) * seconds
        out = f"{folder}/run{len(ended)}"
        pids = start(script, [*argv, "--out", out], processes, operation, f"{folder}/log")
        codes, _ = wait(pids, 60, kill_after)
        is_cut = -signal.SIGKILL in codes
        if is_cut:
            killed[kind] += 1
        elif any(codes):
            raise RuntimeError(Path(f"{folder}/log-0.txt").read_text()[-3000:])
        else:
            ended.append(out)
    return ended, killed


def warm_up(model):
    """Imports, once, what each forked process would import."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    bases.load(model)


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    name, model, arguments = sys.argv[1:]
    warm_up(model)
    function = {"spread": spread, "chain": chain}[name]
    print(json.dumps(function(*json.loads(arguments))))
