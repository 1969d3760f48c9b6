"""Random bases of a few thousand weights, in the layout of the published ones.

conftest.py has the fixtures `names` {family: what --model would be} and `loaded` {family: model}.
"""

import json
from pathlib import Path

import diffusers
import torch
import transformers
from conftest import ROOT
from safetensors.torch import save_file
from transformers.convert_slow_tokenizer import bytes_to_unicode

from bases import edm2, sit
from bases.packed import pack, unpack
from sampling import sample

# sd2 predicts velocities; without a T5 zeros stand in for its tokens; tiny has no VAE.
FAMILIES = [
    "tiny",
    "sd1",
    "sd2",
    "sdxl",
    "sd3",
    "sd3-without-t5",
    "flux",
    "flux-schnell",
    "qwen-image",
    "dit",
    "sit",
    "edm2",
]

# One of each class of generator, and tiny.
KINDS = ["tiny", "sd1", "sdxl", "sd3", "flux", "qwen-image", "dit", "sit", "edm2"]

TEXTS = ["a dark coat", "photo of a bag"]
CLASSES = ["tench, Tinca tinca", "goldfish", "crane", "drake", "crane, machine"]
TOKENIZER = ROOT / "assets" / "tiny" / "tokenizer"


def shaken(module, scale=0.1):
    """Moves all weights away from zero, so that each of them matters."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return module


def build_clip(encoder_class, width=16, layers=2):
    """-> tokenizer, text encoder."""
    tokenizer = transformers.CLIPTokenizer.from_pretrained(TOKENIZER)
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=32,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=10,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer, shaken(encoder_class(config))


def build_t5(width=40):
    """-> tokenizer, text encoder."""
    letters = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    letters += [(letter, -3.0) for letter in "▁abcdefghijklmnopqrstuvwxyz"]
    tokenizer = transformers.T5TokenizerFast(vocab=letters, extra_ids=0)
    config = transformers.T5Config(
        vocab_size=len(letters), d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2
    )
    return tokenizer, shaken(transformers.T5EncoderModel(config))


def build_vae(**scaling):
    """Of pictures of 16 x 16, with latents of 4 x 8 x 8."""
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=16,
        **scaling,
    )
    return shaken(vae, 0.05)


def build_sd(folder, prediction="epsilon", scheduler_class=diffusers.DDIMScheduler):
    """Stable Diffusion 1, or 2 with prediction v_prediction."""
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    settings = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "prediction_type": prediction,
    }
    if scheduler_class is diffusers.DDIMScheduler:
        settings["clip_sample"] = False
    tokenizer, encoder = build_clip(transformers.CLIPTextModel)
    pipeline = diffusers.StableDiffusionPipeline(
        vae=build_vae(scaling_factor=0.18215),
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=shaken(unet, 0.05),
        scheduler=scheduler_class(**settings),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)


def build_sdxl(folder):
    """Stable Diffusion XL, with the stock scheduler, Euler's."""
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=24,
        attention_head_dim=(2, 4),
        norm_num_groups=4,
        use_linear_projection=True,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=8 + 6 * 4,
    )
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="leading",
        steps_offset=1,
    )
    tokenizer, encoder = build_clip(transformers.CLIPTextModel)
    tokenizer_2, encoder_2 = build_clip(transformers.CLIPTextModelWithProjection, 8, 3)
    pipeline = diffusers.StableDiffusionXLPipeline(
        vae=build_vae(scaling_factor=0.13025),
        text_encoder=encoder,
        text_encoder_2=encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=shaken(unet, 0.05),
        scheduler=scheduler,
    )
    pipeline.save_pretrained(folder)


