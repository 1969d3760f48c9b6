"""Builds assets/shapes, a small Stable Diffusion 3 in colour, whose collapse can be counted.

    python experiments/build_shapes.py              # nothing is downloaded: scenes are drawn
    python experiments/build_shapes.py --report     # the quality of what was built

It learns the scenes of shapes.py (36 x 36, one object, five attributes) from drawings of them:
    vae/                                an autoencoder: latents [8, 9, 9]
    transformer/ text_encoder/ tokenizer/ scheduler/    a rectified flow in latents with captions
    reward/ evaluator/                  two networks that read all attributes, trained apart
    recogniser/                         a third, of another kind, as a reward
    prompts.jsonl eval_prompts.jsonl    to train on, and to judge on; beside a prompt, what it names
What the two builds share is in build_tiny.py. Left out: resuming.
"""

import argparse
import copy
import multiprocessing
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from safetensors.torch import save_file
from tqdm import tqdm

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]
import shapes  # noqa: E402
from build_tiny import (  # noqa: E402
    MODEL_INDEX,
    CaptionedPictures,
    build_tokenizer,
    flow_matching_loss,
    learning_rate,
    new_generator,
    train_generator,
    train_recogniser,
    write_json,
    write_rows,
)

import bases  # noqa: E402
import eval as evaluation  # noqa: E402
from commands import picture_sets  # noqa: E402
from dist_reward import moments  # noqa: E402
from prompting import read_prompts  # noqa: E402
from rewards import classifier  # noqa: E402
from rewards.metrics import mean_distance  # noqa: E402
from rewards.recogniser import Recogniser  # noqa: E402
from support.files import to_uint8  # noqa: E402

ATTRIBUTES = shapes.ATTRIBUTES
TOKENS = 12  # the longest caption, start and end marks included

# The autoencoder, 0.2 M parameters: 4 x 4 pixels in colour are 8 numbers.
VAE = {
    "sample_size": shapes.SIDE,
    "block_out_channels": (16, 24, 32),
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "layers_per_block": 1,
    "latent_channels": 8,
    "norm_num_groups": 8,
    "mid_block_add_attention": False,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}

# The transformer, 2.3 M parameters: 9 patches of 3 x 3 x 8 numbers. A patch is a cell of the world,
# so that one token draws the object, and the others learn to leave it alone.
TRANSFORMER = {
    "sample_size": shapes.SIDE // 4,
    "patch_size": 3,
    "in_channels": 8,
    "out_channels": 8,
    "num_layers": 4,
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "joint_attention_dim": 64,
    "caption_projection_dim": 128,
    "pooled_projection_dim": 64,
    "pos_embed_max_size": 3,
    "qk_norm": "rms_norm",
}

# Scenes of each part of the build: the seed of shapes.new_scene, so that nothing is seen twice.
GENERATOR_SEED, REWARD_SEED, EVALUATOR_SEED, TEST_SEED, RECOGNISER_SEED = 1, 2, 3, 4, 5
CROWD_SEED = 6

# Place and colour are decided while a picture is nearly noise: so it samples there most. The words
# for places are learned there alone, and from captions that name everything: so in the first part
# of the training all do, and half of the times are there. The shape is decided later: so are the
# times of the rest.
SHIFT = 3.0
NOISY = 0.5
FIRST_PART = 0.05
LATER_SHIFT = 1.5


# --------------------------------------------------------------------------------------------------
# Prompts.

