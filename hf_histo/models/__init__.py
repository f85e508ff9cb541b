"""Backbones, heads and adapters."""

import warnings

# transformers calls its own deprecated property whenever a model is built or wrapped.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
