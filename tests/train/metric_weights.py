"""Tiny stand-ins for the weights of learned metrics, of random values."""

import json
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil


class ColourMeans(nn.Module):
    """A detector of three features that takes clips of four frames or more."""

    def __init__(self, flat: bool) -> None:
        super().__init__()
        self.flat = flat

    def forward(self, video: Tensor, rescale: bool = True, return_features: bool = False) -> Tensor:
        if rescale or not return_features:
            raise RuntimeError("not called as a detector")
        if video.shape[2] < 4:
            raise RuntimeError("too short")
        means = video.mean(dim=(2, 3, 4))
        return means.flatten() if self.flat else means


def save_detector(path: Path, *, flat: bool = False) -> Path:
    torch.jit.script(ColourMeans(flat)).save(str(path))
    return path


class Edges(nn.Module):
    """Stands for the VGG-16 of LPIPS: differences of neighbouring pixels."""

    def forward(self, images: Tensor, resize_images: bool, return_lpips: bool) -> Tensor:
        if resize_images or not return_lpips or images.min() < 0 or images.max() <= 1:
            raise RuntimeError("not called as LPIPS")
        edges = (images[:, :, 1:] - images[:, :, :-1]) / 255
        return edges.flatten(1) / edges[0].numel() ** 0.5


def save_perceptual(path: Path) -> Path:
    torch.jit.script(Edges()).save(str(path))
    return path


def save_clip_model(folder: Path) -> Path:
    """A CLIP over the letters a to e, 16 tokens and pictures of 16×16."""
    folder.mkdir(parents=True)
    letters = [*"abcde", *(f"{letter}</w>" for letter in "abcde")]
    words = [*letters, "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 2}
    ends = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1}
    config = CLIPConfig(
        text_config={**small, "vocab_size": len(words), "max_position_embeddings": 16, **ends},
        vision_config={**small, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    size = {"shortest_edge": 16}
    pictures = CLIPImageProcessorPil(size=size, crop_size={"height": 16, "width": 16})
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    CLIPProcessor(pictures, tokenizer).save_pretrained(folder)
    return folder