# What the prompts of training and of evaluation name; everything else is left open. Each attribute
# is named by some and left open by others.
TRAIN_NAMED = [
    {"shape": "star"},
    {"shape": "ring"},
    {"shape": "triangle"},
    {"colour": "blue"},
    {"colour": "yellow"},
    {"cell": "top left"},
    {"cell": "bottom"},
    {"background": "white"},
    {"size": "large"},
    {"shape": "circle", "colour": "red"},
    {"shape": "square", "colour": "green"},
    {"shape": "cross", "colour": "orange"},
    {"shape": "star", "colour": "turquoise"},
    {"shape": "ring", "colour": "pink"},
    {"shape": "triangle", "colour": "purple"},
    {"shape": "circle", "size": "small"},
    {"shape": "square", "size": "large"},
    {"shape": "star", "size": "medium"},
    {"shape": "cross", "cell": "right"},
    {"shape": "ring", "cell": "top"},
    {"shape": "triangle", "cell": "centre"},
    {"shape": "circle", "background": "sand"},
    {"shape": "cross", "background": "sky"},
    {"colour": "orange", "cell": "left"},
    {"colour": "red", "size": "large"},
    {"colour": "green", "background": "grey"},
    {"size": "small", "cell": "bottom right"},
    {"shape": "square", "colour": "blue", "background": "white"},
    {"shape": "star", "colour": "yellow", "size": "large"},
    {"shape": "ring", "colour": "purple", "cell": "bottom left"},
]
EVAL_NAMED = [
    {"shape": "cross"},
    {"colour": "purple"},
    {"cell": "top right"},
    {"shape": "star", "colour": "red"},
    {"shape": "triangle", "colour": "green"},
    {"shape": "ring", "size": "large"},
    {"shape": "square", "cell": "bottom"},
    {"shape": "circle", "background": "sky"},
    {"colour": "turquoise", "background": "sand"},
    {"shape": "circle", "colour": "orange", "size": "medium"},
]


def write_prompts(folder):
    """prompts.jsonl, and eval_prompts.jsonl: other things, phrased in another way."""
    for name, named, style in (("prompts", TRAIN_NAMED, 0), ("eval_prompts", EVAL_NAMED, 1)):
        rows = [{"prompt": shapes.phrase(facts, style=style)} | facts for facts in named]
        write_rows(folder / f"{name}.jsonl", rows)


# --------------------------------------------------------------------------------------------------
# The data.


def pictures_of(seed, count):
    """-> uint8 [count, 3, SIDE, SIDE], and the facts of each."""
    numbers = tqdm(range(count), desc=f"scenes of seed {seed}", mininterval=5)
    pictures, facts = shapes.draw_many(seed, numbers)
    return torch.from_numpy(pictures.copy()), facts


def as_images(pictures):
    """Bytes -> float32 in [0, 1]."""
    return pictures.float() / 255


