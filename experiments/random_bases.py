"""Bases of random weights, in the layout of the published ones: a few million of them, or as many as Stable Diffusion 1.5 and 3.5 medium have.

    import random_bases; random_bases.build("sd1", folder, device)       a diffusers folder that bases.load reads; sd1, sd3, sd15 or sd35

For what asks how fast and how large, never how good. The tokenizer is that of assets/tiny. Left out: the T5 of Stable Diffusion 3.5, whose tokens
are then zeros, as where a folder comes without it.
"""
from pathlib import Path

import torch

TOKENIZER = Path(__file__).resolve().parent.parent / "assets" / "tiny" / "tokenizer"
VAE = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
UNETS = {                                                                # sides of a latent, network, CLIP width, VAE
    "sd1": (12, dict(block_out_channels=(64, 128, 128), layers_per_block=1, attention_head_dim=4, norm_num_groups=16, cross_attention_dim=128,
                     down_block_types=("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",), up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 2),
            128, dict(block_out_channels=(8, 16, 16, 16), norm_num_groups=4, layers_per_block=1)),
    "sd15": (64, dict(block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8),
             768, dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2))}
TRANSFORMERS = {                                                         # the same; CLIP widths
    "sd3": (16, dict(num_layers=6, num_attention_heads=4, attention_head_dim=32, joint_attention_dim=128, caption_projection_dim=128,
                     pooled_projection_dim=128, pos_embed_max_size=8, in_channels=4, out_channels=4), (128,), UNETS["sd1"][3]),
    "sd35": (64, dict(num_layers=24, num_attention_heads=24, attention_head_dim=64, joint_attention_dim=4096, caption_projection_dim=1536,
                      pooled_projection_dim=2048, pos_embed_max_size=384, in_channels=16, out_channels=16, dual_attention_layers=tuple(range(13))),
             (768, 1280), UNETS["sd15"][3])}
NAMES = (*UNETS, *TRANSFORMERS)


def clip(cls, width, heads=2, layers=2):
    """A CLIP text model of `width`; 128 is a small one, 768 and 1280 are those of Stable Diffusion."""
    from transformers import CLIPTextConfig, CLIPTokenizer
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER, model_max_length=10 if width < 768 else 77)
    heads, layers = {768: (12, 12), 1280: (20, 32)}.get(width, (heads, layers))
    return tokenizer, cls(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width, projection_dim=width, num_hidden_layers=layers,
        num_attention_heads=heads, max_position_embeddings=tokenizer.model_max_length, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))


def build(base, folder, device):
    """Writes a base of random weights, seeded, as a diffusers folder."""
    import diffusers
    import transformers
    diffusers.utils.logging.set_verbosity_error(), transformers.utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    with torch.device(device):
        if base in UNETS:
            side, network, width, vae = UNETS[base]
            tokenizer, encoder = clip(transformers.CLIPTextModel, width)
            diffusers.StableDiffusionPipeline(
                diffusers.AutoencoderKL(**VAE, **vae, latent_channels=4, sample_size=8 * side), encoder, tokenizer,
                diffusers.UNet2DConditionModel(sample_size=side, **network),
                diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
                                        steps_offset=1), None, None, requires_safety_checker=False).save_pretrained(folder)
        else:
            side, network, widths, vae = TRANSFORMERS[base]
            encoders = [part for width in widths for part in reversed(clip(transformers.CLIPTextModelWithProjection, width))] + [None] * 4
            diffusers.StableDiffusion3Pipeline(
                diffusers.SD3Transformer2DModel(sample_size=side, patch_size=2, qk_norm="rms_norm", **network),
                diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
                diffusers.AutoencoderKL(**VAE, **vae, latent_channels=network["in_channels"], sample_size=8 * side), *encoders[:6]).save_pretrained(folder)
