"""What the tests of rewards share: random images, errors of one line, and a CLIP of random weights.

Import the fixture `published` where it is used.
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch import nn

TINY = ROOT / "assets" / "tiny"
SIZE = 32  # of the images that the CLIP sees
LOGIT_SCALE = 1.7


def rand(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


# Seven images, from dark to light, and what is asked for.
IMAGES = rand(7, 3, 28, 28) * torch.linspace(0.2, 1, 7)[:, None, None, None]
PROMPTS = [
    "a dark coat",
    "photo of a shirt",
    "a dark coat",
    "a light bag",
    "grey sandal",
    "a dress",
    "picture of trousers",
]
METADATA = [{"label": label} for label in (4, 6, 4, 8, 5, 3, 1)]


def noise(*shape, seed=0):
    """Random bytes."""
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def as_images(array):
    """uint8 [B, H, W, 3] -> float [B, 3, H, W] in [0, 1]."""
    return torch.from_numpy(array).permute(0, 3, 1, 2).float() / 255


def less_than_half_a_byte(*shape):
    """Changes of images that leave their nearest bytes as they are."""
    return (rand(*shape) - 0.5) * 0.98 / 255


def refused(call, *naming):
    """Checks that a call raises ValueError in one line that names all these -> the line."""
    with pytest.raises(ValueError) as caught:
        call()
    line = str(caught.value)
    assert len(line.splitlines()) == 1 and len(line) < 1000
    for name in naming:
        assert str(name) in line
    return line


def edit_json(path, **changes):
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps(content))


def save_clip(folder, projection=768, size=SIZE, seed=2):
    """A CLIP of random weights with the words of assets/tiny, as transformers saves one."""
    import transformers

    tokenizer = transformers.CLIPTokenizer.from_pretrained(TINY / "tokenizer")
    layers = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    text = dict(
        vocab_size=len(tokenizer),
        max_position_embeddings=8,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    vision = dict(image_size=size, patch_size=8)
    config = transformers.CLIPConfig(
        text_config=layers | text, vision_config=layers | vision, projection_dim=projection
    )
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = transformers.CLIPModel(config)
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        model.logit_scale.fill_(LOGIT_SCALE)
    model.save_pretrained(folder)
    processor = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
    transformers.CLIPProcessor(processor, tokenizer).save_pretrained(folder)
    return folder


class PublishedHead(nn.Module):
    """The module whose state_dict LAION published: dropouts between, and no activation."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(768, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    def forward(self, x):
        return self.layers(x)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A CLIP's folder, its network loaded by transformers alone, a head and its two files."""
    import transformers
    from safetensors.torch import save_file

    folder = save_clip(tmp_path_factory.mktemp("clip") / "model")
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(3)
        head = PublishedHead().eval()
        for parameter in head.parameters():
            parameter.mul_(2)  # without it the head is nearly constant
    pth = folder.parent / "head.pth"
    safetensors = folder.parent / "head.safetensors"
    torch.save(head.state_dict(), pth)
    save_file(head.state_dict(), safetensors)
    return SimpleNamespace(
        folder=folder,
        network=transformers.CLIPModel.from_pretrained(folder).eval(),
        head=head,
        pth=pth,
        safetensors=safetensors,
        clip=f"clip:{folder}",
        pickscore=f"pickscore:{folder}",
        aesthetic=f"aesthetic:{pth}@{folder}",
    )
