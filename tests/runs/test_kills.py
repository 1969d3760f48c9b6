"""Many processes, two hosts, deaths, kills at random moments, full disks, three hundred updates."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, command, launch, launch_process, read_metrics, read_weights, small
from PIL import Image
from safetensors.torch import load_file

import bases
from support import files

FID = "--reward class:1,fid:0.3 --reference 24".split()
RL = (
    "--device cpu --updates 5 --group_size 4 --images 30 --reference 60 --report_images 20 "
    "--steps 2 --sigma_rel 0.07,0.15"
).split()
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


def forked(name, model, *arguments):
    """spread or chain of forked_runs.py, in a process of its own -> what it returns."""
    script = Path(__file__).with_name("forked_runs.py")
    words = [sys.executable, str(script), name, str(model), json.dumps(arguments, default=str)]
    ran = subprocess.run(words, capture_output=True, text=True, timeout=900, env=ONE_THREAD)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def snapshots(tiny, tmp_path_factory):
    """Four averages of one run's weights, to merge."""
    out = tmp_path_factory.mktemp("snapshots") / "run"
    launch(small(tiny, out, "--iterations", 2, "--snapshot_every", 1, "--lr", 0.01))
    return [str(path) for path in sorted((out / "snapshots").glob("*-0.*"))]


# --------------------------------------------------------------------------------------------------
# Sizes are global: 1, 2 and 4 processes do the same.


def assert_close_weights(out, expected_out, base):
    """Two runs of a few updates on `base` moved the weights alike."""

    def flat(weights):
        return torch.cat([weights[name].flatten() for name in names])

    weights, expected = read_weights(out), read_weights(expected_out)
    names = sorted(weights.keys() & base.keys())
    error = flat(weights) - flat(expected)
    way = flat(weights) - flat(base)
    assert error.norm() < 1e-3 * way.norm()
    assert error.abs().max() < 1e-4


def assert_close_metrics(out, expected_out):
    for row, expected in zip(read_metrics(out), read_metrics(expected_out), strict=True):
        assert row == pytest.approx(expected, rel=1e-4, abs=1e-5)


def assert_close_pictures(path, expected_path):
    """A byte may round the other way."""
    pixels = np.asarray(Image.open(path)).astype(int)
    expected = np.asarray(Image.open(expected_path)).astype(int)
    assert pixels.shape == expected.shape
    assert abs(pixels - expected).max() <= 1
    assert expected.std() > 1


@pytest.mark.slow
def test_one_two_and_four_processes_train_alike(tiny, tmp_path):
    flags = (
        "--iterations 5 --prompts_per_step 3 --group_size 5 --updates 1 --eval_every 5 "
        "--select all --keep 5"
    ).split()
    argv = small(tiny, "", *flags, *FID)
    codes = forked("spread", tiny, "train", argv, (1, 2, 4), tmp_path)
    assert codes == [[0], [0] * 2, [0] * 4]
    base = bases.load(tiny).network.state_dict()
    expected_credits = torch.load(tmp_path / "log1-credits.pt")
    assert len(expected_credits) == 5
    for count in (2, 4):
        out = tmp_path / str(count)
        credits = torch.load(tmp_path / f"log{count}-credits.pt")
        for (index, advantage), (expected_index, expected) in zip(
            credits, expected_credits, strict=True
        ):
            assert torch.equal(index, expected_index)
            assert expected.abs().max() > 0.1
            torch.testing.assert_close(advantage, expected, rtol=0, atol=1e-4)
        assert_close_metrics(out, tmp_path / "1")
        assert_close_weights(out, tmp_path / "1", base)
        for path in sorted((tmp_path / "1" / "grids").iterdir()):
            assert_close_pictures(out / "grids" / path.name, path)


@pytest.mark.slow
def test_one_two_and_four_processes_search_alike(tiny, snapshots, tmp_path):
    argv = ["rl", *snapshots, *RL, "--reward", "fid:1,class:0.5"]
    codes = forked("spread", tiny, "merge", argv, (1, 2, 4), tmp_path)
    assert codes == [[0], [0] * 2, [0] * 4]

    def merged(count):
        (path,) = (tmp_path / str(count) / "model" / "transformer").glob("*.safetensors")
        return load_file(path)

    expected_rows = read_metrics(tmp_path / "1")
    for count in (2, 4):
        rows = read_metrics(tmp_path / str(count))
        for row, expected in zip(rows, expected_rows, strict=True):
            assert row.keys() == expected.keys() and len(row) > 5
            for name in row:
                value, expected_value = torch.tensor(row[name]), torch.tensor(expected[name])
                torch.testing.assert_close(value, expected_value, rtol=1e-4, atol=1e-5)
        for tensor, expected in zip(merged(count).values(), merged(1).values(), strict=True):
            torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-5)


