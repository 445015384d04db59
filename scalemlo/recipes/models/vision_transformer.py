"""A small vision transformer and the masked autoencoder that pretrains it.

References: Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale"
(arXiv:2010.11929); He et al. 2022, "Masked Autoencoders Are Scalable Vision Learners" (arXiv:2111.06377).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import scalemlo as mlo


class Block(nn.Module):
    """Self-attention and a perceptron, each after a layer norm and added to its input.

    Args:
        dim: Width D of a token.
        num_heads: Heads of the attention.
    """

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.project = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.perceptron = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, tokens: Tensor, is_token: Tensor | None = None) -> Tensor:
        """Tokens ``[B, T, D]`` to tokens, of which those with ``is_token [B, T]`` are seen, by default all."""
        seen = None if is_token is None else is_token[:, None, None]
        q, k, v = self.qkv(self.norm1(tokens)).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2)  # [B, T, D]
        tokens = tokens + self.project(attended)
        return tokens + self.perceptron(self.norm2(tokens))


class Encoder(nn.Module):
    """Vision transformer without a class token: its features are the mean of its tokens.

    Args:
        image_size: Height and width of the images.
        patch_size: Height and width of a patch, which divides that.
        dim: Width D of a token.
        depth: Blocks.
        num_heads: Heads of the attention.

    Raises:
        ValueError: If patches do not fill the image.
    """

    def __init__(self, image_size: int, patch_size: int, dim: int = 32, depth: int = 2, num_heads: int = 4):
        super().__init__()
        if image_size % patch_size:
            raise ValueError(
                f"patch_size={patch_size} must divide the size of the images, {image_size}; give one that does"
            )
        self.patch_size, self.num_patches = patch_size, (image_size // patch_size) ** 2
        self.embed = nn.Linear(patch_size**2, dim)
        self.positions = nn.Parameter(0.1 * torch.randn(self.num_patches, dim))
        self.blocks = nn.ModuleList(Block(dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)

    def patches(self, images: Tensor) -> Tensor:
        """Pixels ``[B, N, P * P]`` of the patches of images ``[B, 1, H, W]``."""
        size = self.patch_size
        return images.squeeze(1).unfold(1, size, size).unfold(2, size, size).flatten(3).flatten(1, 2)

    def forward(self, images: Tensor, visible: Tensor | None = None) -> Tensor:
        """Tokens ``[B, V, D]`` of the patches with numbers ``visible [B, V]``, of all without."""
        tokens = self.embed(self.patches(images)) + self.positions
        if visible is not None:
            tokens = _rows(tokens, visible)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)

    def features(self, images: Tensor) -> Tensor:
        """Mean token ``[B, D]`` of whole images."""
        return self(images).mean(1)


class MaskedAutoencoder(nn.Module):
    """An encoder of visible patches, and a decoder of one block that draws the others.

    Args:
        encoder: What is pretrained.
        num_heads: Heads of the decoder's attention.
    """

    def __init__(self, encoder: Encoder, num_heads: int = 4):
        super().__init__()
        dim = encoder.norm.normalized_shape[0]
        self.encoder, self.num_patches = encoder, encoder.num_patches
        self.hidden = nn.Parameter(0.1 * torch.randn(dim))  # stands for a masked patch
        self.positions = nn.Parameter(0.1 * torch.randn(encoder.num_patches, dim))
        self.block, self.norm = Block(dim, num_heads), nn.LayerNorm(dim)
        self.pixels = nn.Linear(dim, encoder.patch_size**2)

    def forward(self, images: Tensor, order: Tensor, num_masked: int) -> Tensor:
        """Mean squared error of every masked patch.

        Args:
            images: ``[B, 1, H, W]``.
            order: ``[B, N]``, numbers of the patches, masked ones first.
            num_masked: M.

        Returns:
            ``[B, M]``, in that order.
        """
        masked, visible = order[:, :num_masked], order[:, num_masked:]
        seen = self.encoder(images, visible) + self.positions[visible]
        drawn = self.block(torch.cat([self.hidden + self.positions[masked], seen], 1))[:, :num_masked]
        target = _rows(self.encoder.patches(images), masked)
        return (self.pixels(self.norm(drawn)) - target).square().mean(2)

    def features(self, images: Tensor) -> Tensor:
        """Mean token ``[B, D]`` of the encoder on whole images."""
        return self.encoder.features(images)

    def encoder_vector(self) -> Tensor:
        """The encoder's parameters as one vector."""
        return vector(self.encoder)


class Classifier(nn.Module):
    """An encoder and a linear layer.

    Args:
        encoder: Gives features.
        num_classes: Number of outputs.
    """

    def __init__(self, encoder: Encoder, num_classes: int = 10):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.norm.normalized_shape[0], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, num_classes]`` of images."""
        return self.head(self.encoder.features(images))

    def features(self, images: Tensor) -> Tensor:
        """Mean token ``[B, D]`` of the encoder."""
        return self.encoder.features(images)

    def classify(self, features: Tensor) -> Tensor:
        """Logits ``[B, num_classes]`` of features ``[B, D]`` of another encoder."""
        return self.head(features)

    def encoder_vector(self) -> Tensor:
        """The encoder's parameters as one vector."""
        return vector(self.encoder)


def vector(module: nn.Module) -> Tensor:
    """All parameters of a module as one vector, in their order; a ``ValueError`` where FSDP shards them."""
    if any(isinstance(p, DTensor) for p in module.parameters()):
        raise ValueError(
            "the proximal term reads all weights at once, and FSDP gathers one block at a time: use engine=ddp, or "
            "engine=single in one process."
        )
    return torch.cat([p.reshape(-1) for p in module.parameters()])


def draw_order(scores: Tensor) -> Tensor:
    """Draw an order of patches, earlier ones the more likely the higher their score: Plackett and Luce's model.

    The next one is drawn from the softmax of the scores of those that are left: the order of scores with Gumbel noise.
    Equal scores give a random permutation. The order is a constant of derivatives.

    Args:
        scores: ``[B, N]``.

    Returns:
        Numbers of patches ``[B, N]``.
    """
    zeros = torch.zeros_like(scores)
    noise = mlo.sample(torch.distributions.Gumbel(zeros, zeros + 1, validate_args=False))
    return mlo.constant(scores + noise).argsort(dim=1, descending=True)


def _rows(tokens: Tensor, index: Tensor) -> Tensor:
    """Of ``tokens [B, N, D]`` those with numbers ``index [B, V]``."""
    return tokens.gather(1, index.unsqueeze(2).expand(-1, -1, tokens.shape[2]))
