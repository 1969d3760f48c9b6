"""Builds assets/tiny, the base model that the default run fine-tunes: a Stable Diffusion 3 in miniature.

    python experiments/build_tiny.py                       # the Debian package dataset-fashion-mnist
    python experiments/build_tiny.py --data FOLDER         # or a folder with the four idx files (.gz or not)
    python experiments/build_tiny.py --report              # the quality of what was built

What it makes, from the 60,000 training photographs of Fashion-MNIST (28 x 28, grey):
  transformer/ text_encoder/ tokenizer/ scheduler/   a rectified flow x_t = (1-t) x_0 + t eps in pixel space, v = eps - x_0,
                                                     conditioned on captions, trained from scratch together with its text encoder
  reward/ evaluator/                                 two classifiers, trained apart: one rewards, the other only judges
  prompts.jsonl eval_prompts.jsonl model_index.json  prompts to train on, prompts to judge on, and the pipeline's table of contents
Left out on purpose: a VAE (28 x 28 pixels need none), augmentation of the generator's data, resuming (it takes less than an hour).
"""
import argparse
import copy
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models as bpe, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import eval as evaluation  # noqa: E402
from commands import picture_sets
import bases  # noqa: E402
from dist_reward import moments  # noqa: E402
from rewards.targets import read_idx  # noqa: E402
from prompting import read_prompts  # noqa: E402
from rewards.classifier import Classifier, load_classifier  # noqa: E402

NOUNS = [["t-shirt", "tee", "top"], ["trousers", "pants"], ["pullover", "sweater", "jumper"], ["dress", "gown", "frock"],
         ["coat", "jacket"], ["sandal", "heel"], ["shirt", "blouse"], ["sneaker", "trainer"], ["bag", "handbag", "purse"],
         ["boot", "ankle boot"]]                                        # several words for each of the ten classes
SHADES, WIDTHS = ["dark", "grey", "light"], ["narrow", "", "wide"]      # what else a caption may say, where it is true
TEMPLATES = ["{}", "photo of {}", "picture of {}"]
GUIDANCES = (1.0, 1.25, 1.5, 2.0)                                       # of the report
TOKENS = 10                                                             # the longest caption, start and end marks included


# ---------------------------------------------------------------------------------------------------------------------
# The data set and its captions.

def load_split(folder, split):
    """-> images float32 [n, 1, 28, 28] in [0, 1], labels int64 [n]; split is 'train' or 't10k'."""
    found = []
    for kind, rank in (("images-idx3-ubyte", 3), ("labels-idx1-ubyte", 1)):
        paths = [p for p in (Path(folder, f"{split}-{kind}.gz"), Path(folder, f"{split}-{kind}")) if p.is_file()]
        if not paths:
            raise SystemExit(f"{folder}: no {split}-{kind}[.gz]; install the Debian package dataset-fashion-mnist or pass --data FOLDER")
        try:
            found.append(torch.from_numpy(read_idx(paths[0], rank).copy()))
        except ValueError as error:
            raise SystemExit(str(error)) from None
    return found[0][:, None].float() / 255, found[1].long()


def attributes(images, labels):
    """What a caption may say besides the class: shade and width, each 0, 1 or 2 (low, middle, high third).

    The shade is the mean of the pixels that belong to the garment, against all garments; the width is the number of columns that
    the garment touches, against its own class (a wide boot is narrower than a narrow bag).
    """
    garment = images > 0.1
    shade = (images * garment).sum((1, 2, 3)) / garment.sum((1, 2, 3)).clamp(min=1)
    width = garment.any(2).sum((1, 2)).float()
    third = lambda value, among: 1 + (value > among.quantile(2 / 3)).long() - (value < among.quantile(1 / 3)).long()
    by_class = torch.ones_like(labels)
    for c in labels.unique():
        mine = labels == c
        by_class[mine] = third(width[mine], width[mine])
    return third(shade, shade), by_class


def noun_phrase(words):
    plural = words[-1] in ("trousers", "pants")
    return " ".join(words) if plural else " ".join(["a"] + words)


def caption(rng, label, shade, width):
    """One true sentence about a picture; it leaves shade and width out more often than not."""
    words = [SHADES[shade]] * (rng.random() < 0.4) + [WIDTHS[width]] * (rng.random() < 0.4 and width != 1)
    return TEMPLATES[rng.integers(len(TEMPLATES))].format(noun_phrase(words + [NOUNS[label][rng.integers(len(NOUNS[label]))]]))


def all_captions():
    """Every caption that can be written, for the tokenizer."""
    return [t.format(noun_phrase([w for w in (s, v, n) if w])) for t in TEMPLATES
            for s in SHADES + [""] for v in WIDTHS for names in NOUNS for n in names]


# ---------------------------------------------------------------------------------------------------------------------
# The pieces of the folder.

