"""commands/picture_sets.py: pictures drawn, written, gone on with after a kill, read again."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, build_model, contents, files_up_to
from PIL import Image

import bases
import eval as evaluation
from bases import files as base_files
from commands import picture_sets
from commands.checks import check_eval
from prompting import Prompt, read_prompts
from sampling import FLOW
from support import files

STEPS = ["--steps", "2", "--device", "cpu"]


def command(*argv):
    """eval.py in this process."""
    return evaluation.main([str(word) for word in argv])


def two_processes(*argv):
    """eval.py under torchrun -> exit code, stdout, stderr.

    The -- keeps torchrun from taking --n for one of its own flags.
    """
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    line += ["--", str(ROOT / "eval.py"), *map(str, argv)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, capture_output=True, text=True, timeout=900, env=environment)
    return done.returncode, done.stdout, done.stderr


def refused(argv, capsys):
    """A command that must be refused -> its one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        command(*argv)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    _, mark, message = lines[-1].partition("error: ")  # behind a progress bar, where there is one
    assert mark
    return mark + message


def pixels_of(out):
    """The pictures of a folder or an npz -> uint8 [N, H, W, 3]."""
    if str(out).endswith(".npz"):
        with np.load(out) as file:
            assert file.files == ["arr_0"]
            return file["arr_0"]
    return np.stack([np.asarray(Image.open(path)) for path in sorted(out.glob("*.png"))])


def assert_same(a, b):
    """The same pictures, but for one level in very few pixels, which other batches may round."""
    assert a.shape == b.shape and a.dtype == b.dtype == np.uint8
    off = np.abs(a.astype(int) - b)
    assert off.max() <= 1
    assert (off > 0).mean() < 1e-3


def eval_args(command_name, *inputs, **flags):
    """The flags of a command, and the same without what was given, as main hands them to checks."""
    inputs = [str(name) for name in inputs]
    flags = {name: str(v) if name in ("out", "prompts") else v for name, v in flags.items()}
    default = evaluation.Args(command_name, inputs)
    return evaluation.Args(command_name, inputs, **flags), default


# --------------------------------------------------------------------------------------------------
# Pictures as a function of seed and number.


class Blend:
    """A model whose picture tells its noise and its prompt; knows two words."""

    path = FLOW
    shape = (1, 4, 4)
    device = torch.device("cpu")
    initial_std = 1.0
    words = {"": 0.0, "coat": 1.0, "bag": -1.0}

    def __call__(self, x, t, prompt):
        v = torch.tanh(x) - prompt[0][:, None, None, :4]
        t = t.reshape(-1, 1, 1, 1)
        return x - t * v, x + (1 - t) * v

    def encode(self, texts):
        return (torch.tensor([[self.words[text]] * 4 for text in texts]),)

    def decode(self, latents):
        return latents.expand(-1, 3, -1, -1)


def generate(n=3, seed=0, batch=100, guidance=1.0, words=("coat", "bag")):
    prompts = [Prompt(word) for word in words]
    return picture_sets.generate(Blend(), prompts, n, 4, guidance, seed, batch)


def test_generate_draws_prompt_by_prompt():
    images = generate()
    assert images.shape == (6, 3, 4, 4) and images.dtype == torch.float32
    assert images[:3].mean() - images[3:].mean() > 0.5
    different = torch.unique(images.flatten(1).round(decimals=4), dim=0)
    assert len(different) == 6


def test_generate_gives_the_same_pictures_for_any_batch():
    torch.testing.assert_close(generate(batch=4), generate(), atol=1e-6, rtol=1e-6)


def test_a_generated_picture_depends_on_its_number_and_not_on_how_many_there_are():
    more = generate(n=6, words=["coat"])
    torch.testing.assert_close(more[:3], generate()[:3], atol=1e-6, rtol=1e-6)


def test_generate_sees_seed_and_guidance():
    assert (generate(seed=1) - generate()).abs().max() > 0.1
    assert (generate(guidance=3.0) - generate()).abs().max() > 0.1


def test_pictures_of_no_numbers_are_an_empty_batch():
    images = picture_sets.pictures(Blend(), [Prompt("coat")], 3, [], 4, 1.0, (2, 0), 5)
    assert images.shape == (0, 3, 4, 4)


# --------------------------------------------------------------------------------------------------
# eval.py images.


