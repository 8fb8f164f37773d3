"""Exact per-sample gradients by torch.func, which share no code with the hooks."""

import torch
from torch.func import functional_call, grad


def per_sample_gradients(model, loss, *batch):
    """name -> [batch, *shape]: one call of torch.func.grad per example, on a batch of one.

    A tied parameter goes by the first of its names in sorted order.
    """
    parameters = {
        name: value.detach() for name, value in model.named_parameters() if value.requires_grad
    }

    def own_loss(parameters, *example):
        return loss(lambda *args: functional_call(model, parameters, args), *example)

    found = [
        grad(own_loss)(parameters, *(each[i : i + 1] for each in batch))
        for i in range(len(batch[0]))
    ]
    first = {}
    for name, value in model.named_parameters(remove_duplicate=False):
        first[id(value)] = min(name, first.get(id(value), name))
    tied = {name: first[id(value)] for name, value in model.named_parameters()}
    return {tied[name]: torch.stack([each[name] for each in found]) for name in parameters}
