"""Backbones, heads and adapters."""

from hf_histo import library_warnings

library_warnings.silence()
