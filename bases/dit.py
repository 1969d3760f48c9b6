"""DiT (arXiv 2212.09748), class-conditional, from diffusers folders.

    x_t = alpha_t x_0 + sigma_t eps,  the network predicts eps, and a variance that is not used
Prompts are classes: numbers, or names that model_index.json gives (id2label). Every block of the
network has a table of label embeddings of its own. The prompt is one row of each, [blocks, D], so
that prompt noise acts on all that the network sees of the class.
Left out on purpose: the learned variance, because a step takes its noise from --kernel and --eta.
diffusers loads no LoRA into this pipeline; merge.py reads the file that --lora writes.
"""

import functools

import torch

from bases.files import class_ids, numbers_of_names
from bases.generator import Generator, _libraries, _part
from sampling import VP
from support.files import read_json


def take_embedding(block, labels, *ignored):
    """The forward of a block's label embedder: embeddings [B, blocks, D] of `embed` -> [B, D].

    It drops no label in train() mode: rollout and update must be the same network.
    """
    return labels[:, block]


def label_embedders(network):
    """The label embedder of each block."""
    return [block.norm1.emb.class_embedder for block in network.transformer_blocks]


def take_embeddings(network):
    """Makes a network take label embeddings [B, blocks, D] in place of labels [B]."""
    for block, embedder in enumerate(label_embedders(network)):
        embedder.forward = functools.partial(take_embedding, block)
    # diffusers calls it once more after the last block, for the output layer.
    network.called_alone = [network.transformer_blocks[0].norm1.emb]


class DiT(Generator):
    """A transformer in the latents of a VAE, for classes."""

    def __init__(self, folder, device, precision, decode_batch):
        super().__init__(folder, device, precision, decode_batch)
        diffusers, _ = _libraries()
        self.network = _part(diffusers.DiTTransformer2DModel, folder / "transformer", device)
        self.network.requires_grad_(True)
        self.vae = _part(diffusers.AutoencoderKL, folder / "vae", device)
        config = self.network.config
        self.classes = config.num_embeds_ada_norm
        labels = read_json(folder / "model_index.json").get("id2label") or {}
        self.names = numbers_of_names(labels.get(str(i), "") for i in range(self.classes))
        self.shape = (config.in_channels, config.sample_size, config.sample_size)

        scheduler = self.scheduler()
        offset = scheduler.config.steps_offset
        self.path = VP(scheduler.alphas_cumprod, scheduler.final_alpha_cumprod, offset)
        take_embeddings(self.network)

    def scheduler(self):
        """diffusers' DDIM with the numbers of the folder's scheduler."""
        diffusers, _ = _libraries()
        config = read_json(self.folder / "scheduler" / "scheduler_config.json")
        return diffusers.DDIMScheduler.from_config(config, clip_sample=False)

    def __call__(self, x_t, t, prompt):
        with self.autocast():
            out = self.network(
                x_t, timestep=t.round().long(), class_labels=prompt[0], return_dict=False
            )[0]
        eps_hat = out[:, : self.shape[0]].float()
        alpha = self.path.alpha(t).float().reshape(-1, 1, 1, 1)
        sigma = self.path.sigma(t).float().reshape(-1, 1, 1, 1)
        return (x_t - sigma * eps_hat) / alpha, eps_hat

    def embed(self, texts):
        """-> (label embeddings [B, blocks, D],)."""
        ids = class_ids(self.folder / "model_index.json", self.names, texts, self.classes)
        ids = torch.tensor(ids, device=self.device)
        rows = [embedder.embedding_table(ids) for embedder in label_embedders(self.network)]
        return (torch.stack(rows, 1),)

    def picture(self, latents):
        latents = latents / self.vae.config.scaling_factor
        return self.vae.decode(latents, return_dict=False)[0] / 2 + 0.5

    def save(self, folder, weights=None):
        self.save_pipeline(folder, "transformer", weights)

    def stock_sample(self, texts, x_T, steps):
        # The pipeline takes no noise of ours, so its loop is written out: scheduler and network.
        scheduler = self.scheduler()
        scheduler.set_timesteps(steps)
        (labels,) = self.encode(texts)
        x = x_T
        for t in scheduler.timesteps:
            out = self.network(x, timestep=t.expand(len(x)), class_labels=labels).sample
            x = scheduler.step(out[:, : self.shape[0]], t, x).prev_sample
        return x
