"""Optimizer state, or weights too, in the host's memory: DeepSpeed's ZeRO-Offload, whose Adam is compiled here."""

import os
import shutil
import sys
from pathlib import Path
from typing import Any, Literal

from pipeline.config import OptimizerConfig

FAR_AWAY = 1 << 40
"""A step that no run comes to."""
Offload = Literal["none", "optimizer", "parameters"]


def offloaded(what: Offload) -> tuple[str, ...]:
    """The sections of DeepSpeed's `zero_optimization` that say so."""
    return {"none": (), "optimizer": ("offload_optimizer",), "parameters": ("offload_optimizer", "offload_param")}[what]


def check_compilers(what: Offload) -> None:
    """Raises ValueError if DeepSpeed's Adam for the host, which offloading needs, could not be compiled."""
    if what == "none":
        return
    _find_own_ninja()
    missing = [tool for tool in ("g++", "ninja") if shutil.which(tool) is None]
    if missing:
        raise ValueError(
            f"parallel.offload is {what}; DeepSpeed compiles the Adam it needs, and {' and '.join(missing)} is not to "
            f"be found on PATH; install it, or set parallel.offload to none."
        )


def new_cpu_adam(groups: list[dict[str, Any]], settings: OptimizerConfig, epsilon: float) -> Any:
    """DeepSpeed's vectorised Adam with decoupled weight decay; compiled at its first use, in about a minute."""
    import torch
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    class HistoryFreeAdam(DeepSpeedCPUAdam):
        """DeepSpeed's multiplies the powers of its betas up from step to step, and computes them where a step does not
        follow the last: a resumed run would round otherwise. A step far away before each makes it compute them."""

        def step(self, closure: None = None) -> None:
            nothing = [torch.zeros(1) for _ in range(4)]
            group = self.param_groups[0]
            moments = (group["lr"], *group["betas"], group["eps"], group["weight_decay"], group["bias_correction"])
            self.ds_opt_adam.adam_update(self.opt_id, FAR_AWAY, *moments, *nothing)
            super().step(closure)

    _find_own_ninja()
    return HistoryFreeAdam(groups, lr=settings.learning_rate, betas=settings.betas, eps=epsilon, adamw_mode=True)


def _find_own_ninja() -> None:
    """Puts the environment's programs on PATH, ninja among them: it need not be activated."""
    own = str(Path(sys.executable).parent)
    if own not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), own])
