"""A bounded cache of embeddings of captions."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class EmbeddingCache:
    """Embeddings of the captions used last.

    What a GPU made and the CPU keeps is in page-locked memory. It is copied there and back in the order of the GPU's
    own work, so the host waits for neither; nor does it read any.

    Args:
        size: most captions kept; 0 keeps none.
        keep_on_cpu: keep them on the CPU, whatever device made them.
    """

    def __init__(self, size: int, *, keep_on_cpu: bool) -> None:
        if size < 0:
            raise ValueError(f"encoder cache_size={size} must be 0 or more")
        self._size, self._keep_on_cpu = size, keep_on_cpu
        self._kept: OrderedDict[tuple[str, int], Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def look_up(
        self,
        texts: Sequence[str],
        length: int,
        run: Callable[[Sequence[str]], Tensor],
        *,
        chunk_size: int,
        device: torch.device,
    ) -> Tensor:
        """One embedding per text on `device`; each distinct text that is not kept is run once.

        Args:
            length: tokens; part of the key.
            run: texts -> stacked embeddings.
        """
        if isinstance(texts, str) or not texts:
            raise ValueError(f"text encoder: got {texts!r}; give a list of at least one caption")
        found = {text: self._kept[text, length] for text in texts if (text, length) in self._kept}
        missing = [text for text in dict.fromkeys(texts) if text not in found]
        for start in range(0, len(missing), chunk_size):
            chunk = missing[start : start + chunk_size]
            found |= zip(chunk, run(chunk).unbind(), strict=True)
        for text, embedding in found.items():
            self._keep((text, length), embedding)
        return torch.stack([found[text].to(device, non_blocking=True) for text in texts])

    def _keep(self, key: tuple[str, int], embedding: Tensor) -> None:
        if key not in self._kept and self._size:
            # a copy, since a view would keep the memory of its whole chunk
            home, pinned = ("cpu", embedding.is_cuda) if self._keep_on_cpu else (embedding.device, False)
            place = torch.empty(embedding.shape, dtype=embedding.dtype, device=home, pin_memory=pinned)
            self._kept[key] = place.copy_(embedding, non_blocking=True)
        if key in self._kept:
            self._kept.move_to_end(key)
        while len(self._kept) > self._size:
            self._kept.popitem(last=False)
