"""The contrastive losses and the scores, each behind one function."""

from pipeline.kernels.clip import ClipLoss, clip_loss
from pipeline.kernels.score import Scored, cosine, score, top_k, update_history
from pipeline.kernels.siglip import SiglipLoss, siglip_loss

__all__ = ["ClipLoss", "Scored", "SiglipLoss", "clip_loss", "cosine", "score", "siglip_loss", "top_k", "update_history"]