@pytest.mark.run
def test_a_folder_and_an_npz_hold_the_pictures_of_generate(tiny, tmp_path, capsys):
    for name in ("set", "set.npz"):
        flags = ["--n", 30, "--seed", 3, "--guidance", 1.5, *STEPS]
        command("images", tiny, "--out", tmp_path / name, *flags)
        assert "30 pictures of 10 prompts" in capsys.readouterr().out
    prompts = read_prompts(tiny / "eval_prompts.jsonl")
    expected = picture_sets.generate(bases.load(tiny), prompts, 3, 2, 1.5, seed=3, batch=500)
    expected = files.to_uint8(expected).permute(0, 2, 3, 1).numpy()

    packed = pixels_of(tmp_path / "set.npz")
    assert packed.shape == (30, 28, 28, 3)
    assert np.array_equal(pixels_of(tmp_path / "set"), packed)
    assert_same(packed, expected)
    assert len(np.unique(packed.reshape(30, -1), axis=0)) == 30
    names = sorted(path.name for path in (tmp_path / "set").glob("*.png"))
    assert names == [f"{number:06d}.png" for number in range(30)]
    assert {path.name for path in tmp_path.iterdir()} == {"set", "set.npz", "set.npz.json"}


def test_the_json_beside_a_set_says_what_it_is_a_function_of(tiny, tmp_path):
    for name in ("set", "set.npz"):
        command("images", tiny, "--n", 10, "--seed", 3, "--out", tmp_path / name, *STEPS)
    saved = json.loads((tmp_path / "set" / "config.json").read_text())
    assert saved == json.loads((tmp_path / "set.npz.json").read_text())
    assert len(saved.pop("network_digest")) == 16
    assert len(saved.pop("prompts_digest")) == 16
    assert saved == {
        "model": str(tiny),
        "prompts": str(tiny / "eval_prompts.jsonl"),
        "n": 10,
        "steps": 2,
        "guidance": 1.0,
        "precision": "float32",
        "seed": 3,
    }


@pytest.fixture
def other_prompts(tiny, tmp_path):
    """The prompts of the tiny model in another order."""
    lines = (tiny / "eval_prompts.jsonl").read_text().splitlines(True)
    path = tmp_path / "other.jsonl"
    path.write_text("".join(reversed(lines)))
    return path


def test_pictures_of_other_settings_are_not_mixed(tiny, tmp_path, other_prompts):
    command("images", tiny, "--n", 10, "--out", tmp_path / "set", *STEPS)
    same = {"n": 10, "steps": 2, "out": tmp_path / "set", "batch": 3, "device": "cpu"}
    check_eval(*eval_args("images", tiny, **same))
    others = {"n": 20, "seed": 1, "guidance": 4.0, "steps": 3, "precision": "bfloat16"}
    others["prompts"] = other_prompts
    for flag, value in others.items():
        message = rf"was made otherwise \(--{flag} .* there, .* here\)"
        with pytest.raises(ValueError, match=message):
            check_eval(*eval_args("images", tiny, **(same | {flag: value})))


@pytest.mark.slow
def test_a_set_does_not_go_on_with_other_weights(tiny, tmp_path, capsys):
    """The other weights have the size and the time of the old ones, so only a digest sees them."""
    model = tmp_path / "model"
    out = tmp_path / "set"
    shutil.copytree(tiny, model)
    argv = ["images", model, "--n", 10, "--out", out, *STEPS]
    command(*argv)
    (ours,) = base_files.network_files(model)
    (other,) = base_files.network_files(build_model(tmp_path / "other", seed=5))
    before = ours.stat()
    weights = ours.read_bytes()
    ours.write_bytes(other.read_bytes())
    os.utime(ours, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert ours.stat().st_size == before.st_size and ours.read_bytes() != weights

    existing = contents(tmp_path)
    line = refused(argv, capsys)
    assert f"--out {out}: the weights of {model} have changed" in line
    assert contents(tmp_path) == existing
    ours.write_bytes(weights)
    command(*argv)
    assert "already complete" in capsys.readouterr().out


def test_a_set_does_not_go_on_with_edited_prompts(tiny, tmp_path, capsys):
    prompts = tmp_path / "p.jsonl"
    out = tmp_path / "set"
    text = (tiny / "eval_prompts.jsonl").read_text()
    prompts.write_text(text)
    argv = ["images", tiny, "--n", 10, "--prompts", prompts, "--out", out, *STEPS]
    command(*argv)
    whole = contents(out)
    (out / "000007.png").unlink()  # as if it had been stopped
    prompts.write_text(text.replace("coat", "boat"))
    existing = contents(tmp_path)
    assert f"the texts of {prompts} have changed" in refused(argv, capsys)
    assert contents(tmp_path) == existing
    prompts.write_text(text)
    command(*argv)
    assert contents(out) == whole


def test_a_set_without_digests_goes_on(tiny, tmp_path, capsys):
    """Older versions wrote none."""
    argv = ["images", tiny, "--n", 10, "--out", tmp_path / "set", *STEPS]
    command(*argv)
    path = tmp_path / "set" / "config.json"
    saved = json.loads(path.read_text())
    del saved["network_digest"], saved["prompts_digest"]
    path.write_text(json.dumps(saved))
    command(*argv)
    assert "already complete" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["images", "score"])
