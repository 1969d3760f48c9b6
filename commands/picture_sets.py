"""Picture sets: drawn by a model, written as PNG files or an npz, and read again as the same bytes.

`eval.py images` writes a folder of NNNNNN.png, or an npz as ADM's evaluation suite reads it (arr_0,
uint8 [N, H, W, 3]); a json beside either says what the set is a function of. An npz is first drawn
as PNG files into FILE.npz.parts/. Picture i is a function of (seed, i) alone, so processes, batches
and interruptions change no picture but for rounding: pictures that exist stay, and only the others
are drawn, unless the weights or the prompts are no longer those that the json names.
Left out: latents, and pictures of several sizes in one npz.
"""

import hashlib
import json
import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import bases
from bases import files as base_files
from prompting import read_prompts
from rewards import metrics
from rewards.targets import PICTURES, endings, picture_files, picture_size, read_npz, read_picture
from sampling import sample, seeded_noise
from support import files, flags, processes

EVAL_STREAM = 2  # keeps the evaluation's noise apart from the training's
DRAWN = 1000  # pictures of a model, without --n

# Files that mark a model folder, which may also hold pictures.
MODEL_FILES = ("model_index.json", "sit.safetensors", "edm2.safetensors", "generator.json")

# Shapes: N pictures of P prompts, n of each, in this order; B pictures of one forward.


def training_prompts(prompts, folder):
    """The file to train on: --prompts, or else the model folder's prompts.jsonl.

    Raises ValueError, in one line, if there is neither.
    """
    own = folder / "prompts.jsonl"
    if not prompts and not own.is_file():
        raise ValueError(f"--prompts: {folder} has no prompts.jsonl; give a file of prompts")
    return prompts or str(own)


def evaluation_prompts(prompts, folder):
    """The file to evaluate on: the model folder's eval_prompts.jsonl, or else that of training."""
    own = folder / "eval_prompts.jsonl"
    return str(own) if own.is_file() else training_prompts(prompts, folder)


def risen(value, default, prompts, processes=1):
    """A number of pictures; its default rises to the next multiple of at most 320 prompts.

    And of the processes, where their work must be equal.
    """
    if value != default or prompts > 320:
        return value
    step = math.lcm(prompts, processes)
    return math.ceil(value / step) * step


# --------------------------------------------------------------------------------------------------
# Drawing.


