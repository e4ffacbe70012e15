"""What stands between the products of a frozen decoder layer, and its gradients by the inputs: norms, activations, rotary."""

from .op import activation, activation_gradient, add_norm, norm, norm_gradient, rotate_

__all__ = ["activation", "activation_gradient", "add_norm", "norm", "norm_gradient", "rotate_"]
