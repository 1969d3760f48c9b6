"""Builds assets/tiny, the base that the default run fine-tunes: a small Stable Diffusion 3.

    python experiments/build_tiny.py                # the Debian package dataset-fashion-mnist
    python experiments/build_tiny.py --data FOLDER  # or a folder of the four idx files (.gz or not)
    python experiments/build_tiny.py --report       # the quality of what was built

It is made from the 60,000 training photographs of Fashion-MNIST (28 x 28, grey):
    transformer/ text_encoder/ tokenizer/ scheduler/    a rectified flow in pixels with captions,
                                                        x_t = (1 - t) x_0 + t eps, v = eps - x_0
    reward/ evaluator/                  two classifiers, trained apart: one rewards, one judges
    recogniser/                         a network of another kind, trained apart, as a reward
    prompts.jsonl eval_prompts.jsonl    to train on, and to judge on
    model_index.json                    diffusers' list of the parts
Transformer and text encoder are trained together from scratch. Left out: a VAE (28 x 28 pixels need
none), augmentation of the generator's data, resuming (it takes less than an hour).
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
from tokenizers import Regex, Tokenizer, pre_tokenizers, trainers
from tokenizers.models import BPE
from tqdm import tqdm
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    ViTConfig,
    ViTForImageClassification,
)

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]
from evidence import faster_precision  # noqa: E402

import bases  # noqa: E402
import eval as evaluation  # noqa: E402
from commands import picture_sets  # noqa: E402
from dist_reward import moments  # noqa: E402
from prompting import read_prompts  # noqa: E402
from rewards.classifier import Classifier, by_attribute, label_of, load_classifier  # noqa: E402
from rewards.metrics import mean_distance  # noqa: E402
from rewards.targets import read_idx  # noqa: E402

# Several words for each of the ten classes.
NOUNS = [
    ["t-shirt", "tee", "top"],
    ["trousers", "pants"],
    ["pullover", "sweater", "jumper"],
    ["dress", "gown", "frock"],
    ["coat", "jacket"],
    ["sandal", "heel"],
    ["shirt", "blouse"],
    ["sneaker", "trainer"],
    ["bag", "handbag", "purse"],
    ["boot", "ankle boot"],
]

# What else a caption may say, where it is true.
SHADES = ["dark", "grey", "light"]
WIDTHS = ["narrow", "", "wide"]
TEMPLATES = ["{}", "photo of {}", "picture of {}"]

TOKENS = 10  # the longest caption, start and end marks included
GUIDANCES = (1.0, 1.25, 1.5, 2.0)  # of the report

# The small transformer, 2.3 M parameters.
TRANSFORMER = {
    "sample_size": 28,
    "patch_size": 7,
    "in_channels": 1,
    "out_channels": 1,
    "num_layers": 4,
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "joint_attention_dim": 64,
    "caption_projection_dim": 128,
    "pooled_projection_dim": 64,
    "pos_embed_max_size": 4,
    "qk_norm": "rms_norm",
}

MODEL_INDEX = {
    "_class_name": "StableDiffusion3Pipeline",
    "_diffusers_version": "0.42.1",
    "transformer": ["diffusers", "SD3Transformer2DModel"],
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "vae": [None, None],
    "text_encoder_2": [None, None],
    "tokenizer_2": [None, None],
    "text_encoder_3": [None, None],
    "tokenizer_3": [None, None],
}


# --------------------------------------------------------------------------------------------------
# The data set and its captions.


def read_split(folder, split, kind, rank):
    """One idx file of the data set as a tensor of bytes. Ends the program if it is missing."""
    name = f"{split}-{kind}"
    for path in (Path(folder, f"{name}.gz"), Path(folder, name)):
        if path.is_file():
            try:
                return torch.from_numpy(read_idx(path, rank).copy())
            except ValueError as error:
                raise SystemExit(str(error)) from None
    raise SystemExit(
        f"{folder}: no {name}[.gz]; install the Debian package dataset-fashion-mnist or pass "
        "--data FOLDER"
    )


def load_split(folder, split):
    """-> images float32 [n, 1, 28, 28] in [0, 1], labels int64 [n]; split is train or t10k."""
    images = read_split(folder, split, "images-idx3-ubyte", rank=3)
    labels = read_split(folder, split, "labels-idx1-ubyte", rank=1)
    return images[:, None].float() / 255, labels.long()


def thirds(values):
    """values [n] -> 0, 1 or 2 [n]: in the lowest, middle or highest third."""
    is_high = values > values.quantile(2 / 3)
    is_low = values < values.quantile(1 / 3)
    return 1 + is_high.long() - is_low.long()


def attributes(images, labels):
    """What a caption may say besides the class -> shade [n], width [n], each 0, 1 or 2.

    The shade is the mean of the pixels that belong to the garment, against all garments. The width
    is the number of columns that the garment touches, against its own class: a wide boot is
    narrower than a narrow bag.
    """
    garment = images > 0.1
    pixels = garment.sum((1, 2, 3)).clamp(min=1)
    shade = (images * garment).sum((1, 2, 3)) / pixels
    columns = garment.any(2).sum((1, 2)).float()
    width = torch.ones_like(labels)
    for label in labels.unique():
        is_of_class = labels == label
        width[is_of_class] = thirds(columns[is_of_class])
    return thirds(shade), width


def noun_phrase(words):
    """The words with an article, if the last one is singular."""
    if words[-1] in ("trousers", "pants"):
        return " ".join(words)
    return " ".join(["a", *words])


def caption(rng, facts):
    """One true sentence about a picture; it leaves shade and width out more often than not.

    facts: its label, shade and width.
    """
    label, shade, width = facts
    words = []
    if rng.random() < 0.4:
        words.append(SHADES[shade])
    if rng.random() < 0.4 and WIDTHS[width]:
        words.append(WIDTHS[width])
    template = TEMPLATES[rng.integers(len(TEMPLATES))]
    nouns = NOUNS[label]
    words.append(nouns[rng.integers(len(nouns))])
    return template.format(noun_phrase(words))


def all_captions():
    """Every caption that can be written, for the tokenizer."""
    all_nouns = [noun for nouns in NOUNS for noun in nouns]
    captions = []
    for template in TEMPLATES:
        for shade in [*SHADES, ""]:
            for width in WIDTHS:
                for noun in all_nouns:
                    words = [word for word in (shade, width, noun) if word]
                    captions.append(template.format(noun_phrase(words)))
    return captions


# --------------------------------------------------------------------------------------------------
# The networks.


def build_tokenizer(folder, captions, longest=TOKENS):
    """A byte-level BPE in CLIP's files -> CLIPTokenizer, of `longest` tokens.

    Each word of the captions is one token; any other text is spelled.
    """
    tokenizer = Tokenizer(BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    words = pre_tokenizers.Split(pattern=Regex(r"[a-z]+|[^\sa-z]"), behavior="removed", invert=True)
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, in_bytes])
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        show_progress=False,
        initial_alphabet=letters,
        end_of_word_suffix="</w>",
        continuing_subword_prefix="",
    )
    tokenizer.train_from_iterator(captions, trainer)
    learned = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in learned["merges"]]

    # In CLIP's order: letters, letters that end a word, merges, marks.
    tokens = [*letters]
    tokens += [letter + "</w>" for letter in letters]
    tokens += ["".join(pair) for pair in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    clip = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=longest)
    clip.save_pretrained(folder / "tokenizer")
    return CLIPTokenizer.from_pretrained(folder / "tokenizer")


def tokenize(tokenizer, texts):
    """Token numbers [B, T], of as many tokens as the tokenizer takes."""
    longest = tokenizer.model_max_length
    tokens = tokenizer(
        texts, padding="max_length", max_length=longest, truncation=True, return_tensors="pt"
    )
    return tokens.input_ids


def new_generator(tokenizer, arguments):
    """-> ModuleDict of transformer and text encoder (0.15 M parameters), untrained.

    arguments: of the transformer, 2.3 M parameters by TRANSFORMER.
    """
    transformer = SD3Transformer2DModel(**arguments)
    # adaLN-zero: every block starts as the identity.
    modulations = ("norm1.linear", "norm1_context.linear", "norm_out.linear")
    for name, module in transformer.named_modules():
        if name.endswith(modulations) or name == "proj_out":
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        projection_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_factor=1.0,
    )
    encoder = CLIPTextModelWithProjection(config)
    return torch.nn.ModuleDict({"transformer": transformer, "text_encoder": encoder})


# --------------------------------------------------------------------------------------------------
# Training.


def train_classifier(images, labels, width, seed, epochs, batch=256, peak_lr=8e-3):
    """A small CNN, trained on slightly shifted, slightly noisy pictures, in eval mode."""
    precision = faster_precision()
    torch.manual_seed(seed)
    model = Classifier(width).to(memory_format=torch.channels_last)
    steps = epochs * len(images) // batch
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_lr, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak_lr, steps, pct_start=0.1)
    for _ in tqdm(range(steps), desc=f"classifier, width {width}", mininterval=5):
        rows = torch.randint(len(images), (batch,))
        shift = torch.randint(-1, 2, (2,)).tolist()
        x = images[rows].roll(shift, (2, 3))
        noise_level = 0.05 * torch.rand(batch, 1, 1, 1)
        x = x + noise_level * torch.randn(batch, 1, 28, 28)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            logits = model(x.to(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits.float(), labels[rows], label_smoothing=0.02)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.to(memory_format=torch.contiguous_format).eval()


def train_recogniser(
    draw, attributes, size, patch, steps, seed, batch=128, peak_lr=1e-3, device="cpu"
):
    """A vision transformer that reads attributes {name: [values]} -> ViTForImageClassification.

    draw(n) -> pictures [n, 3, size, size] in [0, 1], and the numbers of their values [n, A], on
    `device`.
    """
    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=384,
        image_size=size,
        patch_size=patch,
        num_labels=sum(len(values) for values in attributes.values()),
        attributes=[[name, values] for name, values in attributes.items()],
    )
    model = ViTForImageClassification(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_lr, weight_decay=0.05)
    for step in tqdm(range(steps), desc="recogniser", mininterval=5):
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, peak_lr)
        images, numbers = draw(batch)
        noise_level = 0.05 * torch.rand(batch, 1, 1, 1, device=device)
        x = images + noise_level * torch.randn(images.shape, device=device)
        logits = model(pixel_values=x * 2 - 1).logits
        loss = 0
        for part, number in zip(by_attribute(logits, attributes), numbers.T):
            loss = loss + F.cross_entropy(part, number, label_smoothing=0.02)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.cpu().eval()


class CaptionedPictures:
    """Pictures as the network sees them [n, C, H, W], and the tokens of captions true of them.

    caption(random, facts) -> a sentence; facts: those of each picture.
    """

    def __init__(self, pictures, facts, caption, tokenizer, seed):
        self.rng = np.random.default_rng(seed)
        self.pictures = pictures
        self.facts = facts
        self.caption = caption
        self.tokenizer = tokenizer
        self.tokens = {}  # {caption: tokens [T]}, of those so far

    def draw(self, count):
        """-> pictures [count, C, H, W], tokens [count, T].

        A tenth of the captions is empty, for guidance.
        """
        picked = self.rng.integers(len(self.pictures), size=count)
        tokens = []
        for i in picked:
            text = ""
            if self.rng.random() >= 0.1:
                text = self.caption(self.rng, self.facts[i])
            if text not in self.tokens:
                self.tokens[text] = tokenize(self.tokenizer, [text])[0]
            tokens.append(self.tokens[text])
        device = self.pictures.device
        return self.pictures[picked], torch.stack(tokens).to(device)


def flow_matching_loss(model, x0, tokens, precision, shift=1.0, noisy=0.0):
    """Mean squared error of the velocity at random times, more often in the middle.

    shift: above 1 more often near the noise, as the scheduler's. noisy: the share of the times that
    is drawn evenly from [0.85, 1], where it is decided what goes where.
    """
    device = x0.device
    noise = torch.randn(x0.shape, device=device)
    is_logit_normal = torch.rand(len(x0), device=device) < 0.8
    logit = torch.randn(len(x0), device=device)
    t = torch.where(is_logit_normal, logit.sigmoid(), torch.rand(len(x0), device=device))
    t = shift * t / (1 + (shift - 1) * t)
    if noisy:
        is_noisy = torch.rand(len(x0), device=device) < noisy
        t = torch.where(is_noisy, 0.85 + 0.15 * torch.rand(len(x0), device=device), t)
    column = t[:, None, None, None]
    x_t = (1 - column) * x0 + column * noise
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        text = model["text_encoder"](tokens)
        v = model["transformer"](
            hidden_states=x_t,
            timestep=1000 * t,
            encoder_hidden_states=text.last_hidden_state,
            pooled_projections=text.text_embeds,
            return_dict=False,
        )[0]
    return F.mse_loss(v.float(), noise - x0)


def learning_rate(step, steps, peak):
    """It rises over 100 steps, and falls as a cosine to a fiftieth."""
    warmup = min(1, (step + 1) / 100)
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return peak * warmup * (0.02 + 0.98 * cosine)


@torch.no_grad()
def update_average(average, model, step):
    """Moves the average towards the weights; the first steps count less and less."""
    share = max(1 - 0.9995, 1 / (step + 1) ** 0.8)
    for mean, parameter in zip(average.parameters(), model.parameters()):
        mean.lerp_(parameter, share)


def train_generator(model, loss_of, steps, early=math.inf, peak_lr=2e-3):
    """Flow matching -> the averaged weights, and those after `early` seconds (None: not reached).

    loss_of(progress) -> the loss of a batch; progress: the part of the steps that is done, 0 to 1.
    Both are a ModuleDict in eval mode.
    """
    average = copy.deepcopy(model)
    snapshot = None
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=peak_lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    start = time.time()
    bar = tqdm(range(steps), desc="generator", mininterval=5)
    for step in bar:
        lr = learning_rate(step, steps, peak_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = loss_of(step / steps)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        update_average(average, model, step)
        if snapshot is None and time.time() - start > early:
            snapshot = copy.deepcopy(average).eval()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", lr=f"{lr:.1e}")
    return average.eval(), snapshot


# --------------------------------------------------------------------------------------------------
# Writing.


def write_json(path, content, indent=None):
    path.write_text(json.dumps(content, indent=indent) + "\n")


def save_classifier(folder, model, images, labels):
    """Weights, width, and the moments of the real pictures in its features.

    real.npz is of all pictures, real-1 and real-2 of each half: for the search and the report of
    merge.py. Each holds mu and sigma (float64, unbiased) and scale, half the mean distance within
    a class.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    write_json(folder / "config.json", {"width": model.width})
    with torch.inference_mode():
        features = torch.cat([model.features(part) for part in images.split(1000)])
    distances = []
    for label in labels.unique():
        distances.append(mean_distance(features[labels == label][:500]))
    scale = np.mean(distances) / 2
    parts = {"real": features, "real-1": features[::2], "real-2": features[1::2]}
    for name, part in parts.items():
        mu, sigma = moments(part)
        np.savez(folder / f"{name}.npz", mu=mu, sigma=sigma, scale=scale)


