"""The steps of optimizers, and the scaling of gradients."""

from __future__ import annotations

import torch

from harness.emulator.operators.common import upcast
from harness.emulator.table import operator


@operator("aclnnForeachNonFiniteCheckAndUnscale", "grads!:tensors found! inverse_scale")
def check_and_unscale(grads, result, inverse_scale):
    infinite = any(not bool(torch.isfinite(grad).all()) for grad in grads)
    return [
        *((upcast(grad) * inverse_scale).to(grad.dtype) for grad in grads),
        torch.ones_like(result) if infinite else result.clone(),
    ]


@operator(
    "aclnnAmpUpdateScale", "scale tracker found growth:double backoff:double interval:int >new_scale >new_tracker"
)
def update_scale(scale, tracker, result, growth, backoff, interval):
    scale, tracker = scale.clone(), tracker.clone()
    torch._amp_update_scale_(scale, tracker, result, growth, backoff, interval)
    return scale, tracker


def _adam(parameter, first, second, most, grad, *, done1, done2, lr, beta1, beta2, decay, eps, maximize):
    """A step of AdamW in float32: parameter, both moments, and the largest second moment where it is kept. `done` are
    beta's powers.
    """
    originals = [parameter, first, second] + ([] if most is None else [most])
    parameter, first, second, most, grad = (
        None if value is None else upcast(value) for value in (parameter, first, second, most, grad)
    )
    grad = -grad if maximize else grad
    first = first * beta1 + grad * (1 - beta1)
    second = second * beta2 + grad * grad * (1 - beta2)
    most = None if most is None else torch.maximum(most, second)
    scale = ((second if most is None else most) / (1 - done2)).sqrt() + eps
    parameter = parameter * (1 - lr * decay) - lr / (1 - done1) * first / scale
    return [new.to(old.dtype) for new, old in zip((parameter, first, second, most), originals)]


@operator(
    "aclnnApplyAdamWV2",
    "parameter! first! second! most! grad done lr:float beta1:float beta2:float decay:float eps:float "
    "amsgrad:bool maximize:bool",
)
def adamw(parameter, first, second, most, grad, done, lr, beta1, beta2, decay, eps, amsgrad, maximize):
    """`done` counts the steps before this one."""
    step = float(done) + 1
    most = most if amsgrad else None
    settings = dict(lr=lr, beta1=beta1, beta2=beta2, decay=decay, eps=eps, maximize=maximize)
    stepped = _adam(parameter, first, second, most, grad, done1=beta1**step, done2=beta2**step, **settings)
    return stepped if amsgrad else [*stepped, None]


@operator(
    "aclnnApplyAdamW",
    "parameter! first! second! power1 power2 lr decay beta1 beta2 eps grad most amsgrad:bool maximize:bool",
)
def adamw_by_tensors(
    parameter, first, second, power1, power2, lr, decay, beta1, beta2, eps, grad, most, amsgrad, maximize
):
    power1, power2, lr, decay, beta1, beta2, eps = (
        float(value) for value in (power1, power2, lr, decay, beta1, beta2, eps)
    )
    settings = dict(lr=lr, beta1=beta1, beta2=beta2, decay=decay, eps=eps, maximize=maximize)
    return _adam(
        parameter,
        first,
        second,
        most if amsgrad else None,
        grad,
        done1=power1 * beta1,
        done2=power2 * beta2,
        **settings,
    )[:3]


@operator(
    "aclnnApplyAdam", "parameter! first! second! power1 power2 lr beta1 beta2 eps grad locking:bool nesterov:bool"
)
def adam(parameter, first, second, power1, power2, lr, beta1, beta2, eps, grad, locking, nesterov):
    power1, power2, lr, beta1, beta2, eps = (float(value) for value in (power1, power2, lr, beta1, beta2, eps))
    rate = lr * (1 - power2) ** 0.5 / (1 - power1)
    new_first = upcast(first) * beta1 + upcast(grad) * (1 - beta1)
    new_second = upcast(second) * beta2 + upcast(grad) * upcast(grad) * (1 - beta2)
    direction = new_first * beta1 + upcast(grad) * (1 - beta1) if nesterov else new_first
    new_parameter = upcast(parameter) - rate * direction / (new_second.sqrt() + eps)
    return new_parameter.to(parameter.dtype), new_first.to(first.dtype), new_second.to(second.dtype)


@operator(
    "aclnnFusedSgd",
    "parameters!:tensors grads!:tensors momenta!:tensors scale decay:float momentum:float lr:float dampening:float "
    "nesterov:bool maximize:bool first:bool",
)
def sgd(parameters, grads, momenta, scale, decay, momentum, lr, dampening, nesterov, maximize, first):
    """Gradients are unscaled in place; momenta may be missing."""
    new_parameters, new_grads, new_momenta = [], [], []
    for position, (parameter, grad) in enumerate(zip(parameters, grads, strict=True)):
        unscaled = upcast(grad) if scale is None else upcast(grad) / scale
        new_grads.append(unscaled.to(grad.dtype))
        step = (-unscaled if maximize else unscaled) + decay * upcast(parameter)
        if momenta:
            speed = step if first else momentum * upcast(momenta[position]) + (1 - dampening) * step
            new_momenta.append(speed.to(momenta[position].dtype))
            step = step + momentum * speed if nesterov else speed
        new_parameters.append((upcast(parameter) - lr * step).to(parameter.dtype))
    return [*new_parameters, *new_grads, *new_momenta]
