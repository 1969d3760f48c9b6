"""Stable Diffusion 1, 2, 3 and 3.5, from diffusers folders.

    1, 2     x_t = alpha_t x_0 + sigma_t eps, the network predicts eps, or v = alpha eps - sigma x_0
    3, 3.5   x_t = (1 - t) x_0 + t eps,       the network predicts v = eps - x_0
Networks, VAEs and text encoders are the libraries' own. Left out on purpose: the safety checker,
and schedulers other than the stock one (DDIM's and the flow's Euler steps).
"""

import torch
from torch.nn.functional import pad

from bases.files import named_parts
from bases.generator import Generator, _encoder, _libraries, _part, _tokens, from_velocity
from sampling import VP, Flow
from support.files import read_json

T5_TOKENS = 256  # of a prompt, as in the stock pipeline


class StableDiffusion(Generator):
    """Stable Diffusion 1.x and 2.x (arXiv 2112.10752).

    A UNet in the latents of a VAE, one CLIP, epsilon- or v-prediction.
    """

    def __init__(self, folder, device, precision, decode_batch):
        super().__init__(folder, device, precision, decode_batch)
        diffusers, transformers = _libraries()
        self.network = _part(diffusers.UNet2DConditionModel, folder / "unet", device)
        self.network.requires_grad_(True)
        self.vae = _part(diffusers.AutoencoderKL, folder / "vae", device)
        clip = (transformers.CLIPTokenizer, transformers.CLIPTextModel)
        self.encoders = [_encoder(folder, "", clip, device, self.encoder_type)]

        config = read_json(folder / "scheduler" / "scheduler_config.json")
        scheduler = diffusers.DDIMScheduler.from_config(config)
        # offset 1 whatever steps_offset says, as in the stock pipeline.
        self.path = VP(scheduler.alphas_cumprod, scheduler.final_alpha_cumprod, offset=1)
        self.predicts_velocity = scheduler.config.prediction_type == "v_prediction"
        side = self.network.config.sample_size
        self.shape = (self.network.config.in_channels, side, side)

    def __call__(self, x_t, t, prompt):
        with self.autocast():
            out = self.network(x_t, t.round().long(), **self.inputs(prompt), return_dict=False)[0]
        out = out.float()
        alpha = self.path.alpha(t).float().reshape(-1, 1, 1, 1)
        sigma = self.path.sigma(t).float().reshape(-1, 1, 1, 1)
        if self.predicts_velocity:
            return alpha * x_t - sigma * out, alpha * out + sigma * x_t
        return (x_t - sigma * out) / alpha, out

    def inputs(self, prompt):
        """What the network takes beside x_t and t, by name."""
        return {"encoder_hidden_states": prompt[0]}

    def encoder_outputs(self, texts):
        """What each text encoder makes of the texts."""
        outputs = []
        for tokenizer, encoder in self.encoders:
            tokens = _tokens(tokenizer, texts, tokenizer.model_max_length, self.device)
            outputs.append(encoder(tokens, output_hidden_states=True))
        return outputs

    def embed(self, texts):
        """-> (token embeddings [B, L, D],)."""
        return (self.encoder_outputs(texts)[0].last_hidden_state,)

    def picture(self, latents):
        latents = latents / self.vae.config.scaling_factor
        return self.vae.decode(latents, return_dict=False)[0] / 2 + 0.5

    def save(self, folder, weights=None):
        self.save_pipeline(folder, "unet", weights)

    def stock_sample(self, texts, x_T, steps):
        diffusers, _ = _libraries()
        pipeline = self.stock_pipeline("unet")
        config = pipeline.scheduler.config
        pipeline.scheduler = diffusers.DDIMScheduler.from_config(
            config, clip_sample=False, steps_offset=1
        )
        output = pipeline(
            texts,
            latents=x_T,
            num_inference_steps=steps,
            guidance_scale=1.0,
            output_type="latent",
        )
        return output.images


