"""A reward by a network of another kind: a vision transformer that reads the same attributes.

The model folder's recogniser/ holds a ViTForImageClassification of transformers (arXiv 2010.11929)
whose config.json has "attributes", too, as pairs [name, values], since transformers sorts the names
of an object, and with them the logits. It is trained apart from reward/ and evaluator/:
    recogniser = max(log p(all that is named | image), FLOOR)
Its features measure nothing: neither diversity nor the distance to real pictures. So a gain under
it is not owed to a reward that is the measure. Left out: training it (experiments/).
"""

from pathlib import Path

import torch
from torch import nn

from rewards.classifier import check_attributes
from support.files import check_regular, read_json
from support.guards import check_weights


def check_recogniser(folder):
    """Raises ValueError, in one line, if a folder holds no recogniser; reads no weight.

    -> {"attributes": {name: [values]}, "size": of the pictures that it sees}.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    if config.get("model_type") != "vit":
        kind = config.get("model_type")
        raise ValueError(f"{folder}: holds a {kind}, not a vit; get a whole copy of the base")
    try:
        attributes = in_order(config.get("attributes"))
        check_attributes(attributes)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    values = sum(len(values) for values in attributes.values())
    if len(config.get("id2label", {})) != values:
        raise ValueError(f"{folder}: config.json has {values} values and another number of labels")
    check_regular(folder / "model.safetensors")
    return {"attributes": attributes, "size": config.get("image_size")}


def in_order(attributes):
    """Pairs [name, values] -> {name: values}. An object of one name, or none, is left as it is.

    Raises ValueError for an object of several names: the order of its logits is not known.
    """
    if isinstance(attributes, dict) and len(attributes) > 1:
        raise ValueError("attributes: give pairs [name, values] in the order of the logits")
    try:
        return dict(attributes) if isinstance(attributes, list) else attributes
    except (TypeError, ValueError):
        raise ValueError("attributes: give pairs [name, values]") from None


class Recogniser(nn.Module):
    """A frozen recogniser: images [B, 3, H, W] in [0, 1] -> logits [B, K], as a Classifier's."""

    def __init__(self, folder, device="cpu"):
        import transformers  # which takes seconds, and few rewards need it

        super().__init__()
        arguments = check_recogniser(folder)
        self.attributes = arguments["attributes"]
        try:
            network, report = transformers.ViTForImageClassification.from_pretrained(
                folder, dtype=torch.float32, output_loading_info=True, use_safetensors=True
            )
        except Exception as error:  # transformers raises another class for each kind of damage
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise ValueError(f"{folder}: cannot be loaded ({reason}); get a whole copy") from None
        if report["missing_keys"] or report["unexpected_keys"]:
            raise ValueError(f"{folder}: config.json and model.safetensors disagree")
        self.network = network.to(device).eval().requires_grad_(False)
        check_weights(self.network, folder)

    def forward(self, images):
        return self.network(pixel_values=images * 2 - 1).logits
