"""Between host and device without making either wait for the other."""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor there. To a GPU it goes by page-locked memory, behind what is queued already."""
    if device.type == "cuda" and not tensor.is_cuda:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class HostCopy:
    """A copy of a tensor on the host, under way since it was asked for."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor.detach().to("cpu", non_blocking=True)
        self._arrived = None
        if tensor.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(tensor.device))

    def read(self) -> Tensor:
        """The copy; waits for it, but not for what the device was told to do since."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._tensor