# --------------------------------------------------------------------------------------------------
# Killed, and started again by the same command.


def what_stays(out):
    """{name: path} of a run's files, the newest checkpoint under one name, without the others."""
    paths = {}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        if path.is_file() and "checkpoint-" not in name:
            paths[name] = path
    newest, _ = files.newest_checkpoint(out)
    for path in newest.iterdir():
        paths[f"newest checkpoint/{path.name}"] = path
    return paths


def equal_files(a, b):
    """Equal bytes; of safetensors, equal tensors, because their facts may come in another order."""
    if a.read_bytes() == b.read_bytes():
        return True
    if a.suffix != ".safetensors":
        return False
    a, b = load_file(a), load_file(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def assert_ended_alike(out, expected_out):
    """All that two runs left but the clock."""
    assert read_metrics(out) == read_metrics(expected_out)
    paths, expected_paths = what_stays(out), what_stays(expected_out)
    assert paths.keys() == expected_paths.keys()
    for name, path in paths.items():
        # Compared above; names --out; show the folder's name.
        if name not in ("metrics.jsonl", "config.json", "coefficients.png", "report.png"):
            assert equal_files(path, expected_paths[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("processes, kills, seed", [(1, 12, 1), (2, 8, 2)])
def test_killed_at_random_moments_a_run_ends_as_if_it_had_not_been(
    tiny, tmp_path, processes, kills, seed
):
    flags = "--iterations 3 --snapshot_every 1 --keep_snapshots 9 --ema 0.5".split()
    argv = small(tiny, "", *flags, *FID)
    ended, killed = forked("chain", tiny, "train", argv, processes, kills, seed, tmp_path)
    assert sum(killed.values()) == kills
    assert min(killed.values()) >= kills // 3
    assert ended
    for out in ended:
        assert_ended_alike(Path(out), tmp_path / "whole")


@pytest.mark.slow
def test_a_search_killed_at_random_moments_ends_as_if_it_had_not_been(tiny, snapshots, tmp_path):
    argv = ["rl", *snapshots, *RL, "--reward", "fid:1", "--updates", "3"]
    ended, killed = forked("chain", tiny, "merge", argv, 1, 5, 3, tmp_path)
    assert sum(killed.values()) == 5
    assert ended
    for out in ended:
        assert_ended_alike(Path(out), tmp_path / "whole")


# --------------------------------------------------------------------------------------------------
# A process that dies ends the others, and says why.

REWARD = """
import os, signal

calls = []

def dies(images, prompts, metadata):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 2:
        {death}
    return images.mean((1, 2, 3))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "death, words",
    [
        ("raise ArithmeticError('no score')", ["no score", "process 1", "in dies"]),
        ("os.kill(os.getpid(), signal.SIGKILL)", ["SIGKILL", "rank      : 1"]),
        (
            "images = images * float('nan')",
            ["process 1", "reward dies", "non-finite", "iteration 2"],
        ),
    ],
)
def test_a_process_that_dies_ends_the_others(tiny, tmp_path, death, words):
    (tmp_path / "deadly.py").write_text(REWARD.format(death=death))
    flags = ("--iterations", 500, "--eval_every", 500, "--reward", "deadly:dies")
    began = time.time()
    argv = small(tiny, tmp_path / "run", *flags)
    code, _, error = launch_process(argv, 2, PYTHONPATH=str(tmp_path))
    assert code != 0
    assert time.time() - began < 60
    for word in words:
        assert word in error
    saved = [path.name for path in (tmp_path / "run").glob("checkpoint-*")]
    assert saved == ["checkpoint-00001"]


@pytest.mark.slow
def test_a_signal_to_torchrun_saves_and_ends(tiny, tmp_path):
    flags = "--iterations 5000 --eval_every 5000 --save_every 5000".split()
    metrics = tmp_path / "run" / "metrics.jsonl"
    process = subprocess.Popen(
        command(small(tiny, tmp_path / "run", *flags), processes=2),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=ONE_THREAD,
    )
    limit = time.time() + 120
    while not (metrics.is_file() and len(metrics.read_text().splitlines()) > 3):
        assert process.poll() is None and time.time() < limit
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    folder, state = files.newest_checkpoint(tmp_path / "run")
    assert state["step"] == int(folder.name.removeprefix("checkpoint-")) >= 3
    assert f"stopped after checkpoint {state['step']} by signal 15" in out
    assert len(read_metrics(tmp_path / "run")) == state["lines"] == state["step"] + 1


# --------------------------------------------------------------------------------------------------
# Two hosts, as two network namespaces.


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts():
    """The names of two hosts of one network, each also that of its interface. The first: 10.83.7.1.

    A command runs on a host by `ip netns exec NAME`.
    """
    if not shutil.which("ip"):
        pytest.skip("no `ip` command, so no network namespaces")
    names = [f"dw{os.getpid()}{side}" for side in "ab"]
    first, second = names
    try:
        for name in names:
            ip("netns", "add", name)
        pair = ("type", "veth", "peer", "name", second, "netns", second)
        ip("link", "add", first, "netns", first, *pair)
        for number, name in enumerate(names, 1):
            ip("-n", name, "addr", "add", f"10.83.7.{number}/24", "dev", name)
            for interface in ("lo", name):
                ip("-n", name, "link", "set", interface, "up")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces are not permitted: {error.stderr.strip()}")
    else:
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.mark.slow
def test_two_hosts_do_what_one_process_does(tiny, tmp_path, hosts):
    flags = "--iterations 3 --eval_every 3 --select all --keep 4 --updates 1".split()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
    torchrun += "--nproc_per_node 1 --master_addr 10.83.7.1 --master_port 29500".split()
    running = []
    for number, host in enumerate(hosts):
        words = ["ip", "netns", "exec", host, *torchrun, "--node_rank", str(number)]
        words += [str(ROOT / "train.py"), *small(tiny, tmp_path / "two", *flags)]
        running.append(
            subprocess.Popen(
                words,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=ONE_THREAD | {"GLOO_SOCKET_IFNAME": host},
            )
        )
    outputs = [process.communicate(timeout=300)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], outputs
    launch(small(tiny, tmp_path / "one", *flags))
    assert_close_metrics(tmp_path / "two", tmp_path / "one")
    base = bases.load(tiny).network.state_dict()
    assert_close_weights(tmp_path / "two", tmp_path / "one", base)


# --------------------------------------------------------------------------------------------------
# A disk that is full, and three hundred updates.


@pytest.mark.run
def test_a_full_disk_is_one_line_and_the_last_checkpoint_is_whole(tiny, tmp_path, monkeypatch):
    argv = small(tiny, tmp_path / "run", "--iterations", 3)
    save_file = files.save_file

    def full(tensors, path, *facts):
        if "checkpoint-00002" in str(path):
            Path(path).write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        save_file(tensors, path, *facts)

    monkeypatch.setattr(files, "save_file", full)
    message = r"error: .*run: .*No space left.*checkpoint 1 is whole"
    with pytest.raises(SystemExit, match=message) as stop:
        launch(argv)
    assert "\n" not in stop.value.code
    monkeypatch.setattr(files, "save_file", save_file)
    launch(argv)
    assert [row["iteration"] for row in read_metrics(tmp_path / "run")] == [0, 1, 2, 3]


def mount(folder, options):
    words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    return subprocess.run(words, capture_output=True, text=True)


@pytest.fixture
def small_disk(tmp_path):
    """The folder of a disk of 700 kB."""
    if not shutil.which("mount"):
        pytest.skip("no `mount` command")
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = mount(folder, "size=700k")
    if mounted.returncode:
        pytest.skip(f"no disk may be mounted: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
def test_a_disk_that_is_full_leaves_a_run_that_goes_on(tiny, tmp_path, small_disk):
    flags = "--iterations 8 --eval_every 8 --keep_checkpoints 99 --train all".split()
    out = small_disk / "run"
    with pytest.raises(SystemExit) as stop:
        launch(small(tiny, out, *flags))
    line = str(stop.value.code)
    _, state = files.newest_checkpoint(out)
    assert line.startswith("error: ") and "\n" not in line
    assert "space" in line.lower()
    assert state["step"] > 0 and f"checkpoint {state['step']} is whole" in line

    mount(small_disk, "remount,size=64m")
    launch(small(tiny, out, *flags))
    launch(small(tiny, tmp_path / "whole", *flags))
    assert_ended_alike(out, tmp_path / "whole")


@pytest.mark.slow
def test_three_hundred_updates_take_no_more_memory_than_fifty(tiny, tmp_path):
    flags = "--iterations 150 --eval_every 1000 --save_every 25 --snapshot_every 25".split()
    code, _, error = launch_process(small(tiny, tmp_path / "run", *flags, *FID))
    assert code == 0, error
    rows = read_metrics(tmp_path / "run", clock=True)
    megabytes = [1024 * row["peak_memory_gb"] for row in rows[1:]]
    assert len(megabytes) == 150
    assert megabytes[149] - megabytes[24] < 8  # two updates an iteration
