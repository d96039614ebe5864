"""Shard sets to models: training, export, evaluation, completions, publishing."""

import logging

# transformers imports torchao wherever it is installed. At import torchao then says which of its own kernels could not
# be loaded (none of them is used here), and torch that torchao registers enumerations in an old way.
logging.getLogger("torchao").addFilter(lambda record: not str(record.msg).startswith("Failed to load "))
logging.getLogger("torch.utils._pytree").addFilter(
    lambda record: not any(str(getattr(value, "__module__", "")).startswith("torchao.") for value in record.args or ())
)