def build_flux(folder, is_dev=True):
    """FLUX.1: dev takes guidance as an input, and its times shift with the size."""
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=40,
        pooled_projection_dim=16,
        guidance_embeds=is_dev,
        axes_dims_rope=(2, 2, 4),
    )
    tokenizer, encoder = build_clip(transformers.CLIPTextModel)
    tokenizer_2, encoder_2 = build_t5()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        shift=3.0 if is_dev else 1.0, use_dynamic_shifting=is_dev
    )
    pipeline = diffusers.FluxPipeline(
        transformer=shaken(transformer),
        scheduler=scheduler,
        vae=build_vae(scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=encoder,
        tokenizer=tokenizer,
        text_encoder_2=encoder_2,
        tokenizer_2=tokenizer_2,
    )
    pipeline.save_pretrained(folder)


def build_qwen_encoder():
    """-> tokenizer, text encoder: Qwen2.5-VL. A token is a byte."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = [*special, *bytes_to_unicode().values()]
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    tokenizer = transformers.Qwen2Tokenizer(
        vocab=vocabulary, merges=[], model_max_length=1024, extra_special_tokens=special[1:]
    )
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
            "max_position_embeddings": 1024,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_heads": 2,
            "out_hidden_size": 16,
        },
    )
    return tokenizer, shaken(transformers.Qwen2_5_VLForConditionalGeneration(config))


def build_qwen_image(folder):
    """Qwen-Image, of pictures of 16 x 16."""
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(2, 2, 4),
    )
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.7, 1.1, 0.9],
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, shift_terminal=0.02
    )
    tokenizer, encoder = build_qwen_encoder()
    pipeline = diffusers.QwenImagePipeline(
        transformer=shaken(transformer),
        scheduler=scheduler,
        vae=shaken(vae, 0.02),
        text_encoder=encoder,
        tokenizer=tokenizer,
    )
    pipeline.save_pretrained(folder)
    edit_json(folder / "vae" / "config.json", sample_size=16)


def build_dit(folder):
    """DiT. The stock pipeline takes 1,000 for the null label, so there are so many classes."""
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=1000,
    )
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.0001, beta_end=0.02, beta_schedule="linear", clip_sample=False
    )
    vae = build_vae(scaling_factor=0.18215)
    diffusers.DiTPipeline(shaken(transformer), vae, scheduler).save_pretrained(folder)
    names = {str(number): name for number, name in enumerate(CLASSES)}
    edit_json(folder / "model_index.json", id2label=names)


def build_sd3(folder, with_t5=True):
    """Stable Diffusion 3, whose scheduler has shift 3."""
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        joint_attention_dim=40,
        caption_projection_dim=16,
        pooled_projection_dim=24,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    tokenizer, encoder = build_clip(transformers.CLIPTextModelWithProjection)
    _, encoder_2 = build_clip(transformers.CLIPTextModelWithProjection, 8, 3)
    tokenizer_3, encoder_3 = build_t5() if with_t5 else (None, None)
    pipeline = diffusers.StableDiffusion3Pipeline(
        transformer=shaken(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=build_vae(scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=encoder,
        tokenizer=tokenizer,
        text_encoder_2=encoder_2,
        tokenizer_2=tokenizer,
        text_encoder_3=encoder_3,
        tokenizer_3=tokenizer_3,
    )
    pipeline.save_pretrained(folder)


def build_beside(folder):
    """What lies beside the file of a class-conditional network."""
    folder.mkdir(parents=True)
    build_vae().save_pretrained(folder / "vae")
    (folder / "classes.txt").write_text("\n".join(CLASSES))


def build_sit(folder):
    build_beside(folder)
    network = shaken(sit.SiT(8, 2, 4, 24, 2, 4, 5))
    save_file(network.state_dict(), folder / "net.safetensors", {"num_heads": "4"})
    return f"sit:{folder / 'net.safetensors'}"


def build_edm2(folder):
    build_beside(folder)
    network = shaken(edm2.EDM2(8, 4, 5, 16, [1, 2], 1, [4], 16), 0.3)
    edm2.save(network, folder / "net.safetensors")
    return f"edm2:{folder / 'net.safetensors'}"


def build_bases(folder, tiny):
    """-> {family: what --model would be}."""
    torch.manual_seed(0)
    names = {"tiny": str(tiny)}
    build_sd(folder / "sd1")
    build_sd(folder / "sd2", "v_prediction")
    build_sd3(folder / "sd3")
    build_sd3(folder / "sd3-without-t5", with_t5=False)
    names["sit"] = build_sit(folder / "sit")
    names["edm2"] = build_edm2(folder / "edm2")
    build_sdxl(folder / "sdxl")
    build_flux(folder / "flux")
    build_flux(folder / "flux-schnell", is_dev=False)
    build_qwen_image(folder / "qwen-image")
    build_dit(folder / "dit")
    for family in FAMILIES:
        if family not in names:
            names[family] = str(folder / family)
    return names


# --------------------------------------------------------------------------------------------------
# What tests do with them.


def file_of(name):
    """sit:FILE or edm2:FILE -> FILE."""
    return Path(name.partition(":")[2])


def prompts_of(family):
    """Three prompts, the last of them the empty one."""
    if family in ("sit", "dit"):
        return ["3", "goldfish", ""]
    if family == "edm2":
        return ["0", "drake", ""]
    return [*TEXTS, ""]


def noise(shape, count=3, seed=0):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def draw(model, texts, steps, guidance=1.0):
    """The deterministic sampler, from the noise that the stock pipeline would start from."""
    x_T = noise(model.shape, len(texts)) * model.initial_std
    times = model.path.times(steps)
    with torch.no_grad():
        prompt = model.encode(texts)
        return sample(model, model.path, times, prompt, x_T, guidance, model.encode([""]))


def stock_pipeline(folder):
    """diffusers' own pipeline of a folder."""
    index = json.loads((Path(folder) / "model_index.json").read_text())
    missing = {}
    for part in ("text_encoder_3", "tokenizer_3"):
        if index.get(part) == [None, None]:
            missing[part] = None
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, **missing)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def stock_draw(pipeline, model, texts, steps, guidance=1.0, kind="latent"):
    """What the stock pipeline draws from the noise of `draw`: latents, or pictures (kind pt)."""
    latents = noise(model.shape, len(texts))
    options = {"guidance_scale": guidance}
    is_packed = isinstance(pipeline, (diffusers.FluxPipeline, diffusers.QwenImagePipeline))
    if is_packed:
        latents = pack(latents)
        options |= {"height": 16, "width": 16}
    if isinstance(pipeline, diffusers.FluxPipeline):
        options["max_sequence_length"] = model.t5_tokens
    if is_packed and not model.network.config.guidance_embeds:  # guidance by the usual formula
        del options["guidance_scale"]
        options |= {"true_cfg_scale": guidance, "negative_prompt": [""] * len(texts)}
    output = pipeline(
        texts, latents=latents, num_inference_steps=steps, output_type=kind, **options
    )
    if is_packed and kind == "latent":
        return unpack(output.images, model.shape)
    return output.images


def edit_json(path, **changes):
    """Gives a JSON file other values."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
