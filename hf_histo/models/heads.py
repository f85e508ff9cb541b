"""The classification head: its configuration, its place in the model, its initialization and its dropout."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from hf_histo.config import ModelOptions
from hf_histo.errors import HistoError
from hf_histo.files import STRICT


@dataclass(frozen=True)
class HeadConfig:
    """Configuration of a classification head; by default one linear layer in place of the backbone's output layer.

    Attributes:
        widths: outputs of the hidden layers, with a ReLU after each; empty for a linear classifier.
        on: "features": in place of the backbone's output layer, on its pooled features. "logits": on top of that
            layer, which is kept with its pretrained weights.
        train_output_layer: with "logits", that layer is trained, too; else it stays as it is.
        softmax: end in a softmax, so that what the loss takes for logits are probabilities. Cross entropy then takes
            the softmax of numbers between 0 and 1: of ten classes the right one gets at most e / (e + 9) = 0.23, the
            loss stays above 1.46, and the gradient vanishes where the classifier is sure, and wrong. For comparison
            with publications that did so; else leave the softmax to the loss.

    Raises `HistoError` for values that contradict each other.
    """

    __pydantic_config__ = STRICT

    widths: tuple[int, ...] = ()
    on: Literal["features", "logits"] = "features"
    train_output_layer: bool = False
    softmax: bool = False

    def __post_init__(self) -> None:
        if self.on not in ("features", "logits"):
            raise HistoError(f"--head_on is {self.on!r}, expected features or logits")
        if self.train_output_layer and self.on == "features":
            raise HistoError("--train_output_layer is True with --head_on features, which has none; expected logits")
        if len(self.widths) > 16 or not all(isinstance(width, int) and 0 < width <= 65536 for width in self.widths):
            raise HistoError(
                f"--head_widths is {self.widths}, expected at most 16 whole numbers from 1 to 65536, such as 512,256"
            )

    @classmethod
    def of(cls, options: ModelOptions) -> HeadConfig:
        """Configuration from options. Raises `HistoError` for `--head_widths` that can't be parsed."""
        widths: tuple[int, ...] = ()
        if options.head == "mlp":
            try:
                widths = tuple(int(width) for width in options.head_widths.split(","))
            except ValueError:
                raise HistoError(
                    f"--head_widths is {options.head_widths!r}, expected whole numbers with commas, such as 512,256"
                ) from None
        return cls(widths, options.head_on, options.train_output_layer, options.head_softmax)

    def __str__(self) -> str:
        layers = f"hidden layers of {', '.join(map(str, self.widths))} with ReLU" if self.widths else "one linear layer"
        place = "pooled features"
        if self.on == "logits":
            place = f"the backbone's output layer, {'trained as well' if self.train_output_layer else 'kept as it is'}"
        return f"{layers} on {place}{', ending in a softmax' if self.softmax else ''}"

    @property
    def is_plain(self) -> bool:
        """Whether transformers and peft alone can build it."""
        return self == HeadConfig()


class Head(nn.Sequential):
    """A classifier that is not plain: features (B, d) to logits (B, num_outputs).

    Its parts are `output`, the backbone's own output layer where the config keeps it, and `layers`, which are new.
    """

    def __init__(self, config: HeadConfig, replaced: nn.Linear, num_outputs: int) -> None:
        super().__init__()
        if config.on == "logits":
            self.add_module("output", replaced)
        width = replaced.out_features if config.on == "logits" else replaced.in_features
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise((width, *config.widths)):
            hidden = nn.Linear(inputs, outputs)
            nn.init.kaiming_normal_(hidden.weight, nonlinearity="relu")
            nn.init.zeros_(hidden.bias)
            layers += [hidden, nn.ReLU()]
            width = outputs
        layers.append(_initialized(nn.Linear(width, num_outputs)))
        if config.softmax:
            layers.append(nn.Softmax(dim=-1))
        self.add_module("layers", nn.Sequential(*layers))
        self.trained = ("output", "layers") if config.train_output_layer else ("layers",)


def name_of(model: PreTrainedModel) -> str:
    """Full name of the module that computes the logits, e.g. 'timm_model.fc': a linear layer or a `Head`."""
    modules: dict[str, nn.Module] = dict(model.named_modules())
    whole = [name for name, module in modules.items() if isinstance(module, Head)]
    labels = model.config.num_labels
    linear = [name for name, part in modules.items() if isinstance(part, nn.Linear) and part.out_features == labels]
    if not (whole or linear):
        raise HistoError(f"{type(model).__name__}: found no linear layer with {labels} outputs")
    return (whole or linear)[-1]


def trained(model: PreTrainedModel) -> list[str]:
    """Full names of the modules of the head that are trained whole and saved with an adapter."""
    name = name_of(model)
    head = model.get_submodule(name)
    return [f"{name}.{part}" for part in head.trained] if isinstance(head, Head) else [name]


def module_of(model: nn.Module) -> nn.Module:
    """The head as the backbone calls it: the layer, or peft's wrapper that holds the frozen and the trained copy."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(base, PreTrainedModel)
    return base.get_submodule(name_of(base).split(".modules_to_save.")[0])


def attach(model: PreTrainedModel, config: HeadConfig, num_outputs: int) -> None:
    """Give the backbone a new classifier of `num_outputs` logits in place of its output layer, or on top of it.

    The last layer starts with weights normal with deviation 0.01 and bias zero, for equal probabilities at the start;
    hidden ones as He et al. 2015, "Delving deep into rectifiers".

    Args:
        model: with an output layer of `num_outputs`, or its own one where the config stands on it.
        config: of the classifier.
        num_outputs: 1 for a binary task.

    Raises `HistoError` for a softmax over a single output, which would be 1 whatever the image.
    """
    if config.softmax and num_outputs == 1:
        raise HistoError("--head_softmax is True for one logit, expected three classes or more; leave it out")
    name = name_of(model)
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    if config.is_plain:
        _initialized(layer)
    else:
        model.set_submodule(name, Head(config, layer, num_outputs))
        model.config.num_labels = num_outputs


def start_from(model: PreTrainedModel, classes: torch.Tensor, length: float) -> None:
    """Start a linear classifier from an embedding of each class, without bias; for one logit, from their difference.

    Args:
        model: whose head takes embeddings of images as they are, while `classes` are meant for those of length 1.
        classes: (K, d), e.g. `clip.text_embeddings`.
        length: the mean one of images' embeddings, by which the weights are divided: the logits are on the scale of
            the zero-shot ones, and the predictions are the same.

    Raises `HistoError` for a classifier that is not one linear layer on features.
    """
    layer = model.get_submodule(name_of(model))
    if not isinstance(layer, nn.Linear):
        raise HistoError("--text_prompt starts a linear classifier, expected --head linear on features; leave it out")
    weight = classes[1:] - classes[:1] if layer.out_features == 1 else classes
    with torch.no_grad():
        layer.weight.copy_(weight / length)
        if layer.bias is not None:
            layer.bias.zero_()


def add_dropout(model: PreTrainedModel, probability: float) -> None:
    """Drop the input of each new linear layer of the head with `probability` while training.

    Hooks rather than layers: the parts of the head keep their names, so the saved weights load without them.
    """

    def drop(module: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return (nn.functional.dropout(inputs[0], probability, module.training),)

    head = model.get_submodule(name_of(model))
    for module in (head.get_submodule("layers") if isinstance(head, Head) else head).modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(drop)


def _initialized(layer: nn.Linear) -> nn.Linear:
    nn.init.normal_(layer.weight, std=0.01)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