def build_tokenizer(folder):
    """A byte-level BPE in CLIP's files in which each word of the captions is one token; any other text still has letters."""
    tokenizer = Tokenizer(bpe.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(pattern=Regex(r"[a-z]+|[^\sa-z]"), behavior="removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    trainer = trainers.BpeTrainer(vocab_size=2000, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  end_of_word_suffix="</w>", continuing_subword_prefix="")
    tokenizer.train_from_iterator(all_captions(), trainer)
    learned = json.loads(tokenizer.to_str())["model"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [tuple(m) for m in learned["merges"]]
    words = letters + [c + "</w>" for c in letters] + ["".join(m) for m in merges] + ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {w: i for i, w in enumerate(dict.fromkeys(words))}
    made = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TOKENS)
    made.save_pretrained(folder / "tokenizer")
    return CLIPTokenizer.from_pretrained(folder / "tokenizer")


def tokenize(tokenizer, texts):
    return tokenizer(texts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt").input_ids


def new_generator(tokenizer):
    """-> transformer (2.3 M parameters), text encoder (0.15 M)."""
    transformer = SD3Transformer2DModel(
        sample_size=28, patch_size=7, in_channels=1, out_channels=1, num_layers=4, num_attention_heads=4, attention_head_dim=32,
        joint_attention_dim=64, caption_projection_dim=128, pooled_projection_dim=64, pos_embed_max_size=4, qk_norm="rms_norm")
    for name, module in transformer.named_modules():                    # adaLN-zero: every block starts as the identity
        if name.endswith(("norm1.linear", "norm1_context.linear", "norm_out.linear")) or name == "proj_out":
            torch.nn.init.zeros_(module.weight), torch.nn.init.zeros_(module.bias)
    encoder = CLIPTextModelWithProjection(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=256, projection_dim=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=TOKENS, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, initializer_factor=1.0))
    return transformer, encoder


def train_classifier(images, labels, width, seed, epochs, batch=256, peak_lr=8e-3):
    """A small CNN on slightly shifted, slightly noisy pictures; one cycle of the learning rate. Returns it in eval mode."""
    torch.manual_seed(seed)
    model, total = Classifier(width).to(memory_format=torch.channels_last), epochs * len(images) // batch
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_lr, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak_lr, total, pct_start=0.1)
    for step in tqdm(range(total), desc=f"classifier, width {width}", mininterval=5):
        pick = torch.randint(len(images), (batch,))
        x = images[pick].roll(torch.randint(-1, 2, (2,)).tolist(), (2, 3))
        x = x + 0.05 * torch.rand(batch, 1, 1, 1) * torch.randn(batch, 1, 28, 28)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(x.to(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits.float(), labels[pick], label_smoothing=0.02)
        optimizer.zero_grad(), loss.backward(), optimizer.step(), schedule.step()
    return model.to(memory_format=torch.contiguous_format).eval()


def train_generator(images, labels, tokenizer, steps, seed, early, batch=256, peak_lr=2e-3):
    """Flow matching with captions; 10 % of them empty, for guidance. Returns the averaged weights, and those after `early` seconds."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    shades, widths = (a.tolist() for a in attributes(images, labels))
    classes, images = labels.tolist(), images * 2 - 1
    tokens = {text: ids for text, ids in zip(all_captions() + [""], tokenize(tokenizer, all_captions() + [""]))}
    model = torch.nn.ModuleDict(dict(zip(("transformer", "text_encoder"), new_generator(tokenizer))))
    average, snapshot, start = copy.deepcopy(model), None, time.time()
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_lr, betas=(0.9, 0.99), weight_decay=0.01)
    bar = tqdm(range(steps), desc="generator", mininterval=5)
    for step in bar:
        lr = peak_lr * min(1, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        pick = rng.integers(len(images), size=batch)
        texts = ["" if rng.random() < 0.1 else caption(rng, classes[i], shades[i], widths[i]) for i in pick]
        x0, noise = images[pick], torch.randn(batch, 1, 28, 28)
        t = torch.where(torch.rand(batch) < 0.8, torch.randn(batch).sigmoid(), torch.rand(batch))
        x_t = (1 - t)[:, None, None, None] * x0 + t[:, None, None, None] * noise
        with torch.autocast("cpu", torch.bfloat16):
            text = model["text_encoder"](torch.stack([tokens[s] for s in texts]))
            v = model["transformer"](hidden_states=x_t, timestep=1000 * t, encoder_hidden_states=text.last_hidden_state,
                                     pooled_projections=text.text_embeds, return_dict=False)[0]
        loss = F.mse_loss(v.float(), noise - x0)
        optimizer.zero_grad(), loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for a, p in zip(average.parameters(), model.parameters()):
                a.lerp_(p, max(1 - 0.9995, 1 / (step + 1) ** 0.8))
        if snapshot is None and time.time() - start > early:
            snapshot = copy.deepcopy(average)
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", lr=f"{lr:.1e}")
    return average.eval(), snapshot.eval() if snapshot else None


# ---------------------------------------------------------------------------------------------------------------------
# Writing it all down.

def save_classifier(folder, model, images, labels):
    """Weights, width, and of the real images in its features: mu and sigma (float64, unbiased), and half the mean distance in a class."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"width": model.width}) + "\n")
    with torch.inference_mode():
        features = torch.cat([model.features(x) for x in images.split(1000)])
    within = [evaluation.mean_distance(features[labels == c][:500]) for c in labels.unique()]
    for name, part in (("real", features), ("real-1", features[::2]), ("real-2", features[1::2])):        # whole, and halves: search, report
        mu, sigma = moments(part)
        np.savez(folder / f"{name}.npz", mu=mu, sigma=sigma, scale=np.mean(within) / 2)


def save_generator(folder, model):
    """The diffusers folder, in half precision."""
    model = copy.deepcopy(model).half()
    model["transformer"].save_pretrained(folder / "transformer")
    model["text_encoder"].save_pretrained(folder / "text_encoder")
    FlowMatchEulerDiscreteScheduler(shift=1.0).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps({
        "_class_name": "StableDiffusion3Pipeline", "_diffusers_version": "0.42.1", "transformer": ["diffusers", "SD3Transformer2DModel"],
        "text_encoder": ["transformers", "CLIPTextModelWithProjection"], "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"], "vae": [None, None], "text_encoder_2": [None, None],
        "tokenizer_2": [None, None], "text_encoder_3": [None, None], "tokenizer_3": [None, None]}, indent=2) + "\n")


