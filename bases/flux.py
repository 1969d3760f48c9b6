"""FLUX.1, dev and schnell, from diffusers folders.

    x_t = (1 - t) x_0 + t eps,  the network predicts v = eps - x_0 for packed tokens (packed.py)
dev was distilled: guidance is a number that its network takes as an input, so --guidance goes in
there and each step asks the network once. schnell has no such input: --guidance is the usual
formula. A prompt is 512 tokens of T5 (schnell: 256) and a pooled CLIP embedding.
Left out on purpose: other sizes than that of vae/config.json, pictures as prompts.
"""

import torch

from bases.generator import Generator, _encoder, _libraries, _part, _tokens, from_velocity
from bases.packed import pack, packed_shape, stock_times, unpack
from sampling import Flow


def t5_tokens(config):
    """How many tokens of a text T5 reads; config: the transformer's. dev takes more."""
    return 512 if config.get("guidance_embeds") else 256


class Flux(Generator):
    """A transformer in the packed latents of a VAE, a T5, and the pooled vector of a CLIP."""

    def __init__(self, folder, device, precision, decode_batch):
        super().__init__(folder, device, precision, decode_batch)
        diffusers, transformers = _libraries()
        self.network = _part(diffusers.FluxTransformer2DModel, folder / "transformer", device)
        self.network.requires_grad_(True)
        self.vae = _part(diffusers.AutoencoderKL, folder / "vae", device)
        clip = (transformers.CLIPTokenizer, transformers.CLIPTextModel)
        t5 = (transformers.T5TokenizerFast, transformers.T5EncoderModel)
        self.encoders = [
            _encoder(folder, "", clip, device, self.encoder_type),
            _encoder(folder, "_2", t5, device, self.encoder_type),
        ]
        config = self.network.config
        self.takes_guidance = config.guidance_embeds
        self.t5_tokens = t5_tokens(self.network.config)
        self.shape = packed_shape(folder, config.in_channels)
        self.path = Flow()._replace(times=stock_times(folder, self.shape))

        rows = torch.arange(self.shape[1] // 2)
        columns = torch.arange(self.shape[2] // 2)
        places = torch.cartesian_prod(torch.zeros(1), rows.float(), columns.float())
        self.places = places.to(self.device)  # [N, 3]: the tokens of a picture
        self.text_places = torch.zeros(self.t5_tokens, 3, device=self.device)

    def __call__(self, x_t, t, prompt, guidance=1.0):
        tokens, pooled = prompt
        strength = torch.full_like(t, guidance) if self.takes_guidance else None
        with self.autocast():
            v = self.network(
                hidden_states=pack(x_t),
                timestep=t,
                guidance=strength,
                encoder_hidden_states=tokens,
                pooled_projections=pooled,
                img_ids=self.places,
                txt_ids=self.text_places,
                return_dict=False,
            )[0]
        return from_velocity(x_t, t, unpack(v.float(), self.shape))

    @property
    def guided(self):
        """dev's guidance (sampling.predict asks for it), or None: the usual formula."""
        return self.with_guidance if self.takes_guidance else None

    def with_guidance(self, x_t, t, prompt, guidance, null_prompt):
        """The prediction at a guidance that is an input; no null prompt is asked."""
        return self(x_t, t, prompt, guidance)

    def embed(self, texts):
        """-> T5's token embeddings [B, L, D], CLIP's pooled embedding [B, D']."""
        (clip_tokenizer, clip), (t5_tokenizer, t5) = self.encoders
        length = clip_tokenizer.model_max_length
        pooled = clip(_tokens(clip_tokenizer, texts, length, self.device)).pooler_output
        tokens = t5(_tokens(t5_tokenizer, texts, self.t5_tokens, self.device))[0]
        return tokens, pooled

    def picture(self, latents):
        config = self.vae.config
        latents = latents / config.scaling_factor + (config.shift_factor or 0)
        return self.vae.decode(latents, return_dict=False)[0] / 2 + 0.5

    def save(self, folder, weights=None):
        self.save_pipeline(folder, "transformer", weights)

    def stock_sample(self, texts, x_T, steps, guidance=1.0):
        pipeline = self.stock_pipeline("transformer")
        side = self.shape[1] * pipeline.vae_scale_factor
        output = pipeline(
            texts,
            latents=pack(x_T),
            height=side,
            width=side,
            num_inference_steps=steps,
            guidance_scale=guidance,
            max_sequence_length=self.t5_tokens,
            output_type="latent",
        )
        return unpack(output.images, self.shape)
