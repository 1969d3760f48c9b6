"""Bases of random weights in the layout of the published ones, to ask how fast and how large.

    import random_bases
    random_bases.build("sd1", folder, device)     # a diffusers folder that bases.load reads

sd1 and sd3 have a few million weights; sd15, sdxl and sd35 as many as Stable Diffusion 1.5, XL and
3.5 medium, at 512, 1,024 and 512 pixels. The tokenizer is that of assets/tiny. Left out: the T5 of
Stable Diffusion 3.5; its tokens are then zeros, as in a published folder without it.
"""

from pathlib import Path

import torch

TOKENIZER = Path(__file__).resolve().parent.parent / "assets" / "tiny" / "tokenizer"

# Arguments of diffusers' networks.
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
SMALL_VAE = {
    **VAE,
    "block_out_channels": (8, 16, 16, 16),
    "norm_num_groups": 4,
    "layers_per_block": 1,
}
LARGE_VAE = {**VAE, "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
UNETS = {
    "sd1": {
        "sample_size": 12,
        "block_out_channels": (64, 128, 128),
        "layers_per_block": 1,
        "attention_head_dim": 4,
        "norm_num_groups": 16,
        "cross_attention_dim": 128,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    },
    "sd15": {
        "sample_size": 64,
        "block_out_channels": (320, 640, 1280, 1280),
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    },
    "sdxl": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
TRANSFORMERS = {
    "sd3": {
        "sample_size": 16,
        "patch_size": 2,
        "qk_norm": "rms_norm",
        "num_layers": 6,
        "num_attention_heads": 4,
        "attention_head_dim": 32,
        "joint_attention_dim": 128,
        "caption_projection_dim": 128,
        "pooled_projection_dim": 128,
        "pos_embed_max_size": 8,
        "in_channels": 4,
        "out_channels": 4,
    },
    "sd35": {
        "sample_size": 64,
        "patch_size": 2,
        "qk_norm": "rms_norm",
        "num_layers": 24,
        "num_attention_heads": 24,
        "attention_head_dim": 64,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 1536,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 384,
        "in_channels": 16,
        "out_channels": 16,
        "dual_attention_layers": tuple(range(13)),
    },
}
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
CLIP_WIDTHS = {
    "sd1": (128,),
    "sd15": (768,),
    "sdxl": (768, 1280),
    "sd3": (128,),
    "sd35": (768, 1280),
}
CLIP_SHAPES = {128: (2, 2), 768: (12, 12), 1280: (20, 32)}  # width: heads, layers
NAMES = (*UNETS, *TRANSFORMERS)
REAL = ("sd15", "sdxl", "sd35")  # of published size


def build_clip(encoder_class, width):
    """A CLIP text model of `width` -> tokenizer, encoder."""
    from transformers import CLIPTextConfig, CLIPTokenizer

    longest = 10 if width == 128 else 77
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER, model_max_length=longest)
    heads, layers = CLIP_SHAPES[width]
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=longest,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer, encoder_class(config)


def build_vae(base, channels, side):
    """The VAE of a base, for latents [channels, side, side]."""
    import diffusers

    config = LARGE_VAE if base in REAL else SMALL_VAE
    return diffusers.AutoencoderKL(**config, latent_channels=channels, sample_size=8 * side)


def build_unet_pipeline(base):
    """A Stable Diffusion 1. Weights are drawn in this order: text encoder, VAE, U-Net."""
    import diffusers
    import transformers

    config = UNETS[base]
    tokenizer, encoder = build_clip(transformers.CLIPTextModel, *CLIP_WIDTHS[base])
    vae = build_vae(base, 4, config["sample_size"])
    return diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=diffusers.UNet2DConditionModel(**config),
        scheduler=diffusers.DDIMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def build_xl_pipeline():
    """A Stable Diffusion XL. Weights are drawn in this order: text encoders, VAE, U-Net."""
    import diffusers
    import transformers

    width, width_2 = CLIP_WIDTHS["sdxl"]
    tokenizer, encoder = build_clip(transformers.CLIPTextModel, width)
    tokenizer_2, encoder_2 = build_clip(transformers.CLIPTextModelWithProjection, width_2)
    config = UNETS["sdxl"]
    return diffusers.StableDiffusionXLPipeline(
        vae=build_vae("sdxl", 4, config["sample_size"]),
        text_encoder=encoder,
        text_encoder_2=encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=diffusers.UNet2DConditionModel(**config),
        scheduler=diffusers.DDIMScheduler(**SCHEDULER),
    )


def build_transformer_pipeline(base):
    """A Stable Diffusion 3 without T5; sd3 without the second CLIP, too.

    Weights are drawn in this order: text encoders, transformer, VAE.
    """
    import diffusers
    import transformers

    config = TRANSFORMERS[base]
    clips = []
    for width in CLIP_WIDTHS[base]:
        clips.append(build_clip(transformers.CLIPTextModelWithProjection, width))
    if len(clips) == 1:
        clips.append((None, None))
    (tokenizer, encoder), (tokenizer_2, encoder_2) = clips
    transformer = diffusers.SD3Transformer2DModel(**config)
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=build_vae(base, config["in_channels"], config["sample_size"]),
        text_encoder=encoder,
        tokenizer=tokenizer,
        text_encoder_2=encoder_2,
        tokenizer_2=tokenizer_2,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def build(base, folder, device):
    """Writes a base of seeded random weights as a diffusers folder; base is one of NAMES."""
    import diffusers
    import transformers

    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    with torch.device(device):
        if base == "sdxl":
            pipeline = build_xl_pipeline()
        elif base in UNETS:
            pipeline = build_unet_pipeline(base)
        else:
            pipeline = build_transformer_pipeline(base)
    if base in REAL:  # half the file; they are read as float32
        pipeline.to(torch.bfloat16)
    pipeline.save_pretrained(folder)