def write_prompts(folder):
    """prompts.jsonl: three prompts a class. eval_prompts.jsonl: one a class, in a phrasing that prompts.jsonl lacks."""
    rows = [(p, c) for c, names in enumerate(NOUNS)
            for p in ([f"photo of {noun_phrase([n])}" for n in names] + [noun_phrase([n]) for n in names])[:3]]
    judged = [(f"picture of {noun_phrase([names[0]])}", c) for c, names in enumerate(NOUNS)]
    for name, lines in (("prompts.jsonl", rows), ("eval_prompts.jsonl", judged)):
        (folder / name).write_text("".join(json.dumps({"prompt": p, "label": c}) + "\n" for p, c in lines), encoding="utf-8")


def report(folders, judge, test, test_labels, pictures):
    """Quality with 20 deterministic steps of fresh pictures at balanced prompts, and, as a floor, of as many real test pictures."""
    real, evaluator = np.load(judge / "evaluator" / "real.npz"), load_classifier(judge / "evaluator")
    prompts, each = read_prompts(judge / "eval_prompts.jsonl"), pictures // 10

    def rows():
        yield "real test pictures", torch.cat([test[test_labels == p.metadata["label"]][:each] for p in prompts])
        for folder in folders:
            model = bases.load(folder, precision="bfloat16")
            yield from ((f"{folder}, guidance {g}", picture_sets.generate(model, prompts, each, 20, g, seed=0, batch=500)) for g in GUIDANCES)

    for name, images in rows():
        scores = evaluation.score(images, [p.metadata["label"] for p in prompts], evaluator, real)
        print(f"{name:40} accuracy {scores['accuracy']:.3f}  Frechet distance {scores['fid']:.3f}  Vendi {scores['vendi']:.1f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--data", default="/usr/share/datasets/fashion-mnist", help="folder with the four idx files")
    parser.add_argument("--out", default="assets/tiny", help="folder to write")
    parser.add_argument("--steps", type=int, default=7000, help="optimizer steps of the generator, 256 pictures each")
    parser.add_argument("--classifier_epochs", type=int, default=14, help="passes over the data for each classifier")
    parser.add_argument("--early", default=None, help="also write the generator as it was after its first 300 seconds to this folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", action="store_true", help="build nothing; print the quality of --out, and of --early if given")
    parser.add_argument("--pictures", type=int, default=5000, help="pictures of the report")
    args = parser.parse_args()
    out, (images, labels), (test, test_labels) = Path(args.out), load_split(args.data, "train"), load_split(args.data, "t10k")
    folders = [f for f in (args.early, out) if f]
    if args.report:
        return report(folders, out, test, test_labels, args.pictures)
    out.mkdir(parents=True, exist_ok=True)
    start = time.time()
    write_prompts(out)
    tokenizer = build_tokenizer(out)
    average, snapshot = train_generator(images, labels, tokenizer, args.steps, args.seed, early=300)
    save_generator(out, average)
    if args.early and snapshot:
        save_generator(Path(args.early), snapshot)
        tokenizer.save_pretrained(Path(args.early) / "tokenizer")
    for name, width, seed in (("reward", 16, 1), ("evaluator", 32, 2)):
        model = train_classifier(images, labels, width, args.seed * 100 + seed, args.classifier_epochs)
        save_classifier(out / name, model, images, labels)
        with torch.inference_mode():
            right = torch.cat([model(x).argmax(1) for x in test.split(1000)]) == test_labels
        print(f"{name}: accuracy on the 10,000 test pictures {right.float().mean():.4f}")
    print(f"{out}: built in {(time.time() - start) / 60:.1f} minutes; --report prints its quality")


if __name__ == "__main__":
    main()
