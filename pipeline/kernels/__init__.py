"""The contrastive loss and the scores, each behind one function."""

from pipeline.kernels.clip import ClipLoss, clip_loss
from pipeline.kernels.score import Scored, cosine, score, top_k, update_history

__all__ = ["ClipLoss", "Scored", "clip_loss", "cosine", "score", "top_k", "update_history"]
