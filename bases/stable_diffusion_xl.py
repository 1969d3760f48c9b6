"""Stable Diffusion XL (arXiv 2307.01952), from diffusers folders.

Like Stable Diffusion 1, x_t = alpha_t x_0 + sigma_t eps, with three more inputs of the network: the
tokens of a second CLIP, its pooled embedding, and the sizes of the picture. The stock sampler is
Euler's in x / alpha over sigma / alpha, which is DDIM's step, down to no noise at all.
Left out on purpose: the refiner, other sizes and crops than the network's own.
"""

import torch

from bases.generator import _encoder, _libraries
from bases.stable_diffusion import StableDiffusion
from sampling import VP
from support.files import read_json


class StableDiffusionXL(StableDiffusion):
    """A UNet in the latents of a VAE, two CLIPs, epsilon- or v-prediction."""

    def __init__(self, folder, device, precision, decode_batch):
        super().__init__(folder, device, precision, decode_batch)
        diffusers, transformers = _libraries()
        clip = (transformers.CLIPTokenizer, transformers.CLIPTextModelWithProjection)
        self.encoders.append(_encoder(folder, "_2", clip, device, self.encoder_type))

        index = read_json(folder / "model_index.json")
        self.zeros_for_empty = index.get("force_zeros_for_empty_prompt", True)
        config = read_json(folder / "scheduler" / "scheduler_config.json")
        scheduler = diffusers.DDIMScheduler.from_config(config)
        is_ddim = config.get("_class_name") == "DDIMScheduler"
        final = scheduler.final_alpha_cumprod if is_ddim else 1.0
        self.path = VP(scheduler.alphas_cumprod, final, offset=config.get("steps_offset", 0))

        blocks = self.vae.config.block_out_channels
        side = self.shape[1] * 2 ** (len(blocks) - 1)  # of a picture
        # Its size as a photograph, where it was cropped, and the size that is asked for.
        self.sizes = torch.tensor([[side, side, 0, 0, side, side]], device=self.device).float()

    def inputs(self, prompt):
        tokens, pooled = prompt
        sizes = self.sizes.expand(len(pooled), -1)
        added = {"text_embeds": pooled, "time_ids": sizes}
        return {"encoder_hidden_states": tokens, "added_cond_kwargs": added}

    def embed(self, texts):
        """-> token embeddings [B, L, D1 + D2], pooled embedding [B, D2]. The empty text: zeros."""
        outputs = self.encoder_outputs(texts)
        tokens = torch.cat([output.hidden_states[-2] for output in outputs], 2)
        pooled = outputs[1].text_embeds
        if self.zeros_for_empty:
            has_words = [float(bool(text)) for text in texts]
            has_words = torch.tensor(has_words, device=self.device).to(tokens)
            tokens = tokens * has_words[:, None, None]
            pooled = pooled * has_words[:, None]
        return tokens, pooled

    def picture(self, latents):
        config = self.vae.config
        latents = latents / config.scaling_factor
        if config.latents_mean is not None and config.latents_std is not None:
            std = latents.new_tensor(config.latents_std)[:, None, None]
            latents = latents * std + latents.new_tensor(config.latents_mean)[:, None, None]
        return self.vae.decode(latents, return_dict=False)[0] / 2 + 0.5

    def stock_sample(self, texts, x_T, steps):
        output = self.stock_pipeline("unet")(
            texts,
            latents=x_T,
            num_inference_steps=steps,
            guidance_scale=1.0,
            output_type="latent",
        )
        return output.images