class StableDiffusion3(Generator):
    """Stable Diffusion 3 and 3.5 (arXiv 2403.03206).

    A transformer in the latents of a VAE, two CLIPs and perhaps a T5, the stock scheduler's times.
    And the embedded miniature of it: one CLIP, no VAE (a latent is the picture, scaled to [-1, 1]),
    evenly spaced times. The stock times would end at t = 1/1000 and then 0: in that last step
    nothing happens, and the miniature has few steps.
    """

    def __init__(self, folder, device, precision, decode_batch):
        super().__init__(folder, device, precision, decode_batch)
        diffusers, _ = _libraries()
        named = named_parts(folder)
        self.network = _part(diffusers.SD3Transformer2DModel, folder / "transformer", device)
        self.network.requires_grad_(True)
        self.encoders = _encoders(folder, named, device, precision)

        config = read_json(folder / "scheduler" / "scheduler_config.json")
        self.path = Flow(config["shift"])
        if "vae" in named:
            self.vae = _part(diffusers.AutoencoderKL, folder / "vae", device)
            scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)

            def times(steps):
                """The stock scheduler's times [steps + 1], noise first."""
                scheduler.set_timesteps(steps)
                return scheduler.sigmas.double()

            self.path = self.path._replace(times=times)
        side = self.network.config.sample_size
        self.shape = (self.network.config.in_channels, side, side)

    def __call__(self, x_t, t, prompt):
        tokens, pooled = prompt
        with self.autocast():
            v = self.network(
                hidden_states=x_t,
                timestep=1000 * t,
                encoder_hidden_states=tokens,
                pooled_projections=pooled,
                return_dict=False,
            )[0]
        return from_velocity(x_t, t, v.float())

    def embed(self, texts):
        """-> token embeddings [B, L, D], pooled embedding [B, D']."""
        length = self.encoders[0][0].model_max_length
        clips = []
        for tokenizer, encoder in self.encoders[:2]:
            tokens = _tokens(tokenizer, texts, length, self.device)
            clips.append(encoder(tokens, output_hidden_states=True))
        if len(clips) == 1:
            return clips[0].last_hidden_state, clips[0].text_embeds

        clip = torch.cat([out.hidden_states[-2] for out in clips], 2)
        pooled = torch.cat([out.text_embeds for out in clips], 1)
        width = self.network.config.joint_attention_dim
        t5 = clip.new_zeros(len(texts), T5_TOKENS, width)  # what stands in for a missing T5
        if len(self.encoders) == 3:
            tokenizer, encoder = self.encoders[2]
            t5 = encoder(_tokens(tokenizer, texts, T5_TOKENS, self.device))[0]
        clip = pad(clip, (0, t5.shape[2] - clip.shape[2]))
        return torch.cat([clip, t5], 1), pooled

    def picture(self, latents):
        if not self.vae:
            return (latents + 1) / 2
        config = self.vae.config
        latents = latents / config.scaling_factor + (config.shift_factor or 0)
        return self.vae.decode(latents, return_dict=False)[0] / 2 + 0.5

    def save(self, folder, weights=None):
        self.save_pipeline(folder, "transformer", weights)

    def stock_sample(self, texts, x_T, steps):
        if not self.vae:
            return None  # the pipeline needs one
        output = self.stock_pipeline("transformer")(
            texts,
            latents=x_T,
            num_inference_steps=steps,
            guidance_scale=1.0,
            output_type="latent",
        )
        return output.images


def _encoders(folder, named, device, precision):
    """Stable Diffusion 3's [(tokenizer, text encoder)]: a CLIP, and those of the others it has."""
    _, transformers = _libraries()
    clip = (transformers.CLIPTokenizer, transformers.CLIPTextModelWithProjection)
    t5 = (transformers.T5TokenizerFast, transformers.T5EncoderModel)
    dtype = torch.float32  # the miniature's encoder is small enough
    if precision == "bfloat16" and "vae" in named:
        dtype = torch.bfloat16
    encoders = []
    for suffix, classes in (("", clip), ("_2", clip), ("_3", t5)):
        if suffix == "" or f"text_encoder{suffix}" in named:
            encoders.append(_encoder(folder, suffix, classes, device, dtype))
    return encoders