def scenes_of(wanted, each, seed=TEST_SEED):
    """Scenes that have what is named: P of {attribute: value} -> float [P each, 3, SIDE, SIDE]."""
    pictures = []
    for number in range(each * len(wanted)):
        scene = shapes.new_scene(seed, number, named=wanted[number // each])
        pictures.append(shapes.draw(scene))
    return as_images(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2))


# --------------------------------------------------------------------------------------------------
# Training.


def object_weight(x):
    """x [B, 3, H, W] in [-1, 1] -> [B, 1, H, W]: 5 where a picture differs from its median, else 1.

    The object has a twentieth of the pixels, and all of the attributes but one.
    """
    median = x.flatten(2).median(2).values[:, :, None, None]
    difference = (x - median).abs().amax(1, keepdim=True)
    return 1 + 4 * (difference > 0.2)


def train_vae(pictures, crowds, steps, seed, batch=32, peak_lr=3e-3):
    """An autoencoder -> AutoencoderKL in eval mode, whose latents have mean 0 and std 1.

    Half of a batch are crowds, of nine objects each, from which it learns faster. Its loss is the
    absolute and the squared error, and a little of the divergence of the latents from noise. It is
    trained on the device that the pictures are on.
    (channels_last is a sixth faster.)
    """
    device = pictures.device
    torch.manual_seed(seed)
    vae = AutoencoderKL(**VAE).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=peak_lr, betas=(0.9, 0.99))
    bar = tqdm(range(steps), desc="autoencoder", mininterval=5)
    for step in bar:
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, peak_lr)
        rows = torch.randint(len(pictures), (batch // 2,), device=device)
        crowded = torch.randint(len(crowds), (batch // 2,), device=device)
        x = as_images(torch.cat([pictures[rows], crowds[crowded]])) * 2 - 1
        x = x.contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(x).latent_dist
        error = vae.decode(posterior.sample()).sample - x
        weight = object_weight(x)
        error = ((error.abs() + error**2) * weight).sum() / (3 * weight.sum())
        loss = error + 4e-7 * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
    vae.eval()
    latents = encode(vae, pictures[:5000])
    vae.register_to_config(
        shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item()
    )
    return vae


@torch.inference_mode()
def encode(vae, pictures):
    """Bytes [n, 3, 36, 36] -> the means of their latents [n, 8, 9, 9]."""
    parts = []
    for part in pictures.split(500):
        parts.append(vae.encode(as_images(part) * 2 - 1).latent_dist.mean)
    return torch.cat(parts)


def learn_places(transformer):
    """Makes the vectors that tell the nine patches apart random, and learned.

    The sines and cosines of three columns and three rows hardly differ.
    """
    places = torch.randn_like(transformer.pos_embed.pos_embed)
    del transformer.pos_embed.pos_embed
    transformer.pos_embed.pos_embed = torch.nn.Parameter(places)


def train_reader(width, seed, scenes, steps, device, batch=128, peak_lr=4e-3):
    """A Classifier of all attributes, trained on slightly blurred, slightly noisy scenes."""
    pictures, facts = pictures_of(seed, scenes)
    pictures = pictures.to(device)
    torch.manual_seed(seed)
    model = classifier.Classifier(width, ATTRIBUTES, shapes.SIDE, channels=3).to(device)
    numbers = classifier.value_numbers(facts, ATTRIBUTES).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_lr, weight_decay=0.05)
    for step in tqdm(range(steps), desc=f"reader, width {width}", mininterval=5):
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, peak_lr)
        rows = torch.randint(len(pictures), (batch,), device=device)
        x = as_images(pictures[rows])
        blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
        x = torch.lerp(x, blurred, 0.6 * torch.rand(batch, 1, 1, 1, device=device))
        noise_level = 0.06 * torch.rand(batch, 1, 1, 1, device=device)
        x = x + noise_level * torch.randn(x.shape, device=device)
        loss = 0
        for logits, asked in zip(classifier.by_attribute(model(x), ATTRIBUTES), numbers[rows].T):
            loss = loss + F.cross_entropy(logits, asked, label_smoothing=0.02)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.cpu().eval()


# --------------------------------------------------------------------------------------------------
# Writing.


@torch.inference_mode()
def save_reader(folder, model, pictures):
    """Weights in half precision, attributes, and what real scenes look like to it.

    real.npz is of all scenes, real-1 and real-2 of each half: for the search and the report of
    merge.py. Each holds mu and sigma (float64, unbiased), frequencies_NAME of the values that it
    reads, and scale, half the mean distance of two scenes that fit the same prompt.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.half() for name, value in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    model.load_state_dict(weights)  # what is measured is what is saved
    config = {"width": model.width, "attributes": ATTRIBUTES, "size": shapes.SIDE, "channels": 3}
    write_json(folder / "config.json", config)
    features = torch.cat([model.features(as_images(part)) for part in pictures.split(1000)])
    values = classifier.read_values(model.head(features), ATTRIBUTES)  # [n, A]

    fitting = scenes_of(EVAL_NAMED, 200)
    distances = [mean_distance(model.features(part)) for part in fitting.split(200)]
    scale = np.mean(distances) / 2

    halves = {"real": slice(None), "real-1": slice(0, None, 2), "real-2": slice(1, None, 2)}
    for name, part in halves.items():
        mu, sigma = moments(features[part])
        frequencies = {}
        for a, (attribute, known) in enumerate(ATTRIBUTES.items()):
            counts = torch.bincount(values[part, a], minlength=len(known)).double()
            frequencies[f"frequencies_{attribute}"] = (counts / counts.sum()).numpy()
        np.savez(folder / f"{name}.npz", mu=mu, sigma=sigma, scale=scale, **frequencies)


def save_generator(folder, model, vae):
    """The diffusers folder, in half precision."""
    model = model.half()
    model["transformer"].save_pretrained(folder / "transformer")
    model["text_encoder"].save_pretrained(folder / "text_encoder")
    vae.half().to(memory_format=torch.contiguous_format).save_pretrained(folder / "vae")
    FlowMatchEulerDiscreteScheduler(shift=SHIFT).save_pretrained(folder / "scheduler")
    index = MODEL_INDEX | {"vae": ["diffusers", "AutoencoderKL"]}
    write_json(folder / "model_index.json", index, indent=2)


# --------------------------------------------------------------------------------------------------
# The command.


def report(folder, pictures):
    """Prints the quality of fresh pictures, and, as a floor, of as many scenes.

    20 deterministic steps at the evaluation prompts, all equally often. Beside the evaluator's
    metrics stands what a program reads from the same pictures.
    """
    judge = evaluation.Judge(folder, "evaluator")
    prompts = read_prompts(folder / "eval_prompts.jsonl")
    each = pictures // len(prompts)

    def print_scores(name, images):
        scores = evaluation.score(images, prompts, judge.network, judge.real)
        words = [f"{metric} {value:.3f}" for metric, value in scores.items()]
        print(f"{name}: {', '.join(words)}")
        print(f"    {read_by_program(images, prompts, judge.network)}", flush=True)

    print_scores("scenes", scenes_of(EVAL_NAMED, each))
    model = bases.load(folder)
    for guidance in (1.0, 1.5, 2.0):
        images = picture_sets.generate(model, prompts, each, 20, guidance, seed=0, batch=500)
        print_scores(f"guidance {guidance}", images)


@torch.inference_mode()
def read_by_program(images, prompts, evaluator):
    """How many pictures a program can read, finds right, and reads as the evaluator does."""
    pictures = to_uint8(images).permute(0, 2, 3, 1).numpy()
    answers = classifier.read_values(evaluator(images), ATTRIBUTES).tolist()
    repeated = [prompt for prompt in prompts for _ in range(len(images) // len(prompts))]
    right = 0
    agreed = dict.fromkeys(ATTRIBUTES, 0)
    clean = 0
    for picture, answer, prompt in zip(pictures, answers, repeated):
        facts = shapes.read(picture)
        if facts is None:
            continue
        clean += 1
        right += all(facts[name] == prompt.metadata.get(name, facts[name]) for name in facts)
        for (name, values), number in zip(ATTRIBUTES.items(), answer):
            agreed[name] += facts[name] == values[number]
    words = [f"{name} {count / max(clean, 1):.3f}" for name, count in agreed.items()]
    return (
        f"a program reads {clean / len(images):.3f} of them, finds {right / max(clean, 1):.3f} "
        f"right, and agrees with the evaluator: {', '.join(words)}"
    )


def build_recogniser(args, out, test, truth):
    """Writes out/recogniser and says how good it is on the scenes `test`."""
    pictures, facts = pictures_of(RECOGNISER_SEED, args.scenes // 2)
    pictures = pictures.to(args.device)
    numbers = classifier.value_numbers(facts, ATTRIBUTES).to(args.device)

    def draw(count):
        rows = torch.randint(len(pictures), (count,), device=args.device)
        return as_images(pictures[rows]), numbers[rows]

    steps = args.recogniser_steps
    model = train_recogniser(draw, ATTRIBUTES, shapes.SIDE, 6, steps, args.seed, device=args.device)
    copy.deepcopy(model).half().save_pretrained(out / "recogniser")
    print_accuracy("recogniser", Recogniser(out / "recogniser"), test, truth)


@torch.inference_mode()
def print_accuracy(name, network, test, truth):
    """How often a network of images -> logits reads each attribute as it is: truth [n, A]."""
    logits = torch.cat([network(as_images(part)) for part in test.split(1000)])
    right = (classifier.read_values(logits, ATTRIBUTES) == truth).double().mean(0)
    words = [f"{attribute} {share:.4f}" for attribute, share in zip(ATTRIBUTES, right)]
    print(f"{name}: accuracy on {len(test):,} fresh scenes: {', '.join(words)}", flush=True)


def build_autoencoder(args):
    """Trains the autoencoder -> it, the latents of the scenes [n, 8, 9, 9], and their facts."""
    pictures, facts = pictures_of(GENERATOR_SEED, args.scenes)
    crowds = [shapes.draw_crowd(CROWD_SEED, number) for number in range(args.scenes // 15)]
    crowds = torch.from_numpy(np.stack(crowds)).permute(0, 3, 1, 2)
    vae = train_vae(pictures.to(args.device), crowds.to(args.device), args.vae_steps, args.seed)
    latents = encode(vae, pictures.to(args.device))
    latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    return vae, latents, facts


def build_generator(args, out, vae, latents, facts):
    """Trains the flow in the latents, and writes it and the autoencoder."""
    tokenizer = build_tokenizer(out, shapes.all_words(), TOKENS)

    torch.manual_seed(args.seed)
    data = CaptionedPictures(latents, facts, shapes.caption, tokenizer, args.seed)
    model = new_generator(tokenizer, TRANSFORMER)
    learn_places(model["transformer"])
    model = model.to(args.device)

    def loss_of(progress):
        is_first_part = progress < FIRST_PART
        data.caption = shapes.full_caption if is_first_part else shapes.caption
        x0, tokens = data.draw(args.batch)
        if is_first_part:
            return flow_matching_loss(model, x0, tokens, "float32", SHIFT, NOISY)
        return flow_matching_loss(model, x0, tokens, "float32", LATER_SHIFT)

    average, _ = train_generator(model, loss_of, args.steps, peak_lr=1.5e-3)
    save_generator(out, average.cpu(), vae.cpu())


def build_readers(args, out):
    """Trains the three networks that read a picture, writes them, and says how good they are."""
    torch.set_num_threads(max(torch.get_num_threads() // 2, 1))
    test, facts = pictures_of(TEST_SEED, args.scenes // 3)
    truth = classifier.value_numbers(facts, ATTRIBUTES)
    for name, width, seed in (("reward", 24, REWARD_SEED), ("evaluator", 32, EVALUATOR_SEED)):
        model = train_reader(width, seed, args.scenes // 2, args.reader_steps, args.device)
        save_reader(out / name, model, test)
        print_accuracy(name, model, test, truth)
    build_recogniser(args, out, test, truth)


def build(args, out):
    """Builds everything: the readers in a process beside the generator."""
    start = time.time()
    out.mkdir(parents=True, exist_ok=True)
    write_prompts(out)
    readers = multiprocessing.get_context("spawn").Process(target=build_readers, args=(args, out))
    threads = torch.get_num_threads()
    readers.start()
    try:
        torch.set_num_threads(max(threads // 2, 1))
        parts = build_autoencoder(args)
        readers.join()
        torch.set_num_threads(threads)
        build_generator(args, out, *parts)
    finally:
        readers.kill()  # where the generator failed
    if readers.exitcode:
        raise SystemExit("the networks that read pictures were not built; see above")
    minutes = (time.time() - start) / 60
    print(f"{out}: built in {minutes:.1f} minutes; --report prints its quality")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--out", default="assets/shapes", help="folder to write")
    parser.add_argument("--scenes", type=int, default=60000, help="that the generator learns from")
    parser.add_argument("--vae_steps", type=int, default=5500, help="of the autoencoder")
    parser.add_argument("--steps", type=int, default=20000, help="of the generator")
    parser.add_argument("--batch", type=int, default=64, help="pictures in one step of it")
    parser.add_argument("--reader_steps", type=int, default=1500, help="of each classifier")
    parser.add_argument("--recogniser_steps", type=int, default=2500, help="of the recogniser")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where the networks are trained",
    )
    parser.add_argument(
        "--report", action="store_true", help="build nothing; print the quality of --out"
    )
    parser.add_argument("--pictures", type=int, default=1000, help="pictures of the report")
    args = parser.parse_args()

    out = Path(args.out)
    if args.report:
        report(out, args.pictures)
    else:
        build(args, out)


if __name__ == "__main__":
    main()
