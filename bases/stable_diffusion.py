"""Stable Diffusion 1, 2, 3 and 3.5."""
import torch
from torch.nn.functional import pad
from bases.files import named_parts
from support.files import read_json
from bases.generator import Generator, _from_velocity, _libraries, _part, _tokens
from sampling import Flow, VP

T5_TOKENS = 256                                                          # of a prompt, as in the stock pipeline


class StableDiffusion(Generator):
    """Stable Diffusion 1.x and 2.x (arXiv 2112.10752): a UNet in the latents of a VAE, one CLIP; epsilon or v-prediction."""

    def __init__(self, folder, device, precision, decode_batch):
        super().__init__(folder, device, precision, decode_batch)
        diffusers, transformers = _libraries()
        self.network = _part(diffusers.UNet2DConditionModel, folder / "unet", device).requires_grad_(True)
        self.vae = _part(diffusers.AutoencoderKL, folder / "vae", device)
        frozen = torch.bfloat16 if precision == "bfloat16" else torch.float32
        self.encoders = [(_part(transformers.CLIPTokenizer, folder / "tokenizer"), _part(transformers.CLIPTextModel, folder / "text_encoder", device, frozen))]
        scheduler = diffusers.DDIMScheduler.from_config(read_json(folder / "scheduler" / "scheduler_config.json"))
        self.path = VP(scheduler.alphas_cumprod, scheduler.final_alpha_cumprod, offset=1)      # whatever steps_offset says, as the stock pipeline
        self.velocity = scheduler.config.prediction_type == "v_prediction"
        self.shape = (self.network.config.in_channels, *[self.network.config.sample_size] * 2)

    def __call__(self, x_t, t, prompt):
        with self.autocast():
            out = self.network(x_t, t.round().long(), encoder_hidden_states=prompt[0], return_dict=False)[0].float()
        alpha, sigma = (c(t).float().reshape(-1, 1, 1, 1) for c in (self.path.alpha, self.path.sigma))
        if self.velocity:                                                # v = alpha eps - sigma x_0
            return alpha * x_t - sigma * out, alpha * out + sigma * x_t
        return (x_t - sigma * out) / alpha, out

    def embed(self, texts):
        [(tokenizer, encoder)] = self.encoders
        return (encoder(_tokens(tokenizer, texts, tokenizer.model_max_length, self.device))[0],)

    def picture(self, z):
        return self.vae.decode(z / self.vae.config.scaling_factor, return_dict=False)[0] / 2 + 0.5

    def save(self, folder, weights=None):
        self.save_pipeline(folder, "unet", weights)


class StableDiffusion3(Generator):
    """Stable Diffusion 3 and 3.5 (arXiv 2403.03206): two CLIPs and perhaps a T5, latents of a VAE, the stock scheduler's times.

    And the embedded miniature of it: one CLIP, no VAE (a latent is the picture, scaled to [-1, 1]), and evenly spaced times. The stock ones would
    end at t = 1/1000 and then 0, a step in which nothing happens; with few steps that is one wasted."""

    def __init__(self, folder, device, precision, decode_batch):
        super().__init__(folder, device, precision, decode_batch)
        diffusers, transformers = _libraries()
        self.network = _part(diffusers.SD3Transformer2DModel, folder / "transformer", device).requires_grad_(True)
        named = named_parts(folder)
        frozen = torch.bfloat16 if precision == "bfloat16" and "vae" in named else torch.float32   # the miniature's encoder is small enough
        clip, t5 = (transformers.CLIPTokenizer, transformers.CLIPTextModelWithProjection), (transformers.T5TokenizerFast, transformers.T5EncoderModel)
        self.encoders = [(_part(tokenizer, folder / f"tokenizer{n}"), _part(encoder, folder / f"text_encoder{n}", device, frozen))
                         for n, (tokenizer, encoder) in (("", clip), ("_2", clip), ("_3", t5)) if not n or f"text_encoder{n}" in named]
        config = read_json(folder / "scheduler" / "scheduler_config.json")
        self.path = Flow(config["shift"])
        if "vae" in named:
            self.vae = _part(diffusers.AutoencoderKL, folder / "vae", device)
            scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)

            def times(steps):
                scheduler.set_timesteps(steps)
                return scheduler.sigmas.double()
            self.path = self.path._replace(times=times)
        self.shape = (self.network.config.in_channels, *[self.network.config.sample_size] * 2)

    def __call__(self, x_t, t, prompt):
        tokens, pooled = prompt
        with self.autocast():
            v = self.network(hidden_states=x_t, timestep=1000 * t, encoder_hidden_states=tokens, pooled_projections=pooled, return_dict=False)[0]
        return _from_velocity(x_t, t, v.float())

    def embed(self, texts):
        """-> token embeddings [B, L, D], pooled embedding [B, D]."""
        length = self.encoders[0][0].model_max_length
        clips = [encoder(_tokens(tokenizer, texts, length, self.device), output_hidden_states=True) for tokenizer, encoder in self.encoders[:2]]
        if len(clips) == 1:
            return clips[0].last_hidden_state, clips[0].text_embeds
        tokens, pooled = torch.cat([clip.hidden_states[-2] for clip in clips], 2), torch.cat([clip.text_embeds for clip in clips], 1)
        more = tokens.new_zeros(len(texts), T5_TOKENS, self.network.config.joint_attention_dim)
        for tokenizer, encoder in self.encoders[2:]:
            more = encoder(_tokens(tokenizer, texts, T5_TOKENS, self.device))[0]
        return torch.cat([pad(tokens, (0, more.shape[2] - tokens.shape[2])), more], 1), pooled

    def decode(self, latents):
        return super().decode(latents) if self.vae else ((latents + 1) / 2).clamp(0, 1).expand(-1, 3, -1, -1)

    def picture(self, z):
        config = self.vae.config
        return self.vae.decode(z / config.scaling_factor + (config.shift_factor or 0), return_dict=False)[0] / 2 + 0.5

    def save(self, folder, weights=None):
        self.save_pipeline(folder, "transformer", weights)
