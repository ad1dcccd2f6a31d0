"""The open device, as the trainer sees it: what `torch.accelerator` lacks, without a vendor's name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from zili.chips.activation import Activation
from zili.chips.backend import CAPABILITIES, Backend, Capability, check_capability
from zili.chips.catalog import Chip, identify
from zili.chips.cpu import cpu_name
from zili.chips.host_memory import peak_bytes

if TYPE_CHECKING:
    import torch

_HOST = "cpu"


class Device:
    """One device of an activated backend.

    `torch.accelerator` covers streams and memory, not random state and names; those come from
    `torch.get_device_module`, whose modules all mirror one interface.
    """

    def __init__(self, activation: Activation, capabilities: Mapping[str, bool] | None = None) -> None:
        """`capabilities`: what the recipe knows better than the records (`chip.capabilities`).

        Raises:
            ChipError: no capability of that name exists.
        """
        import torch

        self.backend: Backend = activation.backend
        self.versions: Mapping[str, str] = activation.versions
        self.torch: torch.device = activation.device
        self._module: Any = torch.get_device_module(activation.device)
        self.chip: Chip | None = identify(self.name())
        self._overrides = self.chip.overrides() if self.chip else {}
        for name, value in (capabilities or {}).items():
            check_capability(name)
            self._overrides[name] = Capability(value, "as the recipe says (chip.capabilities)", "recipe")

    @property
    def type(self) -> str:
        return self.torch.type

    def name(self) -> str:
        """The model as the driver reports it."""
        if self.type == _HOST:
            return cpu_name()
        ask = getattr(self._module, "get_device_name", None)
        return str(ask(self.torch.index)) if ask else self.type

    def capability(self, name: str) -> Capability:
        """The backend's answer, or the chip model's own where the catalog states one, or the recipe's.

        Raises:
            ChipError: no capability of that name exists.
        """
        return self.backend.capability(name, self._overrides)

    def lacking(self) -> dict[str, str]:
        """Capabilities it does not have, each with the reason."""
        answers = {name: self.capability(name) for name in CAPABILITIES}
        return {name: answer.reason for name, answer in answers.items() if not answer.value}

    def synchronize(self) -> None:
        """Wait until everything launched on the device is done."""
        import torch

        if self.type != _HOST:
            torch.accelerator.synchronize(self.torch)

    def seed(self, seed: int) -> None:
        """Seed the host's and every device's default generator."""
        import torch

        torch.manual_seed(seed)

    def rng_state(self) -> dict[str, torch.Tensor]:
        """State of the default generators by device type: the host's, and the device's where it has one."""
        import torch

        state = {_HOST: torch.get_rng_state()}
        if self.type != _HOST and hasattr(self._module, "get_rng_state"):
            state[self.type] = self._module.get_rng_state(self.torch)
        return state

    def set_rng_state(self, state: Mapping[str, torch.Tensor]) -> bool:
        """Restore what `rng_state` gave.

        Returns:
            Whether that was everything. False where the state was taken on another kind of device: the host's
            generator is restored, the device's is left, and what it draws from now on will differ.
        """
        import torch

        torch.set_rng_state(state[_HOST].cpu())
        if self.type == _HOST or not hasattr(self._module, "set_rng_state"):
            return set(state) == {_HOST}
        if self.type not in state:
            return False
        self._module.set_rng_state(state[self.type].cpu(), self.torch)
        return True

    def memory(self) -> dict[str, int] | None:
        """Bytes of the device: allocated now, allocated at the peak, free, total.

        None on the host, and where the plugin does not report it.
        """
        import torch

        if self.type == _HOST:
            return None
        try:
            free, total = torch.accelerator.get_memory_info(self.torch)
            allocated = torch.accelerator.memory_allocated(self.torch)
            peak = torch.accelerator.max_memory_allocated(self.torch)
        except (RuntimeError, AttributeError):  # torch asks the plugin's allocator, which need not answer
            return None
        return {"allocated": allocated, "peak": peak, "free": free, "total": total}

    def peak_memory(self) -> int | None:
        """Most bytes that this process has had so far: allocated on the device, or resident on the host."""
        if self.type == _HOST:
            return peak_bytes()
        memory = self.memory()
        return memory["peak"] if memory else None
