"""Classification heads: configuration, location in the model, aggregation of bags, initialization and dropout."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Annotated, Literal

import torch
from peft import PeftModel
from pydantic import Field
from torch import nn
from transformers import PreTrainedModel

from hf_histo.config import ModelOptions
from hf_histo.errors import HistoError
from hf_histo.files import STRICT


@dataclass(frozen=True)
class HeadConfig:
    """Configuration of a classification head; by default one linear layer in place of the backbone's output layer.

    Attributes:
        widths: widths of the hidden layers, each followed by a ReLU; empty for a linear classifier.
        on: "features": the head replaces the backbone's output layer and takes its pooled features. "logits": the head
            is on top of that layer, which keeps its pretrained weights.
        train_output_layer: with "logits", whether that layer is trained as well.
        softmax: end in a softmax, so that the loss gets probabilities in place of logits. Cross entropy then applies a
            second softmax to numbers between 0 and 1: with ten classes, the right one gets at most e / (e + 9) = 0.23,
            the loss stays above 1.46, and the gradient vanishes if the classifier is confident but wrong. Only for
            comparison with publications that did so.
        aggregation: how the images of a bag get one prediction, see `BagHead`; "none" where each image has its own.
        attention_width: units of the attention of "abmil".

    Raises `HistoError` for values that contradict each other.
    """

    __pydantic_config__ = STRICT

    widths: tuple[int, ...] = ()
    on: Literal["features", "logits"] = "features"
    train_output_layer: bool = False
    softmax: bool = False
    aggregation: Literal["none", "abmil", "mean", "max"] = "none"
    attention_width: Annotated[int, Field(gt=0, le=65536)] = 128

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
        return cls(
            widths,
            options.head_on,
            options.train_output_layer,
            options.head_softmax,
            options.aggregation,
            options.attention_width,
        )

    def __str__(self) -> str:
        layers = f"hidden layers of {', '.join(map(str, self.widths))} with ReLU" if self.widths else "one linear layer"
        place = "pooled features"
        if self.on == "logits":
            place = f"the backbone's output layer, {'trained as well' if self.train_output_layer else 'kept as it is'}"
        bags = {
            "none": "",
            "abmil": f", averaged over each bag by gated attention of {self.attention_width} units",
            "mean": ", averaged over each bag",
            "max": ", and of its logits the largest of each bag",
        }
        return f"{layers} on {place}{bags[self.aggregation]}{', ending in a softmax' if self.softmax else ''}"

    @property
    def is_of_bags(self) -> bool:
        """Whether a prediction is of a bag of images, e.g. of a slide by its patches."""
        return self.aggregation != "none"

    @property
    def is_plain(self) -> bool:
        """Whether transformers and peft can build the head without this package."""
        return self == HeadConfig()


class Head(nn.Sequential):
    """A head other than one linear layer on features: maps features (B, d) to logits (B, num_outputs).

    Submodules: `output`, the backbone's own output layer if the config keeps it, and `layers`, the new layers.
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


class GatedAttention(nn.Module):
    """Scores of images by their features (n, d): (n,), whose softmax over a bag is the attention.

    Ilse et al. 2018, "Attention-based deep multiple instance learning", eq. 9: w . (tanh(V h) * sigmoid(U h)), without
    biases as there.

    Args:
        features: d.
        width: rows of V and U.
    """

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.signal = nn.Linear(features, width, bias=False)  # V
        self.gate = nn.Linear(features, width, bias=False)  # U
        self.score = nn.Linear(width, 1, bias=False)  # w

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.score(torch.tanh(self.signal(features)) * torch.sigmoid(self.gate(features)))
        return scores[:, 0]


