"""Stress: many processes, two hosts, deaths, kills at random moments, a full disk, three hundred updates.

    python tests/test_stress.py spread|chain ARGUMENTS      what the tests below run in a process of its own: it imports train and merge once and
                                                            then forks the processes of every run, so that a run costs no more than itself
"""
import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch

from conftest import ROOT, command, contents, launch, launch_process, read_metrics, read_weights, small

TINY = "--iterations 3 --snapshot_every 1 --keep_snapshots 9 --ema 0.5 --reward class:1,fid:0.3 --reference 24".split()
RL = "--device cpu --updates 5 --group_size 4 --images 30 --reference 60 --report_images 20 --steps 2 --sigma_rel 0.07,0.15".split()


# ---------------------------------------------------------------------------------------------------------------------
# Processes of one run, forked; and their end at a moment, or at an operation on files.

def fault(number):
    """The number-th operation on files of this process is its last: an even one does not happen, an odd one happens by half."""
    from support import processes
    from bases import tensors
    count = itertools.count()

    def done(function, *args, **kwargs):
        function(*args, **kwargs)

    def cut(function, content, path, *args, **kwargs):
        function(content, path, *args, **kwargs)
        os.truncate(path, os.path.getsize(path) // 2)

    def remove_one(function, folder, **kwargs):
        next(p for p in sorted(Path(folder).rglob("*")) if p.is_file()).unlink()

    def dying(function, half):
        def run(*args, **kwargs):
            at = 2 * next(count)
            if number == at + 1:
                half(function, *args, **kwargs)
            if number in (at, at + 1):
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return run
    os.replace, torch.save = dying(os.replace, done), dying(torch.save, cut)
    runtime.save_file, weights.save_file = dying(runtime.save_file, cut), dying(weights.save_file, cut)
    rmtree = shutil.rmtree
    shutil.rmtree = lambda path, *args, **kwargs: (dying_rmtree if os.path.isdir(path) else rmtree)(path, *args, **kwargs)
    dying_rmtree = dying(rmtree, remove_one)
    return count


def worker(script, argv, rank, processes, port, operation, log):
    """One process of a run, as torchrun would start it; never returns."""
    code = 1
    with open(f"{log}-{rank}.txt", "a", buffering=1) as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    try:
        import merge
        import train
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        if processes > 1:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        count = fault(operation) if rank == 0 else None
        credit, credits = train.credit, []
        train.credit = lambda *args: credits.append(credit(*args)) or credits[-1]
        {"train": train, "merge": merge}[script].main(argv)
        if rank == 0:
            torch.save(credits, f"{log}-credits.pt")
            Path(f"{log}-operations.txt").write_text(str(2 * next(count)))
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def start(script, argv, processes, operation, log):
    """Forks the processes of a run -> their ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port, pids = free.getsockname()[1], []
    for rank in range(processes):
        pids.append(os.fork())
        if pids[-1] == 0:
            worker(script, argv, rank, processes, port, operation, log)
    return pids


def end(pids, seconds=60, kill_after=None):
    """Waits for all; after `kill_after` they are killed -> (exit codes, a killed one's negative, how long it took). Nobody may outlive the first by `seconds`."""
    began, codes, first = time.time(), {}, None
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes and (found := os.waitpid(pid, os.WNOHANG))[0]:
                codes[pid], first = os.waitstatus_to_exitcode(found[1]), first or time.time()
            elif pid not in codes and kill_after is not None and time.time() - began > kill_after:
                os.kill(pid, signal.SIGKILL)
        if first and time.time() - first > seconds:
            [os.kill(pid, signal.SIGKILL) for pid in pids if pid not in codes]
            raise RuntimeError(f"{len(pids) - len(codes)} processes still there {seconds} s after another's end")
        time.sleep(0.005)
    return [codes[pid] for pid in pids], time.time() - began


def warm(model):
    """Imports, once, what the forked processes would each import."""
    import merge
    merge.compare.pyplot(), merge.models.load(model)


def spread(model, script, argv, counts, folder):
    """The same command with each number of processes -> exit codes of each."""
    warm(model)
    return [end(start(script, [*argv, "--out", f"{folder}/{n}"], n, None, f"{folder}/log{n}"), 300)[0] for n in counts]


def chain(model, script, argv, processes, kills, seed, folder):
    """A whole run, in folder/whole; then the same command again and again, killed at random moments, half of them operations on files. What has
    ended is left, and the next run begins in a new folder. -> the ended runs, how many were killed in each way, restarts of one run at most."""
    warm(model)
    moments, done, killed, restarts = random.Random(seed), [], {"moment": 0, "operation": 0}, [0]
    codes, seconds = end(start(script, [*argv, "--out", f"{folder}/whole"], processes, None, f"{folder}/whole-log"))
    if any(codes):
        raise RuntimeError(Path(f"{folder}/whole-log-0.txt").read_text())
    operations = int(Path(f"{folder}/whole-log-operations.txt").read_text())
    while sum(killed.values()) < kills or restarts[-1]:
        kind, out = "moment" if sum(killed.values()) % 2 else "operation", f"{folder}/run{len(done)}"
        over = sum(killed.values()) >= kills
        pids = start(script, [*argv, "--out", out], processes, None if over or kind == "moment" else moments.randrange(operations), f"{folder}/log")
        codes, _ = end(pids, 60, moments.uniform(0.05, 1) * seconds if kind == "moment" and not over else None)
        if -signal.SIGKILL in codes:
            killed[kind] += 1
            restarts[-1] += 1
        elif any(codes):
            raise RuntimeError(Path(f"{folder}/log-0.txt").read_text()[-3000:])
        else:
            done.append(out)
            restarts.append(0)
    return done, killed, max(restarts)


def forked(name, *arguments):
    """spread or chain, in a process of its own -> what it returns."""
    ran = subprocess.run([sys.executable, __file__, name, json.dumps(arguments, default=str)], capture_output=True, text=True, timeout=900,
                         env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def snapshots(tiny, tmp_path_factory):
    """Four averages of one run's weights, to merge."""
    out = tmp_path_factory.mktemp("snapshots") / "run"
    launch(small(tiny, out, "--iterations", 2, "--snapshot_every", 1, "--lr", 0.01))
    return [str(path) for path in sorted((out / "snapshots").glob("*-0.*"))]


# ---------------------------------------------------------------------------------------------------------------------
# Sizes are global: 1, 2 and 4 processes do the same.

def distance(a, b, base):
    """Largest and relative difference of two sets of trained weights."""
    flat = lambda weights: torch.cat([weights[name].flatten() for name in sorted(a) if name in base])
    return (flat(a) - flat(b)).abs().max().item(), ((flat(a) - flat(b)).norm() / (flat(a) - flat(base)).norm()).item()


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["", "--reward class:1,fid:0.3 --reference 24"])
def test_one_two_and_four_processes_train_alike(tiny, tmp_path, flags):
    import bases
    argv = small(tiny, "", *"--iterations 5 --prompts_per_step 3 --group_size 5 --updates 1 --eval_every 5 --select all --keep 5".split(), *flags.split())
    assert forked("spread", tiny, "train", argv, (1, 2, 4), tmp_path) == [[0], [0] * 2, [0] * 4]
    base = bases.load(tiny).network.state_dict()
    one, credits = tmp_path / "1", torch.load(tmp_path / "log1-credits.pt")
    for n in (2, 4):
        more, row = tmp_path / str(n), torch.load(tmp_path / f"log{n}-credits.pt")
        assert len(credits) == len(row) == 5
        for (index, advantage), (index_, advantage_) in zip(credits, row):
            assert torch.equal(index, index_) and advantage.abs().max() > 0.1
            torch.testing.assert_close(advantage, advantage_, rtol=0, atol=1e-4)
        for mine, theirs in zip(read_metrics(one), read_metrics(more), strict=True):
            assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-5)
        for path in sorted((one / "grids").iterdir()):
            assert_pictures(path, more / "grids" / path.name)
        largest, relative = distance(read_weights(one), read_weights(more), base)
        print(f"{n} processes against one, 5 updates{' ' * bool(flags)}{flags}: weights differ by {largest:.1e} at most, {relative:.1e} of the way trained")
        assert relative < 1e-3 and largest < 1e-4


def assert_pictures(a, b):
    import numpy as np
    from PIL import Image
    a, b = (np.asarray(Image.open(path)).astype(int) for path in (a, b))
    assert a.shape == b.shape and abs(a - b).max() <= 1 and a.std() > 1  # a byte may round the other way


@pytest.mark.slow
def test_one_two_and_four_processes_search_alike(tiny, snapshots, tmp_path):
    from safetensors.torch import load_file
    assert forked("spread", tiny, "merge", ["rl", *snapshots, *RL, "--reward", "fid:1,class:0.5"], (1, 2, 4), tmp_path) == [[0], [0] * 2, [0] * 4]
    model = lambda n: load_file(next((tmp_path / str(n) / "model" / "transformer").glob("*.safetensors")))
    for n in (2, 4):
        for mine, theirs in zip(read_metrics(tmp_path / "1"), read_metrics(tmp_path / str(n)), strict=True):
            assert mine.keys() == theirs.keys() and len(mine) > 5
            for name in mine:
                torch.testing.assert_close(torch.tensor(mine[name]), torch.tensor(theirs[name]), rtol=1e-4, atol=1e-5)
        largest = max((a - b).abs().max().item() for a, b in zip(model(1).values(), model(n).values()))
        print(f"merge.py rl, {n} processes against one, 5 updates: merged weights differ by {largest:.1e} at most")
        assert largest < 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# Killed, and started again by the same command.

def assert_ended_alike(a, b):
    """All that two runs left but the clock: the newest checkpoint, metrics, pictures, snapshots, the model."""
    assert read_metrics(a) == read_metrics(b)
    named = lambda out: {str(p.relative_to(out)): p for p in sorted(out.rglob("*")) if p.is_file() and "checkpoint-" not in str(p.relative_to(out))}
    newest = lambda out: max(out.glob("checkpoint-*"), key=lambda folder: folder.name)
    mine, theirs = ({**named(out), **{"newest/" + p.name: p for p in newest(out).iterdir()}} for out in (a, b))
    assert mine.keys() == theirs.keys() and newest(a).name == newest(b).name
    for name, path in mine.items():
        if name not in ("metrics.jsonl", "config.json", "coefficients.png"):          # read above; names --out; draws the folder's name
            assert equal(path, theirs[name]), name


def equal(a, b):
    from safetensors.torch import load_file
    if a.read_bytes() == b.read_bytes():
        return True
    if a.suffix != ".safetensors":                                       # whose facts may come in another order
        return False
    a, b = load_file(a), load_file(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
@pytest.mark.parametrize("processes, kills, seed", [(1, 12, 1), (2, 8, 2)])
def test_killed_at_random_moments_a_run_ends_as_if_it_had_not_been(tiny, tmp_path, processes, kills, seed):
    done, killed, restarts = forked("chain", tiny, "train", small(tiny, "", *TINY), processes, kills, seed, tmp_path)
    print(f"train.py, {processes} processes: {killed}, up to {restarts} in one run, {len(done)} runs ended alike")
    assert sum(killed.values()) == kills and min(killed.values()) >= kills // 3 and done
    for out in done:
        assert_ended_alike(Path(out), tmp_path / "whole")


@pytest.mark.slow
def test_a_search_killed_at_random_moments_ends_as_if_it_had_not_been(tiny, snapshots, tmp_path):
    argv = ["rl", *snapshots, *RL, "--reward", "fid:1", "--updates", "3"]
    done, killed, restarts = forked("chain", tiny, "merge", argv, 1, 5, 3, tmp_path)
    print(f"merge.py rl: {killed}, up to {restarts} in one run, {len(done)} runs ended alike")
    assert sum(killed.values()) == 5 and done
    for out in done:
        assert_ended_alike(Path(out), tmp_path / "whole")


# ---------------------------------------------------------------------------------------------------------------------
# A process that dies ends the others, and says why.

REWARDS = """
import os, signal

def dies(images, prompts, metadata):
    seen.append(1)
    if os.environ.get("RANK") == "1" and len(seen) == 2:
        {how}
    return images.mean((1, 2, 3))

seen = []
"""


@pytest.mark.slow
@pytest.mark.parametrize("how, said", [("raise ArithmeticError('the moon is full')", ["the moon is full", "process 1", "in dies"]),
                                       ("os.kill(os.getpid(), signal.SIGKILL)", ["SIGKILL", "rank      : 1"]),
                                       ("images = images * float('nan')", ["process 1", "reward dies", "non-finite", "iteration 2"])],
                         ids=["raises", "killed", "not finite"])
def test_a_process_that_dies_ends_the_others(tiny, tmp_path, how, said):
    (tmp_path / "deadly.py").write_text(REWARDS.format(how=how))
    argv = small(tiny, tmp_path / "run", "--iterations", 500, "--eval_every", 500, "--reward", "deadly:dies")
    began = time.time()
    code, out, error = launch_process(argv, 2, PYTHONPATH=str(tmp_path))
    assert code != 0 and time.time() - began < 60
    for words in said:
        assert words in error
    assert sorted(p.name for p in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-00001"]


def test_a_signal_that_comes_while_the_processes_agree_is_heard_the_next_time(monkeypatch):
    from support import processes
    said = []

    def agree(number, device):
        if not said:
            os.kill(os.getpid(), signal.SIGTERM)
        said.append(number)
        return float(number)
    monkeypatch.setattr(processes, "all_max", agree)
    with processes.Interrupt() as interrupt:
        assert [interrupt.asked(None) for _ in range(2)] == [False, True]
    assert said == [0, 15] and interrupt.signal == 15


@pytest.mark.slow
def test_a_signal_to_torchrun_saves_and_ends(tiny, tmp_path):
    argv = small(tiny, tmp_path / "run", "--iterations", 5000, "--eval_every", 5000, "--save_every", 5000)
    process = subprocess.Popen(command(argv, 2), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    metrics, limit = tmp_path / "run" / "metrics.jsonl", time.time() + 120
    while not (metrics.is_file() and len(metrics.read_text().splitlines()) > 3):
        assert process.poll() is None and time.time() < limit
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    saved, = (tmp_path / "run").glob("checkpoint-*")
    state = json.loads((saved / "state.json").read_text())
    assert f"stopped after checkpoint {state['step']} by signal 15" in out and state["step"] == int(saved.name[11:]) >= 3
    assert len(read_metrics(tmp_path / "run")) == state["lines"] == state["step"] + 1


# ---------------------------------------------------------------------------------------------------------------------
# Two hosts, as two network namespaces.

@pytest.fixture
def hosts():
    """Two hosts of one network -> [(command prefix, interface)], and the address of the first."""
    name, run = f"dw{os.getpid()}", lambda *words: subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
    if not shutil.which("ip"):
        pytest.skip("no `ip` command, so no network namespaces")
    try:
        run("netns", "add", name + "a"), run("netns", "add", name + "b")
        run("link", "add", name + "a", "netns", name + "a", "type", "veth", "peer", "name", name + "b", "netns", name + "b")
        for n, host in enumerate((name + "a", name + "b"), 1):
            run("-n", host, "addr", "add", f"10.83.7.{n}/24", "dev", host)
            for device in ("lo", host):
                run("-n", host, "link", "set", device, "up")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces are not permitted here: {error.stderr.strip()}")
    else:
        yield [(["ip", "netns", "exec", name + side], name + side) for side in "ab"], "10.83.7.1"
    finally:
        for side in "ab":
            subprocess.run(["ip", "netns", "del", name + side], capture_output=True)


@pytest.mark.slow
def test_two_hosts_do_what_one_process_does(tiny, tmp_path, hosts):
    import bases
    (hosts, first), flags = hosts, "--iterations 3 --eval_every 3 --select all --keep 4 --updates 1".split()
    running = [subprocess.Popen(
        [*inside, sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node_rank", str(n), "--nproc_per_node", "1", "--master_addr", first,
         "--master_port", "29500", str(ROOT / "train.py"), *small(tiny, tmp_path / "two", *flags)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": interface})
        for n, (inside, interface) in enumerate(hosts)]
    said = [process.communicate(timeout=300)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    launch(small(tiny, tmp_path / "one", *flags))
    for mine, theirs in zip(read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two"), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    largest, relative = distance(read_weights(tmp_path / "one"), read_weights(tmp_path / "two"), bases.load(tiny).network.state_dict())
    print(f"two hosts against one process, 3 updates: weights differ by {largest:.1e} at most, {relative:.1e} of the way trained")
    assert relative < 1e-3 and largest < 1e-4


# ---------------------------------------------------------------------------------------------------------------------
# A disk that is full, and three hundred updates.

@pytest.fixture
def small_disk(tmp_path):
    """A disk of 700 kB -> its folder, and a function that makes it larger."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = lambda options: subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True)
    if not shutil.which("mount") or (mounted := mount("size=700k")).returncode:
        pytest.skip(f"no disk may be mounted here: {mounted.stderr.strip() if shutil.which('mount') else 'no mount'}")
    yield folder, lambda: mount("remount,size=64m")
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_full_leaves_one_line_and_a_run_that_goes_on(tiny, tmp_path, small_disk):
    folder, enlarge = small_disk
    flags = "--iterations 8 --eval_every 8 --keep_checkpoints 99 --train all".split()
    with pytest.raises(SystemExit) as stopped:
        launch(small(tiny, folder / "run", *flags))
    line = str(stopped.value.code)
    saved = [int(p.name[11:]) for p in (folder / "run").glob("checkpoint-*")]
    assert line.startswith("error: ") and "\n" not in line and "space" in line.lower() and saved and f"checkpoint {max(saved)} is whole" in line
    enlarge()
    launch(small(tiny, folder / "run", *flags)), launch(small(tiny, tmp_path / "whole", *flags))
    assert_ended_alike(folder / "run", tmp_path / "whole")


@pytest.mark.slow
def test_three_hundred_updates_take_no_more_memory_than_fifty(tiny, tmp_path):
    flags = "--iterations 150 --eval_every 1000 --save_every 25 --snapshot_every 25 --updates 2 --reward class:1,fid:0.3 --reference 24".split()
    code, _, error = launch_process(small(tiny, tmp_path / "run", *flags))
    assert code == 0, error
    memory = {2 * row["iteration"]: 1024 * row["peak_memory_gb"] for row in read_metrics(tmp_path / "run", clock=True)[1:]}
    print(f"peak memory {memory[50]:.1f} MB after 50 updates, {memory[300]:.1f} MB after 300")
    assert len(memory) == 150 and memory[300] - memory[50] < 8


if __name__ == "__main__":
    print(json.dumps({"spread": spread, "chain": chain}[sys.argv[1]](*json.loads(sys.argv[2]))))
