"""Picture sets: drawn by a model, written as PNG or npz, and read again, all as the same bytes.

`images` writes a folder of NNNNNN.png, or an npz as ADM's evaluation suite reads it (arr_0, uint8 [N, H, W, 3]), and beside either a json that
says what it is a function of. Picture i is a function of (seed, i) alone, so processes, batches and interruptions change no picture but for
rounding; what is there stays, and only the rest is drawn, unless the weights or the prompts are no longer those that the json tells of.
Left out: latents, and pictures of several sizes in one npz.
"""
import hashlib
import json
import numpy as np
import shutil
import sys
import torch
import zipfile
import zlib
from PIL import Image
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tqdm import tqdm
import bases
from bases import files as base_files
from rewards import metrics
from support import files
from support import flags
from support import processes
from bases.files import locate
from prompting import read_prompts
from rewards.targets import check_npz, picture_files, read_picture
from sampling import sample, seeded_noise
from support.processes import gather, share

EVAL_STREAM = 2                                                          # keeps held-out noise apart from the training's


@torch.no_grad()                                                         # in inference_mode, --shard would gather weights for it alone
def stream(model, prompts, n, numbers, steps, guidance, key, batch):
    """The pictures `numbers` of P prompts, n each, by the deterministic sampler: yields (numbers [B], pictures [B, 3, H, W]). Picture i has
    prompt i // n, and noise that is a function of (key, i) alone."""
    times, numbers = model.path.times(steps), torch.as_tensor(numbers, dtype=torch.long)
    null = model.encode([""])
    for i in numbers.split(batch) if len(numbers) else ():
        x_T = seeded_noise(key, i, model.shape).to(model.device) * model.initial_std
        prompt = model.encode([prompts[j // n].text for j in i.tolist()])
        yield i, model.decode(sample(model, model.path, times, prompt, x_T, guidance, null)).float()


def pictures(model, prompts, n, numbers, steps, guidance, key, batch):
    """All that `stream` yields -> [len(numbers), 3, H, W]."""
    images = [x for _, x in stream(model, prompts, n, numbers, steps, guidance, key, batch)]
    return torch.cat(images) if images else model.decode(torch.zeros(0, *model.shape, device=model.device))


def open_model(name, prompts, device, precision):
    """The model with its prompts encoded: what its files hold, and whether a prompt is a class, shows only now, before anything is written."""
    with flags.refusing():
        model = bases.load(name, device, precision)
        model.forget_text_encoders([p.text for p in prompts] + [""])     # what they made of the prompts is kept for `stream`
    return model


def generate(model, prompts, n, steps, guidance, seed, batch):
    """n pictures for each of P prompts -> [P * n, 3, H, W], prompt by prompt, on every process; each draws its share."""
    mine = pictures(model, prompts, n, list(share(len(prompts) * n)), steps, guidance, (EVAL_STREAM, seed), batch)
    return gather(mine, len(prompts) * n)


def sidecar(out):
    return Path(f"{out}.json") if Path(out).suffix == ".npz" else Path(out) / "config.json"


def settings(args):
    """What a set of pictures is a function of: the flags."""
    return {name: getattr(args, name) for name in ("model", "prompts", "n", "steps", "guidance", "precision", "seed")}


def digests(args, prompts):
    """And what they name: digests of the network's files (and its guide's), whole, and of the prompts' texts. -> {name in the json: digest}"""
    *_, file, guide = locate(args.model)
    found = hashlib.sha256()
    for path in [*([file] if file else base_files.network_files(args.model)), *([guide] if guide else [])]:
        with open(path, "rb") as opened:
            found.update(hashlib.file_digest(opened, "sha256").digest())
    return {"network_digest": found.hexdigest()[:16], "prompts_digest": hashlib.sha256(json.dumps([p.text for p in prompts]).encode()).hexdigest()[:16]}


def make_images(args, prompts):
    """Writes the pictures that are not there yet; those of an npz as parts, which are put together when all are done."""
    device, out, there, here = processes.start(args.device), Path(args.out), read_sidecar(args.out), digests(args, prompts)
    for name, what in (("network_digest", f"the weights of {args.model}"), ("prompts_digest", f"the texts of {args.prompts}")):
        if there.get(name, here[name]) != here[name]:                    # an older json has none
            flags.refuse(f"--out {out}: {what} have changed since it was made; choose another --out")
    packed, parts = out.suffix == ".npz", Path(f"{out}.parts")
    folder = parts if packed else out
    if packed:
        done = set(range(args.n)) if out.is_file() else {i for part in parts.glob("[0-9]*.npz") for i in np.load(part)["numbers"].tolist()}
    else:
        done = {int(path.stem) for path in out.glob("[0-9]*.png")}
    todo = [i for i in range(args.n) if i not in done]
    mine, model = [todo[k] for k in share(len(todo))], open_model(args.model, prompts, device, args.precision) if todo else None
    processes.all_sum(torch.zeros(1, device=device))                       # all have looked before any writes
    if processes.rank() == 0 and todo:
        folder.mkdir(parents=True, exist_ok=True)
        files.write_atomic(sidecar(out), lambda path: path.write_text(json.dumps(settings(args) | here, indent=2) + "\n"))
    processes.all_sum(torch.zeros(1, device=device))
    if mine:
        with tqdm(total=len(mine), disable=processes.rank() > 0, desc="pictures", unit="") as bar:
            for numbers, x in stream(model, prompts, args.n // len(prompts), mine, args.steps, args.guidance, (EVAL_STREAM, args.seed), args.batch):
                save_pictures(folder, numbers.tolist(), files.to_uint8(x).permute(0, 2, 3, 1).cpu().numpy(), packed)
                bar.update(len(numbers))
    processes.all_sum(torch.zeros(1, device=device))
    if processes.rank() == 0:
        if packed:
            if todo or not out.is_file():
                assemble(parts, out, args.n)
            shutil.rmtree(parts, ignore_errors=True)
        print(f"{out}: " + ("already complete" if not todo else f"{args.n} pictures of {len(prompts)} prompts") + f"; settings in {sidecar(out)}")


def save_pictures(folder, numbers, pixels, packed):
    """Pixels [B, H, W, 3], uint8, as NNNNNN.png each, or as one part that is named after its first picture."""
    if packed:
        files.write_atomic(folder / f"{numbers[0]:06d}.npz", lambda path: np.savez(path, numbers=numbers, pixels=pixels))
        return
    for i, image in zip(numbers, pixels):
        files.write_atomic(folder / f"{i:06d}.png", lambda path: Image.fromarray(image).save(path, format="PNG"))


def assemble(parts, out, n):
    """The parts -> an npz as ADM's evaluation reads it: arr_0, uint8 [n, H, W, 3], uncompressed."""
    pixels = None
    for part in sorted(parts.glob("[0-9]*.npz")):
        with np.load(part) as file:
            numbers, x = file["numbers"], file["pixels"]
        pixels = np.zeros((n, *x.shape[1:]), np.uint8) if pixels is None else pixels
        pixels[numbers] = x
    files.write_atomic(out, lambda path: np.savez(path, arr_0=pixels))


@dataclass
class Pictures:
    """A set to judge. read(numbers, device) yields floats [B, 3, H, W] that are bytes over 255; size None: only the model can tell."""
    name: str
    total: int
    prompts: list | None                                                 # P of them; picture i has number i * P // total
    size: tuple | None
    read: Callable
    model: str = ""                                                      # the folder of the model that drew them, if that is known


def read_npz(path):
    """-> arr_0, uint8 [N, H, W, 3]. Raises ValueError, in one line; nothing is unpickled."""
    try:
        check_npz(path, "arr_0")
        with np.load(path, allow_pickle=False) as file:
            pixels = file["arr_0"]
    except KeyError:
        raise ValueError(f"{path}: holds no arr_0; an npz of pictures has arr_0, uint8, [N, H, W, 3]") from None
    except (OSError, ValueError, EOFError, AttributeError, TypeError, RuntimeError, zlib.error, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not an npz file of pictures ({' '.join(str(error).split())})") from None
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3 or 0 in pixels.shape:
        raise ValueError(f"{path}: arr_0 is {pixels.dtype} {list(pixels.shape)}; expected uint8 [N, H, W, 3]")
    return pixels


def open_pictures(args, name):
    """A model folder, a folder of pictures or an npz -> Pictures. Raises ValueError, in one line; no weight is read."""
    path = Path(name)
    if (path / "metrics.jsonl").is_file():
        raise ValueError(f"{name}: is a run folder; give its model/, {path / 'model'}")
    is_model = any((path / mark).exists() for mark in ("model_index.json", "sit.safetensors", "edm2.safetensors"))     # which may hold pictures too
    files = [] if path.suffix == ".npz" or is_model else [p for p in picture_files(path) if not p.name.startswith(".")]
    if path.suffix != ".npz" and not files:
        try:
            folder = bases.check(name)
        except ValueError as error:
            raise ValueError(f"{name}: neither pictures (a folder, or an .npz with arr_0) nor a model ({error})") from None
        return drawn_pictures(args, name, args.prompts or str(folder / "eval_prompts.jsonl"))
    if files:
        total, size, one = len(files), read_picture(files[0]).shape[1:], lambda i: read_picture(files[i])
    else:
        pixels = read_npz(path)
        total, size, one = len(pixels), pixels.shape[1:3], lambda i: pixels[i].transpose(2, 0, 1)
    said = read_sidecar(name)
    if said and said["n"] != total:
        raise ValueError(f"{name}: {total} pictures of {said['n']}; finish it by the same eval.py images command")
    where = args.prompts or said.get("prompts", "")
    prompts = read_prompts(where) if where else None
    chosen = choose(total, args.n or total, len(prompts) if prompts else 0, name)

    def read(numbers, device):
        for at in range(0, len(numbers), args.batch):
            try:
                images = [torch.from_numpy(np.ascontiguousarray(one(chosen[i]))) for i in numbers[at:at + args.batch]]
            except ValueError as error:                                  # a picture whose end is missing; on whichever process it is
                print(f"error: {error}", file=sys.stderr)
                raise SystemExit(2) from None
            for stack in torch.stack(images).split(args.batch) if len({x.shape for x in images}) == 1 else [x[None] for x in images]:
                yield stack.to(device).float() / 255
    return Pictures(name, len(chosen), prompts, tuple(size), read, said.get("model", ""))


def drawn_pictures(args, name, where):
    """The Pictures of a model, drawn when they are read."""
    prompts, total = read_prompts(where), args.n or 1000
    choose(total, total, len(prompts), where)

    def read(numbers, device):
        model = open_model(name, prompts, device, args.precision)
        for _, x in stream(model, prompts, total // len(prompts), list(numbers), args.steps, args.guidance, (EVAL_STREAM, args.seed), args.batch):
            yield files.to_uint8(x).float() / 255
    return Pictures(name, total, prompts, None, read, name)


def choose(total, n, P, where):
    """The numbers of n of `total` pictures, the first ones of each of P prompts, or at even steps if there are no prompts (P = 0)."""
    for count in (total, n):
        if count % (P or 1):
            raise ValueError(f"--n {count}: must be a multiple of the {P} prompts of {where}; {count - count % P + P} is the next")
    if n > total:
        raise ValueError(f"--n {n}: {where} holds only {total} pictures")
    return [p * (total // P) + k for p in range(P) for k in range(n // P)] if P else metrics.evenly(total, n)


def read_sidecar(name):
    """What `images` wrote beside a set -> its settings, {} if there are none. Raises ValueError if they are damaged."""
    path = sidecar(name)
    try:
        said = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable ({error}); remove it or make the pictures again") from None
    return said if isinstance(said, dict) and {"model", "prompts", "n"} <= {*said} else {}           # else: somebody else's
