"""A network whose products compute in float16: the same modules, with casts in front of them and behind.

Float16 are the weights and inputs of linear layers and the two products of attention, and so keys, values and what the ViT hands
to the decoder. All that is summed up or decided stays float32: the stream between layers, norms, attention's logits and their softmax,
all routers, and where the action expert takes and gives numbers of the flow. Products accumulate as the hardware does; what they hand
on is float16, so a network with larger numbers than 65504 in between cannot be halved, which parity finds.

Casts are explicit, so that the graphs are strongly typed as TensorRT takes them.
"""

import torch
from torch import nn

from mose_ros.modeling.driver import MoseDriver


def halve(driver: MoseDriver) -> MoseDriver:
    """Let the products of a float32 network compute in float16 from now on, and return it.

    ValueError names a weight that float16 cannot hold.
    """
    for name, module in driver.named_modules():
        if _stays(name):
            continue
        if isinstance(module, nn.Linear):
            _narrow(name, module).register_forward_pre_hook(_inputs_to_half)
        elif isinstance(module, nn.Embedding):
            _narrow(name, module).register_forward_hook(_output_to_float)
    visual = driver.vlm.model.visual
    _narrow('patch_embed', visual.patch_embed.proj)
    visual.blocks[0].register_forward_pre_hook(_inputs_to_float)
    return driver


def _stays(name: str) -> bool:
    border = name.startswith('action_expert.') and '.layers.' not in name
    return 'router' in name or border or name == 'semantic_head'


def _narrow(name: str, module: nn.Module) -> nn.Module:
    module.half()
    for weight in module.parameters():
        if not weight.isfinite().all():
            raise ValueError(
                f'{name} has weights that are too large for float16; export with fp32'
            )
    return module


def _inputs_to_half(module: nn.Module, inputs: tuple) -> tuple:
    return tuple(one.half() for one in inputs)


def _inputs_to_float(module: nn.Module, inputs: tuple) -> tuple:
    return tuple(one.float() for one in inputs)


def _output_to_float(module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
    return output.float()