def test_weights_that_do_not_fit_leave_nothing_behind(tiny, tmp_path, capsys, name):
    model = tmp_path / "model"
    out = tmp_path / "out.json"
    shutil.copytree(tiny, model)
    path = model / "transformer" / "config.json"
    config = json.loads(path.read_text())
    config["num_layers"] = 2
    path.write_text(json.dumps(config))
    line = refused([name, model, "--n", 10, "--out", out, *STEPS], capsys)
    assert line.startswith(f"error: --model {model}: transformer is not")
    assert not out.exists()


def test_a_prompt_that_is_no_class_leaves_nothing_behind(tiny, tmp_path, capsys, monkeypatch):
    def refuses(self, texts=()):
        raise ValueError(f"prompt {texts[0]!r}: a class is a number")

    monkeypatch.setattr(bases.stable_diffusion.StableDiffusion3, "forget_text_encoders", refuses)
    line = refused(["images", tiny, "--n", 10, "--out", tmp_path / "set", *STEPS], capsys)
    assert "a class is a number" in line
    assert not (tmp_path / "set").exists()


# --------------------------------------------------------------------------------------------------
# Interruptions.


class Killed(BaseException):
    """Stands for a kill: no handler of the program sees it."""


def stop_after(writes, monkeypatch):
    """Ends the program in its next write after so many, leaving what a kill would leave."""
    write = files.write_atomic
    done = []

    def stops(path, content):
        if len(done) == writes:
            (path.parent / f".tmp-{path.name}").write_bytes(b"half")
            raise Killed
        done.append(path)
        write(path, content)

    monkeypatch.setattr(files, "write_atomic", stops)


def count_drawn(monkeypatch):
    """-> a list that gets the numbers of all pictures drawn from now on."""
    drawn = []
    stream = picture_sets.stream

    def counting(model, prompts, n, numbers, *rest):
        drawn.extend(numbers)
        return stream(model, prompts, n, numbers, *rest)

    monkeypatch.setattr(picture_sets, "stream", counting)
    return drawn


@pytest.mark.parametrize(
    "name, writes",
    [
        pytest.param("set", 1, marks=pytest.mark.slow),  # the json, and no picture
        pytest.param("set", 18, marks=pytest.mark.run),
        pytest.param("set.npz", 18, marks=pytest.mark.slow),
        pytest.param("set.npz", 31, marks=pytest.mark.run),  # every picture, and not the npz
    ],
)
def test_a_killed_set_goes_on_to_the_same_pictures(tiny, tmp_path, monkeypatch, name, writes):
    whole = tmp_path / "whole"
    cut = tmp_path / "cut"
    command("images", tiny, "--n", 30, "--out", whole / name, "--batch", 10, *STEPS)
    argv = ["images", tiny, "--n", 30, "--out", cut / name, *STEPS]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_after(writes, patch)
        command(*argv, "--batch", 10)
    assert not (cut / "set.npz").exists()

    drawn = count_drawn(monkeypatch)
    command(*argv, "--batch", 7)  # another batch may go on
    assert sorted(drawn) == list(range(writes - 1, 30))  # existing pictures stay
    assert_same(pixels_of(cut / name), pixels_of(whole / name))
    assert contents(cut).keys() == contents(whole).keys()


