"""Qwen-Image (arXiv 2508.02324), from diffusers folders.

    x_t = (1 - t) x_0 + t eps,  the network predicts v = eps - x_0 for packed tokens (packed.py)
A prompt is what Qwen2.5-VL makes of a template with the text in it: 256 token embeddings, shorter
ones filled with zeros, and a mask that hides the filling. Guidance keeps the norm: each token of
the guided v is scaled to the norm of the prompted one, as the stock pipeline does.
Left out on purpose: texts above 256 tokens (the stock pipeline cuts at 512, or 1,024 if told so),
pictures as prompts.
"""

import torch

from bases.generator import Generator, _encoder, _libraries, _part, from_velocity
from bases.packed import pack, packed_shape, stock_times, unpack
from sampling import Flow

TOKENS = 256  # of a text

# The template that the network was trained with; its first 34 tokens are dropped again.
TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, "
    "quantity, text, spatial relationships of the objects and background:<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
DROPPED = 34


class QwenImage(Generator):
    """A transformer in the packed latents of a VAE, and a language model that reads the text."""

    def __init__(self, folder, device, precision, decode_batch):
        super().__init__(folder, device, precision, decode_batch)
        diffusers, transformers = _libraries()
        network_class = diffusers.QwenImageTransformer2DModel
        self.network = _part(network_class, folder / "transformer", device)
        self.network.requires_grad_(True)
        self.vae = _part(diffusers.AutoencoderKLQwenImage, folder / "vae", device)
        qwen = (transformers.Qwen2Tokenizer, transformers.Qwen2_5_VLForConditionalGeneration)
        self.encoders = [_encoder(folder, "", qwen, device, self.encoder_type)]
        self.shape = packed_shape(folder, self.network.config.in_channels)
        self.path = Flow()._replace(times=stock_times(folder, self.shape))

    def __call__(self, x_t, t, prompt):
        return from_velocity(x_t, t, unpack(self.velocity(x_t, t, prompt), self.shape))

    def velocity(self, x_t, t, prompt):
        """v of packed tokens [B, N, 4 C]."""
        tokens, mask = prompt
        grid = (1, self.shape[1] // 2, self.shape[2] // 2)
        with self.autocast():
            v = self.network(
                hidden_states=pack(x_t),
                timestep=t,
                encoder_hidden_states=tokens,
                encoder_hidden_states_mask=mask,
                img_shapes=[[grid]] * len(x_t),
                return_dict=False,
            )[0]
        return v.float()

    def guided(self, x_t, t, prompt, guidance, null_prompt):
        """The prediction with guidance that keeps the norm of each token (sampling.predict)."""
        if guidance == 1.0:
            return self(x_t, t, prompt)
        both = [torch.cat([null.expand_as(p), p]) for null, p in zip(null_prompt, prompt)]
        v_null, v_prompt = self.velocity(torch.cat([x_t, x_t]), t.repeat(2), both).chunk(2)
        v = v_null + guidance * (v_prompt - v_null)
        v = v * v_prompt.norm(dim=-1, keepdim=True) / v.norm(dim=-1, keepdim=True)
        return from_velocity(x_t, t, unpack(v, self.shape))

    def embed(self, texts):
        """-> token embeddings [B, 256, D], mask [B, 256] of integers, 1 where there is a token."""
        tokenizer, encoder = self.encoders[0]
        inputs = tokenizer(
            [TEMPLATE.format(text) for text in texts],
            max_length=DROPPED + TOKENS,
            padding=True,
            truncation=True,
            return_tensors="pt",
        ).to(self.device)
        output = encoder(inputs.input_ids, inputs.attention_mask, output_hidden_states=True)
        hidden = output.hidden_states[-1]
        tokens = hidden.new_zeros(len(texts), TOKENS, hidden.shape[2])
        mask = torch.zeros(len(texts), TOKENS, dtype=torch.long, device=self.device)
        for row, is_token in enumerate(inputs.attention_mask.bool()):
            kept = hidden[row, is_token][DROPPED:]
            tokens[row, : len(kept)] = kept
            mask[row, : len(kept)] = 1
        return tokens, mask

    def picture(self, latents):
        config = self.vae.config
        std = latents.new_tensor(config.latents_std)[:, None, None]
        mean = latents.new_tensor(config.latents_mean)[:, None, None]
        frame = (latents * std + mean)[:, :, None]  # the VAE is one of videos
        return self.vae.decode(frame, return_dict=False)[0][:, :, 0] / 2 + 0.5

    def save(self, folder, weights=None):
        self.save_pipeline(folder, "transformer", weights)

    def stock_sample(self, texts, x_T, steps):
        pipeline = self.stock_pipeline("transformer")
        side = self.shape[1] * pipeline.vae_scale_factor
        output = pipeline(
            texts,
            latents=pack(x_T),
            height=side,
            width=side,
            num_inference_steps=steps,
            true_cfg_scale=1.0,
            output_type="latent",
        )
        return unpack(output.images, self.shape)
