"""Imported once by the server that test processes are forked from: what each of them would otherwise do again.

Half of a tiny run's start is transformers compiling the rules by which it renames tensors of old checkpoints.
"""

from __future__ import annotations

import trainer_support  # noqa: F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import olatrain.compose
import olatrain.train  # noqa: F401

get_checkpoint_conversion_mapping("llava")