def test_a_complete_set_is_left_alone(tiny, tmp_path, monkeypatch, capsys):
    argv = ["images", tiny, "--n", 10, "--out", tmp_path / "set.npz", *STEPS]
    command(*argv)
    existing = contents(tmp_path)
    monkeypatch.setattr(bases, "load", lambda *args: pytest.fail("the model was loaded again"))
    command(*argv)
    assert "already complete" in capsys.readouterr().out
    assert contents(tmp_path) == existing


def test_pictures_left_beside_a_complete_npz_are_removed(tiny, tmp_path):
    """As a kill leaves them between the last write and their removal."""
    out = tmp_path / "set.npz"
    parts = tmp_path / "set.npz.parts"
    argv = ["images", tiny, "--n", 10, "--out", out, *STEPS]
    command(*argv)
    pixels = pixels_of(out)
    parts.mkdir()
    (parts / "000000.png").write_bytes(b"?")
    command(*argv)
    assert not parts.exists()
    assert np.array_equal(pixels_of(out), pixels)


@pytest.mark.slow
def test_a_full_disk_ends_with_one_line_and_the_set_goes_on(tiny, tmp_path):
    command("images", tiny, "--n", 30, "--out", tmp_path / "whole.npz", *STEPS)
    out = tmp_path / "set.npz"
    argv = ["images", tiny, "--n", 30, "--out", out, *STEPS]
    message = r"^error: .*set.npz: .*too large.*what is there is whole; the same command goes on"
    with files_up_to(20000), pytest.raises(SystemExit, match=message) as stop:
        command(*argv)
    assert "\n" not in stop.value.code
    assert len(list((tmp_path / "set.npz.parts").glob("[0-9]*"))) == 30
    assert not out.exists()
    command(*argv)
    assert np.array_equal(pixels_of(out), pixels_of(tmp_path / "whole.npz"))


@pytest.mark.slow
def test_two_processes_draw_the_same(tiny, tmp_path):
    one = tmp_path / "one" / "set.npz"
    two = tmp_path / "two" / "set.npz"
    command("images", tiny, "--n", 30, "--out", one, *STEPS)
    code, out, error = two_processes("images", tiny, "--n", 30, "--out", two, *STEPS)
    assert code == 0, error
    assert out.count("30 pictures") == 1
    assert_same(pixels_of(one), pixels_of(two))
    assert contents(one.parent).keys() == contents(two.parent).keys()


# --------------------------------------------------------------------------------------------------
# Reading sets.


def test_choose_takes_the_first_pictures_of_each_prompt():
    assert picture_sets.choose(12, 6, 3, "?") == [0, 1, 4, 5, 8, 9]
    assert picture_sets.choose(10, 5, 0, "?") == [0, 2, 4, 6, 8]  # no prompts: at even steps
    assert picture_sets.choose(6, 6, 2, "?") == list(range(6))


@pytest.mark.parametrize(
    "total, n, P, message",
    [
        (20, 25, 10, "--n 25: must be a multiple of the 10 prompts of SET; 30 is the next"),
        (20, 30, 10, "--n 30: SET holds only 20 pictures"),
    ],
)
def test_choose_refuses(total, n, P, message):
    with pytest.raises(ValueError, match=message):
        picture_sets.choose(total, n, P, "SET")


@pytest.fixture(scope="module")
def pixels():
    """Twenty random pictures, uint8 [20, 28, 28, 3]."""
    return np.random.default_rng(0).integers(0, 256, (20, 28, 28, 3), dtype=np.uint8)


def test_a_folder_and_an_npz_are_read_as_the_same_bytes(tmp_path, pixels):
    np.savez(tmp_path / "set.npz", arr_0=pixels)
    (tmp_path / "set").mkdir()
    for number, picture in enumerate(pixels):
        Image.fromarray(picture).save(tmp_path / "set" / f"{number:06d}.png")
    (tmp_path / "set" / ".tmp-000020.png").write_bytes(b"half a picture")  # what a kill leaves
    for name in ("set", "set.npz"):
        args, _ = eval_args("score", tmp_path / name, batch=7)
        picture_set = picture_sets.open_pictures(args, tmp_path / name)
        assert (picture_set.total, picture_set.prompts) == (20, None)
        assert list(picture_set.sizes) == [(28, 28)]
        images = torch.cat(list(picture_set.read(range(3, 20), "cpu")))
        expected = torch.from_numpy(pixels[3:]).permute(0, 3, 1, 2).float() / 255
        assert torch.equal(images, expected)