def save_generator(folder, model):
    """The diffusers folder, in half precision."""
    model = copy.deepcopy(model).half()
    model["transformer"].save_pretrained(folder / "transformer")
    model["text_encoder"].save_pretrained(folder / "text_encoder")
    FlowMatchEulerDiscreteScheduler(shift=1.0).save_pretrained(folder / "scheduler")
    write_json(folder / "model_index.json", MODEL_INDEX, indent=2)


def write_rows(path, rows):
    """One JSON object a line."""
    lines = [json.dumps(row) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")


def write_prompts(folder):
    """prompts.jsonl: three prompts a class. eval_prompts.jsonl: one, phrased as none of these."""
    prompts = []
    eval_prompts = []
    for label, nouns in enumerate(NOUNS):
        phrases = [noun_phrase([noun]) for noun in nouns]
        texts = [f"photo of {phrase}" for phrase in phrases] + phrases
        for text in texts[:3]:
            prompts.append({"prompt": text, "label": label})
        eval_prompts.append({"prompt": f"picture of {phrases[0]}", "label": label})
    for name, rows in (("prompts.jsonl", prompts), ("eval_prompts.jsonl", eval_prompts)):
        lines = [json.dumps(row) + "\n" for row in rows]
        (folder / name).write_text("".join(lines), encoding="utf-8")


# --------------------------------------------------------------------------------------------------
# The command.


def report(folders, judge, test, test_labels, pictures):
    """Prints the quality of fresh pictures, and, as a floor, of as many real test pictures.

    20 deterministic steps at the evaluation prompts, all equally often; `judge` is the folder
    whose evaluator judges.
    """
    real = np.load(judge / "evaluator" / "real.npz")
    evaluator = load_classifier(judge / "evaluator")
    prompts = read_prompts(judge / "eval_prompts.jsonl")
    labels = [prompt.metadata["label"] for prompt in prompts]
    each = pictures // 10

    def print_scores(name, images):
        scores = evaluation.score(images, prompts, evaluator, real)
        print(
            f"{name:40} accuracy {scores['accuracy']:.3f}  Frechet distance {scores['fid']:.3f}  "
            f"Vendi {scores['vendi']:.1f}",
            flush=True,
        )

    real_pictures = [test[test_labels == label][:each] for label in labels]
    print_scores("real test pictures", torch.cat(real_pictures))
    for folder in folders:
        model = bases.load(folder, precision="bfloat16")
        for guidance in GUIDANCES:
            images = picture_sets.generate(model, prompts, each, 20, guidance, seed=0, batch=500)
            print_scores(f"{folder}, guidance {guidance}", images)


def build_recogniser(args, out):
    """Writes out/recogniser and says how good it is."""
    images, labels = load_split(args.data, "train")
    attributes = label_of(10)

    def draw(count):
        rows = torch.randint(len(images), (count,))
        x = images[rows].roll(torch.randint(-1, 2, (2,)).tolist(), (2, 3))
        return x.expand(-1, 3, -1, -1), labels[rows][:, None]

    model = train_recogniser(draw, attributes, 28, 7, args.recogniser_steps, 100 * args.seed + 3)
    copy.deepcopy(model).half().save_pretrained(out / "recogniser")
    test, test_labels = load_split(args.data, "t10k")
    answers = []
    with torch.inference_mode():
        for part in test.expand(-1, 3, -1, -1).split(1000):
            answers.append(model(pixel_values=part * 2 - 1).logits.argmax(1))
    accuracy = (torch.cat(answers) == test_labels).float().mean()
    print(f"recogniser: accuracy on the 10,000 test pictures {accuracy:.4f}")


def build(args, out):
    """Builds everything and says how good the classifiers are."""
    images, labels = load_split(args.data, "train")
    test, test_labels = load_split(args.data, "t10k")
    start = time.time()
    out.mkdir(parents=True, exist_ok=True)
    write_prompts(out)
    tokenizer = build_tokenizer(out, all_captions())
    torch.manual_seed(args.seed)
    shades, widths = attributes(images, labels)
    facts = list(zip(labels.tolist(), shades.tolist(), widths.tolist()))
    data = CaptionedPictures(images * 2 - 1, facts, caption, tokenizer, args.seed)
    model = new_generator(tokenizer, TRANSFORMER)
    precision = faster_precision()

    def loss_of(progress):
        return flow_matching_loss(model, *data.draw(256), precision)

    average, snapshot = train_generator(model, loss_of, args.steps, early=300)
    save_generator(out, average)
    if args.early and snapshot:
        early = Path(args.early)
        save_generator(early, snapshot)
        tokenizer.save_pretrained(early / "tokenizer")

    for name, width, seed in (("reward", 16, 1), ("evaluator", 32, 2)):
        seed = args.seed * 100 + seed
        model = train_classifier(images, labels, width, seed, args.classifier_epochs)
        save_classifier(out / name, model, images, labels)
        with torch.inference_mode():
            answers = torch.cat([model(part).argmax(1) for part in test.split(1000)])
        accuracy = (answers == test_labels).float().mean()
        print(f"{name}: accuracy on the 10,000 test pictures {accuracy:.4f}")
    build_recogniser(args, out)
    minutes = (time.time() - start) / 60
    print(f"{out}: built in {minutes:.1f} minutes; --report prints its quality")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--data",
        default="/usr/share/datasets/fashion-mnist",
        help="folder with the four idx files",
    )
    parser.add_argument("--out", default="assets/tiny", help="folder to write")
    parser.add_argument(
        "--steps",
        type=int,
        default=7000,
        help="optimizer steps of the generator, 256 pictures each",
    )
    parser.add_argument(
        "--classifier_epochs",
        type=int,
        default=14,
        help="passes over the data for each classifier",
    )
    parser.add_argument(
        "--early",
        default=None,
        help="also write the generator as it was after its first 300 seconds to this folder",
    )
    parser.add_argument(
        "--recogniser_steps", type=int, default=4000, help="optimizer steps of the recogniser"
    )
    parser.add_argument(
        "--recogniser", action="store_true", help="build the recogniser of --out alone"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--report",
        action="store_true",
        help="build nothing; print the quality of --out, and of --early if given",
    )
    parser.add_argument("--pictures", type=int, default=5000, help="pictures of the report")
    args = parser.parse_args()

    out = Path(args.out)
    if args.report:
        folders = [args.early, out] if args.early else [out]
        test, test_labels = load_split(args.data, "t10k")
        report(folders, out, test, test_labels, args.pictures)
    elif args.recogniser:
        build_recogniser(args, out)
    else:
        build(args, out)


if __name__ == "__main__":
    main()
