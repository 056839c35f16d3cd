"""How far gradients reach back in time: vanishing or exploding, layer by layer, as a plot."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .model import RNNLanguageModel


@dataclass(frozen=True)
class GradientFlow:
    """Norms of the gradient with respect to the hidden state of every step.

    Attributes:
        norms: float32 [layers, T]; entry (l, t) is the norm of dL/dh_t of layer l over all rows,
            through every path, where L is the loss at the last step.
    """

    norms: Tensor

    def reach(self, share: float = 0.01) -> list[int]:
        """Steps back from the last one until the norm is below ``share`` of its largest, by layer.

        T where it never is: gradients do not vanish within the window.
        """
        reached = []
        for norms in self.norms:
            small = torch.nonzero(norms.flip(0) < share * norms.max()).flatten()
            # The first steps back may be small too, before the gradient has come down the layers.
            top = int(norms.flip(0).argmax())
            later = small[small > top]
            reached.append(int(later[0]) if len(later) else norms.numel())
        return reached

    def save_plot(self, path: str | Path, title: str = "") -> None:
        """Plots the norms against the steps before the loss, on a logarithmic scale, to a PNG file.

        Raises:
            ModuleNotFoundError: matplotlib is missing.
        """
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        steps = range(self.norms.shape[1])
        for layer, norms in enumerate(self.norms):
            axes.plot(steps, norms.flip(0).tolist(), label=f"layer {layer + 1}")
        axes.set_yscale("log")
        axes.set_xlabel("steps before the loss")
        axes.set_ylabel("norm of dL/dh")
        axes.set_title(title)
        axes.grid(alpha=0.3)
        axes.legend()
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=120)
        Path(path).write_bytes(buffer.getvalue())


def gradient_flow(model: RNNLanguageModel, tokens: Tensor, targets: Tensor) -> GradientFlow:
    """Measures how much the loss at the last step depends on every earlier hidden state.

    The layers are run one step at a time, so that the gradient with respect to a state holds all
    that flows through the steps after it, and not only what leaves the layer at that step. Without
    dropout; parameters and their gradients are left as they are.

    Args:
        model: any device. Attention is left out: it is a way around the recurrent states.
        tokens: int64 [T, B].
        targets: int64 [B], the tokens after the last step.

    Returns:
        The norms for every layer and step.

    Example:
        >>> from .model import ModelConfig
        >>> model = RNNLanguageModel(ModelConfig(vocab_size=5, emb=3, hidden=4), seed=0)
        >>> flow = gradient_flow(model, torch.zeros(6, 2, dtype=torch.int64), torch.ones(2).long())
        >>> flow.norms.shape
        torch.Size([1, 6])
    """
    was_training = model.training
    model.eval()
    try:
        with torch.enable_grad():
            # An input that needs a gradient makes every state need one.
            x = model.embedding(tokens).detach().requires_grad_()
            states: list[list[Tensor]] = []
            for layer in model.layers:
                state = None
                hidden: list[Tensor] = []
                for step in x.split(1):
                    _, state = layer(step, state)
                    hidden.append(state[0] if isinstance(state, tuple) else state)  # [1, B, H]
                x = torch.cat(hidden)
                states.append(hidden)
            loss = model.head.nll(model.projection(x[-1]), targets)
            flat = [h for hidden in states for h in hidden]
            gradients = torch.autograd.grad(loss, flat, allow_unused=True)
    finally:
        model.train(was_training)
    norms = [0.0 if each is None else float(each.norm()) for each in gradients]
    return GradientFlow(torch.tensor(norms).view(len(states), -1))