def test_pictures_of_several_sizes_are_read_one_by_one(tmp_path, pixels):
    Image.fromarray(pixels[0]).save(tmp_path / "0.png")
    Image.fromarray(pixels[1][:20]).save(tmp_path / "1.png")
    args, _ = eval_args("score", tmp_path)
    images = list(picture_sets.open_pictures(args, tmp_path).read([0, 1], "cpu"))
    assert [tuple(image.shape) for image in images] == [(1, 3, 28, 28), (1, 3, 20, 28)]


class Trap:
    """Unpickled, it would write a file."""

    def __reduce__(self):
        return open, ("SPRUNG", "w")


def write_npz(path, kind, pixels):
    """An npz that cannot be read as pictures, in the way that `kind` says."""
    if kind == "truncated":
        np.savez(path, arr_0=pixels)
        path.write_bytes(path.read_bytes()[:-3000])
    elif kind == "objects":
        np.savez(path, arr_0=np.array([Trap(), None], dtype=object), allow_pickle=True)
    elif kind == "another name":
        np.savez(path, images=pixels)
    elif kind == "floats":
        np.savez(path, arr_0=pixels.astype(np.float32) / 255)
    elif kind == "channels first":
        np.savez(path, arr_0=pixels.transpose(0, 3, 1, 2))


@pytest.mark.parametrize(
    "kind, message",
    [
        ("missing", "no such file"),
        ("truncated", "not an npz file"),
        ("objects", "not an npz file"),
        ("another name", "arr_0"),
        ("floats", r"arr_0 is float32 \[20, 28, 28, 3\]; expected uint8"),
        ("channels first", r"arr_0 is uint8 \[20, 3, 28, 28\]"),
    ],
)
def test_an_npz_that_holds_no_pictures_is_named(tmp_path, monkeypatch, pixels, kind, message):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "set.npz"
    write_npz(path, kind, pixels)
    with pytest.raises(ValueError, match=message) as caught:
        picture_sets.read_pixels(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "SPRUNG").exists()


def write_set(folder, kind, pixels, tiny):
    """A folder that cannot be read as a set, in the way that `kind` says."""
    folder.mkdir()
    if kind == "run":
        (folder / "metrics.jsonl").write_text("")
    elif kind == "broken picture":
        (folder / "0.png").write_bytes(b"\x89PNG half")
    elif kind in ("unfinished", "damaged json", "lost prompts"):
        Image.fromarray(pixels[0]).save(folder / "000000.png")
        saved = {"model": str(tiny), "prompts": str(tiny / "eval_prompts.jsonl"), "n": 20}
        if kind == "lost prompts":
            saved = {"model": str(tiny), "prompts": "gone.jsonl", "n": 1}
        text = json.dumps(saved)
        (folder / "config.json").write_text("{half" if kind == "damaged json" else text)


@pytest.mark.parametrize(
    "kind, message",
    [
        ("empty", "neither pictures .* nor a model .*; read are .bmp"),
        ("run", "is a run folder; give its model/"),
        ("broken picture", "0.png"),
        ("unfinished", "1 pictures of 20; finish it"),
        ("damaged json", "config.json"),
        ("lost prompts", "gone.jsonl"),
    ],
)
def test_a_folder_that_holds_no_set_is_named(tiny, tmp_path, pixels, kind, message):
    write_set(tmp_path / "set", kind, pixels, tiny)
    args, _ = eval_args("score", tmp_path / "set")
    with pytest.raises(ValueError, match=message) as caught:
        picture_sets.open_pictures(args, str(tmp_path / "set"))
    assert "\n" not in str(caught.value)


def test_a_config_of_others_beside_pictures_is_ignored(tmp_path):
    (tmp_path / "config.json").write_text('{"model": "theirs"}')
    assert picture_sets.read_sidecar(tmp_path) == {}
    assert picture_sets.read_sidecar(tmp_path / "none.npz") == {}


def test_a_picture_that_ends_early_is_named(tiny, tmp_path, capsys):
    """Only the first picture of a folder is looked at before a set is read."""
    command("images", tiny, "--n", 30, "--out", tmp_path / "set", *STEPS)
    bad = tmp_path / "set" / "000023.png"
    bad.write_bytes(bad.read_bytes()[:-40])
    assert str(bad) in refused(["score", tmp_path / "set", "--device", "cpu"], capsys)