@torch.no_grad()  # not inference_mode: in it, --shard would gather the weights for it alone
def stream(model, prompts, n, numbers, steps, guidance, key, batch):
    """Draws pictures by the deterministic sampler: yields (numbers [B], pictures [B, 3, H, W]).

    numbers: which of the P n pictures. Picture i has prompt i // n, and noise that is a function of
    (key, i) alone. (Eight parameters: what the pictures are a function of, and the batch.)
    """
    times = model.path.times(steps)
    null_prompt = model.encode([""])
    numbers = torch.as_tensor(numbers, dtype=torch.long)
    if not len(numbers):
        return
    for part in numbers.split(batch):
        noise = seeded_noise(key, part, model.shape).to(model.device)
        x_T = noise * model.initial_std
        prompt = model.encode([prompts[number // n].text for number in part.tolist()])
        latents = sample(model, model.path, times, prompt, x_T, guidance, null_prompt)
        yield part, model.decode(latents).float()


def pictures(model, prompts, n, numbers, steps, guidance, key, batch):
    """All pictures that `stream` yields -> [len(numbers), 3, H, W]."""
    drawn = stream(model, prompts, n, numbers, steps, guidance, key, batch)
    images = [part for _, part in drawn]
    if not images:
        return model.decode(torch.zeros(0, *model.shape, device=model.device))
    return torch.cat(images)


def generate(model, prompts, n, steps, guidance, seed, batch):
    """n pictures for each of P prompts -> [P n, 3, H, W] on every process; each draws its share."""
    total = len(prompts) * n
    numbers = list(processes.share(total))
    key = (EVAL_STREAM, seed)
    ours = pictures(model, prompts, n, numbers, steps, guidance, key, batch)
    return processes.gather(ours, total)


def open_model(name, prompts, device, precision):
    """Loads a model and encodes its prompts, before anything is written.

    What its files hold, and whether a prompt is one of its classes, shows only now.
    """
    with flags.refusing():
        model = bases.load(name, device, precision)
        # The embeddings of these prompts are kept, for `stream`.
        model.forget_text_encoders([prompt.text for prompt in prompts] + [""])
    return model


# --------------------------------------------------------------------------------------------------
# eval.py images: writing a set.


def sidecar(out):
    """The json that says how a set was made: FILE.npz.json, or config.json in its folder."""
    if Path(out).suffix == ".npz":
        return Path(f"{out}.json")
    return Path(out) / "config.json"


def parts_of(out):
    """The folder in which the pictures of FILE.npz wait until all are drawn."""
    return Path(f"{out}.parts")


def settings(args):
    """The flags that a set of pictures is a function of."""
    names = ("model", "prompts", "n", "steps", "guidance", "precision", "seed")
    return {name: getattr(args, name) for name in names}


def digests(args, prompts):
    """Digests of what these flags name: the files of the network and of its guide, the prompts."""
    network = hashlib.sha256()
    for path in base_files.files_of(args.model):
        with open(path, "rb") as opened:
            network.update(hashlib.file_digest(opened, "sha256").digest())
    texts = json.dumps([prompt.text for prompt in prompts])
    return {
        "network_digest": network.hexdigest()[:16],
        "prompts_digest": hashlib.sha256(texts.encode()).hexdigest()[:16],
    }


def check_digests(args, current):
    """Refuses to go on with a set that other weights or other prompts have begun."""
    saved = read_sidecar(args.out)
    named = {
        "network_digest": f"the weights of {args.model}",
        "prompts_digest": f"the texts of {args.prompts}",
    }
    for name, what in named.items():
        if name in saved and saved[name] != current[name]:  # older files have no digests
            flags.refuse(
                f"--out {args.out}: {what} have changed since it was made; choose another --out"
            )


def make_images(args, prompts):
    """Draws the pictures of --out that do not exist yet. Collective: call on every process."""
    device = processes.start(args.device)
    out = Path(args.out)
    is_npz = out.suffix == ".npz"
    folder = parts_of(out) if is_npz else out
    current = digests(args, prompts)
    check_digests(args, current)

    missing = []
    if not (is_npz and out.is_file()):
        existing = {int(path.stem) for path in folder.glob("[0-9]*.png")}
        missing = [number for number in range(args.n) if number not in existing]
    model = None
    if missing:
        model = open_model(args.model, prompts, device, args.precision)
    wait_for_all(device)  # every process has looked before any writes

    if missing and processes.rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(settings(args) | current, indent=2) + "\n"
        files.write_atomic(sidecar(out), lambda path: path.write_text(text))
    wait_for_all(device)

    ours = [missing[place] for place in processes.share(len(missing))]
    if ours:
        draw_into(folder, args, model, prompts, ours)
    wait_for_all(device)

    if processes.rank() == 0:
        if is_npz:
            if not out.is_file():
                pack(folder, out, args.n)
            shutil.rmtree(folder, ignore_errors=True)
        done = f"{args.n} pictures of {len(prompts)} prompts" if missing else "already complete"
        print(f"{out}: {done}; settings in {sidecar(out)}")


def wait_for_all(device):
    """A barrier: returns when every process has come here."""
    processes.all_sum(torch.zeros(1, device=device))


def draw_into(folder, args, model, prompts, numbers):
    """Draws the pictures `numbers` and writes each as NNNNNN.png, so that a kill loses few."""
    n = args.n // len(prompts)
    key = (EVAL_STREAM, args.seed)
    drawn = stream(model, prompts, n, numbers, args.steps, args.guidance, key, args.batch)
    quiet = processes.rank() > 0
    with tqdm(total=len(numbers), disable=quiet, desc="pictures", unit="") as bar:
        for part, images in drawn:
            pixels = files.to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()  # [B, H, W, 3]
            for number, picture in zip(part.tolist(), pixels):
                save_picture(folder / f"{number:06d}.png", picture)
            bar.update(len(part))


def save_picture(path, pixels):
    """pixels: uint8 [H, W, 3]."""
    image = Image.fromarray(pixels)
    files.write_atomic(path, lambda temporary: image.save(temporary, format="PNG"))


def pack(folder, out, n):
    """The n PNG files of a folder -> an npz with arr_0, uint8 [n, H, W, 3], uncompressed."""
    pixels = None
    for number in range(n):
        picture = read_picture(folder / f"{number:06d}.png").transpose(1, 2, 0)
        if pixels is None:
            pixels = np.zeros((n, *picture.shape), np.uint8)
        pixels[number] = picture
    files.write_atomic(out, lambda path: np.savez(path, arr_0=pixels))


# --------------------------------------------------------------------------------------------------
# eval.py score: reading a set.


@dataclass
class Pictures:
    """A set to evaluate: a folder of pictures, an npz, or a model that draws them when read."""

    name: str
    total: int  # N
    prompts: list | None  # P of them; picture i has prompt i * P // N
    sizes: dict | None  # {height and width: a picture of it}; None: only the model can tell
    read: Callable  # read(numbers, device) yields float pictures [B, 3, H, W], bytes over 255
    model: str = ""  # the model that drew them, "" if that is not known


def open_pictures(args, name):
    """A model, a folder of pictures or an npz -> Pictures. No weight is read.

    Raises ValueError, in one line, for anything else and for a set that is damaged or unfinished.
    """
    path = Path(name)
    if (path / "metrics.jsonl").is_file():
        raise ValueError(f"{name}: is a run folder; give its model/, {path / 'model'}")
    if path.suffix == ".npz":
        return npz_pictures(args, name)

    is_model = any((path / file).exists() for file in MODEL_FILES)
    if not is_model:
        paths = picture_files(path)
        if paths:
            return folder_pictures(args, name, paths)
    try:
        folder = bases.check(name)
    except ValueError as error:
        if path.is_dir() and not is_model:
            raise ValueError(
                f"{name}: neither pictures (0 in it, {endings(path)}) nor a model "
                f"(no model_index.json); read are {', '.join(sorted(PICTURES))}"
            ) from None
        raise ValueError(
            f"{name}: neither pictures (a folder, or an .npz with arr_0) nor a model ({error})"
        ) from None
    return drawn_pictures(args, name, args.prompts or evaluation_prompts("", folder))


def npz_pictures(args, name):
    """An npz with arr_0, uint8 [N, H, W, 3] -> Pictures."""
    pixels = read_pixels(name)

    def picture(number):
        return pixels[number].transpose(2, 0, 1)

    return stored_pictures(args, name, len(pixels), {pixels.shape[1:3]: name}, picture)


def folder_pictures(args, name, paths):
    """The files of a folder of pictures -> Pictures."""

    def picture(number):
        return read_picture(paths[number])

    sizes = {}
    for path in paths:
        sizes.setdefault(picture_size(path), path)
    picture(0)  # raises if it cannot be read
    return stored_pictures(args, name, len(paths), sizes, picture)


def stored_pictures(args, name, total, sizes, picture):
    """`total` pictures of the sizes {(H, W): one of it}; picture(number) -> uint8 [3, H, W]."""
    saved = read_sidecar(name)
    if saved and saved["n"] != total:
        raise ValueError(
            f"{name}: {total} pictures of {saved['n']}; "
            "finish it by the same eval.py images command"
        )
    prompt_file = args.prompts or saved.get("prompts", "")
    prompts = read_prompts(prompt_file) if prompt_file else None
    P = len(prompts) if prompts else 0
    chosen = choose(total, args.n or total, P, name)

    def read(numbers, device):
        for start in range(0, len(numbers), args.batch):
            part = numbers[start : start + args.batch]
            images = load_pictures(picture, [chosen[number] for number in part])
            shapes = {image.shape for image in images}
            if len(shapes) == 1:
                yield torch.stack(images).to(device).float() / 255
            else:
                for image in images:
                    yield image[None].to(device).float() / 255

    return Pictures(name, len(chosen), prompts, sizes, read, saved.get("model", ""))


def load_pictures(picture, numbers):
    """-> list of uint8 [3, H, W]. A damaged file ends the process that reads it, with code 2."""
    try:
        return [torch.from_numpy(np.ascontiguousarray(picture(number))) for number in numbers]
    except ValueError as error:
        # Not flags.refuse: it prints on the first process only, and this may be another.
        print(f"error: {flags.one_line(error)}", file=sys.stderr)
        raise SystemExit(2) from None


def drawn_pictures(args, name, prompt_file):
    """The pictures of a model, which draws them when they are read."""
    prompts = read_prompts(prompt_file)
    total = args.n or risen(DRAWN, DRAWN, len(prompts))
    choose(total, total, len(prompts), prompt_file)

    def read(numbers, device):
        model = open_model(name, prompts, device, args.precision)
        n = total // len(prompts)
        key = (EVAL_STREAM, args.seed)
        drawn = stream(model, prompts, n, list(numbers), args.steps, args.guidance, key, args.batch)
        for _, images in drawn:
            yield files.to_uint8(images).float() / 255

    return Pictures(name, total, prompts, None, read, name)


def choose(total, n, P, name):
    """The numbers of n of `total` pictures: the first ones of each of P prompts.

    Without prompts (P = 0) at even steps. Raises ValueError where P does not divide both.
    """
    for count in (total, n):
        if P and count % P:
            raise ValueError(
                f"--n {count}: must be a multiple of the {P} prompts of {name}; "
                f"{count - count % P + P} is the next"
            )
    if n > total:
        raise ValueError(f"--n {n}: {name} holds only {total} pictures")
    if not P:
        return metrics.evenly(total, n)
    chosen = []
    for prompt in range(P):
        first = prompt * (total // P)
        chosen += range(first, first + n // P)
    return chosen


def read_pixels(path):
    """The arr_0 of an npz of pictures -> uint8 [N, H, W, 3]. Raises ValueError, in one line."""
    (pixels,) = read_npz(path, "arr_0")
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3 or 0 in pixels.shape:
        raise ValueError(
            f"{path}: arr_0 is {pixels.dtype} {list(pixels.shape)}; expected uint8 [N, H, W, 3]"
        )
    return pixels


def read_sidecar(name):
    """What `images` wrote beside a set -> its settings, {} if there are none.

    Raises ValueError, in one line, if they are damaged.
    """
    path = sidecar(name)
    if not path.is_file():
        return {}
    try:
        saved = files.read_json(path)
    except ValueError as error:
        raise ValueError(f"{error}; or remove it and make the pictures again") from None
    is_ours = {"model", "prompts", "n"} <= saved.keys()
    return saved if is_ours else {}