class BagHead(Head):
    """A head for bags of images: one vector of logits for the features of all images of a bag.

    The classifier, `layers`, is the same for all aggregations; d features of n images are aggregated as

    - "abmil": classifier of the features' mean by attention (`GatedAttention`, Ilse et al. 2018, eq. 7 to 9);
    - "mean": classifier of their mean;
    - "max": the largest of the images' logits, of each class alone.

    A call takes each image as a bag alone, whose logits are those of the classifier in all three cases: features (B, d)
    to logits (B, num_outputs). So a model with this head still gives logits of single images.
    """

    def __init__(self, config: HeadConfig, replaced: nn.Linear, num_outputs: int) -> None:
        super().__init__(config, replaced, num_outputs)
        self.aggregation = config.aggregation
        if config.aggregation == "abmil":
            self.add_module("attention", GatedAttention(replaced.in_features, config.attention_width))
            self.trained = (*self.trained, "attention")

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.get_submodule("layers")(features)
        return logits

    def of_bag(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits (num_outputs,) of a bag by its features (n, d), and the attention (n,), which sums to 1, or None."""
        # Not by a call of the head itself, which activations from the cache are put into (`activation_cut`).
        if self.aggregation == "max":
            return self.forward(features).amax(0), None
        if self.aggregation == "mean":
            return self.forward(features.mean(0, keepdim=True))[0], None
        attention = self.get_submodule("attention")(features).softmax(0)
        return self.forward((attention @ features)[None])[0], attention


def bag_head(model: nn.Module) -> BagHead:
    """The head of a model for bags."""
    head = module_of(model)
    assert isinstance(head, BagHead)
    return head


class HeadInput:
    """Stores the input of a head, the features (B, d), as `last` in each forward pass, until it is removed."""

    last: torch.Tensor

    def __init__(self, head: nn.Module) -> None:
        self.remove = head.register_forward_pre_hook(self._keep).remove

    def _keep(self, head: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self.last = inputs[0]


class Features(nn.Module):
    """Wraps a model so that its `logits` are the input of its head, the features."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> SimpleNamespace:
        head_input = HeadInput(module_of(self.model))
        try:
            self.model(pixel_values=pixel_values)
        finally:
            head_input.remove()
        return SimpleNamespace(logits=head_input.last)


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
    """Full names of the head's modules that are trained (without LoRA) and saved with an adapter."""
    name = name_of(model)
    head = model.get_submodule(name)
    return [f"{name}.{part}" for part in head.trained] if isinstance(head, Head) else [name]


def module_of(model: nn.Module) -> nn.Module:
    """The module that the backbone calls as its head: the head itself, or peft's wrapper around it."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(base, PreTrainedModel)
    return base.get_submodule(name_of(base).split(".modules_to_save.")[0])


def number_of_classes(model: nn.Module) -> int:
    """Number of classes that the head tells apart: one logit is for two."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(base, PreTrainedModel)
    outputs: int = base.config.num_labels or 0
    return max(2, outputs)


def attach(model: PreTrainedModel, config: HeadConfig, num_outputs: int) -> None:
    """Give the backbone a new classifier of `num_outputs` logits in place of its output layer, or on top of it.

    The last layer is initialized with normal weights of deviation 0.01 and zero bias, for nearly equal probabilities;
    hidden layers as in He et al. 2015, "Delving deep into rectifiers".

    Args:
        model: has an output layer of `num_outputs`, or its own pretrained one if `config.on` is "logits".
        config: configuration of the classifier.
        num_outputs: number of logits; 1 for a binary task.

    Raises `HistoError` for a softmax over a single output, which would always be 1.
    """
    if config.softmax and num_outputs == 1:
        raise HistoError("--head_softmax is True for one logit, expected three classes or more; leave it out")
    name = name_of(model)
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    if config.is_plain:
        _initialized(layer)
    else:
        model.set_submodule(name, (BagHead if config.is_of_bags else Head)(config, layer, num_outputs))
        model.config.num_labels = num_outputs


def start_from(model: PreTrainedModel, classes: torch.Tensor, length: float) -> None:
    """Initialize a linear classifier with class embeddings and zero bias; one logit gets the difference of two classes.

    Args:
        model: its head takes image embeddings (B, d) that are not normalized.
        classes: (K, d) weights for embeddings of length 1, e.g. `clip.text_embeddings`.
        length: mean length of image embeddings. Weights are divided by it, so that logits are on the scale of the
            zero-shot classifier; the predicted classes are the same.

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
    """Apply dropout with `probability` to the input of each new linear layer of the head, in training mode.

    By hooks rather than layers, so that modules keep their names, and saved weights load without dropout.
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
