"""Trains Image GPT on shard sets; exports, evaluates, completes images with and publishes the models."""

import logging

# transformers imports torchao if it is installed. On import, torchao logs which of its kernels it could not load (this
# project uses none of them), and torch logs that torchao registers its enumerations in a deprecated way.
logging.getLogger("torchao").addFilter(lambda record: not str(record.msg).startswith("Failed to load "))
logging.getLogger("torchao.kernel.intmm").addFilter(lambda record: "no triton" not in str(record.msg))
logging.getLogger("torch.utils._pytree").addFilter(
    lambda record: not any(str(getattr(value, "__module__", "")).startswith("torchao.") for value in record.args or ())
)
